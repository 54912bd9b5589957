"""Files in, cases out: one function for each file format, and the checks that every input passes.

A case is one image or volume with its boxes, its label map, or both. Inside the project
images are (H, W) or (H, W, 3) uint8 and volumes (D, H, W) uint8, intensities 0..255;
boxes are pixels of the original image, inclusive of the mask's outermost pixels:
(x_min, y_min, x_max, y_max) in 2D and (x_min, y_min, z_min, x_max, y_max, z_max) in 3D;
spacing is (z, y, x) in mm, in the order of the array's axes. Files store it as (x, y, z).

A new format needs one more function here that returns a `Case`; nothing else changes.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from metrics import label_bounds

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MAX_LABEL = 65_535  # labels are uint16 everywhere: the challenge has images with more than 255 objects

# First word of a file name, lower case, hyphens removed -> modality. Order matters: the first match wins
# (micro-ultrasound is ultrasound, not microscopy; the challenge's files use several spellings of one modality).
MODALITY_PREFIXES = (
    ("microus", "US"),
    ("mamm", "Mammography"),
    ("micro", "Microscopy"),
    ("nuclei", "Microscopy"),
    ("oct", "OCT"),
    ("ct", "CT"),
    ("btcv", "CT"),
    ("mr", "MR"),
    ("pet", "PET"),
    ("us", "US"),
    ("ultra", "US"),
    ("xr", "X-Ray"),
    ("cxr", "X-Ray"),
    ("hipxray", "X-Ray"),
    ("teeth", "X-Ray"),
    ("derm", "Dermoscopy"),
    ("endo", "Endoscopy"),
    ("fundus", "Fundus"),
)


class InputError(ValueError):
    """Bad input, told in one sentence: which file, what was found, what to do."""


@dataclass(frozen=True)
class Case:
    """One image or volume. See the module header for axis order, units and frames."""

    name: str  # file name without its ending
    image: np.ndarray  # (H, W), (H, W, 3) or, if is_3d, (D, H, W); uint8
    boxes: np.ndarray | None  # (N, 4) or (N, 6) float64; row i is object i + 1
    labels: np.ndarray | None  # (H, W) or (D, H, W) uint16, 0 is background
    spacing_mm: tuple[float, float, float] | None  # (z, y, x); None in 2D
    is_3d: bool


def modality_of(name: str) -> str:
    """Modality that a challenge-style file name starts with ("2DBox_X-Ray_0053" -> "X-Ray"); "Other" if none."""
    words = name.split("_")
    if words[0].lower() in ("2dbox", "3dbox", "2d", "3d"):
        words = words[1:]
    first = words[0].lower().replace("-", "") if words else ""
    return next((modality for prefix, modality in MODALITY_PREFIXES if first.startswith(prefix)), "Other")


def spacing_zyx(spacing_xyz: np.ndarray) -> tuple[float, float, float]:
    """Spacing as files store it, (x, y, z) mm, in array-axis order (z, y, x). ValueError unless three positive numbers."""
    spacing = np.asarray(spacing_xyz, dtype=float).ravel()
    if spacing.shape != (3,) or not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise ValueError(f"spacing must be three positive numbers (x, y, z) in mm, found {spacing.tolist()}")
    x, y, z = spacing.tolist()
    return z, y, x


def boxes_from_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact box of every label of a label map.

    labels: (H, W) or (D, H, W), integers, 0 is background.
    Returns (ids (N,) ascending, boxes (N, 4) or (N, 6) float64, pixels, inclusive of the outermost ones).
    """
    bounds = label_bounds(labels)
    ids = np.array(list(bounds), dtype=labels.dtype)
    corners = [(*low[::-1], *high[::-1]) for low, high in bounds.values()]  # array order to x first
    return ids, np.array(corners, dtype=np.float64).reshape(len(ids), 2 * labels.ndim)


def promptable_labels(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the objects of a label map 1..N, so that box i is object i + 1. -> (labels uint16, objects left out)

    An object 1 pixel wide or high has an exact box without area, which prompts nothing: it becomes background.
    """
    ids, boxes = boxes_from_labels(labels)
    sides = (boxes[:, labels.ndim :] - boxes[:, : labels.ndim])[:, :2]  # x and y; one slice of a volume is enough
    good = ids[(sides > 0).all(axis=1)]
    number = np.zeros(int(labels.max()) + 1, np.uint16)
    number[good] = np.arange(1, len(good) + 1)
    return number[labels], len(ids) - len(good)


def list_cases(folder: Path) -> list[Path]:
    """The .npz files of a folder, sorted by name. InputError if the folder is missing or holds none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a folder of .npz cases, or make one with: python phantoms.py")
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise InputError(f"{folder}: holds no .npz case; name another folder, or make cases with: python phantoms.py")
    return files


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file. Never unpickles: an object array could run code. InputError if it can't be read."""
    try:
        with path.open("rb") as file:  # given a path, np.load leaves a damaged file open
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                raise ValueError("it holds a single array, as .npy files do")
            return {key: np.asarray(stored[key]) for key in stored.files}  # what is no array comes as bytes
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, MemoryError) as error:
        # RuntimeError and MemoryError: a header that damage turned into nonsense
        raise InputError(
            f"{path}: not a complete .npz file (truncated or damaged); copy or download it again"
        ) from error
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise InputError(
                f"{path}: holds an object array or a pickle, which could run code and is refused, or is no .npz "
                "file at all; save plain numeric arrays with np.savez_compressed"
            ) from error
        raise InputError(
            f"{path}: not a readable .npz file ({error}); save it again with np.savez_compressed"
        ) from error


