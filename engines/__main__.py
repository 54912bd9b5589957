"""Make files that other engines run: static int8 for OpenVINO, or ONNX.

    python -m engines static --model proposed --cache cache
    python -m engines onnx --model proposed -o onnx

static: the encoder in int8, calibrated on training images. Writes the folder NAME.static, which step 4 runs with
--engine openvino-int8 and without PyTorch. Needs: pip install -r requirements-fast.txt
What that costs and buys: benchmarks/accuracy.py precision, benchmarks/speed.py.
onnx: graphs.export_onnx says what is in them. Needs: pip install -r requirements-onnx.txt
"""

import argparse
from pathlib import Path

import segment
from engines import code_hash, default_static
from engines.graphs import export_onnx, write_graphs
from engines.static_int8 import quantize_static
from formats import InputError
from formats.writing import script


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m engines", description=__doc__.splitlines()[0])
    p.add_argument("command", choices=("static", "onnx"), help="static: a static int8 network; onnx: ONNX files")
    models = ", ".join(segment.MODELS)
    p.add_argument("--model", default="proposed", metavar="NAME|FILE", help=f"{models}, or a float checkpoint")
    p.add_argument("--cache", type=Path, help="static: cache of step 1, whose training images calibrate")
    p.add_argument("--calibration", type=int, default=198, help="so many images, of each modality in turn (198)")
    p.add_argument(
        "-o", "--out", type=Path, help="folder NAME.static (default: beside the checkpoint), or of ONNX files (onnx)"
    )
    args = p.parse_args(argv)
    if args.calibration < 1:
        p.error("--calibration must be 1 or more")
    if args.command == "static" and not args.cache:
        p.error("static needs --cache")
    return args


def run(args: argparse.Namespace) -> None:
    if args.command == "onnx":
        paths = export_onnx(args.model, args.out or Path("onnx"))
        print(f"Wrote {', '.join(map(str, paths))}. Next: python examples/onnx_example.py {paths[0].parent}")
        return
    model, path, stored = segment.read_model(args.model)
    out = args.out or (default_static(model) if args.model in segment.MODELS else path.with_suffix(".static"))
    if out.suffix != ".static":
        raise InputError(f"{out}: a static int8 network is a folder NAME.static; change --out")
    segmenter = segment.load(model, path)
    graph, count = quantize_static(segmenter, args.cache, args.calibration)
    info = {"architecture": model, "preset": stored.get("preset"), "code": code_hash(model)}
    write_graphs(out, segmenter.engine.network, info, graph)
    command = f"python 04_infer.py --model {out} --engine openvino-int8 -i CASES -o segs_int8"
    print(f"Wrote {out}, calibrated on {count} images. Next: {command}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with script("python -m engines"):
        run(args)


if __name__ == "__main__":
    main()
