"""Figures 1 to 3 of the paper, overlays, training curves: data and axes in, axes out.

Figure 1 is drawn in notebooks/02_network.ipynb. `draw_figures` makes the files of Figures 2 and 3 for step 5.
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
from grid import boxes_to_grid, label_bounds, resize_to_grid
from presets import PRESETS

YELLOW = (255, 221, 0)  # box prompts, as in the paper's Figure 3
PALETTE = np.array(  # mask colours, RGB, told apart by colour-blind readers too (Okabe and Ito 2008)
    [(86, 180, 233), (0, 158, 115), (213, 94, 0), (204, 121, 167), (0, 114, 178), (230, 159, 0)], dtype=np.uint8
)
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


def figure1(rows: list[dict], ax, marked: dict[str, str] | None = None, skips: Sequence[tuple[str, str]] = ()):
    """[P Fig. 1] The network as boxes: the image encoder from top to bottom, prompt encoder and mask decoder beside it.

    rows: of quantize.trace_parts, the image encoder's first; each is a box with its output's shape (C x H x W), its
    parameters and its multiply-adds. A row that others are inside is a frame round their boxes. marked: {name of a
    row: a line of text}; such a box gets a thick frame and the text. skips: pairs of the image encoder's rows; the
    output of the first goes to the second as well.
    """
    from matplotlib.patches import Rectangle  # matplotlib is imported only where something is drawn

    colours = {"image_encoder": PALETTE[0], "prompt_encoder": PALETTE[5], "mask_decoder": PALETTE[1]}
    inputs = {"image_encoder": "image\n3 x 256 x 256", "prompt_encoder": "box\n4 numbers, x y x y"}
    holders = {row["inside"] for row in rows}
    boxes = [row for row in rows if row["name"] not in holders]
    left = [row for row in boxes if row["side"] == "image_encoder"]
    right = [row for row in boxes if row["side"] != "image_encoder"]
    height = len(left)
    places = {row["name"]: (0, height - 1 - i) for i, row in enumerate(left)}  # column, row from below
    places |= {row["name"]: (1, len(right) - 1 - i) for i, row in enumerate(right)}
    ends: dict[int, float] = {}  # where the last box of each column ends
    for column, side in enumerate(inputs):
        top = 1.1 + max((y for x, y in places.values() if x == column), default=-1)
        ax.text(column, top, inputs[side], ha="center", va="center", fontsize=10)
        ends[column] = top - 0.27
    for row in [*(row for row in rows if row["name"] in holders), *boxes]:
        count, work = row["parameters"], row["multiply_adds"] / 1e9
        size = f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"
        text = f"{row['name']}\n{' x '.join(map(str, row['output']))}\n{size} parameters, {work:.2f} G"
        note = (marked or {}).get(row["name"])
        text = f"{text}\n{note}" if note else text
        frame = {"edgecolor": PALETTE[2] / 255, "linewidth": 3} if note else {"edgecolor": "0.4", "linewidth": 0.8}
        pale = 1 - 0.35 * (1 - colours[row["side"]] / 255)  # so that the text stays readable
        if row["name"] in holders:
            inner = [places[one["name"]] for one in boxes if one["inside"] == row["name"]]
            x, low, high = inner[0][0], min(y for _, y in inner) - 1.15, max(y for _, y in inner) + 0.45
            margin = 0.1 + 0.06 * len(skips) if skips and x == 0 else 0.02  # skips run inside the frame
            ax.add_patch(
                Rectangle((x - 0.46 - margin, low), 0.94 + margin, high - low, facecolor=(pale + 2) / 3, **frame)
            )
            ax.text(x, low + 0.36, text, ha="center", va="center", fontsize=9, linespacing=1.15)
            continue
        x, y = places[row["name"]]
        ax.add_patch(Rectangle((x - 0.46, y - 0.37), 0.92, 0.74, facecolor=pale, **frame))
        ax.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.15)
        ax.annotate("", (x, y + 0.38), (x, ends[x]), arrowprops={"arrowstyle": "->"})
        ends[x] = y - 0.38
    decoder = [row["name"] for row in right if row["side"] == "mask_decoder"]
    if left and decoder:  # the embedding goes over to the decoder
        (x, y), (to_x, to_y) = places[left[-1]["name"]], places[decoder[0]]
        ax.annotate("", (to_x - 0.47, to_y), (x + 0.47, y), arrowprops={"arrowstyle": "->"})
    for i, (start, end) in enumerate(skips):
        y, to_y, x = places[start][1], places[end][1] + 0.15 - 0.25 * i, -0.54 - 0.06 * i
        ax.plot([-0.46, x, x], [y, y, to_y], color="black", linewidth=1, marker="")
        ax.annotate("", (-0.46, to_y), (x, to_y), arrowprops={"arrowstyle": "->", "shrinkA": 0})
    ax.set(xlim=(-0.6 - 0.06 * len(skips), 1.5), ylim=(-1.2 if holders - {""} else -0.5, height + 0.5))
    ax.axis("off")
    return ax


def figure2(image: np.ndarray, axes):
    """[P Fig. 2] The three channels of one gray image: raw, diffused, equalized, on the 256 grid.

    image: (H, W) uint8, or (H, W, 3) with three equal channels. axes: three Axes; returned."""
    channels = three_channels(resize_to_grid(image), PRESETS["fixed"])
    for ax, channel, title in zip(axes, np.moveaxis(channels, -1, 0), ("raw", "diffused", "equalized"), strict=True):
        ax.imshow(channel, cmap="gray", vmin=0, vmax=255)
        ax.set_title(title)
        ax.axis("off")
    return axes


def figure3(rows: list[tuple[str, tuple, tuple]], axes):
    """[P Fig. 3] A row a case: image with boxes, prediction, truth.

    rows: (title, prediction, truth), each of the two what `overlay` takes. axes: (len(rows), 3) Axes; returned."""
    for (title, (image, labels, boxes), truth), three in zip(rows, axes, strict=True):
        shown = {f"{title}: box prompts": (image, np.zeros_like(labels), boxes), "prediction": (image, labels, boxes)}
        for ax, (name, panel) in zip(three, (shown | {"reference": truth}).items(), strict=True):
            ax.imshow(overlay(*panel))
            ax.set_title(printable(name), fontsize=9, parse_math=False)  # a name may hold a $
            ax.axis("off")
    return axes


def figure3_row(name: str, image: np.ndarray, boxes: np.ndarray | None, segs: np.ndarray, gts: np.ndarray) -> tuple:
    """One row for `figure3`: a case with its prediction and truth, label maps of the image's (H, W) or (D, H, W).

    A volume shows the slice that is busiest in the truth."""
    truth = flat_view(image, gts, boxes)
    if gts.ndim == 2:
        return name, (image, segs, boxes), truth
    z = busiest_slice(gts)
    return f"{name}, slice {z}", (truth[0], segs[z], truth[2]), truth


def figure_idea(image: np.ndarray, box_xyxy: np.ndarray, segmenter, axes):
    """[P Figs. 1, 2] The whole idea on one gray image, in six pictures from the box to the mask.

    image: (H, W) uint8; box_xyxy: (4,) pixels; segmenter: segment.Segmenter on PyTorch; axes: (2, 3) Axes; returned.
    An embedding has 256 numbers for each cell. The three directions in which those vary most become red, green, blue.
    """
    boxes, nothing = box_xyxy[None], np.zeros(image.shape, np.uint16)
    on_grid = boxes_to_grid(boxes, *image.shape)
    channels = three_channels(resize_to_grid(image), segmenter.preset)
    stack = np.concatenate([np.pad(channels[..., i], ((0, 8), (0, 0)), constant_values=255) for i in range(3)])
    embedding = segmenter.embed(image)  # (1, 256, 64, 64), padding at the right and below
    height, width = np.array(channels.shape[:2]) // 4
    cells = embedding[0, :, :height, :width].numpy().reshape(256, -1)
    varies = np.linalg.eigh(np.cov(cells))[1][:, -3:]  # (256, 3), the last varies most
    colours = (cells - cells.mean(axis=1, keepdims=True)).T @ varies
    low, high = np.percentile(colours, [2, 98], axis=0)
    colours = ((colours - low) / (high - low)).clip(0, 1).reshape(height, width, 3)
    tokens = segmenter.engine.network.prompt_encoder(embedding.new_tensor(on_grid))[0][0].detach()  # (2, 256)
    logits = segmenter.decode(embedding, on_grid)[0][0, : channels.shape[0], : channels.shape[1]]
    most = float(np.abs(logits).max())
    mask = segmenter.masks(embedding, boxes, image.shape).labels
    shown = [
        ("image and box", overlay(image, nothing, boxes), {}),
        ("three channels: raw,\ndiffused, equalized", stack, {"cmap": "gray", "vmin": 0, "vmax": 255}),
        ("embedding: 256 numbers\nfor each of 64 x 64 cells", colours, {"interpolation": "nearest"}),
        (
            "box tokens: 256 numbers\nfor each of two corners",
            tokens,
            {"cmap": "cividis", "aspect": 60, "interpolation": "nearest"},
        ),
        (
            "logits: where above 0 (red)\nthe pixel is the object's",
            logits,
            {"cmap": "RdBu_r", "vmin": -most, "vmax": most},
        ),
        ("mask", overlay(image, mask, boxes), {}),
    ]
    for ax, (title, picture, settings) in zip(axes.ravel(), shown, strict=True):
        ax.imshow(picture, **settings)
        ax.set_title(title, fontsize=13)
        ax.axis("off")
    axes[0, 0].figure.canvas.draw()  # else the panels are not yet where they will be
    image_at, channels_at, embedding_at, tokens_at, logits_at, mask_at = (ax.transAxes for ax in axes.ravel())
    below, above, left, right = (0.5, -0.03), (0.5, 1.38), (-0.03, 0.5), (1.03, 0.5)
    for start, end, (first, last), name in (
        (image_at, channels_at, (right, left), "enhance"),
        (channels_at, embedding_at, (right, left), "image\nencoder"),
        (image_at, tokens_at, (below, above), "    prompt encoder"),
        (embedding_at, logits_at, (below, (0.97, 1.32)), ""),
        (tokens_at, logits_at, (right, left), "mask\ndecoder"),
        (logits_at, mask_at, (right, left), "> 0"),
    ):
        axes[0, 0].annotate("", last, first, end, start, arrowprops={"arrowstyle": "-|>", "linewidth": 1.5})
        x, y = (start.transform(first) + end.transform(last)) / 2
        at = axes[0, 0].figure.transFigure.inverted().transform((x, y + 4 * ("encoder" not in name or "\n" in name)))
        upright = first == below
        axes[0, 0].figure.text(
            *at, name, fontsize=12, ha="left" if upright else "center", va="center" if upright else "bottom"
        )
    return axes


def draw_figures(out: Path, rows: list[dict], named: Sequence[str], images: Path, segs: Path, gts: Path) -> None:
    """figure3.png of the named cases, else of the first four; figure2.png of their first gray 2D image, else of any.

    rows: of step 5's `score_case`, one system's. images, segs, gts: folders of the cases, of that system's predictions,
    and of the truth. InputError for a case that has no image or was not scored."""
    from matplotlib.figure import Figure  # not pyplot: no window, this also runs on a server

    from formats.truth import read_labels  # only here: step 4 draws too

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

    cases, found = [read(files[name]) for name in named or list(files)[:4]], []
    for case in cases:
        places = {"segs": segs / f"{case.name}.npz", "gts": gts / f"{case.name}.npz"}
        masks = [read_labels(path, key, case.grid_shape)[0] for key, path in places.items()]
        found.append(figure3_row(case.name, case.image, case.boxes, *masks))
    figure = Figure(figsize=(9, 2.6 * len(found)))
    figure3(found, figure.subplots(len(found), 3, squeeze=False))
    save_figure(out / "figure3.png", figure)
    every = itertools.chain(cases, map(read, files.values()))
    if gray := next((case for case in every if not case.is_3d and is_gray(case.image)), None):
        figure = Figure(figsize=(9, 3.2))
        figure2(gray.image, figure.subplots(1, 3))
        save_figure(out / "figure2.png", figure)


def plot_losses(log: list[dict], ax=None, losses: Sequence[tuple[int, float]] = ()):
    """Training and validation loss over the steps.   log: rows of log.csv, step, train_loss, validation_loss.

    losses: (step, loss) of every training step, if known. They are drawn thin, and their mean over the last steps
    thick, in place of the log's training loss.   ax: those of a figure of their own if None."""
    if ax is None:
        from matplotlib.figure import Figure  # not pyplot: no window system, and no state to clean up

        ax = Figure(figsize=(6, 4)).subplots()
    steps = [row["step"] for row in log]
    if losses:
        at, values = np.array(losses, float).T
        count, span = len(values), int(np.clip(len(values) // 10, 1, 100))
        mean = np.convolve(values, np.ones(span))[:count] / np.minimum(np.arange(count) + 1, span)
        ax.plot(at, values, color="C0", alpha=0.35, linewidth=0.8, label="training, each step")
        ax.plot(at, mean, color="C0", linewidth=2, label=f"training, mean of the last {span}")
    else:
        ax.plot(steps, [row["train_loss"] for row in log], marker="o", markersize=3, label="training")
    if log:
        validation = [row["validation_loss"] for row in log]
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
