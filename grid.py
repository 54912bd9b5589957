"""The 256-pixel grid that the network sees: images, boxes and masks there and back. [P 2.1]

Original image (H, W) -> long side to 256, aspect kept -> (h, w) -> zero padding at the right and
bottom -> (256, 256), "the grid". The scale is 256 / max(H, W). An image's short side is rounded to
whole pixels, a box is not, as in LiteMedSAM: the two differ by at most half a grid pixel.
Coordinates count pixels of the original image or of the grid. Boxes: x_min, y_min, x_max, y_max.
"""

import zlib
from typing import NamedTuple

import cv2
import numpy as np

GRID = 256  # side of the network's input image and of its mask logits, pixels [P 2.1]
BOX_JITTER = 5  # largest move of a side of a box in training, grid pixels (#18)
JITTER_SHARE = 0.1  # jitter "scaled": the move is also at most this share of the object's width or height


class MaskPatch(NamedTuple):
    """One object's logits in a window of the original image; there is no mask outside."""

    values: np.ndarray  # (r, c) float32; the mask is where they are above 0
    rows: slice
    columns: slice


NO_MASK = MaskPatch(np.zeros((0, 0), np.float32), slice(0, 0), slice(0, 0))


def grid_size(height: int, width: int) -> tuple[int, int]:
    """Size (h, w) of an image (height, width) on the grid: long side 256, at least 1 pixel."""
    scale = GRID / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_to_grid(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 -> (h, w) or (h, w, 3), area interpolation, not padded."""
    height, width = grid_size(*image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def resize_labels_to_grid(labels: np.ndarray) -> np.ndarray:
    """(H, W) uint16 -> (h, w) uint16, not padded: the label of the nearest pixel.

    At half size two pixels are equally near. They take turns: always the left one would move an
    object by half a pixel."""
    taken = []
    for n_grid, n_original in zip(grid_size(*labels.shape), labels.shape, strict=True):
        i = np.arange(n_grid)
        # a grid pixel's centre, from the image's edge: original pixel k lies between k and k + 1
        taken.append(((i + 0.5) * n_original / n_grid - 1e-6 * (i % 2)).astype(np.intp))
    rows, columns = taken
    return labels[rows].take(columns, axis=1)


def pad_to_square(image: np.ndarray, side: int) -> np.ndarray:
    """Zeros at the right and bottom: (h, w) or (h, w, 3) -> (side, side) or (side, side, 3)."""
    missing = [(0, side - image.shape[0]), (0, side - image.shape[1])] + [(0, 0)] * (image.ndim - 2)
    return np.pad(image, missing)


def boxes_to_grid(boxes_xyxy: np.ndarray, height: int, width: int, rounding: str = "float") -> np.ndarray:
    """Boxes (N, 4) in pixels of an image (height, width) -> (N, 4) float32 in grid pixels.

    rounding: "float" keeps fractions (D4: boxes are not rounded), "int" cuts them off."""
    scaled = np.asarray(boxes_xyxy, dtype=np.float64) * (GRID / max(height, width))
    return (np.trunc(scaled) if rounding == "int" else scaled).astype(np.float32)


def logits_to_original(logits: np.ndarray, height: int, width: int) -> MaskPatch:
    """One object's mask logits (256, 256) float32 on the grid -> upsampled to the original image.

    The padding is cut off: logits[:h, :w], (h, w) = grid_size(height, width). Then bilinear from (h, w)
    to (height, width), pixel centres aligned (align_corners=False). So the short side has its own
    scale, h / height, not 256 / max(height, width) as boxes have. Only the surroundings of positive
    logits are upsampled, as there is no mask elsewhere: a small object costs its own area."""
    h, w = grid_size(height, width)
    inside = logits[:h, :w]
    positive_rows, positive_columns = np.flatnonzero((inside > 0).any(axis=1)), np.flatnonzero((inside > 0).any(axis=0))
    if len(positive_rows) == 0:
        return NO_MASK
    rows, from_rows, down = _bilinear_weights(positive_rows[0], positive_rows[-1], h, height)
    columns, from_columns, across = _bilinear_weights(positive_columns[0], positive_columns[-1], w, width)
    return MaskPatch(down @ inside[from_rows, from_columns] @ across.T, rows, columns)


def _bilinear_weights(first: int, last: int, n_grid: int, n_original: int) -> tuple[slice, slice, np.ndarray]:
    """Along one axis: the original pixels that grid pixels first..last influence, the grid pixels
    that those are interpolated from, and the weights (original, grid) of the interpolation."""
    ratio = n_original / n_grid
    start = max(0, int(np.floor((first - 0.5) * ratio - 0.5)))
    stop = min(n_original, int(np.ceil((last + 1.5) * ratio - 0.5)) + 1)
    position = np.maximum((np.arange(start, stop) + 0.5) / ratio - 0.5, 0)  # in grid pixels, centre to centre
    lower = position.astype(np.int64)
    upper = np.minimum(lower + 1, n_grid - 1)
    low, high = int(lower[0]), int(upper[-1]) + 1
    weights, pixels = np.zeros((stop - start, high - low), np.float32), np.arange(stop - start)
    weights[pixels, lower - low] = 1 - (position - lower)
    weights[pixels, upper - low] += (position - lower).astype(np.float32)
    return slice(start, stop), slice(low, high), weights


def reach_of(boxes_xyxy: np.ndarray, height: int, width: int) -> np.ndarray:
    """The regions where the masks of boxes may lie: (N, 4) -> (N, 4) float64, original pixels."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    # D18: a mask ends near its box. What a network marks farther away is another object, or noise.
    margin = (boxes[:, 2:] - boxes[:, :2]) / 4 + 8 * max(height, width) / GRID
    return np.concatenate([boxes[:, :2] - margin, boxes[:, 2:] + margin], axis=1)


def grid_pixels_for(regions_xyxy: np.ndarray, height: int, width: int) -> np.ndarray:
    """The grid pixels (N, 4) that regions (N, 4) of the image are interpolated from, inclusive."""
    # two grid pixels (the neighbour, and rounding) and one original pixel (rounding)
    beyond = 2 + GRID / max(height, width)
    return boxes_to_grid(regions_xyxy, height, width) + np.float32([-beyond, -beyond, beyond, beyond])


def crop_to_box(mask: MaskPatch, box_xyxy: np.ndarray) -> MaskPatch:
    """Cut a mask to the pixels inside a box (4,) of the original image, inclusive."""
    values, rows, columns = mask
    x0, y0 = np.floor(box_xyxy[:2]).astype(int)
    x1, y1 = np.ceil(box_xyxy[2:]).astype(int) + 1
    top, bottom = max(rows.start, y0), min(rows.stop, y1)
    left, right = max(columns.start, x0), min(columns.stop, x1)
    if bottom <= top or right <= left:
        return NO_MASK
    inside = values[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start]
    return MaskPatch(inside, slice(top, bottom), slice(left, right))


def mask_box(mask: MaskPatch) -> np.ndarray | None:
    """Box (4,) round the positive logits of a mask, original pixels, inclusive; or None."""
    y, x = np.nonzero(mask.values > 0)
    if len(x) == 0:
        return None
    left, top = mask.columns.start, mask.rows.start
    return np.array([x.min() + left, y.min() + top, x.max() + left, y.max() + top], float)


def loosen_boxes(boxes: np.ndarray, looseness: float, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Boxes as people draw them: sides move outward by 0.5 to 1.5 times `looseness` of the size.

    boxes : (N, 4) or (N, 6), pixels of an image (height, width), on which they stay; z never moves.
    looseness : a share of the width for x, of the height for y.   Returns float64, not rounded."""
    boxes = np.asarray(boxes, dtype=np.float64)
    low, high = slice(0, 2), slice(boxes.shape[1] // 2, boxes.shape[1] // 2 + 2)  # x and y of both corners
    size = boxes[:, high] - boxes[:, low]
    outward = looseness * rng.uniform(0.5, 1.5, size=(len(boxes), 2, 2)) * size[:, None]  # (N, low and high, x and y)
    loose = boxes.copy()
    loose[:, low] = np.maximum(boxes[:, low] - outward[:, 0], 0)
    loose[:, high] = np.minimum(boxes[:, high] + outward[:, 1], [width - 1, height - 1])
    return loose


def case_rng(name: str, seed: int = 0) -> np.random.Generator:
    """Random numbers of a case: they depend on its name and the seed, not on other cases."""
    return np.random.default_rng((seed, zlib.crc32(name.encode())))


def drawn_boxes(name: str, boxes: np.ndarray, looseness: float, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """`loosen_boxes` of a case of `shape` (H, W) or (D, H, W): equal for steps 4 and 5."""
    return loosen_boxes(boxes, looseness, case_rng(name, seed), *shape[-2:]) if looseness else boxes


def move_box(
    box: np.ndarray, jitter: str, loose: tuple[float, float], rng: np.random.Generator, height: int, width: int
) -> np.ndarray:
    """A box (4,) as training prompts with it: its sides moved by up to BOX_JITTER pixels. (#18)

    jitter : "both" in or out by whole pixels, "outward" by whole pixels, "scaled" in or out.
    loose : a share of the boxes that is loosened instead, and by how much at most (segment.BOX_KINDS).
    All stay on the image."""
    share, looseness = loose
    # D20: most boxes loosened, as drawn
    if share and rng.random() < share:
        return loosen_boxes(box[None], looseness * rng.random(), rng, height, width)[0]
    if jitter == "scaled":
        # D15: at most a tenth of the object. 5 pixels are nothing to a lung, half of a nucleus.
        most = np.clip(JITTER_SHARE * np.tile(box[2:] - box[:2], 2), 1, BOX_JITTER)
        moves = most * rng.random() * rng.uniform(-1, 1, size=4)  # one share for the box, one for each side
    else:
        moves = rng.integers(0 if jitter == "outward" else -BOX_JITTER, BOX_JITTER + 1, size=4)
    moved = np.clip(box + moves * np.array([-1, -1, 1, 1]), 0, [width, height, width, height])  # positive: outward
    for low, high in ((0, 2), (1, 3)):
        if moved[high] - moved[low] < 1:  # less than a pixel left: these sides stay
            moved[[low, high]] = box[[low, high]]
    return moved


def label_ids(labels: np.ndarray) -> np.ndarray:
    """The labels of a map except 0, ascending. (np.unique of the map would sort every pixel.)"""
    flat = labels.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    found = np.unique(np.append(flat[ends], flat[-1:]))
    return found[found != 0]


def label_bounds(labels: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """First and last index of each label except 0: {label: (low (ndim,), high (ndim,))}.

    labels: (H, W) or (D, H, W). Rows become runs of equal value: few coordinates are compared."""
    width = labels.shape[-1]
    starts = np.ones((labels.size // max(1, width), width), bool)  # a run never continues on the next row
    rows = labels.reshape(starts.shape)
    np.not_equal(rows[:, 1:], rows[:, :-1], out=starts[:, 1:])
    first = np.flatnonzero(starts)
    last = np.append(first[1:], labels.size) - 1
    value = rows.ravel()[first]
    first, last, value = (a[value != 0] for a in (first, last, value))
    order = np.argsort(value, kind="stable")
    ids, begin = np.unique(value[order], return_index=True)
    if not ids.size:
        return {}
    first, last = first[order], last[order]
    outer = np.unravel_index(first // width, labels.shape[:-1])  # y, or z and y
    low = np.stack([np.minimum.reduceat(c, begin) for c in (*outer, first % width)], axis=1)  # (n, ndim)
    high = np.stack([np.maximum.reduceat(c, begin) for c in (*outer, last % width)], axis=1)
    return {int(i): (a, b) for i, a, b in zip(ids, low, high, strict=True)}


def boxes_from_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact boxes of a label map -> (ids (N,), ascending; boxes (N, 4) or (N, 6) float64)."""
    bounds = label_bounds(labels)
    ids = np.array(list(bounds), dtype=labels.dtype)
    corners = [(*low[::-1], *high[::-1]) for low, high in bounds.values()]  # array order to x first
    return ids, np.array(corners, dtype=np.float64).reshape(len(ids), 2 * labels.ndim)


def promptable_labels(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the objects of a label map 1..N -> (labels uint16, number of objects left out).

    An object 1 pixel wide or high has a box without area, which prompts nothing: it becomes 0."""
    ids, boxes = boxes_from_labels(labels)
    sides = (boxes[:, labels.ndim :] - boxes[:, : labels.ndim])[:, :2]  # x and y; one slice of a volume is enough
    good = ids[(sides > 0).all(axis=1)]
    number = np.zeros(int(labels.max()) + 1, np.uint16)
    number[good] = np.arange(1, len(good) + 1)
    return number[labels], len(ids) - len(good)
