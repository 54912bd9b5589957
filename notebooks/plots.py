"""Teaching plots of the notebooks: data in, a matplotlib figure or a picture out. The paper's figures are in figures.py.

Every notebook draws with `new_figure` and ends with `show`, which asks for a text for readers who cannot see the picture.
Widths are in inches; 5.4 stays readable on a telephone. Colours are those of figures.py, which colour-blind readers tell
apart.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from IPython.display import Image, Markdown
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from figures import PALETTE, YELLOW, overlay

WIDTH = 5.4  # inches of a figure
DPI = 110
COLOURS = [tuple(colour / 255) for colour in PALETTE[[4, 2, 1, 3, 5, 0]]]  # of lines and bars, the darkest first
MARKERS = "osD^v*"  # a second sign beside the colour
BOX = tuple(np.array(YELLOW) / 255)


# ---------------------------------------------------------------- for all


def new_figure(rows: int = 1, columns: int = 1, height: float = 3.2, width: float = WIDTH):
    """A Figure and its axes: one Axes, or an array (rows, columns) without axes of length one."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    return figure, figure.subplots(rows, columns)


def show(figure: Figure, alt: str, colours: int | None = None) -> Image:
    """The figure as a PNG for the notebook. alt: what it shows and what there is to see, in a sentence or two.

    colours: so many at most, which halves the file of a photograph.
    """
    if colours:
        return animate([frame_of(figure)], alt, colours=colours)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return Image(data=picture.getvalue(), format="png", alt=alt)


def show_table(text: str) -> Markdown:
    """A table of tables.py or paper_tables.py, which is Markdown, as the notebook shows it."""
    return Markdown(text)


