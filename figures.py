"""Figures 2 and 3 of the paper, overlays, training curves: data and axes in, axes out.

Figure 1 is drawn in notebooks/02_network.ipynb, by notebooks/network.py. `draw_figures` makes the files of Figures 2
and 3 for step 5.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from enhance import is_gray, three_channels
from formats import InputError, printable
from formats.case import Case, told_in_a_sentence
from formats.readers import list_cases, name_of, read_case
from formats.writing import save_figure
from grid import boxes_from_labels, drawn_boxes, label_bounds, resize_to_grid
from presets import PRESETS

YELLOW = (255, 221, 0)  # box prompts, as in the paper's Figure 3
PALETTE = np.array(  # mask colours, RGB, told apart by colour-blind readers too (Okabe and Ito 2008)
    [(86, 180, 233), (0, 158, 115), (213, 94, 0), (204, 121, 167), (0, 114, 178), (230, 159, 0)], dtype=np.uint8
)
GRAY = {"cmap": "gray", "vmin": 0, "vmax": 255}
OVERLAY_SIDE = 512  # pixels; smaller images are enlarged to it, so that outlines can be seen


def overlay(
    image: np.ndarray, labels: np.ndarray, boxes_xyxy: np.ndarray | None = None, numbers: bool = False
) -> np.ndarray:
    """Masks as tinted areas with outlines, boxes in yellow. Small objects get thin lines. [P Fig. 3]

    image: (H, W) or (H, W, 3) uint8; labels: (H, W), 0 is background; boxes_xyxy: (N, 4), pixels of the image.
    numbers: write its label beside each object. Returns (h, w, 3) RGB uint8, enlarged if the image is small."""
    factor = max(1, round(OVERLAY_SIDE / max(image.shape[:2])))
    rgb = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    rgb = rgb.repeat(factor, axis=0).repeat(factor, axis=1).copy()
    big = labels.repeat(factor, axis=0).repeat(factor, axis=1)
    inside = big > 0
    colours = PALETTE[(big[inside].astype(np.int64) - 1) % len(PALETTE)]
    rgb[inside] = (0.65 * rgb[inside] + 0.35 * colours).astype(np.uint8)
    widest = max(1, round(max(rgb.shape[:2]) / 200))
    bounds = label_bounds(labels).items()
    bounds = {label: (low[::-1] * factor, (high[::-1] + 1) * factor) for label, (low, high) in bounds}  # x, y
    widths = {label: _line_width(*ends, widest) for label, ends in bounds.items()}
    width_of = np.zeros(max(widths, default=0) + 1, np.uint8)  # by label
    width_of[list(widths)] = list(widths.values())
    for width in sorted(set(widths.values())):
        # outline: object pixels that see another label within `width` pixels, the same on all sides
        window = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
        edge = (width_of[big] == width) & (cv2.dilate(big, window) != cv2.erode(big, window))
        rgb[edge] = PALETTE[(big[edge].astype(np.int64) - 1) % len(PALETTE)]
    for box in boxes_xyxy if boxes_xyxy is not None else ():
        low = (np.floor(box[:2]) * factor).astype(int)
        high = ((np.floor(box[2:]) + 1) * factor - 1).astype(int)  # inclusive: the last pixel lies inside
        cv2.rectangle(rgb, low.tolist(), high.tolist(), YELLOW, _line_width(low, high, widest))
    for label, ends in bounds.items() if numbers else ():
        _write_number(rgb, str(label), *ends)
    return rgb


def layer(labels: np.ndarray, opacity: float = 0.35) -> np.ndarray:
    """Masks as a picture to lay over the image: labels (H, W), 0 is background -> (H, W, 4) RGBA uint8.

    >>> layer(np.array([[0, 1]]), opacity=1).tolist()
    [[[0, 0, 0, 0], [86, 180, 233, 255]]]
    """
    inside, rgba = labels > 0, np.zeros((*labels.shape, 4), np.uint8)
    rgba[inside, :3] = PALETTE[(labels[inside].astype(np.int64) - 1) % len(PALETTE)]
    rgba[inside, 3] = round(255 * opacity)
    return rgba


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """The outer outline of each part of a mask (H, W) bool: (n, 2) x, y of its outermost pixels; the longest first.

    An outline holds every pixel of the border, so cv2.fillPoly makes the part of it again, without its holes.
    >>> [part.tolist() for part in outlines(np.array([[1, 1, 0, 1]], bool))]
    [[[0, 0], [1, 0]], [[3, 0]]]
    """
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return sorted((part[:, 0] for part in found), key=len, reverse=True)


def _line_width(low: np.ndarray, high: np.ndarray, widest: int) -> int:
    """Pixels: a sixtieth of an object's longer side, at least 1."""
    return int(np.clip(round(float((high - low).max()) / 60), 1, widest))


