"""A box drawn with the mouse, its mask at once: the interactive cell of 05_infer.ipynb, with ipympl (requirements-dev.txt).

    from notebooks.drawing import draw_boxes

    drawing = draw_boxes(segmenter, image, boxes, names=["disc", "vessel"])  # boxes: x0 y0 x1 y1, pixels, both ends inclusive
    drawing  # the last line of a cell: it is shown

No `%matplotlib widget` is needed. The image is embedded once, by `draw_boxes`; each box then costs one pass through the
decoder. `drawing.boxes` (N, 4) and `drawing.found` (segment.Masks) are what is shown last. `drawing.milliseconds`, the time
for its masks, changes from run to run: a committed notebook does not print it.

Without a mouse (`python -m notebooks`, nbconvert, a page where notebooks are hosted) the fixed boxes and their masks are a
picture with an alt text, the same in each run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import cv2
import numpy as np
from ipympl.backend_nbagg import Canvas, FigureManager
from IPython.display import display
from matplotlib.backend_bases import Event, MouseEvent
from matplotlib.figure import Figure
from matplotlib.widgets import RectangleSelector

from figures import overlay
from formats.writing import someone_is_there
from notebooks.plots import BOX, DPI, show
from segment import Segmenter

TITLE = 0.3  # inches above the image
SMALLEST = 2  # pixels that a box needs in width and in height
TOO_SMALL = f"Too small: a box needs {SMALLEST} x {SMALLEST} pixels or more."
FIXED = "Fixed boxes and predicted IoU"
HINT = "Drag a box with the mouse"


def draw_boxes(segmenter: Segmenter, image: np.ndarray, boxes, names: Sequence[str] | None = None, width: float = 3.4) -> Drawing:  # fmt: skip
    """An image with fixed boxes and their masks, on which the mouse draws another box. Shown as the last line of a cell.

    image: (H, W) or (H, W, 3) uint8; boxes: (N, 4) x0 y0 x1 y1, pixels, both ends inclusive; names: one a box.
    width: of the picture, inches of 110 pixels.
    """
    return Drawing(segmenter, image, np.asarray(boxes), names or [f"box {i + 1}" for i in range(len(boxes))], width)


class Drawing:
    """An image with boxes and their masks, and the mouse that draws another box. `draw_boxes` makes it."""

    def __init__(self, segmenter: Segmenter, image: np.ndarray, boxes: np.ndarray, names: Sequence[str], width: float):
        self.segmenter, self.image = segmenter, image
        self.embedding = segmenter.embed(image)  # once: every box is decoded from it
        rows, columns = image.shape[:2]
        margin = 0.02 * max(rows, columns)  # a drag may begin and end beside the image
        height = width * min(1.2, (rows + 2 * margin) / (columns + 2 * margin)) + TITLE
        self.figure = Figure(figsize=(width, height), dpi=DPI, layout="none")
        self.canvas = Canvas(self.figure)
        FigureManager(self.canvas, 0)
        self.canvas.toolbar_visible = self.canvas.header_visible = False
        self.canvas.footer_visible = self.canvas.resizable = False
        self.ax = self.figure.add_axes((0, 0, 1, 1 - TITLE / height))
        borders = (-0.5, columns - 0.5, rows - 0.5, -0.5)
        self.picture = self.ax.imshow(np.zeros((1, 1, 3)), extent=borders, interpolation="nearest")
        self.ax.set(xlim=(-0.5 - margin, columns - 0.5 + margin), ylim=(rows - 0.5 + margin, -0.5 - margin))
        self.ax.set_axis_off()
        self.ax.apply_aspect()
        self.show_masks(boxes)
        texts = [f"{name} {iou:.2f}" for name, iou in zip(names, self.found.iou, strict=True)]
        self.alt = f"An image with {len(boxes)} yellow boxes and their masks. Predicted IoU: {', '.join(texts)}."
        self.labels = [place_label(self.ax, box, text, BOX) for box, text in zip(boxes, texts, strict=True)]
        self.canvas.mpl_connect("button_release_event", self.follow)  # before the selector's own
        # kept here: a selector that nothing refers to is thrown away, and the mouse would do nothing
        line = {"edgecolor": BOX, "fill": False, "linewidth": 1.5}
        self.selector = RectangleSelector(self.ax, self.on_drag, button=1, minspanx=-1, minspany=-1, props=line)
        self.canvas.mpl_connect("button_press_event", self.on_press)
        self.canvas.mpl_connect("figure_leave_event", self.end_drag)

    def show_masks(self, boxes: np.ndarray) -> None:
        """Segment the boxes, and draw them with their masks in place of those before."""
        start = time.perf_counter()
        self.found = self.segmenter.masks(self.embedding, boxes, self.image.shape[:2], "drawn")
        self.milliseconds = 1000 * (time.perf_counter() - start)
        self.boxes = boxes
        picture = overlay(self.image, self.found.labels, boxes)
        factor = min(1.0, self.ax.bbox.width / picture.shape[1])  # made small once here, not at each move of the mouse
        self.picture.set_data(cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA))

    def set_title(self, text: str) -> None:
        """The line above the image."""
        self.ax.set_title(text, fontsize=10)

    def on_drag(self, press: MouseEvent, release: MouseEvent) -> None:
        """A drag has ended: cut the box to the image, segment it, draw it."""
        box = box_of_drag(press, release, self.image.shape[:2])
        if box is None:
            self.set_title(TOO_SMALL)
        else:
            self.show_masks(box[None])
            while self.labels:
                self.labels.pop().remove()
            self.set_title(f"Predicted IoU {self.found.iou[0]:.2f}, mask in {self.milliseconds:.0f} ms")
        self.canvas.draw_idle()

    def follow(self, event: MouseEvent) -> None:
        """The box ends where the mouse is released; moves are told a few times a second only, the last perhaps before."""
        self.selector.onmove(event)

    def on_press(self, event: MouseEvent) -> None:
        """The second click of a double click is told twice, and its release once."""
        if event.dblclick:
            self.end_drag(event)

    def end_drag(self, event: Event) -> None:
        """End a drag whose release the canvas does not hear of, as when the mouse has left it."""
        MouseEvent("button_release_event", self.canvas, event.x, event.y, 1)._process()

    def _ipython_display_(self) -> None:
        """For a page with a mouse the canvas, else the picture. The page takes the first kind that it can show."""
        alive = someone_is_there()
        self.set_title(HINT if alive else FIXED)
        picture, metadata = show(self.figure, self.alt)._repr_mimebundle_()
        kinds = {"text/plain": self.alt, **picture}
        if alive:
            view = {"version_major": 2, "version_minor": 0, "model_id": self.canvas.model_id}
            kinds["application/vnd.jupyter.widget-view+json"] = view
        display(kinds, metadata=metadata, raw=True)


def box_of_drag(press: MouseEvent, release: MouseEvent, shape: tuple[int, int]) -> np.ndarray | None:
    """The pixels (4,) that a drag touched, cut to the image (H, W); None if either way they are fewer than SMALLEST.

    press, release: their xdata, ydata count pixels, whose centres have whole coordinates.
    """
    last = np.array(shape[::-1]) - 1  # the last pixel's x, y; pixel i lies between i - 0.5 and i + 0.5
    ends = np.clip([(press.xdata, press.ydata), (release.xdata, release.ydata)], -0.5, last + 0.5)
    low, high = ends.min(axis=0), ends.max(axis=0)
    if (high - low < SMALLEST).any():
        return None
    return np.minimum(np.floor([*low + 0.5, *high + 0.5]), [*last, *last])


def place_label(ax, box, text: str, colour, size: float = 9):
    """A text above a box, or below one in the lower half, away from the image's middle, moved until it is inside."""
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
