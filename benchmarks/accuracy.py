"""What is claimed of masks, measured: steps 4 and 5 in a loop over systems and kinds of boxes. [P 4.1, Table 4]

    python benchmarks/accuracy.py table4 --cases val         a table of TABLES; writes results/table4
    python benchmarks/accuracy.py table4 --smoke             on two tiny cases; results are removed again

Reads folders of .npz cases with `imgs`, `gts`, in 3D `spacing`. All systems get the same boxes. Writes cases.csv and
differences.csv (0..1), table.md (per cent), settings.json.
Label maps stay in --work, and a run that was stopped goes on there. If weights, options, images or boxes have changed,
the system is run again. After an edit of the code, name another --work.
"""

import hashlib
import importlib
import shutil
import sys
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

import tables
import volumes
from demo_data import tiny_case
from engines import openvino_engine
from formats import InputError
from formats.case import Case
from formats.checkpoints import OUR_CHECKPOINT
from formats.npz import spacing_of, write_training_case
from formats.readers import list_cases, read_case
from formats.writing import csv_text, progress, save_figure, save_json, save_npz, save_text, tell
from grid import BOX_JITTER, GRID, boxes_from_labels, case_rng, drawn_boxes, promptable_labels
from segment import BOX_KINDS, MODELS

SHOWN = {"DSC": "dsc_strict", "NSD": "nsd_strict", "NSD challenge": "nsd_challenge"}
ELLIPSE = "inscribed ellipse"


class System(NamedTuple):
    """What step 4 is run with, and the systems that are subtracted from it."""

    name: str
    minus: tuple[str, ...] = ()
    model: str = "proposed"  # or "baseline", or "static": the folder of --static
    engine: tuple[str, ...] = ("torch",)  # and its options, KEY=VALUE
    preset: tuple[str, ...] = ("fixed",)  # and its fields, FIELD=VALUE
    only: str = ""  # "pictures" or "volumes": it is run on these alone
    note: str = ""  # number in PAPER_VS_CODE.md
    constants: tuple[tuple[str, float | str], ...] = ()  # of volumes.py, with other values
    boxes_are: str = ""  # the kind that it asks boxes as, or "other": not the kind that they are (KIND_OF)


class Table(NamedTuple):
    """Systems, boxes, and what divides the cases into parts that have a mean each: "folder", "boxes", "kind"."""

    title: str
    systems: tuple[System, ...]
    boxes: tuple[str, ...] = ("exact",)
    parts: tuple[str, ...] = ()
    only: str = ""  # "pictures" or "volumes"


MOVED, LOOSE = f"moved-{BOX_JITTER}px-seed0", ("loose-15pct-seed0", "loose-30pct-seed0")
KIND_OF = {"exact": "exact", MOVED: "exact", LOOSE[0]: "drawn", LOOSE[1]: "drawn"}  # of segment.BOX_KINDS
FLOAT = ("openvino", "precision=f32")  # the masks of engine torch but for rounding, in a third of its time
BASELINE = System("baseline", model="baseline", engine=FLOAT)
PROPOSED = System("proposed", ("baseline", ELLIPSE), engine=FLOAT)
INT8 = (
    System("baseline-int8", ("baseline",), "baseline", ("torch-int8",)),
    System("proposed-int8", ("proposed",), "proposed", ("torch-int8",)),
)


def change(name: str, note: str, *fields: str, only: str = "", engine: str = "torch") -> System:
    """Ours with some fields of its preset changed, to be compared with `fixed`."""
    return System(name, ("fixed",), engine=(engine,), preset=("fixed", *fields), only=only, note=note)


