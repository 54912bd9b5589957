"""Step 3 of 5, quantize. Reads a checkpoint, writes its int8 form and a report of what that bought. [P 2.3]

    python 03_quantize.py                                               LiteMedSAM, the baseline -> checkpoints/
    python 03_quantize.py --model proposed --weights checkpoints/best.pt -i demo/imgs      with scores on these cases
    python 03_quantize.py --model proposed --method static --cache cache     static int8, calibrated on a cache of step 1
    python 03_quantize.py --smoke                                       a tiny synthetic case, nothing is kept

Dynamic int8 (quantize.py), the paper's way, writes NAME.dynamic.pt; step 4 runs it with --engine torch-int8. The file is
smaller, but the network is no faster than before, or slower. Only linear layers become int8. They do a few per cent of the
multiply-adds: the decoder's, while the proposed encoder, which does most of the work, has none. And at every call each
of them first has to measure and round its activations, which takes time.
Static int8 (fast/static_int8.py) reaches the encoder's convolutions, which is faster, but needs training images and
OpenVINO (requirements-fast.txt). It writes the folder NAME.static; step 4: --engine openvino-int8, which needs no PyTorch.

Beside the file goes a report, .md and .json: which layers became int8, their share of weights and of multiply-adds,
file sizes, speed, DSC and NSD at the same boxes.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import segment
from fast import counts, engines, static_int8
from fast.report import SYSTEMS, by_modality, markdown, mean_row
from fast.torch_engine import fast_engine
from files import InputError
from files.case import check_labels
from files.checkpoints import read_checkpoint
from files.formats import list_cases, read_case
from files.npz import write_case
from files.writing import progress, save_json, save_text, tell
from metrics import case_scores
from model import TorchEngine
from phantoms import tiny_case
from presets import PRESETS
from quantize import quantize_linear_layers, save_int8
from segment import MODELS, Segmenter
from tables import read_truth
from volumes import segment_case

TIMED_BOXES = (1, 4, 16)  # so many boxes a call of the decoder are timed


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", choices=MODELS, default="baseline", help="baseline is LiteMedSAM, proposed the paper's")
    p.add_argument("--weights", type=Path, help="float checkpoint (default: the model's own)")
    p.add_argument("--preset", choices=PRESETS, help="reading of the paper (default: the checkpoint's, else fixed)")
    p.add_argument(
        "--method", choices=METHODS, default="dynamic", help="dynamic: linear layers; static: the encoder, for OpenVINO"
    )
    p.add_argument("--cache", type=Path, help="for static: cache of step 1, whose training images calibrate")
    p.add_argument("--calibration", type=int, default=198, help="for static: so many images, of each modality in turn")
    p.add_argument(
        "--engine-cache", type=Path, metavar="DIR", help="where OpenVINO keeps graphs (default: user's cache)"
    )
    p.add_argument(
        "-o", "--out", type=Path, help="int8 file or folder (default: beside the weights, or in checkpoints/)"
    )
    p.add_argument("-i", "--input", type=Path, help="folder of .npz cases to score (default: two tiny synthetic ones)")
    p.add_argument("-g", "--gts", type=Path, help="folder of their truth, unless the cases hold it (default: ../gts)")
    p.add_argument("--cases", type=int, help="score the first so many cases only (default: all)")
    p.add_argument("--repeats", type=int, default=9, help="timed runs of each part, of which the median counts")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the network")
    p.add_argument("--smoke", action="store_true", help="1 repeat, 1 tiny case, random weights but for the baseline")
    args = p.parse_args(argv)
    if min(args.repeats, args.threads, args.calibration, 1 if args.cases is None else args.cases) < 1:
        p.error("--repeats, --threads, --calibration and --cases must be 1 or more")
    args.repeats = 1 if args.smoke else args.repeats
    return args


def float_segmenter(args: argparse.Namespace) -> Segmenter:
    """The float model as written. With --smoke its weights are random, which is enough for sizes and speed."""
    if not is_random(args):
        return segment.load(args.model, args.weights, args.preset)
    torch.manual_seed(0)
    engine = TorchEngine(segment.build(args.model))
    return Segmenter(engine, PRESETS[args.preset or "fixed"], segment.architecture(args.model).enhanced)


def is_random(args: argparse.Namespace) -> bool:
    """Whether the float model has no checkpoint: --smoke must not need one. The baseline's is in a package."""
    return args.smoke and args.weights is None and args.model != "baseline"


