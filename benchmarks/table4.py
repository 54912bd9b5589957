"""Table 4 measured: both models in float and int8, two references that never look, exact and moved boxes. [P 4.1]

    python benchmarks/table4.py --cases val                     all four systems; ours from the committed checkpoint
    python benchmarks/table4.py --cases val --systems baseline baseline-int8
    python benchmarks/table4.py --smoke                         two tiny cases, our weights random, 1 min

Reads a folder of cases with masks (.npz: `imgs`, `gts`, in 3D `spacing`). Every system gets the same boxes, drawn once
from the seed, so that float and int8 differ by quantization alone. Label maps are kept in --predictions, in a folder
named after the weights. A run that was stopped goes on where it was, and other weights never reuse what is not theirs.
Other code would: after changing how boxes become masks, name another folder.
Writes cases.csv, table.md, differences.csv, differences.md and settings.json. Scores in .csv are 0..1, in .md per cent.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

import segment
from fast import engines
from files import MODALITIES, InputError, modality_of
from files.case import Case
from files.checkpoints import OUR_CHECKPOINT, save_checkpoint
from files.formats import list_cases, read_case
from files.npz import load_npz, read_npz, spacing_of, write_training_case
from files.writing import csv_text, save_json, save_npz, save_text
from grid import GRID, boxes_from_labels, promptable_labels
from metrics import PROTOCOLS
from phantoms import tiny_case
from presets import PRESETS
from tables import (
    AVERAGE,
    DRAWS,
    REFERENCES,
    difference_table,
    paired_differences,
    score_case,
    score_names,
    score_table,
    summarize,
)
from volumes import segment_case

SYSTEMS = {  # name -> model, engine; fast is compared with model.py when it loads
    "baseline": ("baseline", "fast"),
    "baseline-int8": ("baseline", "torch-int8"),
    "proposed": ("proposed", "fast"),
    "proposed-int8": ("proposed", "torch-int8"),
}
PRESET = "fixed"
INT8_PAIRS = (("baseline-int8", "baseline"), ("proposed-int8", "proposed"))
PAIRS = (("proposed", "baseline"), ("proposed", "inscribed ellipse"), *INT8_PAIRS)
BAR = {"dsc_strict": 0.2, "nsd_strict": 0.3}  # points of per cent that int8 may differ from float, on average
SHOWN = {"DSC": "dsc_strict", "NSD strict": "nsd_strict", "NSD challenge": "nsd_challenge"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--cases", type=Path, help="folder of .npz cases with imgs and gts")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="float checkpoint of the proposed model")
    p.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="models in the table")
    p.add_argument("--jitter", type=int, default=5, help="pixels of the 256 grid that a side of a moved box moves")
    p.add_argument("--seed", type=int, default=0, help="seed of the moved boxes, 0 or more")
    p.add_argument("--modalities", nargs="+", choices=MODALITIES, default=MODALITIES, help="only cases of these")
    p.add_argument("--2d-only", dest="only_2d", action="store_true", help="leave the volumes out: they take longest")
    p.add_argument("-p", "--predictions", type=Path, default=Path("out/table4"), help="folder for boxes and label maps")
    p.add_argument("-o", "--out", type=Path, default=Path("results/table4"), help="folder for the tables")
    p.add_argument("--smoke", action="store_true", help="two tiny synthetic cases, random weights; nothing is kept")
    args = p.parse_args(argv)
    if args.cases is None and not args.smoke:
        p.error("name the cases: --cases FOLDER, or --smoke")
    if args.jitter < 1 or args.seed < 0:
        p.error("--jitter must be 1 or more, --seed 0 or more")
    return args


# ---------------------------------------------------------------- the same boxes for everyone


def moved_boxes(boxes: np.ndarray, shape: tuple[int, ...], pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Move each x and y side of each box in or out by a whole number of grid pixels, at most `pixels`. [P 3.2]

    boxes: (N, 4) or (N, 6), original pixels, of an image (H, W) or volume (D, H, W): `shape`. One pixel of the 256 grid
    is max(H, W) / 256 of them. z sides stay. A box stays in the image; where it would become less than one grid pixel
    wide or high, those two sides stay where they were, as in training. -> the boxes moved, not rounded
    """
    ndim, step = len(shape), max(shape[-2:]) / GRID
    outward = rng.integers(-pixels, pixels + 1, size=(len(boxes), 2, 2)) * step  # (N, low and high, x and y)
    moved = boxes.copy()
    for axis in (0, 1):
        last = shape[-1 - axis] - 1
        low = np.clip(boxes[:, axis] - outward[:, 0, axis], 0, last)
        high = np.clip(boxes[:, ndim + axis] + outward[:, 1, axis], 0, last)
        good = high - low >= step
        moved[good, axis], moved[good, ndim + axis] = low[good], high[good]
    return moved


def prepare_case(path: Path, case: Case, kinds: tuple[str, str], args: argparse.Namespace) -> str:
    """Write one case in the challenge's format, KIND/imgs/NAME.npz and KIND/gts/NAME.npz, for exact and moved boxes.

    Returns NAME.npz. Raises InputError if the case has nothing to ask for, or no spacing.
    """
    labels, _ = promptable_labels(case.labels)
    if not labels.any():
        raise InputError(f"{path}: every object is 1 pixel wide or high, which prompts nothing; leave the file out")
    if case.is_3d and case.spacing_mm is None:
        raise InputError(f"{path}: has no key 'spacing', and a 3D NSD is in mm; save (x, y, z) in mm as 'spacing'")
    exact, name = boxes_from_labels(labels)[1], f"{case.name}.npz"
    rng = np.random.default_rng((args.seed, zlib.crc32(case.name.encode())))  # whatever other cases there are
    for kind, boxes in zip(kinds, (exact, moved_boxes(exact, labels.shape, args.jitter, rng)), strict=True):
        save_npz(args.predictions / kind / "imgs" / name, imgs=case.image, boxes=boxes, **spacing_of(case))
        save_npz(args.predictions / kind / "gts" / name, gts=labels, boxes=boxes, **spacing_of(case))
    return name


def prepare(kinds: tuple[str, str], args: argparse.Namespace) -> tuple[list[str], int]:
    """All cases asked for. A bad one is told and left out. -> (file names, number left out)"""
    names, left_out = [], 0
    for path in tqdm(list_cases(args.cases), "boxes", disable=None):
        if modality_of(path.stem) not in args.modalities:
            continue
        try:
            case = read_case(path, boxes_from_masks=True)
            if not (args.only_2d and case.is_3d):
                names.append(prepare_case(path, case, kinds, args))
        except InputError as error:
            left_out += 1
            tqdm.write(f"table4.py: left out: {error}", file=sys.stderr)
    if not names:
        raise InputError(f"{args.cases}: holds no case that can be used; name another folder, or fewer restrictions")
    return names, left_out


# ---------------------------------------------------------------- predictions, kept


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits that change with any byte."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def case_digest(case: Case) -> str:
    """What a label map depends on besides the system: image and boxes."""
    return digest(str(case.image.shape).encode(), case.image.tobytes(), case.boxes.tobytes())


def is_done(path: Path, case: Case) -> bool:
    """True if a label map was kept for just this image and these boxes."""
    try:
        return path.is_file() and str(load_npz(path).get("case")) == case_digest(case)
    except InputError:  # damaged: made again
        return False


class RememberingSegmenter(segment.Segmenter):
    """Encodes an image or slice once for all kinds of boxes: its embedding (4 MB) does not depend on them."""

    def __init__(self, other: segment.Segmenter) -> None:
        super().__init__(other.engine, other.preset, other.enhanced)
        self.kept = {}  # bytes of an image -> its embedding; emptied after each case

    def embed(self, image: np.ndarray):
        key = image.tobytes()
        if key not in self.kept:
            self.kept[key] = super().embed(image)
        return self.kept[key]


def predict(system: str, weights: Path, kinds: tuple[str, str], names: list[str], folder: Path) -> Path:
    """Label maps of all cases by one system, those that are not there yet. -> the folder that holds KIND/NAME.npz"""
    model, engine = SYSTEMS[system]
    place = folder / "segs" / f"{system}-{digest(weights.read_bytes(), repr(PRESETS[PRESET]).encode())}"
    missing = {}  # name -> kinds of boxes
    for name in names:
        cases = {kind: read_npz(folder / kind / "imgs" / name) for kind in kinds}
        if todo := [kind for kind in kinds if not is_done(place / kind / name, cases[kind])]:
            missing[name] = todo
    if missing:
        segmenter = RememberingSegmenter(engines.load(model, weights, PRESET, engine))
        for name, todo in tqdm(missing.items(), system, disable=None):
            segmenter.kept.clear()
            for kind in todo:
                case = read_npz(folder / kind / "imgs" / name)
                save_npz(place / kind / name, segs=segment_case(segmenter, case), case=np.array(case_digest(case)))
    return place


# ---------------------------------------------------------------- tables


def table_text(rows: list[dict], kinds: tuple[str, str]) -> str:
    """table.md: for each kind of boxes a table of DSC and one of NSD under each protocol."""
    lines = ["# Table 4 measured", ""]
    for kind in kinds:
        summary = summarize([row for row in rows if row["boxes"] == kind])
        for title, score in SHOWN.items():
            lines += [f"## {title}, boxes {kind}", "", score_table(summary, score), ""]
    return "\n".join(lines) + (
        "\n"
        "Boxes exact: each object's own. Boxes moved-Npx-seedS: each x and y side of them moved in or out by a whole number\n"
        "of pixels of the 256 grid, at most N, drawn from seed S; such a pixel is max(H, W) / 256 of the image's. z sides\n"
        "stay. All systems get the same boxes, so -int8 differs from its float model by quantization alone.\n"
        "Per cent. Means over a case's objects, a modality's cases, the modalities. DSC is the same under both protocols.\n"
        "Filled box and inscribed ellipse never look at the image: they are drawn from the same boxes.\n"
        "The paper's columns are its Table 4: another split, 256-pixel slices, another average: not comparable.\n"
    )


def differences_text(lines: list[dict], kinds: tuple[str, str], told: list[str]) -> str:
    """differences.md: a table for each kind of boxes and pair of systems, then the `verdicts`."""
    text = ["# Differences, case by case, with 95 % bootstrap intervals", ""]
    for kind in kinds:
        for system, minus in PAIRS:
            chosen = [line for line in lines if (line["boxes"], line["system"], line["minus"]) == (kind, system, minus)]
            if chosen:
                text += [f"## {system} - {minus}, boxes {kind}", "", difference_table(chosen, SHOWN), ""]
    return "\n".join(text) + (
        "\n"
        f"Points of per cent, mean [low, high]: {DRAWS:,} draws of the cases within each modality, seed 0. With two or\n"
        "three cases an interval is narrower than it should be; it says nothing about cases of another source.\n"
        + "".join(f"\n- {one}" for one in told)
        + "\n"
    )


def verdicts(lines: list[dict]) -> list[str]:
    """One sentence for each quantized system and kind of boxes: does int8 stay within BAR of float on average?"""
    means = {
        (line["boxes"], line["system"], line["minus"], line["score"]): 100 * line["difference"]
        for line in lines
        if line["modality"] == AVERAGE
    }
    found = []
    for kind, pair in ((kind, pair) for kind in dict.fromkeys(line["boxes"] for line in lines) for pair in INT8_PAIRS):
        if (kind, *pair, "dsc_strict") in means:
            points = {score: means[kind, *pair, score] for score in BAR}
            kept = "within" if all(abs(points[score]) < BAR[score] for score in BAR) else "NOT within"
            told = " and ".join(f"{points[score]:+.2f} {score[:3].upper()}" for score in BAR)
            found.append(f"{pair[0]} - {pair[1]}, boxes {kind}: {told}, {kept} {' and '.join(map(str, BAR.values()))}")
    return found


