"""The fourteen cases of the paper's Table 5, drawn: true sizes and numbers of objects, contents synthetic. [P 4.3]

Those files may not be redistributed, and time hardly depends on what is in them: the network does the same sums for any
image. It does depend on size, on the number of objects, on whether an image has colour, and in 3D on how many slices an
object spans, which the paper does not print. That number is taken from its own seconds, see SECONDS_A_SLICE.
Objects are bright ellipses and ellipsoids, each in a cell of its own, so every box is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data import grid_pixels_for, reach_of
from efficientvit import EMBED_GRID
from fast_decoder import cell_range
from phantoms import Phantom
from presets import Preset
from readers import Case

# The paper's baseline needs 0.40 s for one image with one object (2DBox_US_0525), and as its 3D loop encodes each slice of
# each object anew, seconds / 0.40 is about the number of slices that the objects of a volume have together.
SECONDS_A_SLICE = 0.40


@dataclass(frozen=True)
class TimedCase:
    """One row of Table 5, or a case of ours that the paper has no seconds for."""

    name: str
    shape: tuple[int, ...]  # (H, W, 3), or (D, H, W) if the name starts with 3D
    objects: int
    paper_baseline_s: float | None = None
    paper_proposed_s: float | None = None
    color: bool = False  # False: three equal channels, as the challenge stores gray images

    @property
    def is_3d(self) -> bool:
        """A volume, by its name, as in the challenge."""
        return self.name.startswith("3D")


TABLE5 = (
    TimedCase("3DBox_CT_0566", (287, 512, 512), 6, 210.98, 51.85),
    TimedCase("3DBox_CT_0888", (237, 512, 512), 6, 53.35, 11.22),
    TimedCase("3DBox_CT_0860", (246, 512, 512), 1, 7.50, 2.51),
    TimedCase("3DBox_MR_0621", (115, 400, 400), 6, 83.16, 16.92),
    TimedCase("3DBox_MR_0121", (64, 290, 320), 6, 51.20, 9.84),
    TimedCase("3DBox_MR_0179", (84, 512, 512), 1, 6.92, 1.6),
    TimedCase("3DBox_PET_0001", (264, 200, 200), 1, 3.50, 0.78),
    TimedCase("2DBox_US_0525", (256, 256, 3), 1, 0.40, 0.11),
    TimedCase("2DBox_X-Ray_0053", (320, 640, 3), 34, 0.90, 0.72),
    TimedCase("2DBox_Dermoscopy_0003", (3024, 4032, 3), 1, 1.41, 2.09, color=True),
    TimedCase("2DBox_Endoscopy_0086", (480, 560, 3), 1, 0.43, 0.09, color=True),
    TimedCase("2DBox_Fundus_0003", (2048, 2048, 3), 1, 0.72, 0.38, color=True),
    TimedCase("2DBox_Microscope_0008", (1536, 2040, 3), 19, 1.05, 0.66, color=True),
    TimedCase("2DBox_Microscope_0016", (1920, 2560, 3), 241, 6.27, 6.19, color=True),
)
SIX_OBJECTS = TimedCase("3DBox_CT_six-objects", (24, 512, 512), 6)  # all six in every slice
SMOKE = (TimedCase("2DBox_US_tiny", (64, 80, 3), 2), TimedCase("3DBox_CT_tiny", (5, 48, 40), 2))
BY_NAME = {case.name: case for case in (*TABLE5, SIX_OBJECTS, *SMOKE)}


# ---------------------------------------------------------------- drawing


def spans(case: TimedCase, rng: np.random.Generator) -> list[tuple[int, int]]:
    """First and last slice of each object of a volume: overlapping, as organs of one region do, of unequal length."""
    depth = case.shape[0]
    if case.paper_baseline_s is None:
        return [(0, depth - 1)] * case.objects
    mean = case.paper_baseline_s / SECONDS_A_SLICE / case.objects + 2  # the released loop leaves both end slices out
    found = []
    for share in np.linspace(0.5, 1.5, case.objects) if case.objects > 1 else (1.0,):
        length = min(max(round(mean * share), 3), depth)
        first = round((depth - length) / 2 + rng.uniform(-0.25, 0.25) * mean)
        first = min(max(first, 0), depth - length)
        found.append((first, first + length - 1))
    return found


def cells(count: int, height: int, width: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Boxes (y0, y1, x0, x1), inclusive, one in each cell of a grid that has room for `count`."""
    columns = math.ceil(math.sqrt(count * width / height))
    rows = math.ceil(count / columns)
    found = []
    for i in range(count):
        sides = []
        for cell, number, length in ((i // columns, rows, height), (i % columns, columns, width)):
            room = length / number
            size = max(round(room * rng.uniform(0.4, 0.8)), 4)
            first = math.ceil(cell * room + rng.uniform(0, 1) * (room - size - 1))
            sides += [first, first + size - 1]
        found.append(tuple(sides))
    return found


def ellipsoid(bounds: list[tuple[int, int]]) -> np.ndarray:
    """The mask that fills inclusive bounds, one (first, last) an axis, and touches each of their faces."""
    sizes = [last - first + 1 for first, last in bounds]
    axes = [((np.arange(n) + 0.5) * 2 / n - 1).astype(np.float32) ** 2 for n in sizes]
    return sum(np.ix_(*axes)) <= 1


def draw(case: TimedCase, seed: int = 0) -> Phantom:
    """A case with its truth: the same for the same seed."""
    rng = np.random.default_rng((seed, list(BY_NAME).index(case.name)))
    grid = case.shape if case.is_3d else case.shape[:2]
    in_depth = spans(case, rng) if case.is_3d else [None] * case.objects
    image = rng.integers(40, 56, size=grid, dtype=np.uint8)
    labels = np.zeros(grid, np.uint16)
    for i, (y0, y1, x0, x1) in enumerate(cells(case.objects, *grid[-2:], rng)):
        bounds = ([in_depth[i]] if case.is_3d else []) + [(y0, y1), (x0, x1)]
        where = tuple(slice(first, last + 1) for first, last in bounds)
        mask = ellipsoid(bounds)
        image[where][mask] += np.uint8(80 + 20 * (i % 5))
        labels[where][mask] = i + 1
    if not case.is_3d:
        shades = (1.0, 0.8, 0.7) if case.color else (1.0, 1.0, 1.0)
        image = np.stack([(image * np.float32(shade)).astype(np.uint8) for shade in shades], axis=-1)
    spacing_mm = (2.5, 0.8, 0.8) if case.is_3d else None
    return Phantom(case.name, image, labels, spacing_mm, ("ellipse",) * case.objects)


# ---------------------------------------------------------------- how much work a case is


def work(case: Case, preset: Preset, shared: bool) -> tuple[int, int, int]:
    """How many images are encoded, boxes decoded and cells of 4x4 grid pixels upscaled for a case.

    shared: each slice is encoded once for all objects and only the cells that a mask may reach are upscaled, as ours does
    (unless --engine torch-int8); False: each slice once for each object, and all cells, as published.
    """
    height, width = case.image.shape[1 if case.is_3d else 0 :][:2]
    reach = case.boxes[:, [0, 1, 3, 4]] if case.is_3d else reach_of(case.boxes, height, width)
    ranges = [cell_range(list(region)) for region in grid_pixels_for(reach, height, width)]
    cells = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in ranges]
    if not case.is_3d:
        return 1, len(case.boxes), sum(cells) if shared else EMBED_GRID**2 * len(case.boxes)
    visited = []  # slices of each object
    for low, high in case.boxes[:, [2, 5]].astype(int):
        middle = (low + high) // 2
        ends = 0 if preset.propagation == "released" else 1  # #41: it leaves the first and the last slice out
        visited.append([*range(middle, high + ends), *range(middle - 1, low - ends, -1)])
    boxes = sum(map(len, visited))
    if not shared:
        return boxes, boxes, EMBED_GRID**2 * boxes
    return len(set().union(*visited)), boxes, sum(n * len(slices) for n, slices in zip(cells, visited, strict=True))


def object_slices(boxes: np.ndarray) -> int:
    """Number of slices that hold an object at all; boxes (N, 6)."""
    return len({z for low, high in boxes[:, [2, 5]].astype(int) for z in range(low, high + 1)})


def thinner(boxes: np.ndarray, limit: int) -> np.ndarray:
    """3D boxes (N, 6) with their slices squeezed, so that together they span `limit` slices at most.

    All by the same factor, so objects overlap in depth as before. A box keeps 3 slices, which the released loop needs
    to visit one. x and y stay.
    """
    low, high = boxes[:, 2], boxes[:, 5]
    span = high.max() - low.min() + 1
    if object_slices(boxes) <= limit or span <= limit:
        return boxes
    factor = limit / span
    lengths = np.maximum(np.floor((high - low + 1) * factor), 3)
    squeezed = boxes.copy()
    squeezed[:, 2] = low.min() + np.minimum(np.floor((low - low.min()) * factor), max(limit - 3, 0))
    squeezed[:, 5] = squeezed[:, 2] + lengths - 1
    return squeezed
