"""What the notebooks show: figures with a text for those who cannot see them, tables, guesses.

Figure 1 is drawn by network.py, Figures 2 and 3 by figures.py of the house.

Curves and bars are plain matplotlib, written where they are shown, so that they can be changed there. `WIDTH` inches stay
readable on a telephone. COLOURS are those of figures.py, which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, Markdown
from matplotlib.figure import Figure
from PIL import Image as Pictures

from figures import PALETTE, YELLOW, overlay

WIDTH = 5.4  # inches of a figure
COLOURS = [tuple(colour / 255) for colour in PALETTE[[4, 2, 1, 3, 5, 0]]]  # of lines and bars, the darkest first
plt.rcParams.update({
    "figure.dpi": 110, "figure.figsize": (WIDTH, 3.2), "figure.constrained_layout.use": True, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.prop_cycle": plt.cycler(color=COLOURS, marker=list("osD^v*")),
})  # fmt: skip


def off_by(guess: float, measured: float, unit: str = "") -> None:
    """Say how far a guess was off. The output of the cell is folded where the notebook is only read."""
    print(
        f"You guessed {guess:g}{unit}; measured: {measured:.4g}{unit}. You were off by {abs(guess - measured):.3g}{unit}."
    )


def show(figure: Figure, alt: str, colours: int | None = None) -> Image:
    """The figure as a PNG for the notebook. alt: what it shows and what there is to see, in a sentence or two.

    colours: so many at most, which makes the file of a photograph smaller.
    """
    return animate([frame_of(figure)], alt, colours=colours)


def frame_of(figure: Figure) -> np.ndarray:
    """A figure as an RGB picture (h, w, 3) uint8, and the figure closed, else Jupyter shows it once more."""
    figure.canvas.draw()
    frame = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # before the figure is closed: it loses its canvas
    plt.close(figure)
    return frame


def animate(frames: Sequence[np.ndarray], alt: str, milliseconds: int = 300, colours: int | None = None) -> Image:
    """RGB or gray frames, uint8 of one size, as an animated PNG, which every browser plays without an end.

    colours: so many at most in all frames together, which makes the file smaller.
    """
    first, *rest = (Pictures.fromarray(frame) for frame in frames)
    if colours:
        together, plain = Pictures.fromarray(np.concatenate(frames)), Pictures.Dither.NONE
        # this method keeps rare colours, such as a box's
        palette = together.quantize(colours, Pictures.Quantize.MAXCOVERAGE, kmeans=3)
        first, *rest = (frame.quantize(palette=palette, dither=plain) for frame in (first, *rest))
    picture = io.BytesIO()
    moves = {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0} if rest else {}
    first.save(picture, format="png", optimize=True, **moves)
    return Image(data=picture.getvalue(), format="png", alt=alt)


def show_table(text: str) -> Markdown:
    """A table of tables.py or paper_tables.py, which is Markdown, as the notebook shows it."""
    return Markdown(text)


def draw_image(ax, image: np.ndarray, title: str = "", box=None, scale: tuple[float, float] = (0, 255)):
    """One image without ticks. scale: the grey levels of black and white, the same wherever images are compared.

    box: x0 y0 x1 y1, pixels, both ends inclusive, drawn in yellow.
    """
    ax.imshow(image, cmap="gray", vmin=scale[0], vmax=scale[1], interpolation="nearest")
    ax.set_title(title, fontsize=10)
    ax.axis("off")
    return ax if box is None else draw_box(ax, box)


def draw_box(ax, box):
    """A box prompt in yellow. box: x0 y0 x1 y1, pixels, both ends inclusive."""
    x0, y0, x1, y1 = (float(value) for value in box)
    xs, ys = [x0 - 0.5, x1 + 0.5, x1 + 0.5, x0 - 0.5, x0 - 0.5], [y0 - 0.5, y0 - 0.5, y1 + 0.5, y1 + 0.5, y0 - 0.5]
    ax.plot(xs, ys, color=tuple(np.array(YELLOW) / 255), linewidth=1.5, marker="")
    return ax


def draw_images(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 3) -> Figure:
    """Images in a grid, all with one grey scale."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, rows * (WIDTH / columns + 0.3)), squeeze=False)
    for i, ax in enumerate(axes.ravel()):
        ax.axis("off")
        if i < len(images):
            draw_image(ax, images[i], titles[i])
    return figure


def draw_overlay(ax, image: np.ndarray, labels: np.ndarray, title: str = "", boxes: np.ndarray | None = None):
    """Masks and yellow boxes over an image, as in Figure 3. labels: (H, W), 0 is background; boxes: (N, 4), pixels."""
    ax.imshow(overlay(image, labels, boxes))
    ax.set_title(title, fontsize=10)
    ax.axis("off")
    return ax
