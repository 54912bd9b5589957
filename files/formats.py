"""The table of file formats: which function reads a file of which ending, and where a file's labels and boxes are.

A new format is one function that takes a path and returns a `Case`, and one row of READERS; of LABEL_READERS too, if labels lie
in a file of their own. Steps 1 and 4 then take such files, alone and in folders. The function calls the checks of case.py (see
npz.py), and fills in boxes or labels if it knows them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from files import InputError
from files.case import Case, check_boxes, check_labels
from files.pictures import PICTURE_ENDINGS
from grid import boxes_from_labels

ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
NIFTI_ENDINGS = (".nii", ".nii.gz")
# Ending, lower case -> what reads it: a function, or "module:function", which is imported when such a file comes.
READERS: dict[str, Callable[..., Case] | str] = {
    ".npz": "files.npz:read_npz",
    **dict.fromkeys(PICTURE_ENDINGS, "files.pictures:read_picture"),
    **dict.fromkeys(NIFTI_ENDINGS, "files.nifti:read_nifti"),
    **dict.fromkeys((".dcm", ".dicom", ".ima"), "files.dicom:read_dicom"),
    **dict.fromkeys(ITK_ENDINGS, "files.itk:read_itk"),
}
LABEL_READERS = {  # (path of the labels, path of the image) -> label map of the image's shape
    **dict.fromkeys(NIFTI_ENDINGS, "files.nifti:read_nifti_labels"),
    **dict.fromkeys(ITK_ENDINGS, "files.itk:read_itk_labels"),
}


# What --read KEY=VALUE takes: what only some files need
READ_KEYS = {
    "window": "grey levels that intensities are cut to: soft, lung, brain, bone, percentile or WIDTH/LEVEL",
    "modality": "what the cases show, for files whose names do not begin with it: US, or US_MyHospital",
    "dataset": "a public data set as it was downloaded, by its name in files/sources.py",
    "instances": "yes: each connected part of a label becomes an object of its own",
    "smallest": "leave out objects of fewer pixels, in 3D voxels",
}


def read_options(texts: list[str], known: tuple[str, ...] = tuple(READ_KEYS)) -> dict[str, str]:
    """["window=lung", "smallest=20"] -> {"window": "lung", "smallest": "20"}. InputError for another key than `known`."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if key not in known or not equals or not value:
            raise InputError(f"--read {text}: give KEY=VALUE; the keys are {', '.join(known)}")
        found[key] = value
    return found


def ending_of(path: Path) -> str | None:
    """The longest ending of READERS that a file's name has (".nii.gz" before ".nii"), or None."""
    found = [ending for ending in READERS if path.name.lower().endswith(ending)]
    return max(found, key=len, default=None)


def name_of(path: Path) -> str:
    """A file's name without its ending, which may have two dots."""
    return path.name[: -len(ending_of(path) or "")] or path.name


def read_case(
    path: Path, boxes_from_masks: bool = False, window: tuple[float, float] | None = None, labels: bool = True
) -> Case:
    """Read one file of any known format, or the folder of a DICOM series. InputError, one sentence, if it can't be used.

    boxes_from_masks: the boxes are the exact ones of the file's labels, in the order of the labels.
    window: for intensities of more than 8 bits (intensity.py).   labels: whether to look for labels in files beside it.
    """
    # results and the journal find a case by its file's name
    case = _image_of(path, window).renamed(name_of(path))
    if case.labels is None and (labels or boxes_from_masks) and READERS.get(ending_of(path)) != READERS[".npz"]:
        from files.partners import label_files  # only here: most cases of step 4 come with boxes

        if beside := label_files(path):
            case = with_labels(case, path, beside)
    if boxes_from_masks:
        return replace(case, boxes=exact_boxes(case, path))
    if case.boxes is None and (named := boxes_beside(path).get(path.name)):
        case = replace(case, boxes=check_boxes(named.boxes, case.grid_shape, path), label_names=named.names)
    return case


def read_pair(image: Path, labels: Path, name: str, window: tuple[float, float] | None = None) -> Case:
    """An image and its labels, of any formats that go together. InputError if they don't fit, or hold no object."""
    case = with_labels(_image_of(image, window).renamed(name), image, [labels])
    if not case.labels.any():
        raise InputError(f"{labels}: the mask holds no object; paint one, or leave the pair out")
    return case


def with_labels(case: Case, path: Path, beside: list[Path]) -> Case:
    """The case of an image file with the labels that lie beside it: one label map, or one mask picture for each object."""
    first, ending, names, shape = beside[0], ending_of(beside[0]), None, case.grid_shape
    if first.suffix == ".json":
        from files import coco, supervisely  # only here: few data sets have them

        labels, names = (
            coco.read_coco(first, path.name, shape)
            if coco.is_coco(first)
            else supervisely.read_supervisely(first, shape)
        )
    elif ending in PICTURE_ENDINGS:
        from files import pictures

        labels, names = pictures.read_masks(beside) if len(beside) > 1 else (pictures.read_mask(first), None)
    elif ending in LABEL_READERS and READERS.get(ending_of(path)) == READERS[ending]:
        labels = _function(LABEL_READERS[ending])(first, path)
    else:
        raise InputError(f"{first}: labels of this kind don't go with {path.name}; convert one of the two")
    return replace(case, labels=check_labels(np.asarray(labels), shape, first), label_names=names)


def exact_boxes(case: Case, path: Path) -> np.ndarray:
    """Exact boxes of a case's labels, in their order. InputError if there are none."""
    if case.labels is None:
        raise InputError(
            f"{path}: holds no masks to take boxes from (in .npz the key 'gts', else a file such as {name_of(path)}_mask.png "
            "beside it); give files with masks"
        )
    boxes = boxes_from_labels(case.labels)[1]
    if len(boxes) == 0:
        raise InputError(f"{path}: its masks hold no object, so there is no box to take from them; leave the file out")
    return boxes


def list_cases(folder: Path, with_boxes: bool = False) -> list[Path]:
    """The cases of a folder, sorted by name: files, and folders that hold a DICOM series. InputError if there is none.

    Files that hold the labels of another file are no cases. Pictures beside .npz cases are taken for previews.
    A folder that holds nothing but DICOM files is one case.   with_boxes: if it has a boxes.csv, only what that names.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a folder of cases, or make one with: python -m phantoms")
    if with_boxes and (named := boxes_beside(folder / "any")):
        return [folder / name for name in sorted(named)]
    entries = sorted(folder.iterdir())
    by_ending = {path: ending_of(path) for path in entries}  # once each: a folder may hold a million files
    endings = {ending for ending in by_ending.values() if ending}
    kinds = endings - {".npz", *PICTURE_ENDINGS}
    files = [path for path in entries if by_ending[path]]
    if ".npz" in endings:
        files = [path for path in files if by_ending[path] not in PICTURE_ENDINGS]
    if kinds or not files:
        from files.partners import dicom_cases

        files = dicom_cases(folder, files + [path for path in entries if not by_ending[path] and path.is_dir()])
    if endings - {".npz"} and files != [folder]:
        from files.partners import label_files_in

        partners = label_files_in(folder)
        files = [path for path in files if path not in partners]
    if not files:
        known = ", ".join(sorted(READERS))
        raise InputError(
            f"{folder}: holds no case ({known}); name another folder, or make cases with: python -m phantoms"
        )
    return files


def boxes_beside(path: Path) -> dict:
    """{file name: boxes} of the boxes.csv in a file's folder; empty if there is none."""
    table = path.parent / "boxes.csv"
    return _boxes_of(table, table.stat().st_mtime_ns) if table.is_file() else {}


@lru_cache(maxsize=4)  # one table for the whole folder: it is read once
def _boxes_of(table: Path, _changed: int) -> dict:
    from files.boxes_csv import read_boxes  # only here: most folders have none

    return read_boxes(table)


def _image_of(path: Path, window: tuple[float, float] | None) -> Case:
    """What a file's own reader gives. InputError for an unknown ending, or a link that leads out of the folder."""
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise InputError(f"{path}: is a link out of its folder, to {path.resolve()}; name that file, or copy it here")
    ending = ".dcm" if path.is_dir() else ending_of(path)
    if ending is None:
        raise InputError(f"{path}: no known format; known endings are {', '.join(READERS)}")
    reader = _function(READERS[ending])
    return reader(path) if window is None else reader(path, window)


def _function(row: Callable | str) -> Callable:
    """A row of READERS or LABEL_READERS as the function that it names."""
    if callable(row):
        return row
    module, name = row.split(":")
    return getattr(importlib.import_module(module), name)
