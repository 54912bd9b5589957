"""Objects that a JSON file outlines: COCO, one file for many images, and Supervisely, a.jpg.json for a.jpg.

Every object becomes a label of its own; a later one covers an earlier one. COCO's larger ones come
first, so that a small object on a large one stays visible. Supervisely's keep their order.
Source: the formats of cocodataset.org and supervisely.com; a test compares with pycocotools.
"""

import base64
import json
import zlib
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from formats import MAX_LABEL, InputError


def read_annotations(path: Path, image_name: str, shape: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Objects of one image, of either kind of file -> (labels (H, W) uint16, the class of each label)"""
    return read_coco(path, image_name, shape) if is_coco(path) else read_supervisely(path, shape)


def is_coco(path: Path) -> bool:
    """Whether a JSON file holds COCO annotations."""
    try:
        return bool(coco_files(path))
    except InputError:
        return False


def coco_files(path: Path) -> set[str]:
    """Names of the images that a COCO file lists. InputError if it is no such file."""
    return set(_objects_by_file(path, path.stat().st_mtime_ns))


def read_coco(path: Path, name: str, shape: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Objects of one image, which the file must list -> (labels (H, W) uint16, the category of each label)"""
    found = _objects_by_file(path, path.stat().st_mtime_ns)
    if name not in found:
        raise InputError(f"{path}: lists no image {name}; add it, or correct the name ('file_name' in 'images')")
    size, objects = found[name]
    if not objects:
        raise InputError(f"{path}: has no object of {name}; outline one, or leave the image out")
    if None not in size and size != shape:
        raise InputError(f"{path}: {name} is listed as {size[0]} x {size[1]} (H, W), but is {shape[0]} x {shape[1]}")
    if len(objects) > MAX_LABEL:
        raise InputError(f"{path}: {name} has {len(objects)} objects, more than the {MAX_LABEL} labels of a mask")
    masks = []
    for number, (category, outline) in enumerate(objects, start=1):
        try:
            masks.append((category, _coco_mask(outline, shape)))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(f"{path}: object {number} of {name} has no good outline ({error}); correct it") from error
    return _painted(sorted(masks, key=lambda item: -np.count_nonzero(item[1])))  # equal sizes stay in order


@lru_cache(maxsize=2)  # one JSON file describes thousands of images: it is read once
def _objects_by_file(path: Path, _changed: int) -> dict[str, tuple[tuple, list]]:
    """{file name: ((H, W), [(category, outline)])} of a COCO file; H and W may be None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {image["id"]: image for image in content["images"]}
        categories = {one["id"]: str(one["name"]) for one in content.get("categories", [])}
        found = {Path(i["file_name"]).name: ((i.get("height"), i.get("width")), []) for i in images.values()}
        for one in content["annotations"]:
            name = Path(images[one["image_id"]]["file_name"]).name
            found[name][1].append((categories.get(one.get("category_id"), ""), one["segmentation"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is no COCO file ({error!r}); it needs 'images' and 'annotations'") from error
    return found


def _coco_mask(outline, shape: tuple[int, int]) -> np.ndarray:
    """An object's outline -> (H, W) bool

    Polygons [x0, y0, x1, y1, ...] count pixels from the image's corner, not from a pixel's centre.
    Run lengths count down the columns, background first: as numbers, or packed into text.
    """
    if isinstance(outline, list):
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
    """Run lengths of a packed code, 5 bits of a number in a letter, lowest first; bit 5: more letters follow.

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


def read_supervisely(path: Path, shape: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Objects of one image, polygons or bitmaps -> (labels (H, W) uint16, the class of each label)"""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        size = (content["size"]["height"], content["size"]["width"])
        masks = [(str(one.get("classTitle", "")), _supervisely_mask(one, size)) for one in content["objects"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zlib.error, cv2.error) as error:
        raise InputError(f"{path}: is no Supervisely annotation ({error!r}); export it again") from error
    if size != shape:
        raise InputError(f"{path}: is for an image of {size[0]} x {size[1]}, but this one is {shape[0]} x {shape[1]}")
    if not masks:
        raise InputError(f"{path}: has no object; outline one, or leave the image out")
    return _painted(masks)


def _painted(masks: list[tuple[str, np.ndarray]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """[(class, mask (H, W))] -> (labels, the class of each label)"""
    labels = np.zeros(masks[0][1].shape, np.uint16)
    for i, (_, mask) in enumerate(masks):
        labels[mask] = i + 1
    return labels, tuple(title for title, _ in masks)


def _supervisely_mask(item: dict, shape: tuple[int, int]) -> np.ndarray:
    """One object -> (H, W) bool."""
    mask = np.zeros(shape, np.uint8)
    if "bitmap" in item:
        packed = np.frombuffer(zlib.decompress(base64.b64decode(item["bitmap"]["data"])), np.uint8)
        stamp = cv2.imdecode(packed, cv2.IMREAD_UNCHANGED)
        stamp = stamp[..., -1] if stamp.ndim == 3 else stamp  # alpha
        x, y = item["bitmap"]["origin"]
        mask[y : y + stamp.shape[0], x : x + stamp.shape[1]] = stamp > 0
    else:
        points = item["points"]
        for value, corners in [(1, points["exterior"]), *((0, hole) for hole in points.get("interior", []))]:
            cv2.fillPoly(mask, [np.array(corners, np.float64).round().astype(np.int32)], value)
    return mask.astype(bool)