def animate(frames: Sequence[np.ndarray], alt: str, milliseconds: int = 300, colours: int | None = None) -> Image:
    """RGB or gray frames, uint8 of one size, as an animated PNG, which every browser plays without an end.

    colours: so many at most in all frames together, which makes the file smaller.
    """
    from PIL import Image as Pictures  # Pillow comes with matplotlib

    first, *rest = (Pictures.fromarray(frame) for frame in frames)
    if colours:
        together, plain = Pictures.fromarray(np.concatenate(frames)), Pictures.Dither.NONE
        # this method keeps rare colours, such as a box's
        palette = together.quantize(colours, Pictures.Quantize.MAXCOVERAGE, kmeans=3)
        first, *rest = (frame.quantize(palette=palette, dither=plain) for frame in (first, *rest))
    picture = io.BytesIO()
    first.save(picture, format="png", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return Image(data=picture.getvalue(), format="png", alt=alt)


def draw_image(ax, image: np.ndarray, title: str = "", box=None, scale: tuple[float, float] = (0, 255)):
    """One image without ticks. scale: the grey levels of black and white, the same wherever images are compared.

    box: x0 y0 x1 y1, pixels, both ends inclusive, drawn in yellow.
    """
    ax.imshow(image, cmap="gray", vmin=scale[0], vmax=scale[1], interpolation="nearest")
    ax.set_title(title, fontsize=10)
    ax.axis("off")
    if box is not None:
        draw_box(ax, box)
    return ax


def draw_box(ax, box):
    """A box prompt in yellow. box: x0 y0 x1 y1, pixels, both ends inclusive."""
    x0, y0, x1, y1 = (float(value) for value in box)
    xs, ys = [x0 - 0.5, x1 + 0.5, x1 + 0.5, x0 - 0.5, x0 - 0.5], [y0 - 0.5, y0 - 0.5, y1 + 0.5, y1 + 0.5, y0 - 0.5]
    ax.plot(xs, ys, color=BOX, linewidth=1.5)
    return ax


def draw_images(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 2, boxes=None, height: float | None = None, scale=(0, 255)) -> Figure:  # fmt: skip
    """Images in a grid, all with one grey scale. boxes: one for each image, or None."""
    rows = -(-len(images) // columns)
    figure, axes = new_figure(rows, columns, height or rows * (WIDTH / columns + 0.3))
    for i, ax in enumerate(np.atleast_1d(axes).ravel()):
        ax.axis("off")
        if i < len(images):
            draw_image(ax, images[i], titles[i], None if boxes is None else boxes[i], scale)
    return figure


def draw_curves(ax, curves: dict[str, tuple], xlabel: str, ylabel: str, markers: bool = True, **settings):
    """Lines with a legend. curves: {label: (x, y)}; settings: of Axes.set, such as ylim or yscale."""
    for i, (label, (x, y)) in enumerate(curves.items()):
        style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4} if markers else {}
        ax.plot(x, y, color=COLOURS[i % len(COLOURS)], label=label, **style)
    ax.set(xlabel=xlabel, ylabel=ylabel, **settings)
    ax.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        ax.legend(frameon=False, fontsize=9)
    return ax


def draw_bars(ax, groups: Sequence[str], bars: dict[str, Sequence[float]], ylabel: str, intervals: dict[str, Sequence] | None = None, **settings):  # fmt: skip
    """Bars side by side in groups. bars: {label: a value a group}; intervals: {label: (low, high) a group}, in the same unit."""
    share, places = 0.8 / len(bars), np.arange(len(groups))
    for i, (label, values) in enumerate(bars.items()):
        x = places + (i - (len(bars) - 1) / 2) * share
        ax.bar(x, values, share, color=COLOURS[i % len(COLOURS)], label=label, hatch=("", "//", "..", "xx")[i % 4], edgecolor="white")  # fmt: skip
        for place, (low, high) in zip(x, (intervals or {}).get(label, ()), strict=False):
            ax.plot([place, place], [low, high], color="black", linewidth=1)
    ax.set_xticks(places, groups, rotation=30 if max(map(len, groups)) > 6 else 0, ha="right" if max(map(len, groups)) > 6 else "center", fontsize=9)  # fmt: skip
    ax.set(ylabel=ylabel, **settings)
    ax.spines[["top", "right"]].set_visible(False)
    if len(bars) > 1:
        ax.legend(frameon=False, fontsize=9)
    return ax


# ---------------------------------------------------------------- 01, preprocessing


# ---------------------------------------------------------------- 02, training


def frame_of(figure: Figure) -> np.ndarray:
    """A figure as an RGB picture (h, w, 3) uint8: a frame for `animate`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ---------------------------------------------------------------- 03, quantization


# ---------------------------------------------------------------- 04, inference


def draw_overlay(ax, image: np.ndarray, labels: np.ndarray, title: str = "", boxes: np.ndarray | None = None):
    """Masks and yellow boxes over an image, as in Figure 3. labels: (H, W), 0 is background; boxes: (N, 4), pixels."""
    ax.imshow(overlay(image, labels, boxes))
    ax.set_title(title, fontsize=10)
    ax.axis("off")
    return ax


def draw_stacks(ax, names: Sequence[str], parts: dict[str, Sequence[float]], title: str = "", unit: str = "s"):
    """A bar for each name, cut into parts, its sum at the end. parts: {label: a value a name}."""
    ends = np.zeros(len(names))
    for i, (label, values) in enumerate(parts.items()):
        ax.barh(names, values, left=ends, color=COLOURS[i % len(COLOURS)], label=label, hatch=("", "//", "..", "xx")[i % 4], edgecolor="white")  # fmt: skip
        ends = ends + values
    for name, end in zip(names, ends, strict=True):
        ax.text(end, name, f" {end:.2g} {unit}", va="center", fontsize=9)
    ax.set_title(title, fontsize=10, loc="left")
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2 * max(ends))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


# ---------------------------------------------------------------- 05, evaluation


def draw_dots(ax, names: Sequence[str], dots: dict[str, Sequence[float]], xlabel: str, intervals: dict[str, Sequence] | None = None, **settings):  # fmt: skip
    """A line of dots for each name, the first at the top. dots: {label: a value a name}; intervals: {label: (low, high) a name}."""
    for i, (label, values) in enumerate(dots.items()):
        y = np.arange(len(names)) + (i - (len(dots) - 1) / 2) * (0.25 if intervals else 0)
        for place, (low, high) in zip(y, (intervals or {}).get(label, ()), strict=False):
            ax.plot([low, high], [place, place], color=COLOURS[i % len(COLOURS)], linewidth=1.5)
        ax.plot(values, y, MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], markersize=6, label=label)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set(xlabel=xlabel, ylim=(len(names) - 0.5, -0.5), **settings)
    ax.grid(axis="y", linewidth=0.4, alpha=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if len(dots) > 1:
        ax.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
    return ax


def draw_elements(ax, gt: np.ndarray, places: Sequence[np.ndarray], near: Sequence[np.ndarray]):
    """Contour elements of truth and prediction over the truth: dots are within the tolerance, triangles are not.

    places: (n, 2) y, x of each contour's elements, pixels; near: (n,) bool of each. Truth first.
    """
    ax.imshow(gt, cmap="gray", vmin=0, vmax=2.5, interpolation="nearest")
    for i, (points, inside, name) in enumerate(zip(places, near, ("truth", "prediction"), strict=True)):
        for chosen, marker, word in ((inside, "o", "near"), (~inside, "^", "far")):
            y, x = points[chosen].T
            ax.plot(x, y, marker, color=COLOURS[4 * i], markersize=6, markeredgecolor="white", label=f"{name}, {word}: {len(x)}")  # fmt: skip
    ax.set(xlabel="x (pixels)", ylabel="y (pixels)")
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


# ---------------------------------------------------------------- 06, paper and code


# ---------------------------------------------------------------- 07, fork
