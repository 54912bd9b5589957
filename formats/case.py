"""One image or volume as the project handles it, and the checks that every input passes.

Images are (H, W) or (H, W, 3) uint8 and volumes (D, H, W) uint8, intensities 0..255.
Boxes are pixels of the original image, inclusive of the mask's outermost pixels:
(x_min, y_min, x_max, y_max) in 2D and (x_min, y_min, z_min, x_max, y_max, z_max) in 3D.
Spacing is (z, y, x) in mm, in the order of the array's axes. Files store it as (x, y, z).
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from formats import MAX_LABEL, MOST_BYTES, InputError, modality_of
from formats.writing import tell
from grid import boxes_from_labels


@dataclass(frozen=True)
class Case:
    """One image or volume with its boxes, its label map, or both. See the module header for axis order, units, frames."""

    name: str  # file name without its ending
    image: np.ndarray  # (H, W), (H, W, 3) or, if is_3d, (D, H, W); uint8
    boxes: np.ndarray | None  # (N, 4) or (N, 6) float64; row i is object i + 1
    labels: np.ndarray | None  # (H, W) or (D, H, W) uint16, 0 is background
    spacing_mm: tuple[float, float, float] | None  # (z, y, x); None in 2D
    is_3d: bool
    label_names: tuple[str, ...] | None = None  # of labels 1, 2, ...
    affine: np.ndarray | None = None  # (4, 4), voxel (x, y, z) to mm, where the file has one
    window: tuple[float, float] | None = None  # width and level that the intensities were cut to; width 0: percentiles
    source_range: tuple[float, float] | None = None  # lowest and highest intensity of the file; None if it had 8 bits
    boxes_are: str = "exact"  # how the boxes were made, of segment.BOX_KINDS
    modality: str = ""  # of MODALITIES; asked of the name once, when the case is made, unless it is given

    def __post_init__(self) -> None:
        if not self.modality:
            object.__setattr__(self, "modality", modality_of(self.name))

    def renamed(self, name: str) -> Case:
        """The same case under another name, which may say another modality, unless the file itself said one."""
        return replace(self, name=name, modality=self.modality if self.modality != modality_of(self.name) else "")

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """The shape of its label map, (H, W) or (D, H, W)."""
        return self.image.shape if self.is_3d else self.image.shape[:2]


def why(error: Exception) -> str:
    """What another library says of a file, in one line, for the sentence of an InputError."""
    # addresses in memory differ from run to run
    return re.sub(r" ?<_io[^>]*>| ?\(?0x[0-9a-f]+\)?:?", "", " ".join(str(error).split()))[-120:]


@contextmanager
def told_in_a_sentence(path: Path, what: str = "", advice: str = "export it again") -> Iterator[None]:
    """Whatever a reader raises becomes an InputError, so that one bad file does not end a run.

    what : is wrong, and `advice` what to do. Without it no reader foresaw the error: it is named with its
    type. GRAYS_DEBUG=yes shows where it was raised. A full disk is no fault of the file, and passes.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # libraries raise many kinds for files from outside
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if os.environ.get("GRAYS_DEBUG"):
            traceback.print_exc()
        told = f"{what} ({why(error)}); {advice}"
        if not what:
            told = (
                f"can't be read ({type(error).__name__}: {why(error)}); {advice}, and report this if it opens elsewhere"
            )
        raise InputError(f"{path}: {told}") from error


def spacing_zyx(spacing_xyz: np.ndarray) -> tuple[float, float, float]:
    """Spacing as files store it, (x, y, z) mm, in array-axis order (z, y, x). ValueError unless three positive numbers."""
    spacing = np.asarray(spacing_xyz, dtype=float).ravel()
    if spacing.shape != (3,) or not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise ValueError(f"spacing must be three positive numbers (x, y, z) in mm, found {spacing.tolist()}")
    x, y, z = spacing.tolist()
    return z, y, x


def check_claim(path: Path, shape: tuple[int, ...], dtype: np.dtype, holds: int) -> int:
    """Bytes of the voxels that a header claims. InputError, before memory is asked for, if the file can't have them.

    holds: the most bytes that the file may unpack to.
    """
    claimed = int(np.prod(shape, dtype=float)) * dtype.itemsize
    if claimed > holds:
        told = f"it can't hold the {shape} voxels that it claims; copy it again"
        raise InputError(f"{path}: ends too early or is damaged: {told}")
    if claimed > MOST_BYTES:
        most = f"more than {MOST_BYTES / 2**30:g} GiB; crop it, or set GRAYS_LIMIT_GB={claimed / 2**30 + 1:.0f}"
        raise InputError(f"{path}: claims {shape} voxels of {dtype.itemsize} bytes, {most}")
    if dtype.kind == "c":
        raise InputError(f"{path}: holds complex values in its {shape} voxels; save their magnitude as a volume")
    return claimed


def check_image(image: np.ndarray, is_3d: bool, path: Path | str) -> np.ndarray:
    """Return the image as uint8, or raise InputError. Whole-number and float arrays must lie in 0..255."""
    shapes = "(D, H, W)" if is_3d else "(H, W) or (H, W, 3)"
    if image.ndim != 3 if is_3d else image.ndim != 2 and image.shape[2:] != (3,):
        raise InputError(f"{path}: 'imgs' has shape {image.shape}, expected {shapes}; reshape or split it")
    if image.size == 0:
        raise InputError(f"{path}: 'imgs' is empty, shape {image.shape}; leave the file out")
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind not in "uif":
        raise InputError(f"{path}: 'imgs' has dtype {image.dtype}, expected uint8 in 0..255; convert it")
    if not np.isfinite(image).all():
        raise InputError(f"{path}: 'imgs' holds NaN or infinity; replace those values and window the image to 0..255")
    low, high = image.min(), image.max()
    if low < 0 or high > 255:
        raise InputError(f"{path}: 'imgs' ranges from {low:g} to {high:g}, expected 0..255; window it to 8 bits first")
    if image.dtype.kind == "f" and 0 < high <= 1:
        raise InputError(f"{path}: 'imgs' is float in 0..1, expected 0..255; multiply it by 255")
    return np.rint(image).astype(np.uint8)