# The constants of volumes.py are chosen by these, so the cases must not be those that a score is stated for.
SWEEP = {
    "GROWTH": (0.0, 0.01, 0.06, 0.1),
    "LOGIT_LIMIT": (1.5, 6.0, 12.0),
    "PRIOR_WEIGHT": (0.0, 10.0, 40.0, 120.0, 400.0),
    "FOLLOWED": ("exact", "drawn"),
}
AS_SET = {name: getattr(volumes, name) for name in SWEEP}
SWEPT = tuple(
    System(f"{name} {value}", ("as set",), engine=FLOAT, constants=((name, value),))
    for name, values in SWEEP.items()
    for value in values
    if value != AS_SET[name]
)
RELEASED_CHANNELS = ("iterations=1", "diffusion_range=1.0", "border=wrap", "rounding=truncate", "equalize=raw")
TABLES = {
    "table4": Table("Table 4 measured", (BASELINE, INT8[0], PROPOSED, INT8[1]), parts=("boxes",)),
    "table4_unseen": Table("Table 4 measured, and with drawn boxes", (BASELINE, PROPOSED, INT8[1]),
                           ("exact", LOOSE[0]), ("boxes",)),
    "looseness": Table("Scores as boxes get looser (D20)", (
        BASELINE, PROPOSED,
        System("proposed, asked as the other kind", ("proposed",), engine=FLOAT, boxes_are="other", note="D24"),
    ), ("exact", MOVED, *LOOSE), ("folder", "boxes"), "pictures"),
    "precision": Table("What does a shorter number cost? (D17, D23)", (
        System("float32", engine=("openvino", "precision=f32")),
        System("bfloat16", ("float32",), engine=("openvino", "precision=bf16")),
        System("int8", ("float32",), "static", ("openvino-int8", "precision=f32")),
        System("int8 and bfloat16", ("float32",), "static", ("openvino-int8", "precision=bf16")),
    )),
    # A row says what one other reading costs at inference. A network that is trained under it may lose less.
    "differences": Table("What do the differences between paper and released code cost? (PAPER_VS_CODE.md)", (
        System("fixed"),
        change("diffusion is a blur", "#1", "iterations=1", "diffusion_range=1.0", only="pictures"),
        change("raw image equalized", "#2", "equalize=raw", only="pictures"),
        change("opposite borders touch", "#3", "border=wrap", only="pictures"),
        change("truncated to 8 bits", "#4", "rounding=truncate", only="pictures"),
        change("colour turns gray", "#5", "color=gray", only="pictures"),
        change("enhanced at full size", "#7", "enhance_at=original", only="pictures"),
        change("padded before resizing", "pad", "pad=before", only="pictures"),
        change("boxes cut to whole pixels", "#43", "box_rounding=int", only="pictures"),
        change("masks may lie anywhere", "D18", "reach=image", only="pictures"),
        change("last object wins", "#46", "overlap=last", only="pictures"),
        change("mended loop", "#42, #47", "propagation=mended", only="volumes"),
        change("released loop", "#40, #41", "propagation=released", only="volumes"),
        change("int8, a scale a channel", "#39", "weight_int8=channel", only="pictures", engine="torch-int8"),
        change("int8, a scale a tensor", "#39", "weight_int8=tensor", only="pictures", engine="torch-int8"),
        System("all of `released`", ("fixed",), preset=("released", "force=yes"), note="all"),
    ), parts=("kind",)),
    # The trained network gets another input than it was trained on.
    "inputs": Table("Does our network lean on the enhancement? [P 4.5]", (
        System("fixed"),
        change("gray three times", "", "iterations=0", "equalize=nothing"),
        change("released channels", "", *RELEASED_CHANNELS),
        change("gray", "#5", "color=gray"),
    ), only="pictures"),
    "propagation": Table("What each constant of the 3D propagation is worth (D6)", (
        BASELINE, System("as set", ("baseline", ELLIPSE), engine=FLOAT),
        System("middle slice asked as drawn", ("as set",), engine=FLOAT, boxes_are="drawn"), *SWEPT,
    ), only="volumes"),
}  # fmt: skip


# ---------------------------------------------------------------- boxes