def _write_number(rgb: np.ndarray, text: str, low: np.ndarray, high: np.ndarray) -> None:
    """White on black above an object's top left corner, or inside it where there is no room.   low, high: x, y."""
    scale = float(np.clip((high - low).max() / 150, 0.35, max(rgb.shape[:2]) / 900 + 0.1))
    thickness = max(1, round(1.5 * scale))
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    x = int(np.clip(low[0], 1, max(1, rgb.shape[1] - width - 2)))
    y = int(low[1]) - 3 if low[1] > height + 4 else int(low[1]) + height + 3
    for colour, extra in (((0, 0, 0), 2), ((255, 255, 255), 0)):
        cv2.putText(rgb, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness + extra, cv2.LINE_AA)


def busiest_slice(labels: np.ndarray) -> int:
    """The slice z of a label volume (D, H, W) that shows most objects, and of those the most voxels."""
    objects = [len(np.unique(plane)) for plane in labels]
    return max(range(len(labels)), key=lambda z: (objects[z], np.count_nonzero(labels[z])))


def flat_view(image: np.ndarray, labels: np.ndarray, boxes: np.ndarray | None) -> tuple:
    """What `overlay` takes, of a 2D case as it is, of a 3D one its busiest slice and the boxes that cross it."""
    if labels.ndim == 2:
        return image, labels, boxes
    z = busiest_slice(labels)
    crossing = None if boxes is None else boxes[(boxes[:, 2] <= z) & (z <= boxes[:, 5])][:, [0, 1, 3, 4]]
    return image[z], labels[z], crossing


def figure2(image: np.ndarray, axes):
    """[P Fig. 2] The three channels of one gray image: raw, diffused, equalized, on the 256 grid.

    image: (H, W) uint8, or (H, W, 3) with three equal channels. axes: three Axes; returned."""
    channels = three_channels(resize_to_grid(image), PRESETS["fixed"])
    for ax, channel, title in zip(axes, np.moveaxis(channels, -1, 0), ("raw", "diffused", "equalized"), strict=True):
        _show(ax, title, "large", channel, **GRAY)
    return axes


def figure3(rows: list[tuple[str, tuple, tuple]], axes):
    """[P Fig. 3] A row a case: image with boxes, prediction, truth.

    rows: (title, prediction, truth), each of the two what `overlay` takes. axes: (len(rows), 3) Axes; returned."""
    for (title, (image, labels, boxes), truth), three in zip(rows, axes, strict=True):
        shown = {f"{title}: box prompts": (image, np.zeros_like(labels), boxes), "prediction": (image, labels, boxes)}
        for ax, (name, panel) in zip(three, (shown | {"reference": truth}).items(), strict=True):
            _show(ax, printable(name), 9, overlay(*panel))
    return axes


def _show(ax, title: str, size: float | str, picture: np.ndarray, **settings) -> None:
    """A picture without an axis.   size: of the title, as Matplotlib takes it.   settings: imshow's."""
    ax.imshow(picture, **settings)
    ax.set_title(title, fontsize=size, parse_math=False)  # a name may hold a $
    ax.axis("off")


def figure3_row(name: str, image: np.ndarray, boxes: np.ndarray | None, segs: np.ndarray, gts: np.ndarray) -> tuple:
    """One row for `figure3`: a case with its prediction and truth, label maps of the image's (H, W) or (D, H, W).

    A volume shows the slice that is busiest in the truth."""
    truth = flat_view(image, gts, boxes)
    if gts.ndim == 2:
        return name, (image, segs, boxes), truth
    z = busiest_slice(gts)
    return f"{name}, slice {z}", (truth[0], segs[z], truth[2]), truth