def output_path(args: argparse.Namespace) -> Path:
    """Where the int8 file goes. InputError if it would replace the float weights."""
    ending = METHODS[args.method][2]
    beside = args.weights.with_name(f"{args.weights.stem}{ending}") if args.weights else None
    out = args.out or beside or Path(f"checkpoints/lite_medsam{ending}")
    suffix = Path(f"any{ending}").suffix
    if out.suffix != suffix:
        raise InputError(f"{out}: what --method {args.method} writes ends in {suffix}; change --out")
    if args.weights and out.resolve() == args.weights.resolve():
        raise InputError(f"{out}: is the float checkpoint itself; name another file with --out")
    return out


# ---------------------------------------------------------------- the two methods


def dynamic(args: argparse.Namespace, out: Path, segmenter: Segmenter) -> tuple[dict, dict]:
    """Linear layers in int8, activations measured at every call. Writes `out`.
    -> (the systems to compare: float, and int8 as the file is read back; this method's part of the report)"""
    per, network = segmenter.preset.weight_int8, segmenter.engine.network
    quantized = copy.deepcopy(network)
    names = quantize_linear_layers(quantized, per)
    written = save_int8(out, quantized, per, carried(args))
    reach = counts.int8_reach(network)
    reach["weights"]["int8"] = reach["weights"]["linear"]
    what = f"{len(names)} linear layers became int8; the rest stays float32."
    int8 = segment.load(args.model, out, segmenter.preset.name, "torch-int8")
    part = reach | {"weight_int8": per, "layers": names, "what": what, "int8_bytes": written}
    return {"float": segmenter, "int8": int8}, part


def static(args: argparse.Namespace, out: Path, segmenter: Segmenter) -> tuple[dict, dict]:
    """Nearly all of the encoder in int8, activations measured on training images. Writes `out`. -> (the same)

    Here float is --engine fast. OpenVINO's float graph is timed too; where it is not int8, OpenVINO runs in float32 both times."""
    if args.cache is None:
        raise InputError("--method static measures activations on training images: name a cache with --cache")
    part = static_int8.write_static(segmenter, out, args.cache, args.calibration, carried(args))
    preset, folder = segmenter.preset, args.engine_cache
    systems = {"float": Segmenter(fast_engine(segmenter.engine.network), preset, segmenter.enhanced)}
    exact = {"cache": folder, "precision": "f32"}
    systems["int8"] = engines.load(args.model, out, preset.name, "openvino-int8", **exact)
    if args.weights:
        systems["openvino"] = engines.load(args.model, args.weights, preset.name, "openvino", **exact)
    return systems, part


def carried(args: argparse.Namespace) -> dict:
    """What the int8 file says of itself: architecture, and the preset that the float model was trained with."""
    path = args.weights or (None if is_random(args) else segment.architecture(args.model).weights())
    preset = read_checkpoint(path).get("preset") if path else None
    return {"architecture": args.model} | ({"preset": preset} if preset else {})


METHODS = {"dynamic": (dynamic, "torch-int8", ".dynamic.pt"), "static": (static, "openvino-int8", ".static")}


# ---------------------------------------------------------------- scores


