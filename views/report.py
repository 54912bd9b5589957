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
from files import MODALITIES, InputError
from files.case import Case
from metrics import METRICS
from tables import AVERAGE, LEVEL, REFERENCES, bootstrap_interval, cell, modalities_of, read_rows, systems_of

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

    rows: `tables.score_case`'s. low and high are nan where there is one case.
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


def plot_bars(intervals: dict[tuple[str, str], tuple[float, float, float]], title: str, ax):
    """Mean of a score by modality, a bar a system, with its interval; the two references are gray. Per cent."""
    systems = list(dict.fromkeys(system for system, _ in intervals))
    modalities = list(dict.fromkeys(modality for _, modality in intervals))
    share = 0.8 / len(systems)
    for i, system in enumerate(systems):
        gray = {"filled box": "0.85", "inscribed ellipse": "0.6"}.get(system)
        colour = gray or tuple(PALETTE[[4, 2, 1, 3, 5, 0]][i % len(PALETTE)] / 255)
        numbers = np.array([intervals.get((system, m), (math.nan,) * 3) for m in modalities]) * 100
        places = np.arange(len(modalities)) + (i - (len(systems) - 1) / 2) * share
        ax.barh(places, numbers[:, 0], share, color=colour, label=system)
        ax.hlines(places, numbers[:, 1], numbers[:, 2], color="black", linewidth=1)
    ax.set(yticks=range(len(modalities)), yticklabels=modalities, xlim=(0, 100), xlabel=f"{title}, per cent")
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


def plot_against_iou(points: list[tuple[str, float, float]], title: str, ax):
    """A dot an object: predicted IoU against the score, both 0..1, coloured by modality."""
    for i, modality in enumerate(dict.fromkeys(m for m, _, _ in points)):
        x, y = np.array([(a, b) for m, a, b in points if m == modality]).T
        style = {"marker": "osD"[i // len(PALETTE)], "color": tuple(PALETTE[i % len(PALETTE)] / 255)}
        ax.plot(x, y, linestyle="", markersize=4, alpha=0.7, label=f"{modality}, {len(x)}", **style)
    ax.set(xlabel="predicted IoU", ylabel=title, xlim=(None, 1.02), ylim=(None, 1.02))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def worst_cases(rows: list[dict], system: str, score: str, count: int = WORST) -> list[dict]:
    """The rows of a system's cases with the lowest score, the lowest first. Cases without one are left out."""
    mine = [row for row in rows if row["system"] == system and not math.isnan(row[score])]
    return sorted(mine, key=lambda row: row[score])[:count]


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

    rows, summary: `tables.score_case`'s and `summarize`'s.   protocol: of the scores that are drawn.
    system: of the worst cases and of the predicted IoU.   objects: its objects.csv, which need not exist.
    pictures: {case file: what `three_pictures` gives}, of worst cases.   facts: sentences under the title.
    """
    worst = [row for row in worst_cases(rows, system, f"dsc_{protocol}") if row["case"] in pictures]
    parts = [
        *(f"<p>{html.escape(fact)}</p>" for fact in facts),
        "<h2>Scores by modality</h2>",
        *(_bars(rows, metric, protocol) for metric in METRICS),
        f"<p class=small>Black lines: {LEVEL:.0%} bootstrap intervals of the mean; none where there is one case. The two gray "
        "systems never look at the image: a filled box, and the ellipse inscribed in it.</p>",
        _score_rows(summary, protocol),
        f"<h2>The worst cases of {html.escape(system)}</h2>",
        f"<p class=small>The {len(worst)} cases with the lowest DSC, the lowest first: image with boxes, prediction, reference. Of a "
        "volume the slice that shows most of the reference.</p>"
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


def _bars(rows: list[dict], metric: str, protocol: str) -> str:
    from matplotlib.figure import Figure  # only where something is drawn

    intervals, title = bar_intervals(rows, f"{metric}_{protocol}"), f"{metric.upper()} ({protocol})"
    if not intervals:  # the challenge's protocol gives no score where a label number is left out
        return f"<p>No case has a {html.escape(title)}.</p>"
    figure = Figure(figsize=(6.5, 1 + 0.16 * len(intervals)), layout="constrained")
    plot_bars(intervals, title, figure.subplots())
    systems = dict.fromkeys(system for system, _ in intervals)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    means = ", ".join(f"{system} {100 * intervals[system, AVERAGE][0]:.1f}" for system in systems)
    return _figure(_png(figure), f"Bars of {title} by modality. On average: {means}.")


def _score_rows(summary: dict, protocol: str) -> str:
    """The same numbers as a table that can be copied."""
    systems = systems_of(summary)
    columns = [(s, k, t) for s in systems for k, t in (*((f"{m}_{protocol}", m.upper()) for m in METRICS), ("seconds", "s"))
               if t != "s" or s not in REFERENCES]  # fmt: skip
    header = "".join(f"<th>{html.escape(s)}<br>{t}</th>" for s, _, t in columns)
    lines = []
    for modality in modalities_of(summary):
        of = {s: summary.get((s, modality), {}) for s in systems}
        numbers = [of[s].get(k, math.nan) * (1 if t == "s" else 100) for s, k, t in columns]
        cells = "".join(f"<td>{cell(number, 1)}</td>" for number in numbers)
        lines.append(f"<tr><td>{modality}</td><td>{of[systems[-1]]['cases']}</td>{cells}</tr>")
    body = "\n".join(lines)
    return f"<div class=wide><table><tr><th>modality</th><th>cases</th>{header}</tr>\n{body}\n</table></div>"


def _worst_case(row: dict, title: str, picture: np.ndarray, protocol: str) -> str:
    scores = ", ".join(f"{metric.upper()} {100 * row[f'{metric}_{protocol}']:.1f}" for metric in METRICS)
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
    points = predicted_and_true(rows, objects, system, f"dsc_{protocol}")
    if len(points) < 3:
        return f"<p>{len(points)} objects have a score and a predicted IoU: too few to draw.</p>"
    from matplotlib.figure import Figure

    correlation = np.corrcoef([a for _, a, _ in points], [b for _, _, b in points])[0, 1]
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    plot_against_iou(points, f"DSC ({protocol})", figure.subplots())
    told = f"{len(points)} objects of {system}, a dot each: predicted IoU against DSC. Correlation {correlation:.2f}."
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