def write_tables(out: Path, rows: list[dict], kinds: tuple[str, str]) -> list[str]:
    """The .csv and .md files into `out`. Returns the verdicts on int8.

    rows: tables.score_case's, with the kind of boxes as "boxes".
    """
    of_kind = {kind: [row for row in rows if row["boxes"] == kind] for kind in kinds}
    lines = [{"boxes": kind} | line for kind in kinds for line in paired_differences(of_kind[kind], PAIRS)]
    told = verdicts(lines)
    save_text(out / "cases.csv", csv_text(rows, ("boxes", "system", "case", "modality", "objects", *score_names())))
    save_text(out / "table.md", table_text(rows, kinds))
    columns = ("boxes", "system", "minus", "modality", "cases", "score", "difference", "low", "high")
    save_text(out / "differences.csv", csv_text(lines, columns))
    save_text(out / "differences.md", differences_text(lines, kinds, told))
    return told


# ---------------------------------------------------------------- all of it


def run(args: argparse.Namespace) -> list[dict]:
    # 1. The same boxes for everyone
    chosen = [system for system in SYSTEMS if system in args.systems]  # in the table's order
    weights = {}
    for system in chosen:
        model = SYSTEMS[system][0]
        weights[system] = path = args.weights if model == "proposed" else segment.MODELS[model].weights()
        if not path.is_file():
            raise InputError(f"{path}: no such checkpoint; name one with --weights, or leave out proposed: --systems")
    kinds = ("exact", f"moved-{args.jitter}px-seed{args.seed}")
    names, left_out = prepare(kinds, args)

    # 2. Label maps, and their scores
    places = {system: predict(system, weights[system], kinds, names, args.predictions) for system in chosen}
    rows, problems = [], []
    for kind, name in tqdm([(kind, name) for kind in kinds for name in names], "score", disable=None):
        truth, systems = args.predictions / kind / "gts" / name, {s: place / kind for s, place in places.items()}
        found, told = score_case(truth, systems, PROTOCOLS)
        rows += [row | {"boxes": kind} for row in found]
        problems += told
    if problems:  # the inputs are ours, so this is no bad case
        raise InputError(problems[0])
    order = [*chosen, *REFERENCES]
    rows.sort(key=lambda row: (kinds.index(row["boxes"]), order.index(row["system"])))  # stable: cases stay in order

    # 3. Tables
    told = write_tables(args.out, rows, kinds)
    digests = {system: hashlib.sha256(path.read_bytes()).hexdigest() for system, path in weights.items()}
    settings = {"preset": PRESET, "jitter": args.jitter, "seed": args.seed, "torch": torch.__version__}
    save_json(args.out / "settings.json", settings | {"cases": len(names), "sha256 of weights": digests})
    print(score_table(summarize([row for row in rows if row["boxes"] == "exact"]), "dsc_strict"))
    print("\n".join(told))
    where = "removed again." if args.smoke else f"wrote {args.out}"
    print(f"table4.py: {len(names)} cases, {left_out} left out; {where}")
    if left_out:
        sys.exit(1)
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of cases.csv."""
    args = parse(argv)
    try:
        if not args.smoke:
            return run(args)
        with tempfile.TemporaryDirectory() as scratch:
            args.cases, args.predictions, args.out = (Path(scratch) / name for name in ("val", "predictions", "table4"))
            for dims in (2, 3):
                write_training_case(args.cases, tiny_case(dims=dims))
            torch.manual_seed(0)
            args.weights = Path(scratch) / "random.pt"
            save_checkpoint(args.weights, {"model": segment.build("proposed").state_dict()})
            return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"table4.py: {error}")


if __name__ == "__main__":
    main()
