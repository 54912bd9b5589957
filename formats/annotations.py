"""Objects that a JSON file outlines: COCO, one file for many images, and LAYOUTS of one image: a.json or a.jpg.json.

A new layout is one function and one row of LAYOUTS. Every object becomes a label of its own, numbered as in the file;
where objects overlap, the smaller ones are seen. What an outline claims is checked before pycocotools, which is C and
believes it, fills it. Source: the formats of cocodataset.org and supervisely.com.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from formats import MAX_LABEL, InputError
from formats.case import paint, told_in_a_sentence
from formats.writing import tell
from grid import boxes_from_labels

Boxed = tuple[np.ndarray, tuple[str, ...], np.ndarray]  # labels (H, W) uint16, the class of each, exact boxes (N, 4)


def read_annotations(path: Path, image: Path, shape: tuple[int, int]) -> Boxed:
    """Objects of one image (H, W) = shape, of any known file.

    Boxes are of whole objects, also where others hide them, and of those that have no outline.
    """
    if is_coco(path):
        return read_coco(path, image, shape)
    # a file that fits no row is told so by the first one
    return (layout_of(path) or next(iter(LAYOUTS.values())))(path, shape)


def layout_of(path: Path) -> Callable[[Path, tuple[int, int]], Boxed] | None:
    """What reads a JSON file about one image: the first row of LAYOUTS whose key it has, or None."""
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return next((read for key, read in LAYOUTS.items() if isinstance(keys, dict) and key in keys), None)


def is_coco(path: Path) -> bool:
    """Whether a JSON file holds COCO annotations."""
    try:
        return bool(coco_files(path))
    except InputError:
        return False


def coco_files(path: Path) -> set[str]:
    """Names of the images that a COCO file lists. InputError if it is no such file."""
    return {listed.name for listed in _objects_by_file(path, path.stat().st_mtime_ns)}


def read_coco(path: Path, image: Path, shape: tuple[int, int]) -> Boxed:
    """What `read_annotations` gives of a COCO file, which must list the image. Objects without an outline are told."""
    names, boxes, lone = [], [], []

    def masks() -> Iterator[np.ndarray]:
        for number, (name, mask, box) in enumerate(_objects_of(path, image, shape), start=1):
            names.append(name), boxes.append(box)
            lone.extend([f"{number} ({name})" if name else str(number)] if mask is None else [])
            yield np.zeros(shape, bool) if mask is None else mask

    labels, _ = paint(masks(), names, f"{path}: {image.name}")
    if lone:
        told = f"object {', '.join(lone)} has no outline, so no mask; step 4 takes its box"
        tell(f"{path}: {image.name}: {told}", error=True)
    return labels, tuple(names), np.array(boxes, float)


def coco_boxes(path: Path, image: Path, shape: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Boxes of one image's objects -> ((N, 4) x_min y_min x_max y_max, pixels, inclusive; their categories; all exact?).

    They are those of the outlines, which are exact; of an object without an outline, the file's own.
    """
    found = [(box, name, mask is not None) for name, mask, box in _objects_of(path, image, shape)]
    boxes, names, are_exact = zip(*found, strict=True)
    return np.array(boxes, float), names, all(are_exact)


def _objects_of(path: Path, image: Path, shape: tuple[int, int]) -> Iterator[tuple[str, np.ndarray | None, Sequence]]:
    """Each object of an image: (category, mask (H, W) bool or None, box x_min y_min x_max y_max). Or InputError."""
    everything, name = _objects_by_file(path, path.stat().st_mtime_ns), image.name
    named = [listed for listed in everything if listed.name == name]
    if len(named) > 1:  # in several folders: the one whose folders are the image's
        named = [one for one in named if one.parts == image.resolve().parts[-len(one.parts) :]] or named
    if len(named) > 1:
        several = ", ".join(map(str, named[:3]))
        raise InputError(f"{path}: lists {several}: which is {image}? give each a name of its own")
    if not named:
        raise InputError(f"{path}: lists no image {name}; add it, or correct the name ('file_name' in 'images')")
    size, objects = everything[named[0]]
    _check(path, name, size if None not in size else shape, shape, len(objects))
    for number, (category, outline, sides) in enumerate(objects, start=1):
        with told_in_a_sentence(path, f"object {number} of {name} has no good outline", "correct it"):
            mask, sides = _mask_of(outline, shape), np.array(sides or [], float)
            if mask is None and not (sides.shape == (4,) and np.isfinite(sides).all() and (sides[2:] > 0).all()):
                raise ValueError("none, and no box")
            if mask is None:
                x, y, width, height = sides
                box = max(x, 0), max(y, 0), min(x + width, shape[1]) - 1, min(y + height, shape[0]) - 1
            else:
                box = boxes_from_labels(mask.view(np.uint8))[1][0]
        yield category, mask, box


def _check(path: Path, name: str, size: tuple[int, int], shape: tuple[int, int], count: int) -> None:
    """InputError if annotations are of an image of another size (H, W), or their number does not fit a label map."""
    if size != shape:
        raise InputError(f"{path}: {name} is listed as {size[0]} x {size[1]} (H, W), but is {shape[0]} x {shape[1]}")
    if not 0 < count <= MAX_LABEL:
        raise InputError(f"{path}: has {count} objects of {name}; outline 1 to {MAX_LABEL}, or leave the image out")


