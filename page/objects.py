"""What has been drawn on one case, without a window: each drag, the boxes between two slices, masks, undo.

All work of the network is done by one thread of its own, so that a window goes on answering.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from formats.case import Case
from segment import Segmenter
from volumes import EMBEDDINGS_KEPT

SMALLEST = 2  # pixels that a box needs in width and in height
TOO_SMALL = f"Too small: a box needs {SMALLEST} x {SMALLEST} pixels or more."


class Drawn(NamedTuple):
    """What was drawn: box i painted label i + 1."""

    labels: np.ndarray  # (H, W) or (D, H, W) uint16
    boxes: np.ndarray  # (N, 4), or (N, 6) round all boxes of an object, z_min its first and z_max its last slice
    iou: np.ndarray  # (N,) float32, predicted; in a volume the mean over the object's slices

    @property
    def own(self) -> np.ndarray:
        """Pixels (N,) of each object."""
        return np.bincount(self.labels.ravel(), minlength=len(self.boxes) + 1)[1:]


class Drag(NamedTuple):
    """One box that the mouse drew."""

    number: int  # of the object, 0-based
    z: int  # slice; 0 in 2D
    box: tuple[int, int, int, int]  # x0 y0 x1 y1, pixels, both ends inclusive


def box_of_drag(press, release, shape: tuple[int, int]) -> np.ndarray | None:
    """The pixels (4,) that a drag touched, cut to the image (H, W); None if either way they are fewer than SMALLEST.

    press, release: events with xdata, ydata, where a pixel's centre has whole coordinates.
    """
    last = np.array(shape[::-1]) - 1  # the last pixel's x, y; pixel i lies between i - 0.5 and i + 0.5
    ends = np.clip([(press.xdata, press.ydata), (release.xdata, release.ydata)], -0.5, last + 0.5)
    low, high = ends.min(axis=0), ends.max(axis=0)
    if (high - low < SMALLEST).any():
        return None
    return np.minimum(np.floor([*low + 0.5, *high + 0.5]), [*last, *last])


class Objects:
    """The objects that were drawn on one case. Masks are found by `worker`, one after another."""

    def __init__(self, segmenter: Segmenter, case: Case) -> None:
        self.segmenter, self.is_3d, self.boxes_are = segmenter, case.is_3d, case.boxes_are
        self.slices = case.image if case.is_3d else case.image[None]  # (D, H, W), or (1, H, W) or (1, H, W, 3)
        self.shape = self.slices.shape[1:3]
        self.history: list[tuple[Drag, ...]] = [()]  # all drags after each change: the last entry is what counts
        self.embeddings: dict = {}  # slice -> embedding, the one that was used last at the end
        self.masks: dict = {}  # (slice, box) -> (its mask as a grid.MaskPatch, predicted IoU)
        self.worker = ThreadPoolExecutor(1)
        self.boxes: list[dict[int, tuple]] = []  # of each object: slice -> box

    def change(self, drags: tuple[Drag, ...]) -> None:
        """Make `drags` what counts, in a way that `undo` takes back."""
        self.history.append(drags)
        self.boxes = boxes_by_slice(drags)

    def undo(self) -> str:
        """Take the last change back, and say what that was."""
        if len(self.history) == 1:
            return "Nothing to take back."
        undone = self.history.pop()
        self.boxes = boxes_by_slice(self.history[-1])
        if len(undone) < len(self.history[-1]):
            return "Taken back: the removal."
        where = f" on slice {undone[-1].z}" if self.is_3d else ""
        return f"Taken back: the box of object {undone[-1].number + 1}{where}."

    def add(self, number: int, z: int, box) -> None:
        """A box of an object on a slice, in place of the object's box there if it has one; its mask is found at once."""
        drag = Drag(number, z, tuple(int(side) for side in box))
        self.worker.submit(self.find, z, drag.box).result()
        self.change((*self.history[-1], drag))

    def remove(self, number: int) -> None:
        """Take an object away; the numbers of those after it become one less."""
        kept = (drag for drag in self.history[-1] if drag.number != number)
        self.change(tuple(drag._replace(number=drag.number - (drag.number > number)) for drag in kept))

    def missing(self) -> list[tuple]:
        """The boxes, (slice, box), whose masks are still to be found."""
        return [key for boxes in self.boxes for key in sorted(boxes.items()) if key not in self.masks]

    def embed_slice(self, z: int):
        """The embedding of a slice, computed once as long as it is among the last EMBEDDINGS_KEPT. By the worker only."""
        embedding = self.embeddings.pop(z, None)
        self.embeddings[z] = self.segmenter.embed(self.slices[z]) if embedding is None else embedding
        if len(self.embeddings) > EMBEDDINGS_KEPT:
            del self.embeddings[next(iter(self.embeddings))]
        return self.embeddings[z]

    def find(self, z: int, box: tuple) -> None:
        """Find the mask of a box, once. By the worker only."""
        if (z, box) not in self.masks:
            embedding, boxes = self.embed_slice(z), np.array([box], float)
            found = self.segmenter.masks(embedding, boxes, self.shape, self.boxes_are)
            values, rows, columns = found.patches[0]
            self.masks[z, box] = (values.copy(), rows, columns), found.iou[0]  # a copy: not the whole slice's logits

    def is_between(self, number: int, z: int) -> bool:
        """Whether nobody drew the object's box on this slice: it lies between two that were drawn."""
        return not any((drag.number, drag.z) == (number, z) for drag in self.history[-1])

    def labels_of(self, z: int) -> np.ndarray:
        """The label map (H, W) of a slice, as far as its masks have been found."""
        canvas = self.segmenter.new_canvas(np.zeros(self.shape, np.uint16), len(self.boxes))
        for number, boxes in enumerate(self.boxes):
            if z in boxes and (z, boxes[z]) in self.masks:
                canvas.paint(number + 1, self.masks[z, boxes[z]][0])
        return canvas.labels

    def object_at(self, z: int, x: float, y: float) -> int | None:
        """The object whose mask covers a pixel of a slice, else the one with the smallest box round it, else None."""
        column, row = round(x), round(y)
        if not (0 <= row < self.shape[0] and 0 <= column < self.shape[1]):
            return None
        if label := int(self.labels_of(z)[row, column]):
            return label - 1
        areas = {}
        for number, (x0, y0, x1, y1) in ((i, boxes[z]) for i, boxes in enumerate(self.boxes) if z in boxes):
            if x0 <= column <= x1 and y0 <= row <= y1:
                areas[number] = (x1 - x0) * (y1 - y0)
        return min(areas, key=areas.get, default=None)

    def drawn(self, finish: bool = True) -> Drawn:
        """All objects. finish: find the masks first that are missing."""
        for key in self.missing() if finish else ():
            self.worker.submit(self.find, *key).result()
        labels = np.zeros(self.slices.shape[:3], np.uint16)
        for z in {z for boxes in self.boxes for z in boxes}:
            labels[z] = self.labels_of(z)
        rows, iou = [], []
        for boxes in self.boxes:
            sides = np.array(list(boxes.values()), float)
            low, high = sides[:, :2].min(axis=0), sides[:, 2:].max(axis=0)
            rows.append([*low, min(boxes), *high, max(boxes)] if self.is_3d else [*low, *high])
            iou.append(np.mean([self.masks[key][1] for key in boxes.items() if key in self.masks]))
        boxes = np.array(rows, float).reshape(-1, 6 if self.is_3d else 4)
        return Drawn(labels if self.is_3d else labels[0], boxes, np.array(iou, np.float32))


def boxes_by_slice(drags: tuple[Drag, ...]) -> list[dict[int, tuple]]:
    """Of each object its box on every slice from its first drag to its last: drawn, or linearly in between.

    >>> boxes_by_slice((Drag(0, 3, (0, 0, 9, 9)), Drag(0, 5, (4, 2, 9, 9))))[0][4]
    (2, 1, 9, 9)
    """
    drawn: list[dict[int, tuple]] = [{} for _ in {drag.number for drag in drags}]
    for drag in drags:
        drawn[drag.number][drag.z] = drag.box  # of two drags on one slice the later one
    for boxes in drawn:
        for below, above in list(pairwise(sorted(boxes))):
            ends = np.array([boxes[below], boxes[above]], float)
            for z in range(below + 1, above):
                share = (z - below) / (above - below)
                boxes[z] = tuple(int(side) for side in np.rint((1 - share) * ends[0] + share * ends[1]))
    return drawn
