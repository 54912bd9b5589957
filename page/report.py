"""The page that step 5 writes of what it scored: one HTML file that opens without a network.

Read top to bottom: three pictures (bars by modality, worst cases, score against predicted IoU) -> the page.
The pictures are data and axes in, axes out; the page embeds them, each with a text for those who cannot see it.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from figures import PALETTE, figure3_row, overlay
from formats import MODALITIES, InputError
from formats.case import Case
from formats.readers import list_cases, name_of, read_case
from formats.writing import save_text
from grid import boxes_from_labels, drawn_boxes
from metrics import METRICS
from tables import AVERAGE, LEVEL, bootstrap_interval, read_labels, read_rows, score_columns, summary_cells, units

WORST = 6  # cases that are shown
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: black; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } img { max-width: 100%; height: auto; } figure { margin: 1.5rem 0; }
figcaption, .small { color: dimgray; font-size: 0.875rem; } code { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.875rem; }
td, th { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid gainsboro; }
td:first-child, th:first-child { text-align: left; }
"""


def bar_intervals(rows: list[dict], score: str) -> dict[tuple[str, str], tuple[float, float, float]]:
    """{(system, modality or "Average"): (mean, low, high)} of one score, 0..1, with its bootstrap interval.

    rows: step 5's `score_case`. low and high are nan where there is one case.
    """
    found = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in rows if row["system"] == system and not math.isnan(row[score])]
        groups = {m: np.array([row[score] for row in mine if row["modality"] == m]) for m in MODALITIES}
        groups = {m: values for m, values in groups.items() if len(values)}
        for modality, members in [(m, [values]) for m, values in groups.items()] + [(AVERAGE, list(groups.values()))]:
            if members:
                ends = bootstrap_interval(members) if sum(map(len, members)) > 1 else (math.nan, math.nan)
                found[system, modality] = (float(np.mean([values.mean() for values in members])), *ends)
    return found


def plot_bars(intervals: dict[tuple[str, str], tuple[float, float, float]], title: str, ax, unit: str = "%"):
    """Mean of a score by modality, a bar a system, with its interval; the two references are gray."""
    factor, limits, words = (100, (0, 100), "per cent") if unit == "%" else (1, (0, None), unit)
    systems = list(dict.fromkeys(system for system, _ in intervals))
    modalities = list(dict.fromkeys(modality for _, modality in intervals))
    share = 0.8 / len(systems)
    for i, system in enumerate(systems):
        gray = {"filled box": "0.85", "inscribed ellipse": "0.6"}.get(system)
        colour = gray or tuple(PALETTE[[4, 2, 1, 3, 5, 0]][i % len(PALETTE)] / 255)
        numbers = np.array([intervals.get((system, m), (math.nan,) * 3) for m in modalities]) * factor
        places = np.arange(len(modalities)) + (i - (len(systems) - 1) / 2) * share
        ax.barh(places, numbers[:, 0], share, color=colour, label=system)
        ax.hlines(places, numbers[:, 1], numbers[:, 2], color="black", linewidth=1)
    ax.set(yticks=range(len(modalities)), yticklabels=modalities, xlim=limits, xlabel=f"{title}, {words}")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def predicted_and_true(rows: list[dict], objects: Path, system: str, score: str) -> list[tuple[str, float, float]]:
    """(modality, predicted IoU, score) of each object of a system, 0..1.   objects: the objects.csv of step 4.

    InputError if that file has other columns.
    """
    try:
        lines = [line for line in read_rows(objects) if line["predicted_iou"]]
        predicted = {(line["case"], int(line["label"])): float(line["predicted_iou"]) for line in lines}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{objects}: needs columns case, label and predicted_iou ({error!r}); run 04_infer.py again"
        ) from error
    return [  # a label that only the other protocol scores has no such score
        (row["modality"], predicted[row["case"], label], scores[score])
        for row in rows
        if row["system"] == system
        for label, scores in row["labels"].items()
        if (row["case"], label) in predicted and not math.isnan(scores.get(score, math.nan))
    ]


def plot_against_iou(points: list[tuple[str, float, float]], title: str, ax, unit: str = "%"):
    """A dot an object: predicted IoU against the score, coloured by modality."""
    for i, modality in enumerate(dict.fromkeys(m for m, _, _ in points)):
        x, y = np.array([(a, b) for m, a, b in points if m == modality]).T
        style = {"marker": "osD"[i // len(PALETTE)], "color": tuple(PALETTE[i % len(PALETTE)] / 255)}
        ax.plot(x, y, linestyle="", markersize=4, alpha=0.7, label=f"{modality}, {len(x)}", **style)
    ax.set(xlabel="predicted IoU", ylabel=title, xlim=(None, 1.02), ylim=(None, 1.02 if unit == "%" else None))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def worst_cases(rows: list[dict], system: str, score: str, count: int = WORST) -> list[dict]:
    """The rows of a system's cases with the worst score, the worst first. Cases without one are left out."""
    mine = [row for row in rows if row["system"] == system and not math.isnan(row[score])]
    return sorted(mine, key=lambda row: row[score], reverse=not METRICS[score.rpartition("_")[0]].more_is_better)[
        :count
    ]


def main_score(protocol: str) -> str:
    """The score that ranks cases: that of the first row of METRICS."""
    return f"{next(iter(METRICS))}_{protocol}"


def worst_pictures(
    rows: list[dict], system: str, protocol: str, images: Path, segs: Path, gts: Path, looseness: float
) -> dict[str, tuple[str, np.ndarray]]:
    """{case file: its `three_pictures`} of the system's worst cases that have an image. segs: its predictions."""
    files = {f"{name_of(path)}.npz": path for path in list_cases(images)}
    pictures = {}
    for name in (row["case"] for row in worst_cases(rows, system, main_score(protocol)) if row["case"] in files):
        case = read_case(files[name])
        found, true = (read_labels(f / name, k, case.grid_shape)[0] for f, k in ((segs, "segs"), (gts, "gts")))
        boxes = boxes_from_labels(true)[1] if case.boxes is None else case.boxes
        pictures[name] = three_pictures(case, drawn_boxes(case.name, boxes, looseness, case.grid_shape), found, true)
    return pictures


def three_pictures(case: Case, boxes: np.ndarray, segs: np.ndarray, gts: np.ndarray) -> tuple[str, np.ndarray]:
    """(the case's name with its slice, (h, w, 3) uint8: image with boxes, prediction and reference side by side)

    boxes: (N, 4) or (N, 6), that were asked.   Where all objects are small, the pictures show their surroundings only.
    """
    title, (image, labels, asked), (_, truth, _) = figure3_row(case.name, case.image, boxes, segs, gts)
    part, asked = surroundings(image.shape[:2], asked)
    image, labels, truth = image[part], labels[part], truth[part]
    panels = [overlay(image, np.zeros_like(labels), asked), overlay(image, labels), overlay(image, truth)]
    gap = np.full((panels[0].shape[0], 8, 3), 255, np.uint8)
    joined = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
    factor = min(1.0, 1200 / joined.shape[1])
    return title, cv2.resize(joined, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def surroundings(shape: tuple[int, int], boxes: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray]:
    """The part of an image (H, W) that shows all boxes (N, 4) with as much again round them, and the boxes in it."""
    if len(boxes) == 0:
        return (slice(None), slice(None)), boxes
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0) + 1
    margin = max(16.0, float((high - low).max()) / 2)
    (x0, y0), (x1, y1) = np.maximum(low - margin, 0).astype(int), np.minimum(high + margin, shape[::-1]).astype(int)
    return (slice(y0, y1), slice(x0, x1)), boxes - (x0, y0, x0, y0)


# The page ----------------------------------------------------------------------------------------------------------


def report_page(
    rows: list[dict], summary: dict, protocol: str, system: str, objects: Path, pictures: dict[str, tuple[str, np.ndarray]],
    facts: Sequence[str],
) -> str:  # fmt: skip
    """The HTML of a whole page.

    rows, summary: step 5's `score_case` and `summarize`'s.   protocol: of the scores that are drawn.
    system: of the worst cases and of the predicted IoU.   objects: its objects.csv, which need not exist.
    pictures: {case file: what `three_pictures` gives}, of worst cases.   facts: sentences under the title.
    """
    worst = [row for row in worst_cases(rows, system, main_score(protocol)) if row["case"] in pictures]
    parts = [
        *(f"<p>{html.escape(fact)}</p>" for fact in facts),
        "<h2>Scores by modality</h2>",
        *(_bars(rows, metric, protocol) for metric in METRICS),
        f"<p class=small>Black lines: {LEVEL:.0%} bootstrap intervals of the mean; none where there is one case. The two gray "
        "systems never look at the image: a filled box, and the ellipse inscribed in it.</p>",
        _score_rows(summary, protocol),
        f"<h2>The worst cases of {html.escape(system)}</h2>",
        f"<p class=small>The {len(worst)} cases with the worst {next(iter(METRICS)).upper()}, the worst first: image with "
        "boxes, prediction, reference. Of a volume the slice that shows most of the reference.</p>"
        if worst
        else "",
        *[_worst_case(row, *pictures[row["case"]], protocol) for row in worst],
        "" if worst else "<p>Step 5 was run without images: name their folder with <code>--images</code>.</p>",
        "<h2>Does the network know when it is wrong?</h2>",
        _against_iou(rows, objects, system, protocol),
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>Evaluation</title><style>{STYLE}</style>"
    body = "\n".join(["<h1>What step 5 scored</h1>", *parts])
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{body}\n</body></html>\n"


def write_report(
    out: Path, rows: list[dict], summary: dict, protocol: str, system: str, folders: tuple[Path | None, Path, Path],
    looseness: float, problems: Sequence[str],
) -> None:  # fmt: skip
    """out/report.html of what step 5 scored.   folders: of images, if any, of the system's predictions, of the truth."""
    images, segs, gts = folders
    pictures = worst_pictures(rows, system, protocol, images, segs, gts, looseness) if images else {}
    cases = len({row["case"] for row in rows})
    facts = [f"{cases} cases of {gts}, protocol {protocol}. {units()}.", *(f"Not scored: {p}" for p in problems[:20])]
    page = report_page(rows, summary, protocol, system, segs / "objects.csv", pictures, facts)
    save_text(out / "report.html", page)


def _bars(rows: list[dict], metric: str, protocol: str) -> str:
    from matplotlib.figure import Figure  # only where something is drawn

    intervals, title = bar_intervals(rows, f"{metric}_{protocol}"), f"{metric.upper()} ({protocol})"
    if not intervals:  # the challenge's protocol gives no score where a label number is left out
        return f"<p>No case has a {html.escape(title)}.</p>"
    figure = Figure(figsize=(6.5, 1 + 0.16 * len(intervals)), layout="constrained")
    unit = METRICS[metric].unit
    plot_bars(intervals, title, figure.subplots(), unit)
    systems = dict.fromkeys(system for system, _ in intervals)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    means = ", ".join(f"{system} {_with_unit(intervals[system, AVERAGE][0], unit)}" for system in systems)
    return _figure(_png(figure), f"Bars of {title} by modality. On average: {means}.")


def _score_rows(summary: dict, protocol: str) -> str:
    """The same numbers as a table that can be copied."""
    header, *body = summary_cells(summary, score_columns(summary, protocol), decimals=1)
    titles = "".join(f"<th>{html.escape(title).replace(': ', '<br>')}</th>" for title in header)
    lines = "\n".join("<tr>" + "".join(f"<td>{text}</td>" for text in cells) + "</tr>" for cells in body)
    return f"<div class=wide><table><tr>{titles}</tr>\n{lines}\n</table></div>"


def _with_unit(score: float, unit: str) -> str:
    return f"{100 * score:.1f}" if unit == "%" else f"{score:.1f} {unit}"


def _worst_case(row: dict, title: str, picture: np.ndarray, protocol: str) -> str:
    values = {name: (row[f"{name}_{protocol}"], metric.unit) for name, metric in METRICS.items()}
    scores = ", ".join(f"{name.upper()} {_with_unit(*value)}" for name, value in values.items())
    told = f"{title} ({row['modality']}, objects: {row['objects']}): {scores}"
    ok, content = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    source = _embedded(content.tobytes(), "jpeg")
    return _figure(source, f"Three pictures of {told}: image with boxes, prediction, reference.", told)


def _against_iou(rows: list[dict], objects: Path, system: str, protocol: str) -> str:
    if not objects.is_file():
        return (
            f"<p>{html.escape(str(objects))} is not there, so the predicted IoU is not known; step 4 writes it: "
            "<code>python 04_infer.py</code>.</p>"
        )
    name = next((name for name, metric in METRICS.items() if not metric.of_case), "")
    points = predicted_and_true(rows, objects, system, f"{name}_{protocol}")
    if len(points) < 3:
        return f"<p>{len(points)} objects have a score and a predicted IoU: too few to draw.</p>"
    from matplotlib.figure import Figure

    correlation = np.corrcoef([a for _, a, _ in points], [b for _, _, b in points])[0, 1]
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    plot_against_iou(points, f"{name.upper()} ({protocol})", figure.subplots(), METRICS[name].unit)
    against = f"predicted IoU against {name.upper()}. Correlation {correlation:.2f}"
    told = f"{len(points)} objects of {system}, a dot each: {against}."
    return _figure(_png(figure), told, told)


def _figure(source: str, alt: str, caption: str = "") -> str:
    under = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{html.escape(alt)}" src="{source}">{under}</figure>'


def _png(figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return _embedded(content.getvalue(), "png")


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
