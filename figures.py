"""One function a figure: data and axes in, axes out; no model, no score.

python figures.py --demo demo      draws Figure 2 and Figure 3 from the demo's files into demo/figures/
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

import cv2
import numpy as np

from data import resize_to_grid
from enhance import is_gray, three_channels
from presets import PRESETS
from readers import InputError, list_cases, load_npz, read_npz
from writers import save_bytes

YELLOW = (255, 221, 0)  # box prompts, as in the paper's Figure 3
PALETTE = np.array(  # mask colours, RGB, told apart by colour-blind readers too (Okabe and Ito 2008)
    [(86, 180, 233), (0, 158, 115), (213, 94, 0), (204, 121, 167), (0, 114, 178), (230, 159, 0)], dtype=np.uint8
)
OVERLAY_SIDE = 512  # pixels; smaller images are enlarged to it, so that outlines can be seen


def overlay(image: np.ndarray, labels: np.ndarray, boxes_xyxy: np.ndarray | None = None) -> np.ndarray:
    """Masks as tinted areas with outlines, boxes in yellow. [P Fig. 3]

    image: (H, W) or (H, W, 3) uint8; labels: (H, W), 0 is background; boxes_xyxy: (N, 4), pixels of the image.
    Returns (h, w, 3) RGB uint8, enlarged by a whole factor if the image is small.
    """
    factor = max(1, round(OVERLAY_SIDE / max(image.shape[:2])))
    rgb = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    rgb = rgb.repeat(factor, axis=0).repeat(factor, axis=1).copy()
    big = labels.repeat(factor, axis=0).repeat(factor, axis=1)
    width = max(1, round(max(rgb.shape[:2]) / 200))
    inside = big > 0
    colours = PALETTE[(big[inside].astype(np.int64) - 1) % len(PALETTE)]
    rgb[inside] = (0.65 * rgb[inside] + 0.35 * colours).astype(np.uint8)
    # outline: object pixels that see another label within `width` pixels, the same on all sides
    window = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    edge = inside & (cv2.dilate(big, window) != cv2.erode(big, window))
    rgb[edge] = PALETTE[(big[edge].astype(np.int64) - 1) % len(PALETTE)]
    for box in boxes_xyxy if boxes_xyxy is not None else ():
        x0, y0 = (np.floor(box[:2]) * factor).astype(int)
        x1, y1 = ((np.floor(box[2:]) + 1) * factor - 1).astype(int)  # inclusive: the last pixel lies inside
        cv2.rectangle(rgb, (int(x0), int(y0)), (int(x1), int(y1)), YELLOW, width)
    return rgb


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


def figure2(image: np.ndarray, axes) -> None:
    """[P Fig. 2] The three channels of one gray image (H, W) uint8: raw, diffused, equalized, as the
    network sees them: on the 256 grid. axes: three Axes."""
    channels = three_channels(resize_to_grid(image), PRESETS["fixed"])
    for ax, channel, title in zip(axes, np.moveaxis(channels, -1, 0), ("raw", "diffused", "equalized"), strict=True):
        ax.imshow(channel, cmap="gray", vmin=0, vmax=255)
        ax.set_title(title)
        ax.axis("off")


def figure3(rows: list[tuple[str, tuple, tuple]], axes) -> None:
    """[P Fig. 3] A row a case: image with boxes, prediction, truth. rows: (title, prediction, truth), each what `overlay`
    takes; axes: (len(rows), 3) Axes."""
    for (title, prediction, truth), (left, middle, right) in zip(rows, axes, strict=True):
        image, labels, boxes = prediction
        left.imshow(overlay(image, np.zeros_like(labels), boxes))
        middle.imshow(overlay(image, labels, boxes))
        right.imshow(overlay(*truth))
        left.set_title(f"{title}: box prompts", fontsize=9)
        middle.set_title("prediction", fontsize=9)
        right.set_title("reference", fontsize=9)
        for ax in (left, middle, right):
            ax.axis("off")


def plot_losses(log: list[dict], ax) -> None:
    """Training and validation loss over the steps. log: rows of log.csv, step, train_loss, validation_loss."""
    steps = [row["step"] for row in log]
    for key, label in (("train_loss", "training"), ("validation_loss", "validation")):
        ax.plot(steps, [row[key] for row in log], marker="o", markersize=3, label=label)
    ax.set(xlabel="optimiser steps", ylabel="loss")
    ax.legend(frameon=False)


def plot_dice(rows: list[dict[str, str]], ax) -> None:
    """Mean Dice of each modality over the steps of both stages, one after the other. rows: dice_by_modality.csv, with
    columns stage, step and one a modality."""
    last = {stage: max(int(row["step"]) for row in rows if row["stage"] == stage) for stage in ("distill", "finetune")}
    steps = [int(row["step"]) + (last["distill"] if row["stage"] == "finetune" else 0) for row in rows]
    for i, modality in enumerate(list(rows[0])[2:]):
        style = {"marker": "o", "markersize": 3, "linestyle": "--" if i > 9 else "-"}  # there are ten colours
        ax.plot(steps, [float(row[modality]) for row in rows], label=modality, **style)
    ax.axvline(last["distill"], color="0.7", linewidth=1)
    ax.set(xlabel="optimiser steps: distillation, then (right of the line) fine-tuning", ylabel="Dice, 256 grid")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def save_loss_curve(path: Path, log: list[dict]) -> None:
    """`plot_losses` as a PNG; nothing if there is no row yet."""
    if not log:
        return
    from matplotlib.figure import Figure  # not pyplot: no window system, and no state to clean up

    figure = Figure(figsize=(6, 4))
    plot_losses(log, figure.subplots())
    save_figure(path, figure)


def save_figure(path: Path, figure) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    save_bytes(path, buffer.getvalue())


def demo_row(folder: Path, name: str) -> tuple[str, tuple, tuple]:
    """One row of Figure 3: a case of the demo with its prediction and truth, in 3D its busiest slice."""
    case = read_npz(folder / "imgs" / f"{name}.npz")
    segs, gts = (load_npz(folder / key / f"{name}.npz").get(key) for key in ("segs", "gts"))
    if segs is None or gts is None or segs.shape != gts.shape:
        raise InputError(f"{folder}: case {name} has no prediction or truth of its shape; run 04_infer.py again")
    if not case.is_3d:
        return name, (case.image, segs, case.boxes), (case.image, gts, case.boxes)
    z = busiest_slice(gts)
    _, _, boxes = flat_view(case.image, gts, case.boxes)
    return f"{name}, slice {z}", (case.image[z], segs[z], boxes), (case.image[z], gts[z], boxes)


def main(argv: list[str] | None = None) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")  # no window: this also runs on a server
    import matplotlib.pyplot as plt

    p = argparse.ArgumentParser(description="Draw Figure 2 and Figure 3 from the demo's files.")
    p.add_argument("--demo", type=Path, default=Path("demo"), help="folder with imgs/, gts/ and segs/ (default: demo)")
    p.add_argument("--figure2", metavar="NAME", help="case of Figure 2 (default: the first gray 2D one)")
    p.add_argument("--figure3", nargs="+", metavar="NAME", help="cases of Figure 3 (default: the first four)")
    p.add_argument("--training", type=Path, help="draw --curve from this dice_by_modality.csv, and nothing else")
    p.add_argument("--curve", type=Path, default=Path("curve.png"), help="picture for --training (default: curve.png)")
    args = p.parse_args(argv)
    if args.training:
        figure, ax = plt.subplots(figsize=(7, 4))
        with args.training.open(newline="", encoding="utf-8") as file:
            plot_dice(list(csv.DictReader(file)), ax)
        save_figure(args.curve, figure)
        return [args.curve]
    try:
        files = {path.stem: path for path in list_cases(args.demo / "imgs")}
        for name in [args.figure2, *(args.figure3 or [])]:
            if name and name not in files:
                raise InputError(f"{args.demo / 'imgs'}: has no case {name}; there are {', '.join(files)}")
        rows = [demo_row(args.demo, name) for name in args.figure3 or list(files)[:4]]
        cases = [read_npz(files[args.figure2])] if args.figure2 else map(read_npz, files.values())
        gray = next((c.image for c in cases if not c.is_3d and is_gray(c.image)), None)
        if gray is None:
            raise InputError(f"{args.figure2 or args.demo / 'imgs'}: no gray 2D image; Figure 2 is about gray ones")
    except InputError as error:
        sys.exit(f"figures.py: {error}")
    written = [args.demo / "figures" / "figure2.png", args.demo / "figures" / "figure3.png"]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
    figure2(gray, axes)
    save_figure(written[0], figure)
    figure, axes = plt.subplots(len(rows), 3, figsize=(9, 2.6 * len(rows)), squeeze=False)
    figure3(rows, axes)
    save_figure(written[1], figure)
    plt.close("all")
    print(f"figures.py: wrote {written[0]} and {written[1]}")
    return written


if __name__ == "__main__":
    main()
