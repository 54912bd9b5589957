"""The challenge's .npz files: cases in, cases and label maps out.

Input files hold `imgs` and `boxes`, training files `imgs` and `gts`, volumes also `spacing` (x, y, z) in mm.
Source: the protocol of the CVPR 2024 challenge "Segment Anything in Medical Images on Laptop".
"""

import zipfile
import zlib
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
    try:
        with path.open("rb") as file:  # given a path, np.load leaves a damaged file open
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                raise ValueError("it holds a single array, as .npy files do")
            size = sum(member.file_size for member in stored.zip.infolist())
            if size > MOST_BYTES:  # a small file that unpacks to any size: a mistake, or made to fill the memory
                raise ValueError(f"it unpacks to {size:,} bytes, over {MOST_BYTES:,}, which GRAYS_LIMIT_GB raises")
            if len(stored.files) > MOST_ARRAYS:
                raise ValueError(f"it holds {len(stored.files):,} arrays, more than {MOST_ARRAYS}")
            return {key: np.asarray(stored[key]) for key in stored.files}  # what is no array comes as bytes
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, MemoryError) as error:
        # RuntimeError and MemoryError: a header that damage turned into nonsense
        raise InputError(f"{path}: not a complete .npz file (truncated or damaged); copy it again") from error
    except ValueError as error:
        if "pickle" in str(error).lower():
            what = "an object array or a pickle, which could run code and is refused, or is no .npz file at all"
            raise InputError(f"{path}: holds {what}; save plain numeric arrays with np.savez_compressed") from error
        raise InputError(f"{path}: not a readable .npz file ({error}); save it with np.savez_compressed") from error


def read_npz(path: Path, window: tuple | None = None) -> Case:
    """Read one case in the challenge's format: `imgs`, and `boxes`, `gts` or both; `spacing` (x, y, z) in mm if 3D.

    window: refused, because such files hold grey levels already. InputError for all that the pipeline could not use.
    """
    if window is not None:
        raise InputError(f"{path}: holds grey levels, which no window can be cut from; leave out --read window")
    stored = load_npz(path)
    if "imgs" not in stored:
        raise InputError(f"{path}: has no key 'imgs' (found {sorted(stored)}); it must hold the image as 'imgs'")
    is_3d = _is_volume(path, stored)
    image = check_image(stored["imgs"], is_3d, path)
    shape = image.shape if is_3d else image.shape[:2]
    if "boxes" not in stored and "gts" not in stored:
        raise InputError(f"{path}: has neither 'boxes' nor 'gts'; add the box prompts as 'boxes', (N, 4) or (N, 6)")
    labels = check_labels(stored["gts"], shape, path) if "gts" in stored else None
    boxes = check_boxes(stored["boxes"], shape, path) if "boxes" in stored else None
    with told_in_a_sentence(path, "bad numbers", "correct the key 'spacing'"):
        spacing = spacing_zyx(stored["spacing"]) if is_3d and "spacing" in stored else None
    return Case(path.stem, image, boxes, labels, spacing, is_3d)


def _is_volume(path: Path, stored: dict[str, np.ndarray]) -> bool:
    """2D or 3D: the name says it (2D..., 3D...), as in the challenge; else the boxes, the label map, the spacing key."""
    boxes = stored.get("boxes", np.zeros(0))
    if path.name[:2] in ("2D", "3D"):
        return path.name[:2] == "3D"
    if boxes.ndim == 2 and boxes.shape[1] in (4, 6):
        return boxes.shape[1] == 6
    return stored["gts"].ndim == 3 if "gts" in stored else "spacing" in stored


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
