"""The challenge's .npz files: cases in, cases and label maps out.

Input files hold `imgs` and `boxes`, training files `imgs` and `gts`, volumes also `spacing` (x, y, z) in mm.
Source: the protocol of the CVPR 2024 challenge "Segment Anything in Medical Images on Laptop".
"""

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from formats import MOST_BYTES, InputError
from formats.case import Case, check_boxes, check_image, check_labels, spacing_zyx, told_in_a_sentence
from formats.writing import save_npz
from grid import boxes_from_labels

MOST_ARRAYS = 100


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file. Never unpickles: an object array could run code. InputError if it can't be read."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    advice = "copy it again if it is truncated or damaged; single arrays, object arrays and pickles, which could run code, are refused"
    with told_in_a_sentence(path, "no .npz file that can be read", advice), zipfile.ZipFile(path) as stored:
        members = [member for member in stored.infolist() if member.filename.endswith(".npy")]
        size = sum(member.file_size for member in members)
        if size > MOST_BYTES:  # a small file that unpacks to any size: a mistake, or made to fill the memory
            raise ValueError(f"it unpacks to {size:,} bytes, over {MOST_BYTES:,}, which GRAYS_LIMIT_GB raises")
        if len(members) > MOST_ARRAYS:
            raise ValueError(f"it holds {len(members):,} arrays, more than {MOST_ARRAYS}")
        # each read to its end, where zipfile compares the checksum: np.load stops before it
        files = {member.filename.removesuffix(".npy"): io.BytesIO(stored.read(member)) for member in members}
        return {key: np.lib.format.read_array(file, allow_pickle=False) for key, file in files.items()}


def read_npz(path: Path, window: tuple | None = None) -> Case:
    """Read one case in the challenge's format: `imgs`, and `boxes`, `gts` or both; `spacing` (x, y, z) in mm if 3D.

    2D or 3D: its name says it (2D..., 3D...), as in the challenge; else the boxes, the label map, the key `spacing`.
    window: refused, because such files hold grey levels already. InputError for all that the pipeline could not use.
    """
    if window is not None:
        raise InputError(f"{path}: holds grey levels, which no window can be cut from; leave out --read window")
    stored = load_npz(path)
    if "imgs" not in stored:
        raise InputError(f"{path}: has no key 'imgs' (found {sorted(stored)}); it must hold the image as 'imgs'")
    boxes, labels = stored.get("boxes"), stored.get("gts")
    if path.name[:2] in ("2D", "3D"):
        is_3d = path.name[:2] == "3D"
    elif boxes is not None and boxes.ndim == 2 and boxes.shape[1] in (4, 6):
        is_3d = boxes.shape[1] == 6
    else:
        is_3d = labels.ndim == 3 if labels is not None else "spacing" in stored
    image = check_image(stored["imgs"], is_3d, path)
    if boxes is None and labels is None:
        raise InputError(f"{path}: has neither 'boxes' nor 'gts'; add the box prompts as 'boxes', (N, 4) or (N, 6)")
    with told_in_a_sentence(path, "bad numbers", "correct the key 'spacing'"):
        spacing = spacing_zyx(stored["spacing"]) if is_3d and "spacing" in stored else None
    case = Case(path.stem, image, None, None, spacing, is_3d)
    labels = None if labels is None else check_labels(labels, case.grid_shape, path)
    return replace(case, labels=labels, boxes=None if boxes is None else check_boxes(boxes, case.grid_shape, path))


def write_case(folder: Path, case: Case) -> Path:
    """Write a case with labels as a challenge input, folder/imgs/NAME.npz and folder/gts/NAME.npz. Returns the first.

    Boxes are those of the labels, int64, exact, inclusive; box i is object i + 1. Spacing is (x, y, z) in mm.
    """
    boxes = boxes_from_labels(case.labels)[1].astype(np.int64)
    small = case.labels.astype(np.uint8 if case.labels.max() <= 255 else np.uint16)
    extra = spacing_of(case)
    save_npz(folder / "imgs" / f"{case.name}.npz", imgs=case.image, boxes=boxes, **extra)
    save_npz(folder / "gts" / f"{case.name}.npz", gts=small, **extra)
    return folder / "imgs" / f"{case.name}.npz"


def write_training_case(folder: Path, case: Case) -> Path:
    """Write folder/NAME.npz as the challenge's training files are: `imgs`, `gts`, in 3D `spacing` (x, y, z) mm."""
    path = folder / f"{case.name.replace('Box_', '_', 1)}.npz"
    save_npz(path, imgs=case.image, gts=case.labels, **spacing_of(case))
    return path


def spacing_of(case: Case) -> dict[str, np.ndarray]:
    """The key `spacing` of a case's file, (x, y, z) mm; nothing for a case without."""
    return {} if case.spacing_mm is None else {"spacing": np.array(case.spacing_mm[::-1], np.float64)}
