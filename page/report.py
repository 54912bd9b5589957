"""The page that step 5 writes of what it scored: one HTML file that opens without a network.

It shows the table of scores, the worst cases as pictures, and whether the predicted IoU tells good masks from bad ones.
"""

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np

from figures import overlay, row_of_case
from formats import InputError
from formats.readers import list_cases, name_of, read_case
from formats.writing import save_text
from metrics import METRICS
from tables import cell, drawn_note, read_rows, score_columns, summary_cells, title_and_factor, units

WORST = 6  # cases that are shown


def write_report(
    out: Path, rows: list[dict], summary: dict, protocol: str, system: str, folders: tuple[Path | None, Path, Path],
    looseness: float, problems: Sequence[str],
) -> None:  # fmt: skip
    """out/report.html of what step 5 scored.

    rows, summary: step 5's `score_case` and `summarize`'s.   protocol: of the scores that are shown.
    system: of the worst cases and of the predicted IoU.   folders: of images, if any, of its predictions, of the truth.
    """
    count = len({row["case"] for row in rows})
    facts = [f"{count} cases of {folders[2]}, protocol {protocol}. {units()}, s in seconds."]
    facts += [f"Not scored: {problem}" for problem in problems[:20]]
    lines = summary_cells(summary, score_columns(summary, protocol), decimals=1)
    lines = ["<tr>" + "".join(f"<td>{escape(text)}" for text in line) for line in lines]
    # a picture shows drawn cases only where there is no other
    shown = [row for row in rows if row["system"] == system]
    shown = [row for row in shown if not row.get("drawn")] or shown
    page = f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Evaluation</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ display: block; overflow-x: auto; font-size: 0.8rem; }} td {{ padding: 0 0.6rem; text-align: right; }}
img {{ max-width: 100%; }} figure {{ margin: 1.5rem 0; }}
</style>
<h1>What step 5 scored</h1>
<p>{"<br>".join(map(escape, facts))}
<h2>Scores by modality</h2>
<table>{"".join(lines)}</table>
<p>The filled box and the ellipse inscribed in it never look at the image: so much a box alone is worth.
{" ".join(drawn_note(summary))}
<h2>The worst cases of {escape(system)}</h2>
{_pictures(shown, protocol, folders, looseness)}
<h2>Does the network know when it is wrong?</h2>
<p>{escape(agreement(shown, folders[1] / "objects.csv", protocol))}
"""
    save_text(out / "report.html", page)


def worst_cases(rows: list[dict], score: str) -> list[dict]:
    """The rows with the worst score, the worst first. Cases without one are left out."""
    up = METRICS[score.rpartition("_")[0]].more_is_better
    scored = [row for row in rows if not math.isnan(row[score])]
    return sorted(scored, key=lambda row: row[score], reverse=not up)[:WORST]


def _pictures(rows: list[dict], protocol: str, folders: tuple[Path | None, Path, Path], looseness: float) -> str:
    """The worst cases by the first row of METRICS, those that have an image, as HTML."""
    images, *labels = folders
    if images is None:
        return "<p>Step 5 was run without images: name their folder with <code>--images</code>."
    files = {f"{name_of(path)}.npz": path for path in list_cases(images)}
    titles = {f"{name}_{protocol}": title_and_factor(f"{name}_{protocol}") for name in METRICS}
    figures = ["<p>The worst first: image with boxes, prediction, reference."]
    for row in worst_cases([row for row in rows if row["case"] in files], next(iter(titles))):
        name, *shown = row_of_case(read_case(files[row["case"]]), *labels, looseness)
        scores = "; ".join(f"{title}: {cell(factor * row[score], 1)}" for score, (title, factor) in titles.items())
        told = escape(f"{name} ({row['modality']}, objects: {row['objects']}): {scores}")
        source = f"data:image/jpeg;base64,{base64.b64encode(three_pictures(*shown)).decode()}"
        alt = f"Image with boxes, prediction, reference of {told}"
        figures.append(f'<figure><img alt="{alt}" src="{source}"><figcaption>{told}</figcaption></figure>')
    return "\n".join(figures)


def three_pictures(predicted: tuple, truth: tuple) -> bytes:
    """Image with boxes, prediction and reference side by side, as JPEG.   Arguments: each what `figures.overlay` takes."""
    image, labels, boxes = predicted
    panels = [overlay(image, np.zeros_like(labels), boxes), overlay(image, labels), overlay(*truth[:2])]
    joined = np.hstack([np.pad(panel, ((0, 0), (0, 8), (0, 0)), constant_values=255) for panel in panels])
    factor = min(1.0, 1200 / joined.shape[1])
    small = cv2.resize(joined, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small[..., ::-1])[1].tobytes()


def agreement(rows: list[dict], objects: Path, protocol: str) -> str:
    """How the predicted IoU goes with the first score that objects have, in a sentence.

    rows: of one system.   objects: its objects.csv of step 4, which may be missing. InputError for a bad one.
    """
    if not objects.is_file():
        return f"The predicted IoU is not known, because {objects} is missing: step 4 writes it."
    name = next((name for name, metric in METRICS.items() if not metric.of_case), "")
    points = np.array(predicted_and_true(rows, objects, f"{name}_{protocol}"))
    # of values that are all alike there is no correlation
    if len(points) < 3 or not np.ptp(points, axis=0).all():
        return f"{len(points)} objects have a score and a predicted IoU: too few, or too much alike, to tell."
    found = np.corrcoef(points.T)[0, 1]
    return f"Correlation {found:.2f} of the predicted IoU and {name.upper()}, {len(points)} objects."


def predicted_and_true(rows: list[dict], objects: Path, score: str) -> list[tuple[float, float]]:
    """(predicted IoU, score) of each object that has both, 0..1.   Arguments: `agreement`'s; the score's column."""
    try:
        lines = [(row["case"], row["label"], row["predicted_iou"] or "nan") for row in read_rows(objects)]
        predicted = {(case, int(label)): float(iou) for case, label, iou in lines}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{objects}: needs columns case, label and predicted_iou; run 04_infer.py again") from error
    of_both = [(row["case"], label, scores) for row in rows for label, scores in row["labels"].items()]
    # the other protocol may have more labels
    points = [(predicted.get((case, label), math.nan), scores.get(score, math.nan)) for case, label, scores in of_both]
    return [point for point in points if not any(map(math.isnan, point))]
