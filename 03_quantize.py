"""Step 3 of 5, quantize. Reads a checkpoint, writes its int8 form and a report of what that bought. [P 2.3]

    python 03_quantize.py                                               LiteMedSAM, the baseline -> checkpoints/
    python 03_quantize.py --model proposed --weights checkpoints/best.pt -i demo/imgs      with scores on these cases
    python 03_quantize.py --model proposed --method static --cache cache     static int8, calibrated on a cache of step 1
    python 03_quantize.py --smoke                                       a tiny synthetic case, nothing is kept

Writes NAME.dynamic.pt (step 4 runs it with --engine torch-int8), or NAME.static.xml, .bin and .pt (--engine
openvino-int8; needs requirements-fast.txt), and beside it a report, .md and .json:
which layers became int8, their share of weights and of multiply-adds, file sizes, speed, DSC and NSD at the same boxes.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import static_int8
from fast_decoder import FastModel
from fused import fused
from int8_report import SYSTEMS, by_modality, markdown, mean_row
from metrics import case_scores
from model import build_model
from openvino_engine import cache_folder, converted, save_static
from phantoms import tiny_case, write_case
from presets import PRESETS
from quantize import compare_speed, int8_reach, quantize_linear_layers, save_int8
from readers import Case, InputError, boxes_from_labels, check_labels, list_cases, load_npz, read_npz
from segment import MODELS, Segmenter, load_segmenter
from weights import default_weights, read_checkpoint
from writers import save_json, save_text


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", choices=MODELS, default="baseline", help="baseline is LiteMedSAM, proposed the paper's")
    p.add_argument(
        "--weights", type=Path, help="float checkpoint (default: LiteMedSAM's, or checkpoints/grays_anatomy_sam_l0.pt)"
    )
    p.add_argument("--preset", choices=PRESETS, help="reading of the paper (default: the checkpoint's, else fixed)")
    p.add_argument(
        "--method", choices=METHODS, default="dynamic", help="dynamic: linear layers; static: the encoder, for OpenVINO"
    )
    p.add_argument("--cache", type=Path, help="for static: cache of step 1, whose training images calibrate")
    p.add_argument("--calibration", type=int, default=198, help="for static: so many images, of each modality in turn")
    p.add_argument("--engine-cache", type=Path, default=cache_folder(), metavar="DIR", help="for OpenVINO's own files")
    p.add_argument("-o", "--out", type=Path, help="int8 file (default: beside the weights, or in checkpoints/)")
    p.add_argument("-i", "--input", type=Path, help="folder of .npz cases to score (default: two tiny synthetic ones)")
    p.add_argument("-g", "--gts", type=Path, help="folder of their truth, unless the cases hold it (default: ../gts)")
    p.add_argument("--cases", type=int, help="score the first so many cases only (default: all)")
    p.add_argument("--repeats", type=int, default=9, help="timed runs of each part, of which the median counts")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the network")
    p.add_argument("--smoke", action="store_true", help="1 repeat, 1 tiny case, weights of the proposed random, 20 s")
    args = p.parse_args(argv)
    if min(args.repeats, args.threads, args.calibration, 1 if args.cases is None else args.cases) < 1:
        p.error("--repeats, --threads, --calibration and --cases must be 1 or more")
    if args.smoke:
        args.repeats = 1
    return args


def float_segmenter(args: argparse.Namespace) -> Segmenter:
    """The float model; with --smoke and no weights the proposed one is random, which is enough for sizes and speed."""
    if args.model == "proposed" and args.weights is None:
        torch.manual_seed(0)
        return Segmenter(build_model(), PRESETS[args.preset or "fixed"], enhanced=True)
    return load_segmenter(args.model, args.weights, args.preset, plain=True)


def output_path(args: argparse.Namespace) -> Path:
    """Where the int8 file goes. InputError if it would replace the float weights."""
    ending = METHODS[args.method][2]
    beside = args.weights.with_name(f"{args.weights.stem}{ending}") if args.weights else None
    out = args.out or beside or Path(f"checkpoints/lite_medsam{ending}")
    if args.out and out.suffix != Path(ending).suffix:
        raise InputError(f"{out}: a {args.method} int8 file ends in {Path(ending).suffix}; change --out")
    if args.weights and out.resolve() == args.weights.resolve():
        raise InputError(f"{out}: is the float checkpoint itself; name another file with --out")
    return out


# ---------------------------------------------------------------- measurements


def truth_of(case: Case, path: Path, gts: Path) -> np.ndarray:
    """Label map of a case, from the case itself or from gts/NAME.npz. InputError if there is none."""
    if case.labels is None:
        stored = load_npz(gts / path.name)
        if "gts" not in stored:
            raise InputError(f"{gts / path.name}: has no key 'gts'; name the folder of truth with --gts")
        labels = check_labels(stored["gts"], case.image.shape[: 3 if case.is_3d else 2], gts / path.name)
    else:
        labels = case.labels
    if not labels.any():
        raise InputError(f"{path}: its truth holds no object; leave the file out")
    if case.is_3d and case.spacing_mm is None:
        raise InputError(f"{path}: has no key 'spacing', and a 3D NSD is in mm; save (x, y, z) in mm as 'spacing'")
    return labels


def score(path: Path, gts: Path, segmenters: dict[str, Segmenter]) -> dict:
    """One case: DSC and NSD (strict) of each model at the same boxes, and the share of pixels where they differ."""
    case = read_npz(path)
    labels = truth_of(case, path, gts)
    ids, exact = boxes_from_labels(labels)
    if case.boxes is not None:  # box i asks for label i + 1
        ids = np.arange(1, len(case.boxes) + 1)
    label_of = np.append(0, ids).astype(np.uint16)
    boxed = Case(case.name, case.image, exact if case.boxes is None else case.boxes, None, None, case.is_3d)
    maps = {name: label_of[segmenter.segment(boxed)] for name, segmenter in segmenters.items()}
    row = {"case": case.name, "objects": len(ids), "differ": float((maps["float"] != maps["int8"]).mean())}
    for name, segs in maps.items():
        found = case_scores(segs, labels, case.spacing_mm if case.is_3d else None)
        row |= {f"dsc_{name}": found.mean_dsc, f"nsd_{name}": found.mean_nsd}
    return row


def score_folder(folder: Path, args: argparse.Namespace, segmenters: dict[str, Segmenter]) -> tuple[list[dict], int]:
    """Every case of a folder; a bad one is told and left out. -> (rows, number left out)"""
    rows, left_out = [], 0
    for path in tqdm(list_cases(folder)[: args.cases], "score", disable=None):
        try:
            rows.append(score(path, args.gts or folder.parent / "gts", segmenters))
        except InputError as error:
            left_out += 1
            tqdm.write(f"03_quantize.py: left out: {error}", file=sys.stderr)
    return rows, left_out


# ---------------------------------------------------------------- the two methods


def dynamic(args: argparse.Namespace, out: Path, segmenter: Segmenter) -> tuple[Segmenter, dict]:
    """Linear layers in int8, activations measured at run time. -> (the int8 file read back, its part of the report)"""
    per, quantized = segmenter.preset.weight_int8, copy.deepcopy(segmenter.model)
    names = quantize_linear_layers(quantized, per)
    written = save_int8(out, quantized, per, carried(args))
    reach = int8_reach(segmenter.model)
    reach["weights"]["int8"] = reach["weights"]["linear"]
    what = f"{len(names)} linear layers became int8; the rest stays float32."
    found = {"weight_int8": per, "layers": names, "what": what, "int8_bytes": written}
    return load_segmenter(args.model, out, segmenter.preset.name, "torch-int8"), reach | found


def static(args: argparse.Namespace, out: Path, segmenter: Segmenter) -> tuple[Segmenter, dict]:
    """Nearly all of the encoder in int8, activations measured on training images. -> (the same)"""
    if args.cache is None:
        raise InputError("--method static measures activations on training images: name a cache with --cache")
    graph, images = static_int8.quantize_static(segmenter, args.cache, args.calibration)
    reach = static_int8.static_reach(segmenter, graph)
    written = save_static(out, graph, segmenter.model, carried(args))
    what = f"{len(reach['layers'])} became int8, calibrated on {images} images; the rest and the decoder stay float32."
    found = {"weight_int8": "channel", "what": what, "int8_bytes": written}
    return load_segmenter(
        args.model, out, segmenter.preset.name, "openvino-int8", engine_cache=args.engine_cache
    ), reach | found


def carried(args: argparse.Namespace) -> dict:
    """What the int8 file says of itself: architecture, and the preset that the float model was trained with."""
    random = args.model == "proposed" and args.weights is None
    preset = None if random else read_checkpoint(args.weights or default_weights("baseline")).get("preset")
    return {"architecture": args.model} | ({"preset": preset} if preset else {})


METHODS = {"dynamic": (dynamic, "torch-int8", ".dynamic.pt"), "static": (static, "openvino-int8", ".static.xml")}


def run(args: argparse.Namespace, cases: Path) -> dict:
    # 1. The float model, and its int8 form in a file that is read back: that is what gets measured
    torch.set_num_threads(args.threads)
    if args.model == "proposed" and not args.smoke:
        args.weights = args.weights or default_weights("proposed")
    list_cases(cases)  # stops now, not after the measurements, if there are none
    out, segmenter, size = output_path(args), float_segmenter(args), io.BytesIO()
    torch.save(segmenter.model.state_dict(), size)
    quantize, engine, _ = METHODS[args.method]
    int8, reach = quantize(args, out, segmenter)
    per, count = reach["weight_int8"], len(reach["layers"])
    print(f"03_quantize.py: {args.model}, preset {segmenter.preset.name}, {count} layers int8, scales per {per}")

    # 2. Sizes, speed, scores; the file is written, so from here the float network is the one that step 4 runs
    network = segmenter.model = fused(segmenter.model)
    if args.method == "static":
        segmenter.model = FastModel(network.image_encoder, network)
    both = dict(zip(SYSTEMS, (segmenter, int8), strict=True))
    models = {name: one.model for name, one in both.items()}
    if args.method == "static" and args.weights:
        models["openvino"] = converted(network, args.weights, args.engine_cache)
    report = {"model": args.model, "method": args.method} | reach
    report["bytes"] = {"float": len(size.getvalue()), "int8": report.pop("int8_bytes")}
    report["speed"] = compare_speed(models, args.repeats, (1,) if args.smoke else (1, 4, 16))
    rows, left_out = score_folder(cases, args, both)
    if not rows:
        raise InputError(f"{cases}: no case could be scored; {left_out} left out as told above")
    report |= {"cases": rows, "mean": mean_row(by_modality(rows)), "arguments": vars(args)}

    # 3. The report, beside the file
    text = markdown(report)
    save_text(out.with_suffix(".md"), text)
    save_json(out.with_suffix(".json"), report)
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
