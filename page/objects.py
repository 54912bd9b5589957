"""What was drawn on one case, without a page: boxes on slices, their masks through the slices, undo, saved files."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np

from figures import PALETTE, flat_view, overlay
from formats.case import Case
from formats.results import OBJECT_COLUMNS, object_rows, save_label_map
from formats.writing import csv_text, save_image, save_json, save_text
from grid import MaskPatch
from segment import Segmenter
from volumes import EMBEDDINGS_KEPT, Found, follow

OVERLAPS = {  # of a pixel that two objects claim
    "keep": "the object drawn first has it",
    "overwrite": "the object drawn later has it",
    "separate": "both have it, each in files of its own",
}
SMALLEST = 2  # pixels that a box needs in width and in height
SHOWN_SIDE = 1200  # pixels: larger images are made smaller to be shown
Masks = dict[int, tuple[MaskPatch, float]]  # of an object: slice -> its mask (bool, not empty), predicted IoU


class Drawn:
    """The objects on a case. Only `work` asks a network; it may run in a thread.

    load: name of a model -> its segmenter.   settings: model, boxes_are, overlap; what is shown and saved follows them.
    """

    def __init__(self, load: Callable[[str], Segmenter], case: Case, settings: dict[str, str]) -> None:
        self.load, self.case, self.settings = load, case, settings
        self.slices = case.image if case.is_3d else case.image[None]  # (D, H, W), or (1, H, W) or (1, H, W, 3)
        # The objects after each change, the last entry counts. An object is what volumes.follow takes: slice -> box
        # (x0, y0, x1, y1), or None where it is not; the mark that was made last at the end
        self.history: list[tuple[dict, ...]] = [()]
        self.embed = lru_cache(EMBEDDINGS_KEPT)(lambda model, z: load(model).embed(self.slices[z]))
        self.walks: dict[tuple, Iterator] = {}  # `follow` of an object, as `key` names it
        self.found: dict[tuple, Masks] = {}  # what each gave so far
        # those that have ended, and models and slices that were embedded before there was a box
        self.done: set[tuple] = set()

    @property
    def objects(self) -> tuple[dict, ...]:
        return self.history[-1]

    def box_of(self, ends: list[float]) -> tuple | None:
        """The pixels x0 y0 x1 y1 that a drag touched, or None if either way they are fewer than SMALLEST.

        ends: x, y of both its ends, as shares of the image's width and height; cut to the image.
        """
        size = np.array(self.slices.shape[2:0:-1])
        low, high = np.sort(np.clip(np.reshape(ends, (2, 2)), 0, 1) * size, axis=0)
        pixels = np.minimum(np.floor([*low, *high]), [*size - 1, *size - 1])
        return None if (high - low < SMALLEST).any() else tuple(pixels.astype(int).tolist())

    def mark(self, number: int, z: int, box: tuple | None) -> None:
        """A box of an object, 0-based, on a slice, or None: it is not there. Without any box the object is gone."""
        before = self.objects[number] if number < len(self.objects) else {}
        marks = {at: one for at, one in before.items() if at != z} | {z: box}
        self.history.append((*self.objects[:number], *[marks] * any(marks.values()), *self.objects[number + 1 :]))

    def key(self, number: int) -> tuple:
        """Of an object as it is now, by the model and as the kind of boxes that are set."""
        return self.settings["model"], self.settings["boxes_are"], tuple(self.objects[number].items())

    def to_do(self, shown: int) -> tuple | None:
        """The next job: objects without any mask; then the slice shown, so that a box on it is answered at once; the rest."""
        keys = [key for key in map(self.key, range(len(self.objects))) if key not in self.done]
        new, here = [key for key in keys if key not in self.found], (self.settings["model"], shown)
        return next(iter([*new, *[here] * (here not in self.done), *keys]), None)

    def work(self, job: tuple) -> int | None:
        """Do one job of `to_do`: the next slice of an object, or an embedding. -> the slice that was asked for a mask"""
        model, what, *marks = job
        walk = follow(self.load(model), self.slices, dict(*marks), what, partial(self.embed, model))
        if not marks:
            self.embed(model, what)
        elif step := next(self.walks.setdefault(job, walk), None):
            z, mask, iou = step
            inside, masks = mask.values > 0, self.found.setdefault(job, {})
            if inside.any():
                masks[z] = mask._replace(values=inside), iou
            return z
        self.done.add(job)
        return None

    def masks(self, number: int) -> Masks:
        """The masks of an object that were found, by slices."""
        return dict(sorted(self.found.get(self.key(number), {}).items()))

    def paint(self, masks: dict[int, Masks], z: int) -> np.ndarray:
        """The label map (H, W) uint16 of a slice: object i paints i + 1."""
        labels = np.zeros(self.slices.shape[1:3], np.uint16)
        for i in masks if self.settings["overlap"] == "overwrite" else reversed(masks):
            if z in masks[i]:
                values, rows, columns = masks[i][z][0]
                labels[rows, columns][values] = i + 1
        return labels

    def picture(self, z: int) -> bytes:
        """A slice with masks, numbers and the boxes that were drawn on it: PNG."""
        image, labels = self.slices[z], self.paint({i: self.masks(i) for i in range(len(self.objects))}, z)
        boxes = np.array([marks[z] for marks in self.objects if marks.get(z)], float).reshape(-1, 4)
        if (factor := SHOWN_SIDE / max(labels.shape)) < 1:
            size = [max(1, round(side * factor)) for side in labels.shape[::-1]]
            image, boxes = cv2.resize(image, size, interpolation=cv2.INTER_AREA), boxes * factor
            labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
        return cv2.imencode(".png", overlay(image, labels, boxes, numbers=True)[..., ::-1])[1].tobytes()

    def whole_box(self, number: int) -> list[float]:
        """The box round all that were drawn of an object, and in a volume round the slices of its masks, too."""
        drawn = {z: box for z, box in self.objects[number].items() if box}
        slices, sides = [*self.masks(number), *drawn], np.array([*drawn.values()], float)
        low, high = [*sides[:, :2].min(axis=0)], [*sides[:, 2:].max(axis=0)]
        return [*low, min(slices), *high, max(slices)] if self.case.is_3d else low + high

    def save(self, folder: Path, source: Path, arguments: dict) -> list[str]:
        """Write all objects as step 4 does, in the geometry of the input. -> names of the files

        source: the file or folder of the case.   arguments: what arguments.json says, beside the settings.
        """
        every, names, rows = list(range(len(self.objects))), [], []
        apart = self.settings["overlap"] == "separate"
        for group in [[i] for i in every] if apart else [every]:
            masks = {i: self.masks(i) for i in group}
            labels = np.stack([self.paint(masks, z) for z in range(len(self.slices))]).reshape(self.case.grid_shape)
            iou = np.array([sum(iou for _, iou in mine.values()) / max(1, len(mine)) for mine in masks.values()])
            own = np.array([sum(mask.values.sum() for mask, _ in mine.values()) for mine in masks.values()])
            case = replace(self.case, name=self.case.name + f"_object{group[0] + 1}" * apart, label_names=None,
                           boxes=np.array([self.whole_box(i) for i in group]), boxes_are=self.settings["boxes_are"])  # fmt: skip
            parts = [(i + 1, z, mask) for i, mine in masks.items() for z, (mask, _) in mine.items()]
            names += [*save_label_map(folder, case, labels, source, PALETTE, parts), f"{case.name}_overlay.png"]
            save_image(folder / names[-1], overlay(*flat_view(case.image, labels, case.boxes), numbers=True))
            rows += object_rows(case, Found(labels, iou, own), np.array(group) + 1, None)
        save_text(folder / "objects.csv", csv_text(rows, OBJECT_COLUMNS))
        preset = {"preset_fields": vars(self.load(self.settings["model"]).preset)}
        save_json(folder / "arguments.json", arguments | self.settings | preset)
        return [*names, "objects.csv", "arguments.json"]
