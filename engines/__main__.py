"""Make files that other engines run: static int8 for OpenVINO, or ONNX.

    python -m engines static --model proposed --cache cache -i demo/cache/cases/imgs
    python -m engines onnx --model proposed -o onnx

static: the encoder in int8, calibrated on training images, and a report of what that bought. Writes the folder
NAME.static, which step 4 runs with --engine openvino-int8 and without PyTorch; NAME.static.md and .json beside it as
step 3 does. Needs: pip install -r requirements-fast.txt
onnx: graphs.export_onnx says what is in them. Needs: pip install -r requirements-onnx.txt
"""

import argparse
import importlib
from pathlib import Path

import segment
from engines import code_hash, default_static
from engines.graphs import export_onnx, write_graphs
from engines.static_int8 import int8_weights, quantize_static
from formats import InputError
from formats.readers import list_cases
from formats.writing import script
from tables import finish_int8, score_cases


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m engines", description=__doc__.splitlines()[0])
    p.add_argument("command", choices=("static", "onnx"), help="static: a static int8 network; onnx: ONNX files")
    models = ", ".join(segment.MODELS)
    p.add_argument("--model", default="proposed", metavar="NAME|FILE", help=f"{models}, or a float checkpoint")
    p.add_argument("--cache", type=Path, help="static: cache of step 1, whose training images calibrate")
    p.add_argument("--calibration", type=int, default=198, help="so many images, of each modality in turn (198)")
    p.add_argument("-i", "--input", type=Path, help="static: folder of cases to score, as step 3 takes it")
    p.add_argument(
        "-o", "--out", type=Path, help="folder NAME.static (default: beside the checkpoint), or of ONNX files (onnx)"
    )
    p.add_argument("--repeats", type=int, default=9, help="timed runs of each part, of which the median counts (9)")
    args = p.parse_args(argv)
    if min(args.calibration, args.repeats) < 1:
        p.error("--calibration and --repeats must be 1 or more")
    if args.command == "static" and not (args.cache and args.input):
        p.error("static needs --cache and --input")
    return args


def run(args: argparse.Namespace, scratch: Path) -> dict:
    if args.command == "onnx":
        paths = export_onnx(args.model, args.out or Path("onnx"))
        print(f"Wrote {', '.join(map(str, paths))}. Next: python examples/onnx_example.py {paths[0].parent}")
        return {"files": paths}
    step3 = importlib.import_module("03_quantize")  # which times and scores
    model, path, stored = segment.read_model(args.model)
    out = args.out or (default_static(model) if args.model in segment.MODELS else path.with_suffix(".static"))
    if out.suffix != ".static":
        raise InputError(f"{out}: a static int8 network is a folder NAME.static; change --out")
    cases, segmenter = list_cases(args.input), segment.load(model, path)
    network, preset = segmenter.engine.network, segmenter.preset.name

    graph, images = quantize_static(segmenter, args.cache, args.calibration)
    layers, float_bytes = int8_weights(graph), sum(v.numel() * v.element_size() for v in network.state_dict().values())
    reach = {"weights": (sum(layers.values()), sum(p.numel() for p in network.parameters()))}
    info = {"architecture": model, "preset": stored.get("preset"), "code": code_hash(model)}
    reach["bytes"] = (write_graphs(out, network, info, graph), float_bytes)

    # OpenVINO in float32 too: what it buys without int8
    options = {"precision": "f32", "cache": scratch}
    in_openvino = segment.load(model, path, preset, "openvino", **options)
    int8 = segment.load(model, out, preset, "openvino-int8", **options)
    timed = {"float": segmenter.engine, "float in OpenVINO": in_openvino.engine, "int8": int8.engine}
    seconds = step3.compare_speed(timed, args.repeats, step3.TIMED_BOXES)
    systems = {"float": segmenter, "int8": int8}
    rows, left_out = score_cases(lambda path: step3.score(path, systems), cases)
    title = f"{model}, static int8 of the encoder, one weight scale per channel, calibrated on {images} images"
    return finish_int8(out, title, list(layers), reach, seconds, rows, left_out, vars(args), "openvino-int8")


def main(argv: list[str] | None = None) -> dict:
    """Returns the report."""
    args = parse(argv)
    with script("python -m engines") as scratch:
        return run(args, scratch)


if __name__ == "__main__":
    main()
