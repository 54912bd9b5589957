"""COCO annotations: a JSON file with the objects of many images, as polygons or run-length codes.

Every object becomes a label of its own, larger ones first, so that a small object on a large one stays visible.
A run-length code counts down the columns, background first: as numbers, or packed into text, 5 bits a letter.
Source: the format of cocodataset.org and of pycocotools; this code is ours, and a test compares the two.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from files import MAX_LABEL, InputError


def is_coco(path: Path) -> bool:
    """Whether a JSON file holds COCO annotations."""
    try:
        return bool(_objects_by_file(path, path.stat().st_mtime_ns))
    except InputError:
        return False


def coco_files(path: Path) -> set[str]:
    """Names of the images that a COCO file lists. InputError if it is no such file."""
    return set(_objects_by_file(path, path.stat().st_mtime_ns))


def read_coco(path: Path, image_name: str, shape: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Objects of one image -> (labels (H, W) uint16, the category of each label). shape: (H, W) of the image.

    InputError: an image that is not listed, that has no object or another size, or a damaged outline.
    """
    found = _objects_by_file(path, path.stat().st_mtime_ns)
    if image_name not in found:
        raise InputError(f"{path}: lists no image {image_name}; add it, or correct the name ('file_name' in 'images')")
    size, objects = found[image_name]
    if not objects:
        raise InputError(f"{path}: has no object of {image_name}; outline one, or leave the image out")
    if None not in size and size != shape:
        raise InputError(
            f"{path}: {image_name} is listed as {size[0]} x {size[1]} (H, W), but is {shape[0]} x {shape[1]}"
        )
    if len(objects) > MAX_LABEL:
        raise InputError(f"{path}: {image_name} has {len(objects)} objects, more than the {MAX_LABEL} labels of a mask")
    masks = []
    for number, (category, outline) in enumerate(objects, start=1):
        try:
            masks.append((category, _mask(outline, shape)))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(
                f"{path}: object {number} of {image_name} has no good outline ({error}); correct it"
            ) from error
    masks.sort(key=lambda item: -np.count_nonzero(item[1]))  # stable: equal sizes stay in order
    labels = np.zeros(shape, np.uint16)
    for i, (_, mask) in enumerate(masks):
        labels[mask] = i + 1
    return labels, tuple(category for category, _ in masks)


@lru_cache(maxsize=2)  # one JSON file describes thousands of images: it is read once
def _objects_by_file(path: Path, _changed: int) -> dict[str, tuple[tuple, list]]:
    """{file name: ((H, W), [(category, outline)])} of a COCO file; H and W may be None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {image["id"]: image for image in content["images"]}
        categories = {one["id"]: str(one["name"]) for one in content.get("categories", [])}
        found = {
            Path(image["file_name"]).name: ((image.get("height"), image.get("width")), []) for image in images.values()
        }
        for one in content["annotations"]:
            name = Path(images[one["image_id"]]["file_name"]).name
            category = categories.get(one.get("category_id"), "")
            found[name][1].append((category, one["segmentation"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is no COCO file ({error!r}); it needs 'images' and 'annotations'") from error
    return found


def _mask(outline, shape: tuple[int, int]) -> np.ndarray:
    """An object's outline -> (H, W) bool."""
    if isinstance(
        outline, list
    ):  # polygons [x0, y0, x1, y1, ...], in pixels from the image's corner, not from a pixel's centre
        from skimage.draw import polygon2mask  # slow to import, and needed here only

        mask = np.zeros(shape, bool)
        for points in outline:
            corners = np.array(points, float).reshape(-1, 2)
            if len(corners) < 3:
                raise ValueError(f"a polygon of {len(corners)} points")
            mask |= polygon2mask(shape, corners[:, ::-1] - 0.5)
        return mask
    if tuple(outline["size"]) != shape:
        raise ValueError(f"its run-length code is for {outline['size']}, the image is {list(shape)}")
    counts = outline["counts"]
    runs = np.array(_unpacked(counts) if isinstance(counts, str) else counts, np.int64)
    if (runs < 0).any() or runs.sum() != shape[0] * shape[1]:
        raise ValueError(f"its runs cover {runs.sum()} pixels, the image has {shape[0] * shape[1]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape, order="F")


def _unpacked(text: str) -> list[int]:
    """Run lengths of a packed code. Bits 0 to 4 of a letter carry the number, lowest first, bit 5 says that more follow.

    From the fourth run on, a number is the difference to the run two before.
    """
    runs, value, shift = [], 0, 0
    for letter in text.encode("ascii"):
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs
