"""The 256-pixel grid that the network sees: images, boxes and masks there and back. [P 2.1]

Original image (H, W) -> long side to 256, aspect kept -> (h, w) -> zero padding at the right and bottom
-> (256, 256). One pixel of the grid is max(H, W) / 256 original pixels; along the short side that is rounded for
images, whose size is whole, and exact for boxes, as in LiteMedSAM: at most half a grid pixel apart at the far end.
Frames are named: "original" or "grid". Boxes are x_min, y_min, x_max, y_max in pixels of their frame.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch

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
    rows, from_rows, down = _bilinear_weights(positive_rows[0], positive_rows[-1], h, height)
    columns, from_columns, across = _bilinear_weights(positive_columns[0], positive_columns[-1], w, width)
    # by PyTorch: NumPy's product has threads of its own, which get into the way of the decoder's
    values = torch.from_numpy(down) @ torch.from_numpy(inside[from_rows, from_columns]) @ torch.from_numpy(across).T
    return values.numpy(), rows, columns


def _bilinear_weights(first: int, last: int, n_grid: int, n_original: int) -> tuple[slice, slice, np.ndarray]:
    """Along one axis: the original pixels that grid pixels first..last can reach, the grid pixels that those lie between, and
    the weights (original, grid), two of which are not 0 in a row. As a matrix product they cost half the time of picking."""
    ratio = n_original / n_grid
    start = max(0, int(np.floor((first - 0.5) * ratio - 0.5)))
    stop = min(n_original, int(np.ceil((last + 1.5) * ratio - 0.5)) + 1)
    position = np.maximum((np.arange(start, stop) + 0.5) / ratio - 0.5, 0)  # in cells, centre to centre
    lower = position.astype(np.int64)
    upper = np.minimum(lower + 1, n_grid - 1)
    low, high = int(lower[0]), int(upper[-1]) + 1
    weights, pixels = np.zeros((stop - start, high - low), np.float32), np.arange(stop - start)
    weights[pixels, lower - low] = 1 - (position - lower)
    weights[pixels, upper - low] += (position - lower).astype(np.float32)
    return slice(start, stop), slice(low, high), weights


def reach_of(boxes_xyxy: np.ndarray, height: int, width: int) -> np.ndarray:
    """How far the masks of boxes may go: (N, 4) -> (N, 4) float64, original pixels, a quarter of the box's size and 8 grid
    pixels beyond it on each side. What a network marks farther away is another object or noise."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    margin = (boxes[:, 2:] - boxes[:, :2]) / 4 + 8 * max(height, width) / GRID
    return np.concatenate([boxes[:, :2] - margin, boxes[:, 2:] + margin], axis=1)


def grid_pixels_for(regions_xyxy: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels of the grid (N, 4), inclusive, that regions (N, 4) in original pixels are interpolated from."""
    beyond = 2 + GRID / max(height, width)  # a neighbour and rounding on the grid, rounding in the original
    return boxes_to_grid(regions_xyxy, height, width) + np.float32([-beyond, -beyond, beyond, beyond])


def crop_to_box(mask: tuple | None, box_xyxy: np.ndarray) -> tuple | None:
    """Cut a mask (values, rows, columns), as `logits_to_original` returns it, to the pixels inside a box, inclusive."""
    if mask is None:
        return None
    values, rows, columns = mask
    x0, y0 = np.floor(box_xyxy[:2]).astype(int)
    x1, y1 = np.ceil(box_xyxy[2:]).astype(int) + 1
    top, bottom = max(rows.start, y0), min(rows.stop, y1)
    left, right = max(columns.start, x0), min(columns.stop, x1)
    if bottom <= top or right <= left:
        return None
    inside = values[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start]
    return inside, slice(top, bottom), slice(left, right)


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
