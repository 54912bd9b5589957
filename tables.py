"""Files of truth and predictions -> scores -> means by modality, differences with intervals -> the tables people read.

Read top to bottom: the paper's numbers -> names and units of scores -> the files that step 5 reads -> means
(`summarize`) -> differences of two systems (`paired_differences`) -> tables as text. Metrics and protocols: metrics.py.
[P 3.1, Table 4]
"""

import csv
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats import MODALITIES, InputError, modality_of
from formats.case import Case, check_boxes, check_labels, spacing_zyx, told_in_a_sentence
from formats.npz import load_npz
from formats.readers import read_case
from formats.writing import csv_text, save_json, save_text
from grid import boxes_from_labels
from metrics import METRICS, PROTOCOLS, filled_box, inscribed_ellipse

# D11: two systems that never look at the image, to show what a box alone is worth
REFERENCES = {"filled box": filled_box, "inscribed ellipse": inscribed_ellipse}
AVERAGE = "Average"
DRAWS = 10_000  # of the bootstrap
LEVEL = 0.95
PAPER_TABLES = Path(__file__).with_name("results") / "paper"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, each {column: text}. Or InputError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a clone of the repository holds it") from error


def paper_scores(quantized: tuple[bool, ...] = (False,)) -> dict[str, dict[str, float]]:
    """Columns of [P Table 4]: {title: {modality or Average: per cent}}. quantized: which models, float or int8."""
    rows, columns = read_rows(PAPER_TABLES / "table4.csv"), {}
    for system in ("Baseline", "Proposed"):
        for metric in ("DSC", "NSD"):
            for int8 in quantized:
                name = f"Quantized {system}" if int8 else system
                numbers = {row["target"]: float(row[f"{name} {metric}"]) for row in rows}
                columns[f"paper's {name} on its own split: {metric}"] = numbers
    return columns


# Names and units of scores -----------------------------------------------------------------------------------------


def score_names(of_objects: bool = False) -> tuple[str, ...]:
    """The scores of a case, or of its objects, in the order of the columns: dsc_strict, nsd_strict, dsc_challenge, ..."""
    names = [name for name, metric in METRICS.items() if not (of_objects and metric.of_case)]
    return tuple(f"{name}_{protocol}" for protocol in PROTOCOLS for name in names)


def scores_in(row: dict) -> list[str]:
    """The columns of a row that hold scores, whatever rows METRICS has by now."""
    return [column for column in row if column.rpartition("_")[2] in PROTOCOLS]


def title_and_factor(score: str) -> tuple[str, int]:
    """Title of a column, and what its numbers are printed times: ("NSD strict", 100), ("HD95 strict, mm", 1), ("s", 1)."""
    if score == "seconds":
        return "s", 1
    name, _, protocol = score.rpartition("_")
    unit = METRICS[name].unit if name in METRICS else "%"
    return (f"{name.upper()} {protocol}", 100) if unit == "%" else (f"{name.upper()} {protocol}, {unit}", 1)


def units() -> str:
    """What the numbers of all metrics are: "DSC and NSD in per cent, HD95 in mm (less is better)"."""
    names: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        unit = ("per cent" if metric.unit == "%" else metric.unit) + " (less is better)" * (not metric.more_is_better)
        names.setdefault(unit, []).append(name.upper())
    return ", ".join(f"{' and '.join(of)} in {unit}" for unit, of in names.items())


# The files that step 5 reads ---------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """Ground truth of a case. ids[i] is the label that box i asks for."""

    labels: np.ndarray  # (H, W) or (D, H, W) uint16
    spacing_mm: tuple[float, ...] | None  # (z, y, x); None in 2D
    ids: np.ndarray  # (N,)
    boxes: np.ndarray  # (N, 4) or (N, 6)
    modality: str


def read_labels(path: Path, key: str, shape: tuple[int, ...] | None = None) -> tuple[np.ndarray, dict]:
    """Label map `key` of an .npz as uint16, of the given shape if any, and all that the file holds. Or InputError."""
    stored = load_npz(path)
    if key not in stored:
        raise InputError(f"{path}: has no key '{key}' (found {sorted(stored)}); name the right folder or save '{key}'")
    return check_labels(stored[key], shape or stored[key].shape, path), stored


