"""Pictures: PNG, JPG, TIFF and BMP files of 8 bits, and mask pictures that lie beside them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from files import InputError
from files.case import Case, check_image, check_labels

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def read_picture(path: Path) -> Case:
    """A picture as a case without boxes. InputError if it can't be read."""
    return Case(path.stem, read_image(path), None, None, None, False)


def read_image(path: Path | str) -> np.ndarray:
    """Read a PNG, JPG, TIFF or BMP file -> (H, W) or (H, W, 3) RGB uint8. InputError if it can't be read."""
    path = Path(path)
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
            if path.suffix.lower() in PICTURE_ENDINGS:
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
