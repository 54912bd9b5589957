"""Table 4 measured: both models in float and int8, two references that never look, exact and moved boxes. [P 4.1]

    python benchmarks/table4.py --cases val                     everything; --systems baseline: only that

Reads .npz cases with masks: `imgs`, `gts`, in 3D `spacing`. Label maps are kept in --predictions, in a folder named after
the weights, and a run that was stopped goes on where it was. After changing how boxes become masks, name another folder.
Writes cases.csv, differences.csv (0..1), table.md, differences.md (per cent) and settings.json.
"""

import hashlib
import importlib
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

import segment
import tables
from fast import engines
from files import MODALITIES, InputError, modality_of
from files.checkpoints import OUR_CHECKPOINT
from files.formats import list_cases, read_case
from files.npz import load_npz, read_npz, spacing_of
from files.writing import csv_text, save_json, save_npz, save_text
from grid import GRID, boxes_from_labels, case_rng, loosen_boxes, promptable_labels
from metrics import PROTOCOLS
from presets import PRESETS
from volumes import segment_case

evaluate = importlib.import_module("05_evaluate")

SYSTEMS = ("baseline", "baseline-int8", "proposed", "proposed-int8")  # float is engine fast, -int8 is torch-int8
PRESET = "fixed"
PAIRS = [("proposed", "baseline"), ("proposed", "inscribed ellipse")]
PAIRS += [("baseline-int8", "baseline"), ("proposed-int8", "proposed")]
SHOWN = {"DSC": "dsc_strict", "NSD strict": "nsd_strict", "NSD challenge": "nsd_challenge"}


