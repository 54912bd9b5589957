"""Objects that a JSON file outlines: COCO, one file for many images, and Supervisely, a.jpg.json for a.jpg.

Every object becomes a label of its own, numbered as in the file. COCO is read by pycocotools, after a
check that no outline claims more than its image has. Where objects overlap, the smaller ones are seen.
Source: the formats of cocodataset.org and supervisely.com.
"""

import base64
import json
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from formats import MAX_LABEL, InputError
from formats.case import paint
from formats.writing import tell
from grid import boxes_from_labels

MAX_BYTES = 2**27  # of one object's bitmap, unpacked
Labels = tuple[np.ndarray, tuple[str, ...]]  # (H, W) uint16, and the class of labels 1, 2, ...


def read_annotations(
    path: Path, image: Path, shape: tuple[int, int]
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray | None]:
    """Objects of one image, of either kind of file -> (labels (H, W) uint16, the class of each, exact boxes (N, 4) or None).

    Boxes are of whole objects, also where others hide them, and of those that have no outline.
    """
    if is_coco(path):
        return *read_coco(path, image, shape), coco_boxes(path, image, shape)[0]
    return read_supervisely(path, shape)


def is_coco(path: Path) -> bool:
    """Whether a JSON file holds COCO annotations."""
    try:
        return bool(coco_files(path))
    except InputError:
        return False


def coco_files(path: Path) -> set[str]:
    """Names of the images that a COCO file lists. InputError if it is no such file."""
    return {listed.name for listed in _objects_by_file(path, path.stat().st_mtime_ns)}


def read_coco(path: Path, image: Path | str, shape: tuple[int, int]) -> Labels:
    """Objects of one image, which the file must list -> (labels (H, W) uint16, the category of each label)

    Objects without an outline, and what the label map hides of larger ones, are told.
    """
    from pycocotools import mask as tools  # only here: few data sets have such files

    objects, nothing = _objects_of(path, image, shape), np.zeros(shape, bool)
    masks = (tools.decode(code).astype(bool) if code else nothing for _, code, _ in objects)
    labels, told = paint(masks, [name for name, _, _ in objects])
    lone = [f"{i} ({name})" if name else str(i) for i, (name, code, _) in enumerate(objects, start=1) if code is None]
    if lone:
        told.append(f"object {', '.join(lone)} has no outline, so no mask; step 4 takes its box")
    for sentence in told:
        tell(f"{path}: {Path(image).name}: {sentence}", error=True)
    return labels, tuple(name for name, _, _ in objects)