def read_npz(path: Path, boxes_from_masks: bool = False) -> Case:
    """Read one case in the challenge's format, input (imgs, boxes) or training (imgs, gts).

    path: .npz with `imgs`, and `boxes`, `gts` or both; `spacing` (x, y, z) in mm if 3D.
    boxes_from_masks: take each object's exact box from `gts` instead of reading `boxes`.
    Raises InputError, one sentence, for everything that the rest of the pipeline could not use.
    Source: the challenge's protocol, CVPR 2024 "Segment Anything in Medical Images on Laptop".
    """
    stored = load_npz(path)
    if "imgs" not in stored:
        raise InputError(f"{path}: has no key 'imgs' (found {sorted(stored)}); it must hold the image as 'imgs'")
    is_3d = _is_volume(path, stored)
    image = check_image(stored["imgs"], is_3d, path)
    grid = image.shape if is_3d else image.shape[:2]
    labels = check_labels(stored["gts"], grid, path) if "gts" in stored else None
    if boxes_from_masks and labels is None:
        raise InputError(f"{path}: has no key 'gts' to take boxes from; give files with masks, or with 'boxes'")
    boxes = boxes_from_labels(labels)[1] if boxes_from_masks else stored.get("boxes")
    if boxes is None and labels is None:
        raise InputError(f"{path}: has neither 'boxes' nor 'gts'; add the box prompts as 'boxes', (N, 4) or (N, 6)")
    if boxes is not None and not boxes_from_masks:  # boxes of masks are right by construction, also 1 pixel wide
        boxes = check_boxes(boxes, grid, path)
    if boxes is not None and len(boxes) == 0:
        raise InputError(f"{path}: 'gts' holds no object, so there is no box to take from it; leave the file out")
    spacing = None
    if is_3d and "spacing" in stored:
        try:
            spacing = spacing_zyx(stored["spacing"])
        except ValueError as error:
            raise InputError(f"{path}: {error}; correct the key 'spacing'") from error
    return Case(path.stem, image, boxes, labels, spacing, is_3d)


def read_image(path: Path) -> np.ndarray:
    """Read a PNG, JPG, TIFF or BMP file -> (H, W) or (H, W, 3) RGB uint8. InputError if it can't be read."""
    pixels = _decode(path)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)  # OpenCV reads BGR
    return check_image(pixels, False, path)


def read_mask(path: Path) -> np.ndarray:
    """Read a mask picture -> (H, W) integers, 0 is background, every other value one object.

    A JPEG cannot carry label numbers (its values smear), so it is cut at 127 into background and one object.
    InputError if the file can't be read or its colours differ: a colour is no label number.
    """
    pixels = _decode(path)
    if pixels.ndim == 3:
        if not (pixels[..., :1] == pixels[..., :3]).all():
            raise InputError(f"{path}: is a colour picture, not a mask; give label numbers in one gray channel")
        pixels = pixels[..., 0]
    return (pixels > 127).astype(np.uint8) if path.suffix.lower() in (".jpg", ".jpeg") else pixels


def read_pair(image_path: Path, mask_path: Path, name: str) -> Case:
    """Read an image and the mask picture of the same size as one 2D case. InputError if they don't fit together."""
    image = read_image(image_path)
    labels = check_labels(read_mask(mask_path), image.shape[:2], mask_path)
    if not labels.any():
        raise InputError(f"{mask_path}: the mask holds no object; paint one, or leave the pair out")
    return Case(name, image, None, labels, None, False)


def list_pairs(images: Path, masks: Path) -> tuple[list[tuple[Path, Path]], list[InputError]]:
    """Image and mask files with equal stems -> (pairs sorted by stem, one InputError for each file that has none)."""
    found: tuple[dict[str, list[Path]], dict[str, list[Path]]] = ({}, {})
    for folder, by_stem in zip((images, masks), found, strict=True):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; name a folder of PNG, JPG, TIFF or BMP files")
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in IMAGE_ENDINGS:
                by_stem.setdefault(path.stem, []).append(path)
        if not by_stem:
            raise InputError(f"{folder}: holds no PNG, JPG, TIFF or BMP file; name another folder")
    pairs, problems = [], []
    for stem in sorted({*found[0], *found[1]}):
        mine, partners = found[0].get(stem, []), found[1].get(stem, [])
        if len(mine) == 1 and len(partners) == 1:
            pairs.append((mine[0], partners[0]))
        elif mine and partners:
            names = ", ".join(path.name for path in (*mine, *partners))
            problems.append(InputError(f"{images}: {names} share one name; keep one image and one mask of each name"))
        else:
            lone, other = (mine[0], masks) if mine else (partners[0], images)
            problems.append(InputError(f"{lone}: has no partner named {stem} in {other}; add it, or remove this file"))
    return pairs, problems