def read_truth(path: Path) -> Truth:
    """Ground truth of a case; the boxes are those of the file if it has `boxes`, else each label's exact one.

    Raises InputError, one sentence, if a key is missing or unusable.
    """
    labels, stored = read_labels(path, "gts")
    if labels.ndim not in (2, 3) or not labels.any():
        raise InputError(f"{path}: 'gts', shape {labels.shape}, must be a (H, W) or (D, H, W) label map with an object")
    if labels.ndim == 3 and "spacing" not in stored:
        raise InputError(f"{path}: has no key 'spacing', and a 3D NSD is in mm; save (x, y, z) in mm as 'spacing'")
    try:
        spacing_mm = spacing_zyx(stored["spacing"]) if labels.ndim == 3 else None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if "boxes" in stored:
        boxes = check_boxes(stored["boxes"], labels.shape, path)
        ids = np.arange(1, len(boxes) + 1)
    else:
        ids, boxes = boxes_from_labels(labels)
    return Truth(labels, spacing_mm, ids, boxes, modality_of(path.stem))


def read_scored(path: Path) -> tuple[Case, Truth]:
    """A case with boxes and its truth, which lies in ../gts unless the case holds it. Or InputError."""
    case = read_case(path)
    file = path if case.labels is not None else path.parent.parent / "gts" / path.name
    truth = read_truth(file)
    check_labels(truth.labels, case.grid_shape, file)
    if case.boxes is not None:
        truth = truth._replace(ids=np.arange(1, len(case.boxes) + 1), boxes=case.boxes)
    return replace(case, boxes=truth.boxes), truth


def read_predictions(name: str, systems: dict[str, Path], truth: Truth) -> tuple[dict[str, np.ndarray], list[str]]:
    """{system: label map uint16 of the truth's shape} of the file of that name, and a sentence for each that is bad."""
    found, problems = {}, []
    for system, folder in systems.items():
        try:
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: no prediction for this case; run python 04_infer.py on it first")
            with told_in_a_sentence(folder / name):
                found[system] = read_labels(folder / name, "segs", truth.labels.shape)[0]
        except InputError as error:
            problems.append(str(error))
    return found, problems


def find_systems(entries: Sequence[str], shown: str | None) -> tuple[dict[str, Path], str]:
    """["ours=runs/segs", "other/segs"] -> {"ours": folder, "segs": folder}, and the one to be shown, else the first.

    InputError if a name or a folder is of no use.
    """
    systems: dict[str, Path] = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals or Path(entry).is_dir():  # a folder may have "=" in its name
            name, folder = Path(entry).resolve().name, entry
        if not name or name in systems or name in REFERENCES:
            raise InputError(f"--segs {entry}: name {name!r} is empty or taken; give another, NAME={folder}")
        if not any(Path(folder).glob("*.npz")):
            raise InputError(f"no .npz in {folder}/. Run first: python 04_infer.py -i CASES -o {folder}")
        systems[name] = Path(folder)
    shown = shown or next(iter(systems))
    if shown not in systems:
        raise InputError(f"--show {shown}: no such system; there are {', '.join(systems)}")
    return systems, shown


def find_truth(gts: Path, systems: dict[str, Path]) -> tuple[list[Path], list[str]]:
    """Files of truth in their order, and a sentence for each prediction that has none. InputError without any file."""
    files = sorted(gts.glob("[!.]*.npz"))  # not the ._NAME.npz that a Mac leaves beside each file
    if not files:
        raise InputError(f"no .npz in {gts}/. Run first: python 01_preprocess.py, or correct --gts")
    names = {file.name for file in files}
    predicted = sorted(file for folder in systems.values() for file in folder.glob("[!.]*.npz"))
    return files, [f"{file}: has no ground truth in {gts}; add it" for file in predicted if file.name not in names]


def read_seconds(systems: dict[str, Path]) -> dict[tuple[str, str], float]:
    """{(system, case file name): total_s} from every folder that has an efficiency.csv (step 4 writes it)."""
    seconds = {}
    for system, path in ((system, folder / "efficiency.csv") for system, folder in systems.items()):
        try:
            lines = read_rows(path) if path.is_file() else []
            seconds |= {(system, line["case"]): float(line["total_s"]) for line in lines}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: needs columns case and total_s ({error!r}); run 04_infer.py again") from error
    return seconds


# Means -------------------------------------------------------------------------------------------------------------


