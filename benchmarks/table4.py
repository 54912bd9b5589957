"""Table 4 measured: both models in float and int8, two references that never look, exact and moved boxes. [P 4.1]

    python benchmarks/table4.py --cases val                     all four systems; ours from the committed checkpoint
    python benchmarks/table4.py --cases val --systems baseline baseline-int8
    python benchmarks/table4.py --smoke                         two tiny cases, our weights random, 1 min

Reads a folder of cases in training format (`imgs`, `gts`, in 3D `spacing`). Every system gets the same boxes, drawn once
from the seed, so that float and int8 differ by quantization alone. Label maps are kept in --predictions, in a folder
named after the weights: a run that was stopped goes on where it was, and other weights never reuse what is not theirs
(other code would: after changing how boxes become masks, name another folder).
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

from table4_report import PAIRS, write_tables

from intervals import paired_differences
from metrics import PROTOCOLS
from model import GRID, build_model
from phantoms import tiny_case, write_training_case
from presets import PRESETS
from readers import Case, InputError, boxes_from_labels, list_cases, load_npz, modality_of, promptable_labels, read_npz
from scoring import score_case
from segment import Segmenter, load_segmenter
from tables import MODALITIES, REFERENCES, score_table, summarize
from weights import OUR_CHECKPOINT, default_weights, save_checkpoint
from writers import save_json, save_npz

SYSTEMS = {  # name -> model, engine
    "baseline": ("baseline", "torch"),
    "baseline-int8": ("baseline", "torch-int8"),
    "proposed": ("proposed", "torch"),
    "proposed-int8": ("proposed", "torch-int8"),
}
PRESET = "fixed"


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


def prepare_case(path: Path, kinds: tuple[str, str], args: argparse.Namespace) -> None:
    """Write one case in the challenge's format, KIND/imgs/NAME.npz and KIND/gts/NAME.npz, for exact and moved boxes."""
    case = read_npz(path, boxes_from_masks=True)
    labels, _ = promptable_labels(case.labels)
    if not labels.any():
        raise InputError(f"{path}: every object is 1 pixel wide or high, which prompts nothing; leave the file out")
    if case.is_3d and case.spacing_mm is None:
        raise InputError(f"{path}: has no key 'spacing', and a 3D NSD is in mm; save (x, y, z) in mm as 'spacing'")
    exact = boxes_from_labels(labels)[1]
    rng = np.random.default_rng((args.seed, zlib.crc32(case.name.encode())))  # whatever other cases there are
    extra = {"spacing": np.array(case.spacing_mm[::-1])} if case.is_3d else {}
    for kind, boxes in zip(kinds, (exact, moved_boxes(exact, labels.shape, args.jitter, rng)), strict=True):
        save_npz(args.predictions / kind / "imgs" / path.name, imgs=case.image, boxes=boxes, **extra)
        save_npz(args.predictions / kind / "gts" / path.name, gts=labels, boxes=boxes, **extra)


def prepare(kinds: tuple[str, str], args: argparse.Namespace) -> tuple[list[str], int]:
    """All cases asked for. A bad one is told and left out. -> (file names, number left out)"""
    names, left_out = [], 0
    for path in tqdm(list_cases(args.cases), "boxes", disable=None):
        if modality_of(path.stem) not in args.modalities:
            continue
        try:
            if not (args.only_2d and read_npz(path).is_3d):
                prepare_case(path, kinds, args)
                names.append(path.name)
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


class RememberingSegmenter(Segmenter):
    """Encodes an image or slice once for all kinds of boxes: its embedding (4 MB) does not depend on them."""

    def __init__(self, other: Segmenter) -> None:
        super().__init__(other.model, other.preset, other.enhanced)
        self.kept: dict[bytes, torch.Tensor] = {}  # emptied after each case

    def embed(self, image: np.ndarray) -> torch.Tensor:
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
        missing[name] = [kind for kind in kinds if not is_done(place / kind / name, cases[kind])]
    missing = {name: todo for name, todo in missing.items() if todo}
    if missing:
        segmenter = RememberingSegmenter(load_segmenter(model, weights, PRESET, engine))
        for name, todo in tqdm(missing.items(), system, disable=None):
            segmenter.kept.clear()
            for kind in todo:
                case = read_npz(folder / kind / "imgs" / name)
                labels = segmenter.segment(case)
                save_npz(place / kind / name, segs=labels, case=np.array(case_digest(case)))
    return place


# ---------------------------------------------------------------- all of it


def run(args: argparse.Namespace) -> list[dict]:
    # 1. The same boxes for everyone
    chosen = [system for system in SYSTEMS if system in args.systems]  # in the table's order
    weights = {"baseline": default_weights("baseline"), "proposed": args.weights}
    weights = {system: weights[SYSTEMS[system][0]] for system in chosen}
    for path in weights.values():
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
    of_kind = {kind: [row for row in rows if row["boxes"] == kind] for kind in kinds}
    lines = [{"boxes": kind} | line for kind in kinds for line in paired_differences(of_kind[kind], PAIRS)]
    told = write_tables(args.out, rows, lines, kinds)
    digests = {system: hashlib.sha256(path.read_bytes()).hexdigest() for system, path in weights.items()}
    settings = {"preset": PRESET, "jitter": args.jitter, "seed": args.seed, "torch": torch.__version__}
    save_json(args.out / "settings.json", settings | {"cases": len(names), "sha256 of weights": digests})
    print(score_table(summarize(of_kind["exact"]), "dsc_strict"))
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
            save_checkpoint(args.weights, {"model": build_model().state_dict()})
            return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"table4.py: {error}")


if __name__ == "__main__":
    main()