def row_of_case(case: Case, segs: Path, gts: Path, looseness: float = 0.0) -> tuple:
    """`figure3_row` of a case, with its label maps from the folders segs and gts. Boxes it lacks are those of the truth.

    looseness: of the boxes that step 4 asked with. InputError for a label map that is not there or of another shape."""
    from formats.truth import read_labels  # only here: step 4 draws too

    places = {"segs": segs / f"{case.name}.npz", "gts": gts / f"{case.name}.npz"}
    found, truth = (read_labels(path, key, case.grid_shape)[0] for key, path in places.items())
    boxes = boxes_from_labels(truth)[1] if case.boxes is None else case.boxes
    return figure3_row(case.name, case.image, drawn_boxes(case.name, boxes, looseness, truth.shape), found, truth)


def draw_figures(out: Path, rows: list[dict], named: Sequence[str], images: Path, segs: Path, gts: Path) -> None:
    """figure3.png of the named cases, else of the first four; figure2.png of their first gray 2D image, else of any.

    rows: of step 5's `score_case`, one system's. images, segs, gts: folders of the cases, of that system's predictions,
    and of the truth. InputError for a case that has no image or was not scored."""
    from matplotlib.figure import Figure  # not pyplot: no window, this also runs on a server

    scored = {row["case"] for row in rows}
    files = {name_of(path): path for path in list_cases(images) if f"{name_of(path)}.npz" in scored}
    if not files:
        raise InputError(f"{images}: holds no image of the cases that were scored; name their folder with --images")
    for name in named:
        if name not in files:
            raise InputError(f"{images}: no case {name} that was scored; there are {', '.join(files)}")

    def read(path: Path) -> Case:
        with told_in_a_sentence(path):
            return read_case(path)

    cases = [read(files[name]) for name in named or list(files)[:4]]
    found = [row_of_case(case, segs, gts) for case in cases]
    figure = Figure(figsize=(9, 2.6 * len(found)))
    figure3(found, figure.subplots(len(found), 3, squeeze=False))
    save_figure(out / "figure3.png", figure)
    every = itertools.chain(cases, map(read, files.values()))
    if gray := next((case for case in every if not case.is_3d and is_gray(case.image)), None):
        figure = Figure(figsize=(9, 3.2))
        figure2(gray.image, figure.subplots(1, 3))
        save_figure(out / "figure2.png", figure)


def plot_losses(log: list[dict], losses: Sequence[tuple[int, float]]):
    """Training and validation loss over the steps. -> the axes of a figure

    log: rows of log.csv, with step and validation_loss.   losses: (step, loss) of every training step, drawn thin, and
    their mean over the last steps thick."""
    from matplotlib.figure import Figure  # not pyplot: no window system, and no state to clean up

    ax = Figure(figsize=(6, 4)).subplots()
    at, values = np.array(losses, float).T
    count, span = len(values), int(np.clip(len(values) // 10, 1, 100))
    mean = np.convolve(values, np.ones(span))[:count] / np.minimum(np.arange(count) + 1, span)
    ax.plot(at, values, color="C0", alpha=0.35, linewidth=0.8, label="training, each step")
    ax.plot(at, mean, color="C0", linewidth=2, label=f"training, mean of the last {span}")
    if log:
        steps, validation = [row["step"] for row in log], [row["validation_loss"] for row in log]
        ax.plot(steps, validation, color="C1", marker="o", markersize=3, label="validation")
    ax.set(xlabel="optimiser steps", ylabel="loss")
    ax.legend(frameon=False)
    return ax


def plot_dice(rows: list[dict[str, str]], ax):
    """Mean Dice of each modality over the steps of all runs, one after the other, a line between them.

    rows: dice_by_modality.csv, with columns stage, step and one a modality."""
    start, ends = {}, [0]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        start[stage] = ends[-1]
        ends.append(start[stage] + max(int(row["step"]) for row in rows if row["stage"] == stage))
    steps = [start[row["stage"]] + int(row["step"]) for row in rows]
    for i, modality in enumerate(list(rows[0])[2:]):
        # there are six colours
        style = {"marker": "osD"[i // 6], "linestyle": ("-", "--", ":")[i // 6], "color": tuple(PALETTE[i % 6] / 255)}
        ax.plot(steps, [float(row[modality]) for row in rows], label=modality, markersize=3, **style)
    for end in ends[1:-1]:
        ax.axvline(end, color="0.7", linewidth=1)
    ax.set(xlabel=f"optimiser steps, between the lines: {', '.join(start)}", ylabel="Dice, 256 grid")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax
