"""The table of file formats: which function reads a file of which ending.

A new format is one function that takes a path and returns a `Case`, and one row of READERS. Steps 1 and 4 then take
such files, alone and in folders. The function calls the checks of case.py (see npz.py), and fills in boxes or labels if it
knows them. An ending of pictures belongs into pictures.PICTURE_ENDINGS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from files import InputError
from files.case import Case
from files.npz import read_npz
from files.pictures import PICTURE_ENDINGS, read_picture
from grid import boxes_from_labels

READERS: dict[str, Callable[[Path], Case]] = {  # ending, lower case -> what reads it
    ".npz": read_npz,
    **dict.fromkeys(PICTURE_ENDINGS, read_picture),
}


def ending_of(path: Path) -> str | None:
    """The longest ending of READERS that a file's name has (".nii.gz" before ".gz"), or None."""
    found = [ending for ending in READERS if path.name.lower().endswith(ending)]
    return max(found, key=len, default=None)


def name_of(path: Path) -> str:
    """A file's name without its ending, which may have two dots."""
    return path.name[: -len(ending_of(path) or "")] or path.name


def read_case(path: Path, boxes_from_masks: bool = False) -> Case:
    """Read one file of any known format. InputError, one sentence, if it is unknown, missing, damaged or unusable.

    boxes_from_masks: the boxes are the exact ones of the file's labels, in the order of the labels.
    """
    ending = ending_of(path)
    if ending is None:
        raise InputError(f"{path}: no known format; known endings are {', '.join(READERS)}")
    case = replace(READERS[ending](path), name=name_of(path))  # results and the journal find a case by its file's name
    if not boxes_from_masks:
        return case
    if case.labels is None:
        raise InputError(f"{path}: holds no masks to take boxes from (in .npz the key 'gts'); give files with masks")
    boxes = boxes_from_labels(case.labels)[1]
    if len(boxes) == 0:
        raise InputError(f"{path}: its masks hold no object, so there is no box to take from them; leave the file out")
    return replace(case, boxes=boxes)


def list_cases(folder: Path) -> list[Path]:
    """The files of a folder that are cases by themselves, sorted by name. InputError if there is none.

    Pictures are left out: they hold neither boxes nor labels, and may be previews.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a folder of .npz cases, or make one with: python -m phantoms")
    files = [path for path in sorted(folder.iterdir()) if ending_of(path) not in (None, *PICTURE_ENDINGS)]
    if not files:
        raise InputError(f"{folder}: holds no .npz case; name another folder, or make cases with: python -m phantoms")
    return files
