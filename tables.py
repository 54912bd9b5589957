"""Files of truth and predictions -> scores of cases -> means by modality, with intervals -> the tables people read.

Read top to bottom: the paper's numbers -> one case (`score_case`) -> means (`summarize`) -> differences of two systems
with bootstrap intervals (`paired_differences`) -> tables as text. Means are plain: over a case's labels, a modality's
cases, the modalities. Metrics, protocols and conventions: see metrics.py. [P 3.1, Table 4]
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from files import MODALITIES, InputError, modality_of
from files.case import check_boxes, check_labels, spacing_zyx
from files.npz import load_npz
from grid import boxes_from_labels, drawn_boxes, label_bounds
from metrics import METRICS, PROTOCOLS, case_scores, filled_box, inscribed_ellipse

# systems that never look at the image: what a box alone is worth
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


def score_names() -> tuple[str, ...]:
    """The scores of a case in the order of the columns: dsc_strict, nsd_strict, dsc_challenge, nsd_challenge, ..."""
    return tuple(f"{metric}_{protocol}" for protocol in PROTOCOLS for metric in METRICS)


# One case: files to scores -----------------------------------------------------------------------------------------


def read_labels(path: Path, key: str, shape: tuple[int, ...] | None = None) -> tuple[np.ndarray, dict]:
    """Label map `key` of an .npz as uint16, of the given shape if any, and all that the file holds. Or InputError."""
    stored = load_npz(path)
    if key not in stored:
        raise InputError(f"{path}: has no key '{key}' (found {sorted(stored)}); name the right folder or save '{key}'")
    return check_labels(stored[key], shape or stored[key].shape, path), stored


def read_truth(path: Path) -> tuple[np.ndarray, tuple[float, ...] | None, np.ndarray, np.ndarray]:
    """Ground truth of a case: labels uint16, spacing_mm (z, y, x) or None in 2D, ids (N,) and boxes (N, 4 or 6).

    ids[i] is the label that box i asks for: i + 1 if the file has `boxes`, else each label with its exact box.
    Raises ValueError, one sentence, if a key is missing or unusable.
    """
    gts, stored = read_labels(path, "gts")
    if gts.ndim not in (2, 3) or not gts.any():
        raise InputError(f"{path}: 'gts', shape {gts.shape}, must be a (H, W) or (D, H, W) label map with an object")
    if gts.ndim == 3 and "spacing" not in stored:
        raise InputError(f"{path}: has no key 'spacing', and a 3D NSD is in mm; save (x, y, z) in mm as 'spacing'")
    spacing_mm = spacing_zyx(stored["spacing"]) if gts.ndim == 3 else None
    if "boxes" not in stored:
        return gts, spacing_mm, *boxes_from_labels(gts)
    boxes = check_boxes(stored["boxes"], gts.shape, path)
    return gts, spacing_mm, np.arange(1, len(boxes) + 1), boxes


def score_case(
    truth: Path, systems: dict[str, Path], protocols: tuple[str, ...], looseness: float = 0.0
) -> tuple[list[dict], list[str]]:
    """Score one case for every system and both references. Returns (rows, problems in one sentence each).

    truth: .npz with gts. systems: {name: folder of predictions, .npz of the same name with segs}.
    looseness: the references get boxes that are this loose, those of 04_infer.py --looseness.
    A row holds system, case (the file's name), modality, objects, a mean for each of `score_names` that was asked
    for, 0..1 or nan, and labels: {label: {score name: score}}.
    """
    try:
        gts, spacing_mm, ids, boxes = read_truth(truth)
    except ValueError as error:
        return [], [str(error) if isinstance(error, InputError) else f"{truth}: {error}"]
    boxes = drawn_boxes(truth.stem, boxes, looseness, gts.shape)
    label_of = np.append(0, ids).astype(np.uint16)  # the references paint box i as i + 1; its label is ids[i]
    maps, problems = {name: label_of[paint(boxes, gts.shape)] for name, paint in REFERENCES.items()}, []
    for system, folder in systems.items():
        path = folder / truth.name
        try:
            if not path.is_file():
                raise InputError(f"{path}: no prediction for this case; run python 04_infer.py on it first")
            maps[system] = read_labels(path, "segs", gts.shape)[0]
        except InputError as error:
            problems.append(str(error))
    rows, modality, objects = [], modality_of(truth.stem), len(label_bounds(gts))
    for system, segs in maps.items():
        row = {"system": system, "case": truth.name, "modality": modality, "objects": objects, "labels": {}}
        for protocol in protocols:
            found = case_scores(segs, gts, spacing_mm, protocol)
            row |= {f"{metric}_{protocol}": mean for metric, mean in found.means.items()}
            for i, label in enumerate(found.labels):
                scores = {f"{metric}_{protocol}": float(values[i]) for metric, values in found.scores.items()}
                if not all(map(math.isnan, scores.values())):  # an id that neither truth nor prediction has
                    row["labels"].setdefault(label, {}).update(scores)
        rows.append(row)
    return rows, problems


# Means -------------------------------------------------------------------------------------------------------------


def summarize(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """{(system, modality or "Average"): cases, objects, mean scores and seconds}, in the order of the table.

    rows: `score_case`'s, of one or more cases; each may have `seconds` as well.
    """
    keys, summary = [key for key in (*score_names(), "seconds") if key in rows[0]], {}

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
# both falls out. The interval says how far the mean difference would move if other cases of the same kind had been
# drawn. To find it, draw as many cases again, with repeats, from those we have; take the mean; do that 10,000 times;
# cut off the outer 5 %. [P Table 4 has no intervals]


def bootstrap_interval(
    groups: Sequence[np.ndarray], draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile-bootstrap interval (low, high) of the mean of group means.

    groups: one array (n,) for each modality. Cases are drawn with repeats within their group, so that each keeps its
    size. A group of one case cannot vary; with two or three, the interval is narrower than it should be.
    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    >>> bootstrap_interval([np.array([2.0, 2.0]), np.array([4.0, 4.0, 4.0])])
    (3.0, 3.0)
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for values in groups:
        drawn = rng.integers(len(values), size=(draws, len(values)))  # (draws, n)
        means += values[drawn].mean(axis=1)
    low, high = np.quantile(means / len(groups), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def paired_differences(rows: list[dict], pairs: Sequence[tuple[str, str]], draws: int = DRAWS) -> list[dict]:
    """Mean difference of each pair of systems, by modality and on average, with its interval.

    rows: `score_case`'s, under both protocols, all at the same boxes. pairs: (system, system to subtract); a pair
    without rows is left out. Means are over cases, then over modalities; a case without a score in either system does
    not count. Returns one dict for each pair, modality and score: system, minus, modality, cases, score, difference,
    low, high. low and high are nan where one case is all there is.
    """
    of_system: dict[str, dict[str, dict]] = {}
    for row in rows:
        of_system.setdefault(row["system"], {})[row["case"]] = row
    found = []
    for system, minus in pairs:
        ours, theirs = of_system.get(system, {}), of_system.get(minus, {})
        for score in score_names():
            values: dict[str, list[float]] = {}
            for case in ours.keys() & theirs.keys():
                difference = ours[case][score] - theirs[case][score]
                if not math.isnan(difference):
                    values.setdefault(ours[case]["modality"], []).append(difference)
            # sorted: sets have no order, and the draws must not depend on one
            groups = {m: np.sort(np.array(values[m])) for m in MODALITIES if m in values}
            lines = {m: [group] for m, group in groups.items()} | ({AVERAGE: list(groups.values())} if groups else {})
            for modality, members in lines.items():
                cases = sum(map(len, members))
                low, high = bootstrap_interval(members, draws) if cases > 1 else (math.nan, math.nan)
                line = {"system": system, "minus": minus, "modality": modality, "cases": cases, "score": score}
                mean = float(np.mean([group.mean() for group in members]))
                found.append(line | {"difference": mean, "low": low, "high": high})
    return found


# Tables as text ----------------------------------------------------------------------------------------------------


def markdown_table(summary: dict[tuple[str, str], dict], protocols: tuple[str, ...], paper: bool) -> str:
    """A row a modality and the average; a system's columns are its metrics, strict if computed, challenge NSD, seconds.

    summary: `summarize`'s. paper: add the float columns of the paper's Table 4.
    """
    first, systems = protocols[0], systems_of(summary)
    keys = {f"{metric.upper()} {first}": f"{metric}_{first}" for metric in METRICS} | {"NSD challenge": "nsd_challenge"}
    keys = {title: key for title, key in keys.items() if key in summary[systems[-1], AVERAGE]} | {"s": "seconds"}
    fields = {f"{s}: {t}": (s, k) for s in systems for t, k in keys.items() if k != "seconds" or s not in REFERENCES}
    printed = paper_scores() if paper else {}
    lines = [["modality", "cases", *fields, *printed]]
    for modality in modalities_of(summary):
        line_of = {system: summary.get((system, modality), {}) for system in systems}
        values = [line_of[s].get(key, math.nan) * (1 if key == "seconds" else 100) for s, key in fields.values()]
        values += [column.get(modality, math.nan) for column in printed.values()]
        lines.append([modality, str(line_of[systems[-1]]["cases"]), *map(cell, values)])
    names = " and ".join(metric.upper() for metric in METRICS)
    notes = [f"{names} in per cent, s in seconds: means over the cases that have one. Average: over the modalities."]
    notes += ["Paper: its Table 4, slices of other cases at 256 x 256, average over its nine: not comparable."] * paper
    return "\n".join([pipe_table(lines), "", *notes, ""])


def score_table(summary: dict[tuple[str, str], dict], score: str) -> str:
    """One score of every system, per cent: a row a modality and the average, the paper's four columns at the right.

    score: one of `score_names`. The paper's columns are those of the same metric, DSC or NSD, on its own split.
    """
    systems, ending = systems_of(summary), f": {score.split('_')[0].upper()}"
    printed = {title: column for title, column in paper_scores((False, True)).items() if title.endswith(ending)}
    lines = [["modality", "cases", "objects", *systems, *(title.removesuffix(ending) for title in printed)]]
    for modality in modalities_of(summary):
        counts = summary[systems[-1], modality]
        values = [100 * summary[system, modality][score] for system in systems]
        values += [column.get(modality, math.nan) for column in printed.values()]
        lines.append([modality, str(counts["cases"]), str(counts["objects"]), *map(cell, values)])
    return pipe_table(lines)


def difference_table(lines: list[dict], scores: dict[str, str]) -> str:
    """Differences of one pair of systems in points of per cent, with their intervals: a row a modality and the average.

    lines: `paired_differences`'s of that pair. scores: {title of the column: one of `score_names`}.
    """
    rows: dict[str, list[str]] = {}
    for score in scores.values():
        for line in (line for line in lines if line["score"] == score):
            numbers = [100 * line[key] for key in ("difference", "low", "high")]
            interval = "" if math.isnan(numbers[1]) else f" [{numbers[1]:+.2f}, {numbers[2]:+.2f}]"
            rows.setdefault(line["modality"], [str(line["cases"])]).append(f"{numbers[0]:+.2f}{interval}")
    return pipe_table([["modality", "cases", *scores], *([modality, *cells] for modality, cells in rows.items())])


def pipe_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first one the header, as a Markdown table without a line end at its end."""
    header, *body = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([header, "| " + " | ".join(["---"] * len(rows[0])) + " |", *body])


def terminal_table(summary: dict[tuple[str, str], dict], protocol: str) -> str:
    """The same in a terminal's width: the metrics of one protocol for each system, seconds where known."""
    systems, modalities = systems_of(summary), modalities_of(summary)
    columns = [
        ["", "modality", *modalities],
        ["", "cases", *(str(summary[systems[-1], m]["cases"]) for m in modalities)],
    ]
    for system in systems:
        keys = {metric.upper(): f"{metric}_{protocol}" for metric in METRICS}
        keys |= {} if system in REFERENCES else {"s": "seconds"}
        for i, (title, key) in enumerate(keys.items()):
            values = [
                summary.get((system, m), {}).get(key, math.nan) * (1 if title == "s" else 100) for m in modalities
            ]
            columns.append(["" if i else system, title, *(cell(value, 1) for value in values)])
    widths = [max(5, *(len(text) for text in column[1:])) for column in columns]
    starts = [i for i, column in enumerate(columns) if column[0]]  # where each system's columns begin
    header = ""
    for start, end in zip(starts, [*starts[1:], len(columns)], strict=True):
        header = header.ljust(widths[0] + sum(width + 2 for width in widths[1:start]) + 4) + columns[start][0]
        widths[start] += max(0, len(columns[start][0]) + 4 - sum(width + 2 for width in widths[start:end]))
    lines = [header]
    for first, *rest in list(zip(*columns, strict=True))[1:]:
        lines.append("".join([first.ljust(widths[0]), *(f"  {c:>{w}}" for c, w in zip(rest, widths[1:], strict=True))]))
    return "\n".join(line.rstrip() for line in lines)


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