def summarize(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """{(system, modality or "Average"): cases, objects, mean scores and seconds}, in the order of the table.

    rows: of step 5's `score_case`, of one or more cases; each may have `seconds` as well. Means are plain: over a
    modality's cases that have a score, then over the modalities, however many cases each has.
    """
    keys, summary = [*scores_in(rows[0]), *(["seconds"] if "seconds" in rows[0] else [])], {}

    def mean(members: list[dict]) -> dict[str, float]:  # of the numbers; nan (no score, no time) if there is none
        known = {key: [row[key] for row in members if not math.isnan(row[key])] for key in keys}
        return {key: sum(values) / len(values) if values else math.nan for key, values in known.items()}

    for system in dict.fromkeys(row["system"] for row in rows):
        lines = {}
        for modality in MODALITIES:
            if members := [row for row in rows if (row["system"], row["modality"]) == (system, modality)]:
                objects = sum(row["objects"] for row in members)
                lines[modality] = {"cases": len(members), "objects": objects, **mean(members)}
        counts = {key: sum(line[key] for line in lines.values()) for key in ("cases", "objects")}
        summary |= {(system, modality): line for modality, line in lines.items()}
        summary[system, AVERAGE] = counts | mean(list(lines.values()))
    return summary


# Is one system better than another? --------------------------------------------------------------------------------
# Two systems get the same cases with the same boxes, so they are subtracted case by case: what makes a case hard for
# both falls out. With a_mc and b_mc the scores of case c of modality m, n_m its cases, M modalities:
#
#     d_mc = a_mc - b_mc                      D = 1/M sum_m 1/n_m sum_c d_mc
#
# How far would D move if other cases of the same kind had been drawn? The bootstrap draws n_m cases of every modality
# again, with repeats, from those we have, and repeats that K = 10,000 times:
#
#     D_k = 1/M sum_m 1/n_m sum_j d_m,i(j)    i(j): the case that came j-th in draw k
#     interval: from the 2.5th to the 97.5th percentile of D_1 .. D_K                     [P Table 4 has no intervals]


def bootstrap_interval(
    groups: Sequence[np.ndarray], draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile-bootstrap interval (low, high) of the mean of group means.

    groups: one array (n,) for each modality. A group keeps its size in each draw. A group of one case cannot vary;
    with two or three, the interval is narrower than it should be.
    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    >>> bootstrap_interval([np.array([2.0, 2.0]), np.array([4.0, 4.0, 4.0])])
    (3.0, 3.0)
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)  # D_k, until the division the sum over m
    for values in groups:
        drawn = rng.integers(len(values), size=(draws, len(values)))  # (draws, n)
        means += values[drawn].mean(axis=1)
    low, high = np.quantile(means / len(groups), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def paired_differences(rows: list[dict], pairs: Sequence[tuple[str, str]], draws: int = DRAWS) -> list[dict]:
    """Mean difference of each pair of systems, by modality and on average, with its interval.

    rows: of step 5's `score_case`, all at the same boxes. pairs: (system, system to subtract); a pair without rows is
    left out, and so is a case that has no score in either. Returns one dict for each pair, modality and score: system,
    minus, modality, cases, score, difference, low, high. low and high are nan where one case is all there is.
    """
    of_system: dict[str, dict[str, dict]] = {}
    for row in rows:
        of_system.setdefault(row["system"], {})[row["case"]] = row
    found = []
    for system, minus in pairs:
        ours, theirs = of_system.get(system, {}), of_system.get(minus, {})
        for score in scores_in(rows[0]):
            differences: dict[str, list[float]] = {modality: [] for modality in MODALITIES}
            for case in ours.keys() & theirs.keys():
                differences[ours[case]["modality"]].append(ours[case][score] - theirs[case][score])
            # sorted: sets have no order, and the draws must not depend on one
            groups = {m: np.sort([d for d in values if not math.isnan(d)]) for m, values in differences.items()}
            lines = {modality: [group] for modality, group in groups.items() if len(group)}
            if lines:
                lines[AVERAGE] = [group for (group,) in lines.values()]
            for modality, members in lines.items():
                cases = sum(map(len, members))
                low, high = bootstrap_interval(members, draws) if cases > 1 else (math.nan, math.nan)
                line = {"system": system, "minus": minus, "modality": modality, "cases": cases, "score": score}
                mean = float(np.mean([group.mean() for group in members]))
                found.append(line | {"difference": mean, "low": low, "high": high})
    return found


# Tables as text ----------------------------------------------------------------------------------------------------


def summary_cells(summary: dict, columns: dict[str, tuple[str, str]], decimals: int = 2) -> list[list[str]]:
    """Cells of a table, its header first: a row a modality and the average.   columns: {title: (system, score)}."""
    last = systems_of(summary)[-1]
    rows = [["modality", "cases", *columns]]
    for modality in modalities_of(summary):
        lines = {system: summary.get((system, modality), {}) for system in systems_of(summary)}
        values = [lines[system].get(key, math.nan) * title_and_factor(key)[1] for system, key in columns.values()]
        rows.append([modality, str(lines[last]["cases"]), *(cell(value, decimals) for value in values)])
    return rows


def score_columns(summary: dict, protocol: str, *more: str) -> dict[str, tuple[str, str]]:
    """{"system: title": (system, score)}: the scores of a protocol, more scores, seconds; what was computed of them."""
    systems = systems_of(summary)
    keys = dict.fromkeys([*(f"{metric}_{protocol}" for metric in METRICS), *more, "seconds"])
    pairs = [(s, key) for s in systems for key in keys if not (key == "seconds" and s in REFERENCES)]
    return {f"{s}: {title_and_factor(key)[0]}": (s, key) for s, key in pairs if key in summary[systems[-1], AVERAGE]}


def markdown_table(summary: dict[tuple[str, str], dict], protocols: tuple[str, ...]) -> str:
    """A row a modality and the average; a system's columns are its metrics, strict if computed, challenge NSD, seconds."""
    rows = summary_cells(summary, score_columns(summary, protocols[0], "nsd_challenge"))
    note = f"{units()}, s in seconds: means over the cases that have one. {AVERAGE}: over the modalities."
    return "\n".join([pipe_table(rows), "", note, ""])


def terminal_table(summary: dict[tuple[str, str], dict], protocol: str) -> str:
    """The scores of one protocol, and seconds where known, in a terminal's width."""
    header, *body = summary_cells(summary, score_columns(summary, protocol), decimals=1)
    return aligned([[re.sub(rf" {protocol}(, \S+)?$", r"\1", title) for title in header], *body])


def score_table(summary: dict[tuple[str, str], dict], score: str) -> str:
    """One score of every system, the paper's four columns of that metric, DSC or NSD, on its own split, at the right."""
    systems, ending = systems_of(summary), f": {score.split('_')[0].upper()}"
    printed = {title: column for title, column in paper_scores((False, True)).items() if title.endswith(ending)}
    header, *body = summary_cells(summary, {system: (system, score) for system in systems})
    rows = [[*header[:2], "objects", *systems, *(title.removesuffix(ending) for title in printed)]]
    for modality, cases, *scores in body:
        objects = str(summary[systems[-1], modality]["objects"])
        rows.append([modality, cases, objects, *scores, *(cell(c.get(modality, math.nan)) for c in printed.values())])
    return pipe_table(rows)


def difference_table(lines: list[dict], scores: dict[str, str], by: str = "modality") -> str:
    """Differences with their intervals, shares in points of per cent: a row a modality, or a pair of systems.

    lines: `paired_differences`'s, of one pair, or by="pair" of one modality. scores: {title of the column: score}.
    """
    rows: dict[str, dict[str, str]] = {}
    for line in (line for line in lines if line["score"] in scores.values()):
        mean, low, high = (title_and_factor(line["score"])[1] * line[key] for key in ("difference", "low", "high"))
        interval = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
        name = line["modality"] if by == "modality" else f"{line['system']} - {line['minus']}"
        row = rows.setdefault(name, {"cases": str(line["cases"])})
        row[line["score"]] = f"{mean:+.2f}{interval}"
    body = [[name, *(row.get(key, "-") for key in ("cases", *scores.values()))] for name, row in rows.items()]
    return pipe_table([[by, "cases", *scores], *body])


def pipe_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first one the header, as a Markdown table without a line end at its end."""
    header, *body = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([header, "| " + " | ".join(["---"] * len(rows[0])) + " |", *body])


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as columns for the terminal, the header first; of titles "group: name" the group stands above."""
    groups, names = zip(*(title.rpartition(": ")[::2] for title in rows[0]), strict=True)
    widths = [max(5, *map(len, column)) for column in zip(names, *rows[1:], strict=True)]
    starts = [i for i in range(1, len(groups)) if groups[i] != groups[i - 1]]
    above = ""
    for start, end in itertools.pairwise([*starts, len(widths)]):
        above = above.ljust(widths[0] + sum(width + 2 for width in widths[1:start]) + 4) + groups[start]
        widths[start] += max(0, len(groups[start]) + 4 - sum(width + 2 for width in widths[start:end]))
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (names, *rows[1:])]
    return "\n".join(line.rstrip() for line in (above, *lines))


def systems_of(summary: dict[tuple[str, str], dict]) -> list[str]:
    """The systems of a summary in their order. The last one is a reference: it has a score for every case."""
    return list(dict.fromkeys(system for system, _ in summary))


def modalities_of(summary: dict[tuple[str, str], dict]) -> list[str]:
    """The modalities of a summary, and the average, in their order."""
    last = systems_of(summary)[-1]
    return [modality for system, modality in summary if system == last]


def cell(value: float, decimals: int = 2) -> str:
    """A number as a table shows it; "-" for nan."""
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def write_tables(
    out: Path, rows: list[dict], summary: dict, differences: list[dict], protocols: tuple[str, ...]
) -> None:
    """cases.csv, labels.csv (a row an object), modalities.csv, differences.csv, table.md.

    Scores in .csv are as computed, shares 0..1; what was not computed, or is nan, is left blank.
    """
    names = ("system", "case", "modality")
    objects = [
        {name: row[name] for name in names} | {"label": label} | scores
        for row in rows
        for label, scores in sorted(row["labels"].items())
    ]
    means = [{"system": system, "modality": modality, **line} for (system, modality), line in summary.items()]
    tables = {
        "cases": (rows, (*names, "objects", *score_names(), "seconds")),
        "labels": (objects, (*names, "label", *score_names(of_objects=True))),
        "modalities": (means, ("system", "modality", "cases", "objects", *score_names(), "seconds")),
        "differences": (differences, ("system", "minus", "modality", "cases", "score", "difference", "low", "high")),
    }
    for name, (lines, columns) in tables.items():
        save_text(out / f"{name}.csv", csv_text(lines, columns))
    scores = {title_and_factor(score)[0]: score for score in (f"{metric}_{protocols[0]}" for metric in METRICS)}
    table = difference_table([line for line in differences if line["modality"] == AVERAGE], scores, by="pair")
    note = f"Differences of the {AVERAGE.lower()}, the first system's minus the second's, in the same units, with their"
    note += f" {LEVEL:.0%} bootstrap intervals."
    save_text(out / "table.md", "\n".join([markdown_table(summary, protocols), table, "", note, ""]))


def write_int8_report(beside: Path, report: dict) -> str:
    """Write what step 3, or `engines static`, found as NAME.md and NAME.json. -> its tables, for the terminal

    beside: their path without the ending."""
    reach = [[what, f"{n:,}", f"{total:,}", f"{n / total:.1%}"] for what, (n, total) in report["reach"].items()]
    timed = list(next(iter(report["seconds"].values())))
    seconds = [["part", *(f"{name}, ms" for name in timed), *(f"{name}: times as fast" for name in timed[1:])]]
    for part, found in report["seconds"].items():
        times = [f"{1e3 * found[name]:.0f}" for name in timed]
        seconds.append([part, *times, *(f"{found['float'] / found[name]:.2f}" for name in timed[1:])])
    text = "\n\n".join([
        "Multiply-adds, where counted, are those of one image and one box.", pipe_table([["", "int8", "of", "share"], *reach]),
        f"Median of {report['repeats']} runs, in turns, on {report['threads']} threads.", pipe_table(seconds),
        "Protocol strict, at the same boxes.", markdown_table(summarize(report["cases"]), ("strict",)).strip(),
    ])  # fmt: skip
    layers = "\n".join(f"- `{name}`" for name in report["layers"])
    save_text(beside.with_name(f"{beside.name}.md"), f"# {report['title']}\n\n{text}\n\nLayers in int8:\n\n{layers}\n")
    save_json(beside.with_name(f"{beside.name}.json"), report)
    return text