def _decode(path: Path) -> np.ndarray:
    """Pixels of a picture file as OpenCV stores them: (H, W), or (H, W, C) in the order blue, green, red."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        content = np.fromfile(path, dtype=np.uint8)  # cv2.imread cannot open non-ASCII paths on Windows
        # all channels and bits, and turned as the camera says, as viewers show it; alpha is dropped
        pixels = cv2.imdecode(content, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH) if content.size else None
        pages = cv2.imdecodemulti(content, cv2.IMREAD_UNCHANGED)[1] if path.suffix.lower() in (".tif", ".tiff") else ()
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from error
    except cv2.error:  # a size beyond OpenCV's limit, true or from a damaged header
        pixels = None
    if pixels is None:
        raise InputError(f"{path}: not an image that OpenCV can read; give a PNG, JPG, TIFF or BMP file")
    if len(pages) > 1:
        raise InputError(f"{path}: holds several pages; save the one to use as an image of its own")
    return pixels


def check_image(image: np.ndarray, is_3d: bool, path: Path) -> np.ndarray:
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


def check_labels(labels: np.ndarray, grid: tuple[int, ...], path: Path) -> np.ndarray:
    """Return the label map as uint16, or raise InputError. grid: the shape it must have, (H, W) or (D, H, W)."""
    if labels.shape != grid:
        raise InputError(f"{path}: label map has shape {labels.shape} but the image has {grid}; they must agree")
    if labels.dtype.kind not in "uib":
        raise InputError(f"{path}: label map has dtype {labels.dtype}, expected whole numbers; convert it")
    if labels.size and (labels.min() < 0 or labels.max() > MAX_LABEL):
        raise InputError(f"{path}: labels range from {labels.min()} to {labels.max()}, allowed are 0 to {MAX_LABEL}")
    return labels.astype(np.uint16)


def check_boxes(boxes: np.ndarray, grid: tuple[int, ...], path: Path | str) -> np.ndarray:
    """Return boxes as (N, 4) or (N, 6) float64, or raise InputError that names the first bad row.

    grid: (H, W) or (D, H, W). A coordinate may equal the image's size (some tools store exclusive maxima).
    A box of one slice (z_min = z_max) is good; one without width or height is not: it prompts nothing.
    """
    width = 2 * len(grid)
    if boxes.ndim != 2 or boxes.shape[1] != width:
        raise InputError(f"{path}: 'boxes' has shape {boxes.shape}, expected (N, {width}) for this image")
    if len(boxes) == 0:
        raise InputError(f"{path}: 'boxes' is empty; give at least one box, or leave the file out")
    if len(boxes) > MAX_LABEL:
        raise InputError(
            f"{path}: {len(boxes)} boxes, more than the {MAX_LABEL} labels that a mask can hold; split the case"
        )
    if boxes.dtype.kind not in "uif" or not np.isfinite(boxes).all():
        raise InputError(f"{path}: 'boxes' must hold finite numbers (dtype {boxes.dtype}); correct it")
    boxes = boxes.astype(np.float64)
    low, high = boxes[:, : len(grid)], boxes[:, len(grid) :]
    size = np.array(grid[::-1], dtype=float)  # x, y(, z), like the columns
    flat = high < low
    flat[:, :2] |= high[:, :2] == low[:, :2]
    outside = (low < 0) | (high > size)
    outside[:, 2:] |= high[:, 2:] > size[2:] - 1  # z is a slice number: it must exist
    for bad, what in (
        (flat, "swapped or without area"),
        (outside, f"outside the image of size {size.astype(int)} (x, y, z)"),
    ):
        if bad.any():
            row = int(np.argmax(bad.any(axis=1)))
            raise InputError(
                f"{path}: box {row} {boxes[row].tolist()} is {what}; boxes are x_min y_min{' z_min' * (width == 6)} "
                f"x_max y_max{' z_max' * (width == 6)} in pixels of the image"
            )
    return boxes


def _is_volume(path: Path, stored: dict[str, np.ndarray]) -> bool:
    """2D or 3D: the name says it (2D..., 3D...), as in the challenge; else the boxes, the label map, the spacing key."""
    if path.name[:2] in ("2D", "3D"):
        return path.name[:2] == "3D"
    boxes = stored.get("boxes")
    if boxes is not None and boxes.ndim == 2 and boxes.shape[1] in (4, 6):
        return boxes.shape[1] == 6
    if "gts" in stored:
        return stored["gts"].ndim == 3
    return "spacing" in stored