def check_contrast(values: np.ndarray, path: Path | str) -> None:
    """InputError if all values of an image are equal: an empty page, or a file that was exported wrongly."""
    if values.min() == values.max():
        raise InputError(f"{path}: every value is {values.min():g}, so there is nothing to see; leave the file out")


def check_labels(labels: np.ndarray, grid: tuple[int, ...], path: Path | str) -> np.ndarray:
    """Return the label map as uint16, or raise InputError. grid: the shape it must have, (H, W) or (D, H, W)."""
    if labels.shape != grid:
        raise InputError(f"{path}: label map has shape {labels.shape} but the image has {grid}; they must agree")
    if labels.dtype.kind not in "uib":
        raise InputError(f"{path}: label map has dtype {labels.dtype}, expected whole numbers; convert it")
    if labels.size and (labels.min() < 0 or labels.max() > MAX_LABEL):
        raise InputError(f"{path}: labels range from {labels.min()} to {labels.max()}, allowed are 0 to {MAX_LABEL}")
    return labels.astype(np.uint16)


def paint(masks: Iterable[np.ndarray], names: Sequence[str], where: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Masks of objects that may overlap -> (label map uint16, exact boxes of the whole masks, (N, 4) or (N, 6)).

    The i-th becomes label i + 1; a smaller one covers a larger one, of equal ones the later. What is hidden is told.
    masks : (H, W) or (D, H, W) bool each, one at least; taken one by one, as many need much memory.
    names : of the objects, "" for none; read at the end.   where : the file that the sentence names.
    """
    labels, sizes, boxes = None, [0], []
    for number, mask in enumerate(masks, start=1):
        labels = np.zeros(mask.shape, np.uint16) if labels is None else labels
        sizes.append(np.count_nonzero(mask))
        boxes.append(boxes_from_labels(mask.view(np.uint8))[1])
        before = labels[mask]
        # sizes of what is there: 0 for nothing
        labels[mask] = np.where((before == 0) | (np.array(sizes)[before] >= sizes[-1]), number, before)
    # row by row: bincount takes 8 bytes a pixel
    visible = sum(np.bincount(row.ravel(), minlength=len(sizes)) for row in labels).tolist()
    hidden = [
        f"object {i}{f' ({name})' * bool(name)} {sizes[i] - visible[i]:,} of {sizes[i]:,}"
        for i, name in enumerate(names, start=1)
        if visible[i] < sizes[i]
    ]
    if hidden:
        told = ", ".join(hidden[:5]) + f", and {len(hidden) - 5} more objects" * (len(hidden) > 5)
        tell(f"{where}: smaller objects hide pixels of larger ones in the label map: {told}", error=True)
    return labels, np.concatenate(boxes)


def check_boxes(boxes: np.ndarray, grid: tuple[int, ...], path: Path | str, flat: bool = False) -> np.ndarray:
    """Return boxes as (N, 4) or (N, 6) float64, or raise InputError that names the first bad row.

    grid: (H, W) or (D, H, W). A coordinate may equal the image's size (some tools store exclusive maxima).
    A box of one slice (z_min = z_max) is good. One without width or height prompts nothing and is refused,
    unless `flat`: the exact box of a mask that is 1 pixel wide is such a box.
    """
    boxes, n = np.asarray(boxes), len(grid)
    if boxes.ndim != 2 or boxes.shape[1] != 2 * n:
        order = "a picture's are x_min y_min x_max y_max" if n == 2 else "a volume's have z_min and z_max too"
        raise InputError(f"{path}: 'boxes' has shape {boxes.shape}, expected (N, {2 * n}) for this image: {order}")
    if len(boxes) == 0:
        raise InputError(f"{path}: 'boxes' is empty; give at least one box, or leave the file out")
    if len(boxes) > MAX_LABEL:
        raise InputError(f"{path}: {len(boxes)} boxes, more than the {MAX_LABEL} labels of a mask; split the case")
    if boxes.dtype.kind not in "uif" or not np.isfinite(boxes).all():
        raise InputError(f"{path}: 'boxes' must hold finite numbers (dtype {boxes.dtype}); correct it")
    boxes = boxes.astype(np.float64)
    low, high, size = boxes[:, :n], boxes[:, n:], np.array(grid[::-1])  # x, y(, z)
    swapped, outside = high < low, (low < 0) | (high > size)
    swapped[:, :2] |= (high[:, :2] == low[:, :2]) & (not flat)
    outside[:, 2:] |= high[:, 2:] > size[2:] - 1  # z is a slice number: it must exist
    for bad, what in (swapped, "swapped or without area"), (outside, f"outside the image of size {size} (x, y, z)"):
        if bad.any():
            row = int(np.argmax(bad.any(axis=1)))
            order = " ".join(f"{axis}_{end}" for end in ("min", "max") for axis in "xyz"[:n])
            told = f"box {row} {boxes[row].tolist()} is {what}; boxes are {order} in pixels of the image"
            raise InputError(f"{path}: {told}")
    return boxes
