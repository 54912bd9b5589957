"""Cells of the embedding: 64x64 of them, each of 4x4 pixels of the grid. Which of them a mask is wanted in. No PyTorch."""

from __future__ import annotations

import numpy as np

from grid import GRID

CELL = 4  # pixels of the grid along a cell's side
CELLS = GRID // CELL  # cells along the grid's side
OUTSIDE = -100.0  # the logit of pixels that were not asked for


def cell_range(within: list[float] | None) -> tuple[slice, slice]:
    """Rows and columns of the cells that hold pixels x0 y0 x1 y1 of the grid, at least one of each; None: all."""
    if within is None:
        return slice(0, CELLS), slice(0, CELLS)
    x0, y0, x1, y1 = (min(max(int(value // CELL), 0), CELLS - 1) for value in within)
    return slice(y0, y1 + 1), slice(x0, x1 + 1)


def pixels(cells: slice) -> slice:
    """Cells along one axis -> their pixels of the grid."""
    return slice(CELL * cells.start, CELL * cells.stop)


def no_logits(boxes: int) -> np.ndarray:
    """Logits (N, 256, 256) of boxes before anything is known of them: OUTSIDE."""
    return np.full((boxes, GRID, GRID), OUTSIDE, np.float32)
