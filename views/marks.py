"""What is drawn over an image: the outline of a mask, and the label of a box."""

from __future__ import annotations

import numpy as np
from contourpy import contour_generator
from matplotlib.path import Path as Outline


def place_label(ax, box, text: str, colour, size: float = 9):
    """A text above a box, or below one in the lower half, away from the middle of the image, moved until all of it is inside."""
    left, high = box[0] + box[2] < sum(ax.get_xlim()), 2 * box[1] < sum(ax.get_ylim())
    label = ax.text(
        box[2] + 0.5 if left else box[0] - 0.5, box[1] - 1 if high else box[3] + 1, text, fontsize=size,
        ha="right" if left else "left", va="bottom" if high else "top",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": size / 6},
    )  # fmt: skip
    drawn, room, place = label.get_window_extent().padded(3), ax.bbox, label.get_position()
    shift = np.maximum(room.min - drawn.min, 0) - np.maximum(drawn.max - room.max, 0)
    label.set_position(ax.transData.inverted().transform(ax.transData.transform(place) + shift))
    return label


def outline_of(labels: np.ndarray, label: int, rows: slice, columns: slice, step: int = 1) -> Outline | None:
    """The border of an object on a label map (H, W), along the borders of its pixels. rows, columns: where it may be.

    step: looks at each step-th pixel, for large pictures whose pixels are smaller than those of the screen.
    """
    mask = np.pad((labels[rows, columns][::step, ::step] == label).astype(np.float32), 1)
    x = columns.start + step * (np.arange(mask.shape[1]) - 1) + (step - 1) / 2  # a pixel's centre has whole coordinates
    y = rows.start + step * (np.arange(mask.shape[0]) - 1) + (step - 1) / 2
    lines = contour_generator(x, y, mask).lines(0.5)
    return Outline.make_compound_path(*(Outline(line, closed=True) for line in lines)) if lines else None
