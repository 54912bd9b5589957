"""The page that step 5 writes of what it scored: one HTML file that opens without a network.

Read top to bottom: what is shown (bars with intervals, predicted IoU and score, worst cases) -> the page, which
embeds each picture with a text for those who cannot see it.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

import tables
from figures import PALETTE, figure3_row, overlay
from formats import InputError
from formats.case import Case, told_in_a_sentence
from formats.readers import list_cases, name_of, read_case
from formats.writing import save_text
from grid import boxes_from_labels, drawn_boxes
from metrics import METRICS
from tables import AVERAGE, LEVEL, read_labels, read_rows, terminal_table, units

WORST = 6  # cases that are shown
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: black; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; } figure { margin: 1.5rem 0; } pre { overflow-x: auto; font-size: 0.8rem; }
figcaption, .small { color: dimgray; font-size: 0.875rem; } code { overflow-wrap: anywhere; }
"""


def bar_intervals(rows: list[dict], score: str) -> dict[tuple[str, str], tuple[float, float, float]]:
    """{(system, line of the table): (mean, low, high)} of one score, 0..1, with its bootstrap interval.

    rows: step 5's `score_case`. low and high are nan where there is one case.
    """
    return {
        (system, name): tables.mean_and_interval(values)
        for system, mine in tables.by_system(rows).items()
        for name, values in tables.table_lines(mine, score).items()
        if values
    }


def predicted_and_true(rows: list[dict], objects: Path, system: str, score: str) -> list[tuple[str, float, float]]:
    """(modality, predicted IoU, score) of each object of a system, 0..1.   objects: the objects.csv of step 4. Or InputError."""
    try:
        lines = [line for line in read_rows(objects) if line["predicted_iou"]]
        predicted = {(line["case"], int(line["label"])): float(line["predicted_iou"]) for line in lines}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{objects}: needs columns case, label and predicted_iou; run 04_infer.py again") from error
    mine = [(row, *labelled) for row in rows if row["system"] == system for labelled in row["labels"].items()]
    found = [(row["modality"], predicted.get((row["case"], label)), of.get(score, math.nan)) for row, label, of in mine]
    # a label that only the other protocol scores has no such score
    return [point for point in found if point[1] is not None and not math.isnan(point[2])]


def worst_cases(rows: list[dict], system: str, score: str) -> list[dict]:
    """The rows of a system's cases with the worst score, the worst first. Cases without one are left out."""
    mine = [row for row in rows if row["system"] == system and not math.isnan(row[score])]
    up = METRICS[score.rpartition("_")[0]].more_is_better
    return sorted(mine, key=lambda row: row[score], reverse=not up)[:WORST]