@lru_cache(maxsize=2)  # one JSON file describes thousands of images: it is read once
def _objects_by_file(path: Path, _changed: int) -> dict[PurePosixPath, tuple[tuple, list]]:
    """{listed file: ((H, W), [(category, outline, box)])} of a COCO file; H and W may be None. Crowds are no objects."""
    with told_in_a_sentence(path, "is no COCO file", "it needs 'images' and 'annotations'"):
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = {one["id"]: str(one["name"]) for one in content.get("categories", [])}
        names = {image["id"]: PurePosixPath(image["file_name"].replace("\\", "/")) for image in content["images"]}
        found = {names[i["id"]]: ((i.get("height"), i.get("width")), []) for i in content["images"]}
        if not len(names) == len(found) == len(content["images"]):
            raise ValueError("an id or a file_name stands twice in 'images'")
        objects = [one for one in content["annotations"] if not one.get("iscrowd")]
        for one in (one for one in objects if one.get("image_id") in names):
            category = categories.get(one.get("category_id"), "")
            found[names[one["image_id"]]][1].append((category, one.get("segmentation"), one.get("bbox")))
    if lost := sum(one.get("image_id") not in names for one in objects):
        tell(f"{path}: {lost} annotations left out, of images that it does not list", error=True)
    return found


def _mask_of(outline, shape: tuple[int, int]) -> np.ndarray | None:
    """An object's outline -> (H, W) bool; None if it has none, or no pixel. ValueError if it is bad.

    Polygons [x0, y0, x1, y1, ...] count pixels from the image's corner, not from a pixel's centre.
    Run lengths count down the columns, background first: as numbers, or packed into text.
    """
    if not outline:
        return None
    if isinstance(outline, list):
        from pycocotools import mask as tools  # only here: few data sets have such files

        corners = [_corners(np.reshape(points, (-1, 2)), shape) for points in outline]
        mask = tools.decode(tools.merge(tools.frPyObjects([points.ravel().tolist() for points in corners], *shape)))
    else:
        if tuple(outline["size"]) != shape:
            raise ValueError(f"its run-length code is for {outline['size']}, the image is {list(shape)}")
        runs = outline["counts"]
        runs = _unpacked(runs) if isinstance(runs, str) else [int(run) for run in runs]
        if min(runs, default=0) < 0 or sum(runs) != shape[0] * shape[1]:
            raise ValueError(f"its runs cover {sum(runs)} pixels, the image has {shape[0] * shape[1]}")
        mask = np.repeat(np.arange(len(runs)) % 2, runs).reshape(shape[::-1]).T
    return mask.astype(bool) if mask.any() else None


def _corners(points, shape: tuple[int, int]) -> np.ndarray:
    """Corners (N, 2) of a polygon, x and y. ValueError for too few, or far outside, where filling takes without end."""
    corners = np.array(points, float)
    if len(corners) < 3:
        raise ValueError(f"a polygon of {len(corners)} points")
    if not (np.abs(corners / shape[::-1] - 0.5) <= 1.5).all():  # NaN too
        raise ValueError(f"a polygon that lies outside the image, to {corners.max():g}")
    return corners


def _unpacked(text: str) -> list[int]:
    """Run lengths of a packed code, 5 bits of a number in a letter, lowest first; bit 5: more letters follow.

    From the fourth run on, a number is the difference to the run two before.
    """
    runs, value, shift = [], 0, 0
    for letter in text.encode("ascii"):
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("its run-length code holds a number that has no end")
        if not bits & 32:
            value -= (1 << shift) * (bits >> 4 & 1)  # bit 4 of the last letter is the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs


def read_supervisely(path: Path, shape: tuple[int, int]) -> Boxed:
    """What `read_annotations` gives of a Supervisely file of polygons."""
    with told_in_a_sentence(path, "is no Supervisely annotation of polygons", "export it again, bitmaps as polygons"):
        content = json.loads(path.read_text(encoding="utf-8"))
        size, objects = (content["size"]["height"], content["size"]["width"]), content["objects"]
        _check(path, path.stem, size, shape, len(objects))
        masks = np.zeros((len(objects), *shape), np.uint8)
        for mask, one in zip(masks, objects, strict=True):
            if one.get("bitmap"):
                raise ValueError("an object is a bitmap")
            holes = one["points"].get("interior", [])
            for corners, value in ((one["points"]["exterior"], 1), *((hole, 0) for hole in holes)):
                cv2.fillPoly(mask, [_corners(corners, shape).round().astype(np.int32)], value)
        names = tuple(str(one.get("classTitle", "")) for one in objects)
    return boxed_objects(path, masks.view(bool), names)


def boxed_objects(path: Path, masks: Sequence[np.ndarray], names: tuple[str, ...]) -> Boxed:
    """What a row of LAYOUTS returns. masks: (H, W) bool, one an object. What the label map has to hide is told."""
    labels, boxes = paint(masks, names, path)
    return labels, names, boxes


# A key that a JSON file about one image has at its top -> what reads it: (path, (H, W)) -> Boxed, or InputError
LAYOUTS: dict[str, Callable[[Path, tuple[int, int]], Boxed]] = {"objects": read_supervisely}
