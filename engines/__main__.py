"""Static int8 of a model's encoder for OpenVINO, calibrated on training images, and a report of what that bought.

    python -m engines static --model proposed --cache cache -i demo/cache/cases/imgs

Writes the folder NAME.static, which step 4 runs with --engine openvino-int8 and without PyTorch; NAME.static.md and
.json beside it as step 3 does. Needs: pip install -r requirements-fast.txt
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import segment
from engines import code_info, default_static
from engines.graphs import write_graphs
from engines.static_int8 import quantize_static, static_reach
from formats import InputError
from formats.readers import list_cases
from formats.writing import progress
from quantize import compare_speed


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m engines", description=__doc__.splitlines()[0])
    p.add_argument("command", choices=("static",), help="static: make a static int8 network")
    models = ", ".join(segment.MODELS)
    p.add_argument("--model", default="proposed", metavar="NAME|FILE", help=f"{models}, or a float checkpoint")
    p.add_argument("--cache", type=Path, required=True, help="cache of step 1, whose training images calibrate")
    p.add_argument("--calibration", type=int, default=198, help="so many images, of each modality in turn (198)")
    p.add_argument("-i", "--input", type=Path, required=True, help="folder of .npz cases to score")
    p.add_argument("-g", "--gts", type=Path, help="folder of their truth, unless the cases hold it (default: ../gts)")
    p.add_argument(
        "-o", "--out", type=Path, help="folder NAME.static (default: beside the checkpoint, or checkpoints/)"
    )
    p.add_argument("--repeats", type=int, default=9, help="timed runs of each part, of which the median counts (9)")
    args = p.parse_args(argv)
    if min(args.calibration, args.repeats) < 1:
        p.error("--calibration and --repeats must be 1 or more")
    return args


def run(args: argparse.Namespace) -> dict:
    step3 = importlib.import_module("03_quantize")  # which reads the checkpoint, scores and reports
    model, path, says = step3.float_checkpoint(args.model)
    out = args.out or (default_static(model) if args.model in segment.MODELS else path.with_suffix(".static"))
    if out.suffix != ".static":
        raise InputError(f"{out}: a static int8 network is a folder NAME.static; change --out")
    cases = list_cases(args.input)
    segmenter = segment.load(model, path)
    network, preset = segmenter.engine.network, segmenter.preset.name

    graph, images = quantize_static(segmenter, args.cache, args.calibration)
    reach, layers = static_reach(network, graph)
    float_bytes = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    reach["bytes"] = (write_graphs(out, network, says | code_info(model), "openvino-int8", graph), float_bytes)

    with tempfile.TemporaryDirectory() as scratch:  # OpenVINO in float32 too: what it buys without int8
        options = {"precision": "f32", "cache": Path(scratch)}
        in_openvino = segment.load(model, path, preset, "openvino", **options)
        int8 = segment.load(model, out, preset, "openvino-int8", **options)
        timed = {"float": segmenter.engine, "float in OpenVINO": in_openvino.engine, "int8": int8.engine}
        seconds = compare_speed(timed, args.repeats, step3.TIMED_BOXES)
        rows = []
        for case in progress(cases, "score", unit="case"):
            rows += step3.score(case, args.gts, {"float": segmenter, "int8": int8})

    title = f"{model}, static int8 of the encoder, one weight scale per channel, calibrated on {images} images"
    report = {"title": title, "reach": reach, "repeats": args.repeats, "seconds": seconds, "cases": rows}
    step3.write_int8_report(out, report | {"layers": layers, "arguments": vars(args)})
    print(f"Wrote {out}. Next: python 04_infer.py --model {out} --engine openvino-int8 -i CASES -o segs_int8")
    return report


def main(argv: list[str] | None = None) -> dict:
    """Returns the report."""
    args = parse(argv)
    try:
        return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"python -m engines: {error}")


if __name__ == "__main__":
    main()