def moved_boxes(boxes: np.ndarray, shape: tuple[int, ...], pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Move each x and y side of each box in or out by a whole number of grid pixels, at most `pixels`. [P 3.2]

    boxes: (N, 4) or (N, 6), original pixels, of an image (H, W) or volume (D, H, W): `shape`. One pixel of the 256 grid
    is max(H, W) / 256 of them. z sides stay. A box stays in the image. Where it would become less than one grid pixel
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


# (exact boxes of a case, its shape, its name) -> boxes
BOXES: dict[str, Callable[[np.ndarray, tuple[int, ...], str], np.ndarray]] = {
    "exact": lambda boxes, shape, name: boxes,
    MOVED: lambda boxes, shape, name: moved_boxes(boxes, shape, BOX_JITTER, case_rng(name)),
    LOOSE[0]: lambda boxes, shape, name: drawn_boxes(name, boxes, 0.15, shape),
    LOOSE[1]: lambda boxes, shape, name: drawn_boxes(name, boxes, 0.3, shape),
}


def with_objects(path: Path) -> tuple[Case, np.ndarray]:
    """A case and its labels, numbered as its boxes. InputError if nothing can be asked for, or a volume has no spacing."""
    case = read_case(path, boxes_from_masks=True)
    labels, _ = promptable_labels(case.labels)
    if not labels.any():
        raise InputError(f"{path}: every object is 1 pixel wide or high, which prompts nothing; remove the file")
    if case.is_3d and case.spacing_mm is None:
        raise InputError(f"{path}: has no key 'spacing', but 3D NSD is in mm; save (x, y, z) in mm as 'spacing'")
    return case, labels


def prepare(
    table: Table, folders: Iterable[Path], work: Path, wanted: Callable[[Case], bool] = lambda case: True
) -> tuple[list[Path], int]:
    """Write every case with every kind of boxes, as work/FOLDER/BOXES/KIND/imgs/NAME.npz and .../gts/NAME.npz.

    A bad case is told and left out. -> (the folders .../KIND, number of cases left out)
    """
    places, left_out = {}, 0
    for folder in folders:
        for old in [*work.glob(f"{folder.name}/*/*/imgs"), *work.glob(f"{folder.name}/*/*/gts")]:
            shutil.rmtree(old)
        for path in progress(list_cases(folder), f"boxes of {folder.name}"):
            try:
                case, labels = with_objects(path)
            except InputError as error:
                left_out += 1
                tell(f"accuracy.py: left out: {error}", error=True)
                continue
            kind, exact = "volumes" if case.is_3d else "pictures", boxes_from_labels(labels)[1]
            for name in table.boxes if table.only in ("", kind) and wanted(case) else ():
                rest = {"boxes": BOXES[name](exact, labels.shape, case.name)} | spacing_of(case)
                place = work / folder.name / name / kind
                save_npz(place / "imgs" / f"{case.name}.npz", imgs=case.image, **rest)
                save_npz(place / "gts" / f"{case.name}.npz", gts=labels, **rest)
                places[place] = None
    if not places:
        raise InputError(f"{', '.join(map(str, folders))}: no case here can be used; name other folders with --cases")
    return list(places), left_out


# ---------------------------------------------------------------- steps 4 and 5


def weights_of(model: str) -> Path:
    """The file or folder behind step 4's --model. InputError if it is not there."""
    path = MODELS[model].weights() if model in MODELS else Path(model)
    if not path.exists():
        raise InputError(f"{path}: no such weights; name others with --model, or with --static")
    return path


def digest(*paths: Path, text: str = "") -> str:
    """sha256 of the files, and of those in the folders."""
    found = hashlib.sha256(text.encode())
    for file in (file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])):
        found.update(file.read_bytes())
    return found.hexdigest()


def label_maps(system: System, model: str, place: Path) -> Path:
    """Step 4 with a system on the cases of a folder, unless it has been done. -> the folder of its label maps"""
    kind = KIND_OF[place.parent.name]
    kind = {"": kind, "other": next(other for other in BOX_KINDS if other != kind)}.get(
        system.boxes_are, system.boxes_are
    )
    flags = ["--model", model, "--preset", *system.preset, "--engine", *system.engine, "--boxes", kind]
    key = digest(weights_of(model), place / "imgs", text=repr((flags, system.constants)))[:16]
    out = place / "segs" / f"{system.name}-{key}"
    # step 4 writes this file when it has done all cases
    if not (out / "efficiency.csv").is_file():
        with patch.multiple(volumes, **AS_SET | dict(system.constants)):
            importlib.import_module("04_infer").main(["-i", str(place / "imgs"), "-o", str(out), *flags])
    return out


def rows_of(systems: Iterable[System], models: dict[str, str], places: Iterable[Path]) -> list[dict]:
    """Steps 4 and 5 with every system on every folder that `prepare` made: the rows of step 5's cases.csv.

    models: what a system calls its model -> step 4's --model. A row also says its folder, boxes and kind.
    """
    rows = []
    for place in places:
        folder, boxes, kind = place.parts[-3:]
        here = [system for system in systems if system.only in ("", kind)]
        found = {system.name: label_maps(system, models[system.model], place) for system in here}
        flags = ["-g", str(place / "gts"), "-o", str(place / "scores")]
        importlib.import_module("05_evaluate").main(["-s", *(f"{name}={path}" for name, path in found.items()), *flags])
        for row in tables.read_rows(place / "scores" / "cases.csv"):
            named = {key: row[key] for key in ("system", "case", "modality")} | {"objects": int(row["objects"])}
            scores = {score: float(row[score] or "nan") for score in tables.score_names()}
            rows.append(named | scores | {"folder": folder, "boxes": boxes, "kind": kind})
    boxed = list(dict.fromkeys((row["folder"], row["boxes"]) for row in rows)).index
    order = [*(system.name for system in systems), *tables.REFERENCES].index
    # stable: cases stay in their order
    return sorted(rows, key=lambda row: (boxed((row["folder"], row["boxes"])), order(row["system"])))


def parts_of(table: Table, rows: list[dict]) -> list[tuple[dict, list[dict]]]:
    """The rows of each part of a table. -> [({column: value}, rows)]"""
    parts: dict[tuple, list[dict]] = {}
    for row in rows:
        parts.setdefault(tuple(row[column] for column in table.parts), []).append(row)
    return [(dict(zip(table.parts, name, strict=True)), here) for name, here in parts.items()]


# ---------------------------------------------------------------- tables


def average_table(table: Table, lines: list[dict]) -> str:
    """A row for each part and pair of systems: the mean difference over the modalities, with its interval.

    lines: rows of differences.csv. Notebook 03 reads a row's third, fifth and sixth cell.
    """
    notes = {system.name: f" ({system.note})" for system in table.systems if system.note}
    averages = [
        line | {"where": ", ".join(line[c] for c in table.parts) or "all", "note": notes.get(line["system"], "")}
        for line in lines
        if line["modality"] == tables.AVERAGE
    ]
    columns = {"cases": "{where}", "number": "{cases}", "system": "{system}", "minus": "{minus}{note}"}
    return tables.difference_table(averages, columns, {title: SHOWN[title] for title in ("DSC", "NSD")})


def table_text(table: Table, rows: list[dict], lines: list[dict]) -> str:
    """table.md: differences of the means, then the means by modality. lines: rows of differences.csv."""
    text = [f"# {table.title}", "", average_table(table, lines), "",
        "Points of per cent, strict protocol, mean over the modalities; in brackets the 95 % bootstrap interval over cases.", ""]  # fmt: skip
    for part, here in parts_of(table, rows):
        # more systems would not fit beside one another
        for title, score in SHOWN.items() if len(table.systems) <= 4 else ():
            heading = ", ".join([f"## {title}", *part.values()])
            text += [heading, "", tables.score_table(tables.summarize(here), score), ""]
    text.append(
        "Means, per cent, over a case's objects, a modality's cases, the modalities. The paper's columns are of other cases.\n"
        "Boxes moved: each x and y side in or out by at most 5 pixels of the 256 grid, whole ones. Loose by S per cent: each\n"
        "outward by 0.5 to 1.5 times S per cent of the object's width or height (D20).\n"
    )
    return "\n".join(text)