def parse(argv: list[str] | None) -> Namespace:
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument("--cases", type=Path, required=True, help="folder of .npz cases with imgs and gts")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="float checkpoint of the proposed model")
    p.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="models in the table")
    p.add_argument("--jitter", type=int, default=5, help="pixels of the 256 grid that a side of a moved box moves")
    p.add_argument(
        "--looseness", type=float, nargs="*", default=[], metavar="SHARE", help="also boxes this loose: 0.15 0.3"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of moved and loose boxes, 0 or more")
    p.add_argument("--modalities", nargs="+", choices=MODALITIES, default=MODALITIES, help="only cases of these")
    p.add_argument("--2d-only", dest="only_2d", action="store_true", help="leave the volumes out: they take longest")
    p.add_argument("-p", "--predictions", type=Path, default=Path("out/table4"), help="folder for boxes and label maps")
    p.add_argument("-o", "--out", type=Path, default=Path("results/table4"), help="folder for the tables")
    args = p.parse_args(argv)
    if args.jitter < 1 or args.seed < 0 or min(args.looseness, default=1) <= 0:
        p.error("--jitter must be 1 or more, --seed 0 or more, --looseness above 0")
    return args


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


def box_kinds(pixels: int, looseness: list[float], seed: int) -> dict[str, Callable]:
    """{name: (exact boxes of a case, shape, case's name) -> boxes}: exact, moved by up to `pixels`, loosened by each share."""

    def exact(boxes: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
        return boxes

    def moved(boxes: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
        return moved_boxes(boxes, shape, pixels, case_rng(name, seed))

    def loose(share: float) -> Callable:
        return lambda boxes, shape, name: loosen_boxes(boxes, share, case_rng(name, seed), *shape[-2:])

    named = {f"loose-{100 * share:g}pct-seed{seed}": loose(share) for share in looseness}
    return {"exact": exact, f"moved-{pixels}px-seed{seed}": moved, **named}


def prepare(kinds: dict[str, Callable], args: Namespace) -> tuple[list[str], int]:
    """Write KIND/imgs/NAME.npz and KIND/gts/NAME.npz of each case, for each kind of boxes.

    A case that has nothing to ask for, or no spacing, is told and left out. -> (file names, number left out)
    """
    names, left_out = [], 0
    for path in tqdm(list_cases(args.cases), "boxes", disable=None):
        if modality_of(path.stem) not in args.modalities:
            continue
        try:
            case = read_case(path, boxes_from_masks=True)
            if args.only_2d and case.is_3d:
                continue
            labels, _ = promptable_labels(case.labels)
            if not labels.any():
                raise InputError(
                    f"{path}: every object is 1 pixel wide or high, which prompts nothing; remove the file"
                )
            if case.is_3d and case.spacing_mm is None:
                raise InputError(
                    f"{path}: has no key 'spacing', but 3D NSD is in mm; save (x, y, z) in mm as 'spacing'"
                )
        except InputError as error:
            left_out += 1
            tqdm.write(f"table4.py: left out: {error}", file=sys.stderr)
            continue
        exact, name = boxes_from_labels(labels)[1], f"{case.name}.npz"
        for kind, changed in kinds.items():
            boxes = changed(exact, labels.shape, case.name)
            save_npz(args.predictions / kind / "imgs" / name, imgs=case.image, boxes=boxes, **spacing_of(case))
            save_npz(args.predictions / kind / "gts" / name, gts=labels, boxes=boxes, **spacing_of(case))
        names.append(name)
    if not names:
        raise InputError(f"{args.cases}: holds no case that can be used; name another folder, or fewer restrictions")
    return names, left_out


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


def predict(system: str, weights: Path, kinds: Iterable[str], names: list[str], folder: Path) -> Path:
    """Label maps of all cases by one system, those that are not there yet. -> the folder that holds KIND/NAME.npz"""
    model, _, int8 = system.partition("-")
    key = hashlib.sha256(weights.read_bytes() + repr(PRESETS[PRESET]).encode()).hexdigest()[:16]
    place = folder / "segs" / f"{system}-{key}"
    segmenter = None  # loaded when there is something to do
    for name in tqdm(names, system, disable=None):
        for kind in kinds:
            case = read_npz(folder / kind / "imgs" / name)
            asked = hashlib.sha256(
                repr(case.image.shape).encode() + case.image.tobytes() + case.boxes.tobytes()
            ).hexdigest()
            path = place / kind / name
            if path.is_file() and load_npz(path)["case"] == asked:  # kept for just this image and these boxes
                continue
            segmenter = segmenter or RememberingSegmenter(
                engines.load(model, weights, PRESET, "torch-int8" if int8 else "fast")
            )
            save_npz(path, segs=segment_case(segmenter, case), case=np.array(asked))
        if segmenter:
            segmenter.kept.clear()
    return place


def weights_of(systems: Iterable[str], ours: Path) -> dict[str, Path]:
    """{system: its float checkpoint}, in the table's order. InputError if one is missing."""
    found = {}
    for system in (system for system in SYSTEMS if system in systems):
        found[system] = path = ours if system.startswith("proposed") else segment.MODELS["baseline"].weights()
        if not path.is_file():
            raise InputError(f"{path}: no such checkpoint; name one with --weights, or leave proposed out of --systems")
    return found


def scored(weights: dict[str, Path], kinds: Iterable[str], names: list[str], folder: Path) -> list[dict]:
    """Predict and score all that `prepare` wrote: 05_evaluate.score_case's rows, each with its `boxes`, in the table's order."""
    places = {system: predict(system, path, kinds, names, folder) for system, path in weights.items()}
    rows = []
    for kind, name in tqdm([(kind, name) for kind in kinds for name in names], "score", disable=None):
        systems = {system: place / kind for system, place in places.items()}
        found, problems = evaluate.score_case(folder / kind / "gts" / name, systems, PROTOCOLS)
        if problems:  # the inputs are ours, so this is no bad case
            raise InputError(problems[0])
        rows += [row | {"boxes": kind} for row in found]
    order = [*kinds, *weights, *tables.REFERENCES].index
    return sorted(rows, key=lambda row: (order(row["boxes"]), order(row["system"])))  # stable: cases stay in order


def texts(rows: list[dict], lines: list[dict], kinds: Iterable[str]) -> tuple[str, str]:
    """table.md, for each kind of boxes a table a score; differences.md, for each kind a table a pair of systems."""
    table, differences = ["# Table 4 measured", ""], ["# Differences, case by case, with 95 % bootstrap intervals", ""]
    for kind in kinds:
        summary = tables.summarize([row for row in rows if row["boxes"] == kind])
        for title, score in SHOWN.items():
            table += [f"## {title}, boxes {kind}", "", tables.score_table(summary, score), ""]
        for pair in PAIRS:
            chosen = [line for line in lines if (line["boxes"], line["system"], line["minus"]) == (kind, *pair)]
            if chosen:
                differences += [f"## {' - '.join(pair)}, boxes {kind}", "", tables.difference_table(chosen, SHOWN), ""]
    table.append(
        "Boxes exact: each object's own. Boxes moved-Npx-seedS: each x and y side of them moved in or out by a whole number\n"
        "of pixels of the 256 grid, at most N, drawn from seed S; such a pixel is max(H, W) / 256 of the image's. z sides\n"
        "stay. Boxes loose-Spct-seedN: each x and y side moved outward by 0.5 to 1.5 times S per cent of the object's width or\n"
        "height (D20). All systems get the same boxes, so -int8 differs from its float model by quantization alone.\n"
        "Per cent. Means over a case's objects, a modality's cases, the modalities. DSC is the same under both protocols.\n"
        "Filled box and inscribed ellipse never look at the image: they are drawn from the same boxes.\n"
        "The paper's columns are its Table 4: another split, 256-pixel slices, another average: not comparable.\n"
    )
    differences.append(
        f"Points of per cent, mean [low, high]: {tables.DRAWS:,} draws of the cases within each modality, seed 0. With two or\n"
        "three cases an interval is narrower than it should be; it says nothing about cases of another source.\n"
    )
    return "\n".join(table), "\n".join(differences)


def run(args: Namespace) -> list[dict]:
    # 1. The same boxes for everyone
    weights = weights_of(args.systems, args.weights)
    kinds = box_kinds(args.jitter, args.looseness, args.seed)
    names, left_out = prepare(kinds, args)

    # 2. Label maps, and their scores
    rows = scored(weights, kinds, names, args.predictions)

    # 3. Tables
    lines = []
    for kind in kinds:
        found = tables.paired_differences([row for row in rows if row["boxes"] == kind], PAIRS)
        lines += [{"boxes": kind} | line for line in found]
    scores = ("boxes", "system", "case", "modality", "objects", *tables.score_names())
    save_text(args.out / "cases.csv", csv_text(rows, scores))
    for name, text in zip(("table.md", "differences.md"), texts(rows, lines, kinds), strict=True):
        save_text(args.out / name, text)
    columns = ("boxes", "system", "minus", "modality", "cases", "score", "difference", "low", "high")
    save_text(args.out / "differences.csv", csv_text(lines, columns))
    digests = {system: hashlib.sha256(path.read_bytes()).hexdigest() for system, path in weights.items()}
    settings = {
        "preset": PRESET,
        "jitter": args.jitter,
        "looseness": args.looseness,
        "seed": args.seed,
        "torch": torch.__version__,
    }
    save_json(args.out / "settings.json", settings | {"cases": len(names), "sha256 of weights": digests})
    print(tables.score_table(tables.summarize([row for row in rows if row["boxes"] == "exact"]), "dsc_strict"))
    print(f"table4.py: {len(names)} cases, {left_out} left out; wrote {args.out}")
    if left_out:
        sys.exit(1)
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of cases.csv."""
    try:
        return run(parse(argv))
    except (InputError, OSError) as error:
        sys.exit(f"table4.py: {error}")


if __name__ == "__main__":
    main()