def coco_boxes(path: Path, image: Path | str, shape: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Boxes of one image's objects -> ((N, 4) x_min y_min x_max y_max, pixels, inclusive; their categories; all exact?).

    They are those of the outlines, which are exact; of an object without an outline, the file's own.
    """
    from pycocotools import mask as tools

    boxes, objects = [], _objects_of(path, image, shape)
    for _, code, box in objects:
        x, y, width, height = tools.toBbox(code) if code else box
        boxes.append((max(x, 0), max(y, 0), min(x + width, shape[1]) - 1, min(y + height, shape[0]) - 1))
    return np.array(boxes, float), tuple(name for name, _, _ in objects), all(code for _, code, _ in objects)


def _objects_of(path: Path, image: Path | str, shape: tuple[int, int]) -> list[tuple[str, dict | None, list | None]]:
    """(category, run lengths of pycocotools or None, box x y width height or None) of each object of an image."""
    everything, image = _objects_by_file(path, path.stat().st_mtime_ns), Path(image)
    named = [listed for listed in everything if listed.name == image.name]
    if len(named) > 1:  # in several folders: the one whose folders are the image's
        named = [one for one in named if one.parts == image.resolve().parts[-len(one.parts) :]] or named
    name = image.name
    if len(named) > 1:
        raise InputError(
            f"{path}: lists {', '.join(map(str, named[:3]))}: which is {image}? give each a name of its own"
        )
    if not named:
        raise InputError(f"{path}: lists no image {name}; add it, or correct the name ('file_name' in 'images')")
    size, objects = everything[named[0]]
    if not objects:
        raise InputError(f"{path}: has no object of {name}; outline one, or leave the image out")
    if None not in size and size != shape:
        raise InputError(f"{path}: {name} is listed as {size[0]} x {size[1]} (H, W), but is {shape[0]} x {shape[1]}")
    if len(objects) > MAX_LABEL:
        raise InputError(f"{path}: {name} has {len(objects)} objects, more than the {MAX_LABEL} labels of a mask")
    found = []
    for number, (category, outline, box) in enumerate(objects, start=1):
        try:
            code, box = _run_lengths(outline, shape), _sides(box)
            if code is None and box is None:
                raise ValueError("none, and no box")
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise InputError(f"{path}: object {number} of {name} has no good outline ({error}); correct it") from error
        found.append((category, code, box))
    return found


@lru_cache(maxsize=2)  # one JSON file describes thousands of images: it is read once
def _objects_by_file(path: Path, _changed: int) -> dict[PurePosixPath, tuple[tuple, list]]:
    """{listed file: ((H, W), [(category, outline, box)])} of a COCO file; H and W may be None. Crowds are no objects."""
    try:
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is no COCO file ({error!r}); it needs 'images' and 'annotations'") from error
    if lost := sum(one.get("image_id") not in names for one in objects):
        tell(f"{path}: {lost} annotations left out, of images that it does not list", error=True)
    return found


def _sides(box) -> list[float] | None:
    """COCO's x, y, width, height, None if there is no such box. A box of no pixel is none."""
    sides = np.array(box or [], float)
    return sides.tolist() if sides.shape == (4,) and np.isfinite(sides).all() and (sides[2:] > 0).all() else None


def _run_lengths(outline, shape: tuple[int, int]) -> dict | None:
    """An object's outline as pycocotools' run lengths; None if it has none, or no pixel. ValueError if it is bad.

    Polygons [x0, y0, x1, y1, ...] count pixels from the image's corner, not from a pixel's centre.
    Run lengths count down the columns, background first: as numbers, or packed into text. What they
    claim is checked first, because pycocotools is C and believes them.
    """
    from pycocotools import mask as tools  # only here: few data sets have such files

    if not outline:
        return None
    if isinstance(outline, list):
        corners = [np.array(points, float).reshape(-1, 2) for points in outline]
        if few := [len(points) for points in corners if len(points) < 3]:
            raise ValueError(f"a polygon of {few[0]} points")
        beyond = [p for p in corners if not (np.abs(p / shape[::-1] - 0.5) <= 1.5).all()]  # NaN too
        if beyond:
            raise ValueError(f"a polygon that lies outside the image, to {beyond[0].max():g}")
        code = tools.merge(tools.frPyObjects([points.ravel().tolist() for points in corners], *shape))
    else:
        if tuple(outline["size"]) != shape:
            raise ValueError(f"its run-length code is for {outline['size']}, the image is {list(shape)}")
        runs = outline["counts"]
        runs = _unpacked(runs) if isinstance(runs, str) else [int(run) for run in runs]
        if min(runs, default=0) < 0 or sum(runs) != shape[0] * shape[1]:
            raise ValueError(f"its runs cover {sum(runs)} pixels, the image has {shape[0] * shape[1]}")
        code = tools.frPyObjects({"size": list(shape), "counts": runs}, *shape)
    return code if tools.area(code) else None


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
        if bits & 32:
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs


def read_supervisely(path: Path, shape: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Objects of one image, polygons or bitmaps -> (labels (H, W) uint16, the class of each, exact boxes (N, 4))"""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        size, objects = (content["size"]["height"], content["size"]["width"]), content["objects"]
        masks = [_supervisely_mask(one, shape) for one in objects] if size == shape else []
        names = tuple(str(one.get("classTitle", "")) for one in objects)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zlib.error, cv2.error) as error:
        raise InputError(f"{path}: is no Supervisely annotation ({error!r}); export it again") from error
    if size != shape:
        raise InputError(f"{path}: is for an image of {size[0]} x {size[1]}, but this one is {shape[0]} x {shape[1]}")
    if not masks or len(masks) > MAX_LABEL:
        raise InputError(f"{path}: has {len(masks) or 'no'} object; outline 1 to {MAX_LABEL}, or leave the image out")
    labels, told = paint(masks, names)
    for sentence in told:
        tell(f"{path}: {sentence}", error=True)
    return labels, names, np.concatenate([boxes_from_labels(mask)[1] for mask in masks])


def _supervisely_mask(item: dict, shape: tuple[int, int]) -> np.ndarray:
    """One object -> (H, W) bool."""
    mask = np.zeros(shape, np.uint8)
    if "bitmap" in item:
        packed = np.frombuffer(
            zlib.decompressobj().decompress(base64.b64decode(item["bitmap"]["data"]), MAX_BYTES), np.uint8
        )
        stamp = cv2.imdecode(packed, cv2.IMREAD_UNCHANGED)
        stamp = stamp[..., -1] if stamp.ndim == 3 else stamp  # alpha
        x, y = item["bitmap"]["origin"]
        mask[y : y + stamp.shape[0], x : x + stamp.shape[1]] = stamp > 0
    else:
        points = item["points"]
        for value, corners in [(1, points["exterior"]), *((0, hole) for hole in points.get("interior", []))]:
            cv2.fillPoly(mask, [np.array(corners, np.float64).round().astype(np.int32)], value)
    return mask.astype(bool)