def score(path: Path, gts: Path, systems: dict[str, Segmenter]) -> dict:
    """One case: DSC and NSD (strict) of each system at the same boxes, and the share of pixels where they differ.

    The truth is in the case itself, or in a file of its name in `gts`."""
    case = read_case(path)
    truth = path if case.labels is not None else gts / path.name
    labels, spacing_mm, ids, boxes, _ = read_truth(truth)
    check_labels(labels, case.image.shape[: 3 if case.is_3d else 2], truth)
    if case.boxes is not None:  # box i asks for label i + 1
        ids, boxes = np.arange(1, len(case.boxes) + 1), case.boxes
    label_of = np.append(0, ids).astype(np.uint16)
    maps = {name: label_of[segment_case(systems[name], replace(case, boxes=boxes))] for name in SYSTEMS}
    row = {"case": case.name, "objects": len(ids), "differ": float((maps["float"] != maps["int8"]).mean())}
    for name, segs in maps.items():
        means = case_scores(segs, labels, spacing_mm).means
        row |= {f"dsc_{name}": means["dsc"], f"nsd_{name}": means["nsd"]}
    return row


def score_folder(folder: Path, args: argparse.Namespace, systems: dict[str, Segmenter]) -> tuple[list[dict], int]:
    """Every case of a folder; a bad one is told and left out. -> (rows, number left out)"""
    rows, left_out = [], 0
    for path in progress(list_cases(folder)[: args.cases], "score", unit="case"):
        try:
            rows.append(score(path, args.gts or folder.parent / "gts", systems))
        except ValueError as error:  # InputError is one
            left_out += 1
            tell(f"03_quantize.py: left out: {error}", error=True)
    return rows, left_out


def run(args: argparse.Namespace, cases: Path) -> dict:
    # 1. The float model, and its int8 form in a file that is read back: that is what gets measured
    torch.set_num_threads(args.threads)
    if args.model != "baseline" and not args.smoke:
        args.weights = args.weights or segment.architecture(args.model).weights()
    list_cases(cases)  # stops now, not after the measurements, if there are none
    out, segmenter, size = output_path(args), float_segmenter(args), io.BytesIO()
    torch.save(segmenter.engine.network.state_dict(), size)
    method, engine, _ = METHODS[args.method]
    systems, part = method(args, out, segmenter)
    per, count = part["weight_int8"], len(part["layers"])
    print(f"03_quantize.py: {args.model}, preset {segmenter.preset.name}, {count} layers int8, scales per {per}")

    # 2. Sizes, speed, scores
    report = {"model": args.model, "method": args.method} | part
    report["bytes"] = {"float": len(size.getvalue()), "int8": report.pop("int8_bytes")}
    timed = {name: one.engine for name, one in systems.items()}
    report["speed"] = counts.compare_speed(timed, args.repeats, TIMED_BOXES[: 1 if args.smoke else None])
    rows, left_out = score_folder(cases, args, systems)
    if not rows:
        raise InputError(f"{cases}: no case could be scored; {left_out} left out as told above")
    report |= {"cases": rows, "mean": mean_row(by_modality(rows)), "arguments": vars(args)}

    # 3. The report, beside the file
    text, beside = markdown(report), out.name.removesuffix(".pt")
    save_text(out.with_name(f"{beside}.md"), text)
    save_json(out.with_name(f"{beside}.json"), report)
    print("\n".join(text.split("\nLayers that")[0].splitlines()[2:]))
    if left_out:
        sys.exit(f"03_quantize.py: {len(rows)} cases scored, {left_out} left out as told above; wrote {out}")
    command = f"python 04_infer.py --model {args.model} --weights {out} --engine {engine} -i CASES -o segs_int8"
    print("03_quantize.py: removed again. Next: 04_infer.py --smoke" if args.smoke else f"Wrote {out}. Next: {command}")
    return report


def main(argv: list[str] | None = None) -> dict:
    """Returns the report."""
    args = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if args.input is None:
                for dims in (2,) if args.smoke else (2, 3):
                    write_case(Path(scratch), tiny_case(dims=dims))
            if args.smoke:
                args.out = Path(scratch) / f"smoke{METHODS[args.method][2]}"
            return run(args, args.input or Path(scratch) / "imgs")
    except (InputError, OSError) as error:
        sys.exit(f"03_quantize.py: {error}")


if __name__ == "__main__":
    main()