def looseness_plot(rows: list[dict]) -> Figure:
    """DSC and NSD of each system over the kinds of boxes; a column a folder. rows: of pictures."""
    folders, kinds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("folder", "boxes"))
    figure = Figure(figsize=(4.2 * len(folders), 6), layout="constrained")
    axes = figure.subplots(2, len(folders), sharex=True, sharey="row", squeeze=False)
    for (i, score), (j, folder) in product(enumerate(("dsc_strict", "nsd_strict")), enumerate(folders)):
        here = [[row for row in rows if (row["folder"], row["boxes"]) == (folder, kind)] for kind in kinds]
        for system in ("baseline", "proposed", ELLIPSE):
            means = [100 * tables.summarize(part)[system, tables.AVERAGE][score] for part in here]
            axes[i, j].plot(kinds, means, marker="o", label=system, linestyle=":" if system == ELLIPSE else "-")
        axes[i, j].set(title=f"{folder}: {score[:3].upper()}", ylabel=f"{score[:3].upper()}, per cent")
        axes[i, j].set_xticks(range(len(kinds)), [k.removesuffix("-seed0").replace("pct", " %") for k in kinds])
        axes[i, j].grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    return figure


def parse(argv: list[str] | None) -> Namespace:
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument("table", choices=TABLES, help="what to measure")
    p.add_argument("--cases", type=Path, nargs="+", help="folders of .npz cases with imgs and gts")
    p.add_argument("--model", default="proposed", help="the proposed model: its name, or a checkpoint")
    p.add_argument("--static", default=str(OUR_CHECKPOINT.with_suffix(".static")), help="its int8 form, for precision")
    p.add_argument("--work", type=Path, default=Path("out/accuracy"), help="folder for boxes, label maps and scores")
    p.add_argument("-o", "--out", type=Path, help="folder for the tables (default: results/TABLE)")
    p.add_argument("--smoke", action="store_true", help="measure two tiny synthetic cases")
    args = p.parse_args(argv)
    if not args.cases and not args.smoke:
        p.error("name the cases: --cases FOLDER, or --smoke")
    args.out = args.out or Path("results") / args.table
    return args


def run(args: Namespace) -> list[dict]:
    # 1. The same boxes for everyone
    table, models = TABLES[args.table], {"proposed": args.model, "baseline": "baseline", "static": args.static}
    if any("precision=bf16" in system.engine for system in table.systems) and not openvino_engine.has_bfloat16():
        raise InputError("this processor has no bfloat16, so there is nothing to compare; use another machine")
    used = {system.model: weights_of(models[system.model]) for system in table.systems}
    places, left_out = prepare(table, args.cases, args.work)

    # 2. Steps 4 and 5
    rows = rows_of(table.systems, models, places)
    pairs = [(system.name, minus) for system in table.systems for minus in system.minus]
    lines = [part | one for part, here in parts_of(table, rows) for one in tables.paired_differences(here, pairs)]

    # 3. Tables
    parts = tuple(column for column in table.parts if column != "kind")  # a case's name says its kind
    save_text(args.out / "cases.csv", csv_text(rows, (*parts, "system", "case", "modality", "objects", *tables.score_names())))  # fmt: skip
    columns = (*table.parts, "system", "minus", "modality", "cases", "score", "difference", "low", "high")
    save_text(args.out / "differences.csv", csv_text(lines, columns))
    save_text(args.out / "table.md", table_text(table, rows, lines))
    if args.table == "looseness":
        save_figure(args.out / "looseness.png", looseness_plot(rows))
    settings = {"torch": version("torch"), "cases": len({(row["folder"], row["case"]) for row in rows})}
    settings |= {"sha256 of weights": {model: digest(path) for model, path in used.items()}}
    save_json(args.out / "settings.json", settings)
    print(average_table(table, lines))
    print(f"accuracy.py: {settings['cases']} cases, {left_out} left out; wrote {args.out}")
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
            for dims in (2, 3):
                write_training_case(Path(scratch) / "tiny", tiny_case(dims=dims))
            args.cases, args.work, args.out = [Path(scratch) / "tiny"], Path(scratch) / "work", Path(scratch) / "out"
            return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"accuracy.py: {error}")


if __name__ == "__main__":
    main()