def three_pictures(case: Case, boxes: np.ndarray, segs: np.ndarray, gts: np.ndarray) -> tuple[str, np.ndarray]:
    """(the case's name with its slice, (h, w, 3) uint8: image with boxes, prediction and reference side by side)"""
    title, (image, labels, asked), (_, truth, _) = figure3_row(case.name, case.image, boxes, segs, gts)
    panels = [overlay(image, np.zeros_like(labels), asked), overlay(image, labels), overlay(image, truth)]
    joined = np.concatenate([np.pad(p, ((0, 0), (0, 8), (0, 0)), constant_values=255) for p in panels], axis=1)
    factor = min(1.0, 1200 / joined.shape[1])
    return title, cv2.resize(joined, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


# The page ----------------------------------------------------------------------------------------------------------


def write_report(
    out: Path, rows: list[dict], summary: dict, protocol: str, system: str, folders: tuple[Path | None, Path, Path],
    looseness: float, problems: Sequence[str],
) -> None:  # fmt: skip
    """out/report.html of what step 5 scored.

    rows, summary: step 5's `score_case` and `summarize`'s.   protocol: of the scores that are drawn.
    system: of the worst cases and of the predicted IoU.   folders: of images, if any, of its predictions, of the truth.
    """
    _, segs, gts = folders
    # a picture shows drawn cases only where there is no other; the table marks them
    shown = [row for row in rows if not row.get("drawn")] or rows
    facts = [f"{len({row['case'] for row in rows})} cases of {gts}, protocol {protocol}. {units()}."]
    facts += [f"Not scored: {problem}" for problem in problems[:20]]
    parts = [
        *(f"<p>{html.escape(fact)}</p>" for fact in facts),
        "<h2>Scores by modality</h2>",
        *(_bars(shown, metric, protocol) for metric in METRICS),
        f"<p class=small>Black lines: {LEVEL:.0%} bootstrap intervals of the mean; none where there is one case. The two gray "
        "systems never look at the image: a filled box, and the ellipse inscribed in it.</p>",
        f"<pre>{html.escape(terminal_table(summary, protocol))}</pre>",
        f"<h2>The worst cases of {html.escape(system)}</h2>",
        *_worst(shown, system, protocol, folders, looseness),
        "<h2>Does the network know when it is wrong?</h2>",
        _against_iou(shown, segs / "objects.csv", system, protocol),
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>Evaluation</title><style>{STYLE}</style>"
    body = "\n".join(["<h1>What step 5 scored</h1>", *parts])
    page = f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{body}\n</body></html>\n"
    save_text(out / "report.html", page)


def _bars(rows: list[dict], metric: str, protocol: str) -> str:
    """Mean of a score by modality, a bar a system, with its interval; the two references are gray."""
    from matplotlib.figure import Figure  # only where something is drawn

    intervals, title = bar_intervals(rows, f"{metric}_{protocol}"), f"{metric.upper()} ({protocol})"
    if not intervals:  # the challenge's protocol gives no score where a label number is left out
        return f"<p>No case has a {html.escape(title)}.</p>"
    unit = METRICS[metric].unit
    factor, limits, words = (100, (0, 100), "per cent") if unit == "%" else (1, (0, None), unit)
    systems, modalities = (list(dict.fromkeys(names)) for names in zip(*intervals, strict=True))
    figure, share = Figure(figsize=(6.5, 1 + 0.16 * len(intervals)), layout="constrained"), 0.8 / len(systems)
    ax = figure.subplots()
    for i, system in enumerate(systems):
        gray = {"filled box": "0.85", "inscribed ellipse": "0.6"}.get(system)
        colour = gray or tuple(PALETTE[[4, 2, 1, 3, 5, 0]][i % len(PALETTE)] / 255)
        numbers = np.array([intervals.get((system, m), (math.nan,) * 3) for m in modalities]) * factor
        places = np.arange(len(modalities)) + (i - (len(systems) - 1) / 2) * share
        ax.barh(places, numbers[:, 0], share, color=colour, label=system.replace("$", r"\$"))
        ax.hlines(places, numbers[:, 1], numbers[:, 2], color="black", linewidth=1)
    ax.set(yticks=range(len(modalities)), yticklabels=modalities, xlim=limits, xlabel=f"{title}, {words}")
    ax.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    means = ", ".join(f"{system} {_number(intervals[system, AVERAGE][0], unit)}" for system in systems)
    return _figure(figure, f"Bars of {title} by modality. On average: {means}.")


def _worst(rows: list[dict], system: str, protocol: str, folders: tuple, looseness: float) -> list[str]:
    """The cases that have an image, of those with the worst score by the first row of METRICS."""
    (images, segs, gts), main = folders, next(iter(METRICS))
    files = {f"{name_of(path)}.npz": path for path in list_cases(images)} if images else {}
    worst = [row for row in worst_cases(rows, system, f"{main}_{protocol}") if row["case"] in files]
    if not worst:
        return ["<p>Step 5 was run without images: name their folder with <code>--images</code>.</p>"]
    parts = [
        f"<p class=small>The {len(worst)} cases with the worst {main.upper()}, the worst first: image with boxes, prediction, "
        "reference. Of a volume the slice that shows most of the reference.</p>"
    ]
    for row in worst:
        with told_in_a_sentence(files[row["case"]]):
            case = read_case(files[row["case"]])
        found, true = (read_labels(f / row["case"], k, case.grid_shape)[0] for f, k in ((segs, "segs"), (gts, "gts")))
        boxes = boxes_from_labels(true)[1] if case.boxes is None else case.boxes
        asked = drawn_boxes(case.name, boxes, looseness, case.grid_shape)
        title, picture = three_pictures(case, asked, found, true)
        scores = (f"{name.upper()} {_number(row[f'{name}_{protocol}'], one.unit)}" for name, one in METRICS.items())
        told = f"{title} ({row['modality']}, objects: {row['objects']}): {', '.join(scores)}"
        parts.append(_figure(picture, f"Three pictures of {told}: image with boxes, prediction, reference.", told))
    return parts


def _against_iou(rows: list[dict], objects: Path, system: str, protocol: str) -> str:
    """A dot an object: predicted IoU against the first score that objects have, coloured by modality."""
    if not objects.is_file():
        missing = html.escape(str(objects))
        return f"<p>The predicted IoU is not known, because {missing} is missing: step 4 writes it.</p>"
    name = next((name for name, metric in METRICS.items() if not metric.of_case), "")
    points = predicted_and_true(rows, objects, system, f"{name}_{protocol}")
    if len(points) < 3:
        return f"<p>{len(points)} objects have a score and a predicted IoU: too few to draw.</p>"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    for i, modality in enumerate(dict.fromkeys(m for m, _, _ in points)):
        x, y = np.array([(a, b) for m, a, b in points if m == modality]).T
        style = {"marker": "osD"[i // len(PALETTE)], "color": tuple(PALETTE[i % len(PALETTE)] / 255)}
        ax.plot(x, y, linestyle="", markersize=4, alpha=0.7, label=f"{modality}, {len(x)}", **style)
    top = 1.02 if METRICS[name].unit == "%" else None
    ax.set(xlabel="predicted IoU", ylabel=f"{name.upper()} ({protocol})", xlim=(None, 1.02), ylim=(None, top))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    told = f"{len(points)} objects of {system}, a dot each: predicted IoU against {name.upper()}."
    both = np.array([point[1:] for point in points]).T
    if (np.ptp(both, axis=1) > 0).all():  # of values that are all alike there is none
        told += f" Correlation {np.corrcoef(*both)[0, 1]:.2f}."
    return _figure(figure, told, told)


def _number(score: float, unit: str) -> str:
    """A score as the page shows it, with its unit unless that is per cent."""
    return f"{100 * score:.1f}" if unit == "%" else f"{score:.1f} {unit}"


def _figure(picture, alt: str, caption: str = "") -> str:
    """A matplotlib Figure, or an RGB array, inside the page."""
    buffer = io.BytesIO()
    if isinstance(picture, np.ndarray):
        buffer.write(cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes())
    else:
        picture.savefig(buffer, format="png", dpi=110)
    kind, content = "jpeg" if isinstance(picture, np.ndarray) else "png", base64.b64encode(buffer.getvalue()).decode()
    under = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/{kind};base64,{content}">{under}</figure>'
