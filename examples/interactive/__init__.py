"""A fork for CVPR 2025, "Foundation Models for Interactive 3D Biomedical Image Segmentation": a box, then clicks.

A file has `imgs` (D, H, W) and `spacing` (x, y, z); `boxes`, a dict an object: a box on its middle slice, and its slices;
later `clicks`, {"fg": [[z, y, x], ...], "bg": [...]} an object, and `prev_pred`. Our network knows boxes alone, so a click
makes a box: `correct`. The program that plays the organisers: python -m examples.interactive --help
"""

import json
import pickle
import zipfile
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from formats import InputError
from formats.case import check_image, check_labels, paint, spacing_zyx
from volumes import follow

KEYS = ("z_min", "z_max", "z_mid", "z_mid_x_min", "z_mid_y_min", "z_mid_x_max", "z_mid_y_max")  # of a box
GROWTH = 2  # pixels: how much larger than a mask the box is that asks for it again
DISK = 3  # pixels round a click on an object that become object whatever the network says


class Plain(pickle.Unpickler):
    """A pickle is a program that calls what it names. Here it may name what makes NumPy's arrays, and nothing else."""

    def find_class(self, module: str, name: str):
        known = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        if known and name in ("_reconstruct", "ndarray", "dtype", "scalar"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def read_objects(path: Path, key: str) -> list[dict]:
    """An array of dicts in an .npz, without running what a pickle could; [] if there is none. Or InputError.

    Only dicts, lists, texts and plain numbers come out: by way of JSON."""
    try:
        with zipfile.ZipFile(path) as stored:
            if f"{key}.npy" not in stored.namelist():
                return []
            with stored.open(f"{key}.npy") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                found = np.ravel(Plain(file).load())
        return [dict(json.loads(json.dumps(one, default=lambda array: array.tolist()))) for one in found]
    except Exception as error:  # bytes from outside can make an unpickler raise anything
        raise InputError(f"{path}: '{key}' is not understood ({error}); save an array of plain dictionaries") from error


def read_volume(path: Path) -> dict:
    """imgs (D, H, W), spacing (z, y, x) mm; gts and prev_pred (D, H, W), or None. Or InputError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] if key in file.files else None for key in ("imgs", "spacing", "gts", "prev_pred")}
        found["imgs"], found["spacing"] = check_image(found["imgs"], True, path), spacing_zyx(found["spacing"])
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no volume with imgs and spacing ({error}); copy it again") from error
    for key in ("gts", "prev_pred"):
        found[key] = None if found[key] is None else check_labels(found[key], found["imgs"].shape, path)
    return found


def read_request(path: Path) -> dict:
    """`read_volume`, and lists of the boxes (dict, or None) and the clicks of each object. Or InputError."""
    found, boxes, clicks = read_volume(path), read_objects(path, "boxes"), read_objects(path, "clicks")
    count, shape = len(boxes or clicks), found["imgs"].shape
    if not count or count != len(clicks or boxes):
        raise InputError(f"{path}: has {len(boxes)} boxes, and clicks for {len(clicks)} objects; give one of each")
    size = np.array(shape)[[0, 0, 0, 2, 1, 2, 1]] - [0, 0, 1, 0, 0, 0, 0]  # the middle slice is asked
    for box in boxes:
        # what is no number, or missing, is none in the image either
        numbers = np.array([n if isinstance(n := box.get(key), int | float) else -1 for key in KEYS])
        if not ((0 <= numbers) & (numbers <= size)).all():
            raise InputError(f"{path}: {box} is no box in {shape} (D, H, W); it needs {', '.join(KEYS)}")
    for one in clicks:
        points = np.array([*one.get("fg", ()), *one.get("bg", ())], float).reshape(-1, 3)
        if not ((points >= 0) & (points < shape)).all():
            raise InputError(f"{path}: {one} has clicks outside {shape} (z, y, x); correct them")
    return found | {"boxes": boxes or [None] * count, "clicks": clicks or [{}] * count}


def bounds(mask: np.ndarray, grow: float) -> np.ndarray:
    """Box (4,) x0 y0 x1 y1 round a mask (H, W) bool that holds a pixel, inclusive, grown, and cut to the slice."""
    y, x = np.nonzero(mask)
    low, high = [x.min() - grow, y.min() - grow], [x.max() + grow, y.max() + grow]
    return np.clip([*low, *high], 0, np.tile(mask.shape[::-1], 2) - 1).astype(float)


def correct(ask, mask: np.ndarray, click: tuple[int, int, int], wanted: bool) -> np.ndarray:
    """A mask (D, H, W) after a click (z, y, x) on what is missing (wanted) or too much.

    On slice z the box is that of the mask and the click, or of what is left when the clicked part, or, of a mask in one
    part, the side of the click is cut off. The slices above and below follow, each with a box made of the slice before,
    until the network says that y, x is right.
    ask: (slice, box (4,) x0 y0 x1 y1) -> mask (H, W) bool
    """
    z, y, x = click
    before, mask = mask, mask.copy()
    rows, columns = np.ogrid[: mask.shape[1], : mask.shape[2]]
    disk = (rows - y) ** 2 + (columns - x) ** 2 <= DISK**2
    parts = cv2.connectedComponents(mask[z].astype(np.uint8))[1]
    cuts = [mask[z] & side for side in (rows < y - 1, rows > y + 1, columns < x - 1, columns > x + 1)]
    left = mask[z] & (parts != parts[y, x])
    if 3 * np.count_nonzero(left) < np.count_nonzero(mask[z]):
        left = max(cuts, key=np.count_nonzero)
    for step, at in ((1, z), (-1, z - 1)):
        while 0 <= at < len(mask) and before[at, y, x] != wanted:
            near = mask[at - step] if at != z else left
            near = near | mask[at] | disk if wanted else near
            found = ask(at, bounds(near, GROWTH)) if near.any() else near
            if at == z:  # what a person clicked on is so, whatever the network says
                found = found | disk if wanted else found & near
            elif found[y, x] != wanted or not near.any():
                break
            mask[at] = mask[at] | found if wanted else mask[at] & found
            at += step
    return mask


def segment_request(segmenter, request: dict) -> np.ndarray:
    """One run: the masks of the boxes, or `prev_pred` after each object's last click. -> (D, H, W) uint16"""
    volume, masks = request["imgs"], []
    embed = cache(lambda z: segmenter.embed(volume[z]))

    def ask(z: int, box: np.ndarray) -> np.ndarray:
        return segmenter.masks(embed(z), box[None], volume.shape[1:], "drawn").labels > 0

    for i, (box, clicks) in enumerate(zip(request["boxes"], request["clicks"], strict=True), start=1):
        mask = np.zeros(volume.shape, bool)
        if request["prev_pred"] is not None:
            mask = request["prev_pred"] == i
        elif box:
            first, last, middle, *drawn = (int(box[key]) for key in KEYS)
            boxes = {
                first - 1: None,
                min(last + 1, len(volume)): None,
                middle: drawn,
            }  # slices: not there, not there, this box
            for z, patch, _ in follow(segmenter, volume, boxes, "exact", embed):
                mask[z, patch.rows, patch.columns] = patch.values > 0
        for click, wanted in [(c, key == "fg") for key in ("fg", "bg") for c in clicks.get(key, ())]:
            z, y, x = map(int, click)
            if mask[z, y, x] != wanted:  # else an earlier run heard it
                mask = correct(ask, mask, (z, y, x), wanted)
        masks.append(mask)
    return paint(masks, [""] * len(masks), "the request")[0]
