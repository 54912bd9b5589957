"""What is claimed of masks, measured: steps 4 and 5 in a loop over systems and kinds of boxes. [P 4.1, Table 4]

    python benchmarks/accuracy.py table4 --cases val         a table of TABLES; writes results/table4

Reads folders of .npz cases with `imgs`, `gts`, in 3D `spacing`. All systems get the same boxes, those of the masks.
Writes cases.csv and differences.csv (0..1), table.md (per cent), settings.json.
"""

import hashlib
import importlib
import shutil
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

import tables
import volumes
from engines import openvino_engine
from formats import InputError
from formats.checkpoints import OUR_CHECKPOINT
from formats.readers import list_cases, read_case
from formats.writing import csv_text, save_figure, save_json, save_text, script
from segment import file_of

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
    other_kind: bool = False  # it asks exact boxes as drawn, and drawn ones as exact


class Table(NamedTuple):
    """Systems, boxes, and what divides the cases into parts that have a mean each: "folder", "boxes", "kind"."""

    title: str
    systems: tuple[System, ...]
    boxes: tuple[str, ...] = ("exact",)
    parts: tuple[str, ...] = ()
    only: str = ""  # "pictures" or "volumes"


# kind of boxes -> how loose they are: see grid.drawn_boxes
BOXES = {"exact": 0.0, "loose-15pct-seed0": 0.15, "loose-30pct-seed0": 0.3}
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
    "GROWTH": (0.0, 0.03, 0.06, 0.1),
    "PRIOR_WEIGHT": (0.0, 10.0, 40.0, 120.0),
    "FOLLOWED": ("exact", "drawn", "followed"),
}
AS_SET = {name: getattr(volumes, name) for name in SWEEP}
SWEPT = tuple(
    System(f"{name} {value}", ("as set",), engine=FLOAT, constants=((name, value),))
    for name, values in SWEEP.items()
    for value in values
    if value != AS_SET[name]
)
TABLES = {
    "table4": Table("Table 4 measured", (BASELINE, INT8[0], PROPOSED, INT8[1]), parts=("boxes",)),
    "table4_unseen": Table("Table 4 measured, and with drawn boxes", (BASELINE, PROPOSED, INT8[1]),
                           ("exact", "loose-15pct-seed0"), ("boxes",)),
    "looseness": Table("Scores as boxes get looser (D20)", (
        BASELINE, PROPOSED,
        System("proposed, asked as the other kind", ("proposed",), engine=FLOAT, other_kind=True, note="D24"),
    ), tuple(BOXES), ("folder", "boxes"), "pictures"),
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
        change("released channels", "", "iterations=1", "diffusion_range=1.0", "border=wrap", "rounding=truncate",
               "equalize=raw"),
        change("gray", "#5", "color=gray"),
    ), only="pictures"),
    "propagation": Table("What each constant of the 3D propagation is worth (D6)", (
        BASELINE, System("as set", ("baseline", ELLIPSE), engine=FLOAT),
        System("middle slice asked as drawn", ("as set",), engine=FLOAT, other_kind=True), *SWEPT,
    ), only="volumes"),
}  # fmt: skip


def copied(table: Table, folders: Iterable[Path], work: Path) -> list[Path]:
    """Copies a table's cases, each kind apart. -> the folders work/FOLDER/KIND, KIND "pictures" or "volumes" """
    places = {}
    for path in (path for folder in folders for path in list_cases(folder)):
        kind = "volumes" if read_case(path).is_3d else "pictures"
        if table.only in ("", kind):
            place = work / path.absolute().parent.name / kind
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
            places[place] = None
    if not places:
        raise InputError(f"--cases: these folders hold none of the {table.only} of this table; name other folders")
    return list(places)


def label_maps(system: System, model: str, place: Path, looseness: float, out: Path) -> Path:
    """Step 4 with a system on the cases of a folder. -> the folder of its label maps, `out`"""
    flags = ["--model", model, "--preset", *system.preset, "--engine", *system.engine]
    flags += ["--boxes-from-masks", str(looseness)]
    if system.other_kind:
        flags += ["--boxes", "exact" if looseness else "drawn"]
    with patch.multiple(volumes, **AS_SET | dict(system.constants)):
        importlib.import_module("04_infer").main(["-i", str(place), "-o", str(out), *flags])
    return out


def rows_of(table: Table, models: dict[str, str], places: Iterable[Path]) -> list[dict]:
    """Steps 4 and 5 with every system, on every folder of `copied`, with every kind of boxes: rows of step 5's cases.csv.

    models: what a system calls its model -> step 4's --model. A row also says its folder, boxes and kind."""
    rows = []
    for place, boxes in product(places, table.boxes):
        (folder, kind), looseness, out = place.parts[-2:], BOXES[boxes], place.with_name(f"{place.name}-{boxes}")
        here = [system for system in table.systems if system.only in ("", kind)]
        found = {one.name: label_maps(one, models[one.model], place, looseness, out / one.name) for one in here}
        flags = ["-g", str(place), "-o", str(out / "scores"), "--looseness", str(looseness)]
        importlib.import_module("05_evaluate").main(["-s", *(f"{name}={path}" for name, path in found.items()), *flags])
        for row in tables.read_rows(out / "scores" / "cases.csv"):
            named = {key: row[key] for key in ("system", "case", "modality")} | {"objects": int(row["objects"])}
            scores = {score: float(row[score] or "nan") for score in tables.score_names()}
            rows.append(named | scores | {"folder": folder, "boxes": boxes, "kind": kind})
    boxed = list(dict.fromkeys((row["folder"], row["boxes"]) for row in rows)).index
    order = [*(system.name for system in table.systems), *tables.REFERENCES].index
    # stable: cases stay in their order
    return sorted(rows, key=lambda row: (boxed((row["folder"], row["boxes"])), order(row["system"])))


def parts_of(table: Table, rows: list[dict]) -> list[tuple[dict, list[dict]]]:
    """The rows of each part of a table. -> [({column: value}, rows)]"""
    parts: dict[tuple, list[dict]] = {}
    for row in rows:
        parts.setdefault(tuple(row[column] for column in table.parts), []).append(row)
    return [(dict(zip(table.parts, name, strict=True)), here) for name, here in parts.items()]


def average_table(table: Table, lines: list[dict]) -> str:
    """A row for each part and pair of systems: the mean difference over the modalities, with its interval.

    lines: rows of differences.csv."""
    notes = {system.name: f" ({system.note})" * bool(system.note) for system in table.systems}
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
            summary = tables.summarize(here)
            cells = tables.summary_cells(summary, {system: (system, score) for system in tables.systems_of(summary)})
            text += [", ".join([f"## {title}", *part.values()]), "", tables.pipe_table(cells), ""]
    text.append(
        "Means, per cent, over a case's objects, a modality's cases, the modalities.\n"
        "Boxes loose by S per cent: each side outward by 0.5 to 1.5 times S per cent of the object's width or height (D20).\n"
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


def run(args: Namespace, work: Path) -> list[dict]:
    # 1. Steps 4 and 5, with the same boxes for everyone
    table, models = TABLES[args.table], {"proposed": args.model, "baseline": "baseline", "static": args.static}
    if any("precision=bf16" in system.engine for system in table.systems) and not openvino_engine.has_bfloat16():
        raise InputError("this processor has no bfloat16, so there is nothing to compare; use another machine")
    rows = rows_of(table, models, copied(table, args.cases, work))
    pairs = [(system.name, minus) for system in table.systems for minus in system.minus]
    lines = [part | one for part, here in parts_of(table, rows) for one in tables.paired_differences(here, pairs)]

    # 2. Tables
    parts = tuple(column for column in table.parts if column != "kind")  # a case's name says its kind
    save_text(args.out / "cases.csv", csv_text(rows, (*parts, "system", "case", "modality", "objects", *tables.score_names())))  # fmt: skip
    columns = (*table.parts, "system", "minus", "modality", "cases", "score", "difference", "low", "high")
    save_text(args.out / "differences.csv", csv_text(lines, columns))
    save_text(args.out / "table.md", table_text(table, rows, lines))
    if args.table == "looseness":
        save_figure(args.out / "looseness.png", looseness_plot(rows))
    settings = {"torch": version("torch"), "cases": len({(row["folder"], row["case"]) for row in rows})}
    used = {model: file_of(models[model]) for model in dict.fromkeys(system.model for system in table.systems)}
    files = {model: sorted(path.iterdir()) if path.is_dir() else [path] for model, path in used.items()}
    weights = {model: b"".join(file.read_bytes() for file in found) for model, found in files.items()}
    settings |= {"sha256 of weights": {model: hashlib.sha256(found).hexdigest() for model, found in weights.items()}}
    save_json(args.out / "settings.json", settings)
    print(average_table(table, lines))
    print(f"accuracy.py: {settings['cases']} cases; wrote {args.out}")
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of cases.csv."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument("table", choices=TABLES, help="what to measure")
    p.add_argument("--cases", type=Path, nargs="+", required=True, help="folders of .npz cases with imgs and gts")
    p.add_argument("--model", default="proposed", help="the proposed model: its name, or a checkpoint")
    p.add_argument("--static", default=str(OUR_CHECKPOINT.with_suffix(".static")), help="its int8 form, for precision")
    p.add_argument("-o", "--out", type=Path, help="folder for the tables (default: results/TABLE)")
    args = p.parse_args(argv)
    args.out = args.out or Path("results") / args.table
    with script("accuracy.py") as work:
        return run(args, work)


if __name__ == "__main__":
    main()
