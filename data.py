"""The 256-pixel grid that the network sees: images, boxes and masks there and back. [P 2.1]

Original image (H, W) -> long side to 256, aspect kept -> (h, w) -> zero padding at the right and bottom
-> (256, 256). One pixel of the grid is max(H, W) / 256 original pixels; along the short side that is rounded for
images, whose size is whole, and exact for boxes, as in LiteMedSAM: at most half a grid pixel apart at the far end.
Frames are named: "original" or "grid". Boxes are x_min, y_min, x_max, y_max in pixels of their frame.
"""

from __future__ import annotations

import cv2
import numpy as np

from enhance import three_channels
from model import GRID
from presets import Preset


def grid_size(height: int, width: int) -> tuple[int, int]:
    """Size (h, w) on the grid, before padding, of an image (height, width): long side 256, at least 1 pixel."""
    scale = GRID / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_to_grid(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 -> (h, w) or (h, w, 3), area interpolation, not padded."""
    height, width = grid_size(*image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def resize_labels_to_grid(labels: np.ndarray) -> np.ndarray:
    """(H, W) uint16 -> (h, w) uint16, not padded. Nearest pixel centre, so no label is invented; small ones may vanish."""
    height, width = grid_size(*labels.shape)
    return cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def pad_to_square(image: np.ndarray, side: int) -> np.ndarray:
    """Zeros at the right and bottom: (h, w) or (h, w, 3) -> (side, side) or (side, side, 3)."""
    missing = [(0, side - image.shape[0]), (0, side - image.shape[1])] + [(0, 0)] * (image.ndim - 2)
    return np.pad(image, missing)


def boxes_to_grid(boxes_xyxy: np.ndarray, height: int, width: int, rounding: str = "float") -> np.ndarray:
    """Boxes (N, 4) in original pixels of an image (height, width) -> (N, 4) float32 in pixels of the grid."""
    scaled = np.asarray(boxes_xyxy, dtype=np.float64) * (GRID / max(height, width))
    return (np.trunc(scaled) if rounding == "int" else scaled).astype(np.float32)


def boxes_to_original(boxes_xyxy: np.ndarray, height: int, width: int) -> np.ndarray:
    """The inverse of `boxes_to_grid` without rounding: (N, 4) on the grid -> (N, 4) float64, original pixels."""
    return np.asarray(boxes_xyxy, dtype=np.float64) * (max(height, width) / GRID)


def logits_to_original(logits: np.ndarray, height: int, width: int) -> tuple[np.ndarray, slice, slice] | None:
    """One object's mask logits on the grid, upsampled to the original image where the mask can be.

    logits: (256, 256) float32, grid frame, padding included. Bilinear, pixel centres aligned (align_corners=False).
    Returns (values (r, c) float32, rows, columns): original[rows, columns] holds values, the rest is below zero;
    None if no logit is positive. Interpolating between non-positive logits gives no positive one, so nothing is
    lost, and a small object in a 12-megapixel image costs its own area only.
    """
    h, w = grid_size(height, width)
    inside = logits[:h, :w]
    positive_rows, positive_columns = np.flatnonzero((inside > 0).any(axis=1)), np.flatnonzero((inside > 0).any(axis=0))
    if len(positive_rows) == 0:
        return None
    rows, y0, y1, fy = _bilinear_taps(positive_rows[0], positive_rows[-1], h, height)
    columns, x0, x1, fx = _bilinear_taps(positive_columns[0], positive_columns[-1], w, width)
    lines = inside[y0] * (1 - fy)[:, None] + inside[y1] * fy[:, None]  # (r, w)
    values = lines[:, x0] * (1 - fx) + lines[:, x1] * fx  # (r, c)
    return values, rows, columns


def _bilinear_taps(first: int, last: int, n_grid: int, n_original: int):
    """Along one axis: the original pixels that grid cells first..last can reach, and for each its two cells and weight."""
    ratio = n_original / n_grid
    start = max(0, int(np.floor((first - 0.5) * ratio - 0.5)))
    stop = min(n_original, int(np.ceil((last + 1.5) * ratio - 0.5)) + 1)
    position = np.maximum((np.arange(start, stop) + 0.5) / ratio - 0.5, 0)  # in cells, centre to centre
    lower = position.astype(np.int64)
    upper = np.minimum(lower + 1, n_grid - 1)
    return slice(start, stop), lower, upper, (position - lower).astype(np.float32)


def network_input(image: np.ndarray, preset: Preset, enhanced: bool) -> np.ndarray:
    """One image as the network takes it. [P 2.1]

    image: (H, W) or (H, W, 3) uint8, original frame.   enhanced: True for the proposed model's three channels;
    False for the baseline, which was trained on raw images (gray repeated three times): the preset changes nothing.
    Returns (3, 256, 256) float32: min-max normalized to 0..1, zero padding.
    """
    if enhanced and preset.enhance_at == "original":
        return normalized(resize_to_grid(three_channels(image, preset)))
    if enhanced and preset.pad == "before":
        image = pad_to_square(image, max(image.shape[:2]))
    return grid_input(resize_to_grid(image), preset, enhanced)


def grid_input(image: np.ndarray, preset: Preset, enhanced: bool) -> np.ndarray:
    """The same from an image that is on the grid already, as the cache holds it: (h, w) or (h, w, 3) uint8, no padding
    unless the preset wants to enhance it too. -> (3, 256, 256) float32"""
    return normalized(three_channels(image, preset) if enhanced else image)


def normalized(image: np.ndarray) -> np.ndarray:
    """(h, w) or (h, w, 3) uint8 on the grid -> (3, 256, 256) float32, min-max to 0..1, then zero padding."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    low, high = float(image.min()), float(image.max())
    unit = (image.astype(np.float32) - low) / max(high - low, 1e-8)  # a constant image becomes all zeros
    return np.ascontiguousarray(pad_to_square(unit.astype(np.float32), GRID).transpose(2, 0, 1))
