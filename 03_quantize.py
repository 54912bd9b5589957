"""Step 3 of 5, quantize. Reads a checkpoint, writes its dynamic int8 form and a report. [P 2.3]

    python 03_quantize.py                                   LiteMedSAM, the baseline -> checkpoints/
    python 03_quantize.py --model runs/best.pt -i demo/cache/cases/imgs     with scores on cases
    python 03_quantize.py --smoke                           on a tiny case, nothing is kept

Only linear layers become int8: their weights once, their inputs at every call (quantize.py). The
image encoder of the proposed network has none, so there nothing changes. The report compares
    float           the network of model.py
    int8            the same with the layers of quantize.py. They are Python code, which calls
                    PyTorch once for each step of the equation
    PyTorch's int8  the same with PyTorch's own int8 layers, where all steps are one compiled function
The last two do the same sums: with the preset's weight_int8=tensor their masks are equal bit for
bit. In the decoder PyTorch's was 1.2 to 1.5 times as fast as float. Ours is slower than float. What
costs its time is the Python between the steps, not int8.

Writes NAME.dynamic.pt, which step 4 runs with --engine torch-int8; NAME.dynamic.md and .json beside
it: layers, bytes, seconds, DSC and NSD. Int8 for convolutions too: python -m engines static.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import segment
from demo_data import tiny_case
from formats import InputError, checkpoints
from formats.case import check_labels
from formats.npz import write_case
from formats.readers import list_cases, read_case
from formats.writing import progress, save_json, save_text
from metrics import case_scores
from model import TorchEngine
from presets import PRESETS
from quantize import compare_speed, int8_reach, quantize_linear_layers, save_int8
from segment import Segmenter
from tables import cell, modalities_of, pipe_table, read_truth, summarize
from volumes import segment_case

TIMED_BOXES = (1, 6, 16)  # so many boxes a call of the decoder are timed


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ", ".join(segment.MODELS)
    p.add_argument(
        "--model", default="baseline", metavar="NAME|FILE", help=f"{models}, or a float checkpoint (baseline)"
    )
    p.add_argument("--preset", choices=PRESETS, help="reading of the paper (default: the checkpoint's, else fixed)")
    p.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the preset")
    p.add_argument("-i", "--input", type=Path, help="folder of .npz cases to score (default: two tiny synthetic ones)")
    p.add_argument("-g", "--gts", type=Path, help="folder of their truth, unless the cases hold it (default: ../gts)")
    p.add_argument("-o", "--out", type=Path, help="the int8 file (default: beside the float one, or in checkpoints/)")
    p.add_argument("--cases", type=int, help="score the first so many cases only (default: all)")
    p.add_argument("--repeats", type=int, default=9, help="timed runs of each part, of which the median counts (9)")
    p.add_argument("--smoke", action="store_true", help="one tiny case, one repeat")
    args = p.parse_args(argv)
    if min(args.repeats, 1 if args.cases is None else args.cases) < 1:
        p.error("--repeats and --cases must be 1 or more")
    return args


def run(args: argparse.Namespace, cases: list[Path]) -> dict:
    # 1. The float network
    model, path, says = float_checkpoint(args.model)
    folder = checkpoints.OUR_CHECKPOINT.parent if args.model in segment.MODELS else path.parent
    out = args.out or folder / f"{path.stem}.dynamic.pt"
    if out.suffix != ".pt" or out.resolve() == path.resolve():
        raise InputError(f"{out}: must end in .pt, and not be the float checkpoint itself; change --out")
    segmenter = segment.load(model, path, args.preset, settings=args.set)
    network, preset = segmenter.engine.network, segmenter.preset

    # 2. [P 2.3] The weights of every linear layer become int8, W ~ s_w Q_w. All else stays float32
    quantized = copy.deepcopy(network)
    layers = quantize_linear_layers(quantized, preset.weight_int8)
    reach = int8_reach(network)
    print(f"03_quantize.py: {model}, preset {preset.name}: {len(layers)} layers became int8")

    # 3. Bytes
    float_bytes = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    reach["bytes"] = (save_int8(out, quantized, preset.weight_int8, says), float_bytes)
    int8 = segment.load(model, out, preset.name, "torch-int8", settings=args.set)  # from here on, what the file holds

    # 4. Seconds. PyTorch's own int8 layer does the same sums as ours, but in one compiled function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will move to another package
        compiled = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    timed = {"float": segmenter.engine, "int8": int8.engine, "PyTorch's int8": TorchEngine(compiled)}
    seconds = compare_speed(timed, args.repeats, TIMED_BOXES)

    # 5. DSC and NSD at the same boxes
    rows = []
    for case in progress(cases, "score", unit="case"):
        rows += score(case, args.gts, {"float": segmenter, "int8": int8})

    title = f"{model}, dynamic int8, one weight scale per {preset.weight_int8}"
    report = {"title": title, "reach": reach, "repeats": args.repeats, "seconds": seconds, "cases": rows}
    write_int8_report(out.with_suffix(""), report | {"layers": layers, "arguments": vars(args)})
    command = f"python 04_infer.py --model {out} --engine torch-int8 -i CASES -o segs_int8"
    print("Removed again. Next: 04_infer.py --smoke" if args.smoke else f"Wrote {out}. Next: {command}")
    return report


def float_checkpoint(model: str) -> tuple[str, Path, dict]:
    """A name of MODELS or a file -> the name; the file; what an int8 form of it says of itself: the name, and the
    preset that it was trained with."""
    path = Path(model) if Path(model).suffix else segment.architecture(model).weights()
    stored = checkpoints.read_checkpoint(path)
    name = model if model in segment.MODELS else segment.name_of_checkpoint(path, stored)
    return name, path, {"architecture": name} | ({"preset": stored["preset"]} if stored.get("preset") else {})


def score(path: Path, gts: Path | None, systems: dict[str, Segmenter]) -> list[dict]:
    """One case: DSC and NSD (strict) of each system at the same boxes, as tables.summarize takes them."""
    case = read_case(path)
    truth = path if case.labels is not None else (gts or path.parent.parent / "gts") / path.name
    labels, spacing_mm, ids, boxes, _ = read_truth(truth)
    check_labels(labels, case.grid_shape, truth)
    if case.boxes is not None:
        ids, boxes = np.arange(1, len(case.boxes) + 1), case.boxes
    label_of = np.append(0, ids).astype(np.uint16)  # box i, which paints i + 1, asks for label ids[i]
    rows = []
    for name, segmenter in systems.items():
        segs = label_of[segment_case(segmenter, replace(case, boxes=boxes))]
        means = case_scores(segs, labels, spacing_mm).means
        row = {"system": name, "case": case.name, "modality": case.modality, "objects": len(ids)}
        rows.append(row | {f"{metric}_strict": mean for metric, mean in means.items()})
    return rows


def write_int8_report(beside: Path, report: dict) -> None:
    """NAME.md, which is printed too, and NAME.json.   beside: their name without the ending."""
    reach = [["", "int8", "of", "share"]]
    reach += [[what, f"{n:,}", f"{total:,}", f"{n / total:.1%}"] for what, (n, total) in report["reach"].items()]
    timed = list(next(iter(report["seconds"].values())))
    seconds = [["part", *(f"{name}, ms" for name in timed), *(f"{name}: times as fast" for name in timed[1:])]]
    for part, found in report["seconds"].items():
        faster = [f"{found['float'] / found[name]:.2f}" for name in timed[1:]]
        seconds.append([part, *(f"{1e3 * found[name]:.0f}" for name in timed), *faster])
    summary, columns = summarize(report["cases"]), [(m, s) for m in ("dsc", "nsd") for s in ("float", "int8")]
    scores = [["modality", "objects", *(f"{metric.upper()} {system}" for metric, system in columns)]]
    for modality in modalities_of(summary):
        values = [cell(100 * summary[system, modality][f"{metric}_strict"]) for metric, system in columns]
        scores.append([modality, str(summary["int8", modality]["objects"]), *values])
    turns = f"Median of {report['repeats']} runs, in turns, on {torch.get_num_threads()} threads."
    text = "\n\n".join([
        "Multiply-adds are those of one image and one box.", pipe_table(reach), turns, pipe_table(seconds),
        "In per cent, protocol strict, at the same boxes.", pipe_table(scores),
    ])  # fmt: skip
    print(text)
    named = "\n".join(f"- `{name}`" for name in report["layers"])
    save_text(Path(f"{beside}.md"), f"# {report['title']}\n\n{text}\n\nLayers that became int8:\n\n{named}\n")
    save_json(Path(f"{beside}.json"), report)


def main(argv: list[str] | None = None) -> dict:
    """Returns the report."""
    args = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if args.input is None:
                for dims in (2,) if args.smoke else (2, 3):
                    write_case(Path(scratch), tiny_case(dims=dims))
            if args.smoke:
                args.out, args.repeats = Path(scratch) / "smoke.dynamic.pt", 1
            return run(args, list_cases(args.input or Path(scratch) / "imgs")[: args.cases])
    except (InputError, OSError) as error:
        sys.exit(f"03_quantize.py: {error}")


if __name__ == "__main__":
    main()
