"""The table of file formats, and how a case gets its labels and its boxes.

A new format is one function that takes a path and returns a `Case`, checked as npz.py does it, and one
row of READERS; of LABEL_READERS too, if labels lie in a file of their own.
"""

import csv
import importlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats import DICOM_ENDINGS, InputError, entries_of, modality_of
from formats.case import Case, check_boxes, check_labels, told_in_a_sentence
from formats.pictures import PICTURE_ENDINGS, as_shown, read_mask, read_masks, read_picture
from grid import boxes_from_labels, drawn_boxes

SCAN_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
# Ending, lower case -> what reads it: a function, or "module:function", which is imported when such a file comes.
READERS: dict[str, Callable[..., Case] | str] = {
    ".npz": "formats.npz:read_npz",
    **dict.fromkeys(PICTURE_ENDINGS, read_picture),
    **dict.fromkeys(SCAN_ENDINGS, "formats.scans:read_scan"),
    **dict.fromkeys(DICOM_ENDINGS, "formats.dicom:read_dicom"),
}
# Of labels: (path of the labels, path of the image) -> label map of the image's shape
LABEL_READERS = dict.fromkeys(SCAN_ENDINGS, "formats.scans:read_scan_labels")

# What --read KEY=VALUE takes, because only some files need it (docs/cache.md)
READ_KEYS = ("window", "modality", "dataset", "instances", "smallest")


def read_options(texts: list[str], known: tuple[str, ...] = READ_KEYS) -> dict:
    """["window=400/40", "smallest=20"] -> {"window": Window(400, 40), "smallest": 20}. InputError for another key or value."""
    found = {}
    for text in texts:
        key, _, value = text.partition("=")
        advice = ""
        if key not in known or not value:
            advice = f"give KEY=VALUE; the keys are {', '.join(known)}"
        elif key == "modality" and (modality_of(value) == "Other" or Path(value).name != value):
            advice = "begin with a known one: CT, MR, US, X-Ray, Fundus, OCT, ..."
        elif key == "instances" and value not in ("yes", "no"):
            advice = "give yes or no"
        elif key == "smallest" and not (value.isdecimal() and len(value) < 10):
            advice = "give a whole number from 0 to 999999999"
        if advice:
            raise InputError(f"--read {text}: {advice}")
        if key == "window":
            found[key] = imported("formats.intensity:parse_window")(value)
        else:
            found[key] = {"yes": True, "no": False}.get(value, int(value) if value.isdecimal() else value)
    return found


class Asked(NamedTuple):
    """What --read says of the values of a file."""

    window: tuple[float, float] | None = None  # width and level; None: the file's own, or what suits its modality
    modality: str | None = None  # of MODALITIES, before what the file's name says; a DICOM file knows its own


def window_of(texts: list[str]) -> Asked:
    """What the --read of step 4 says. InputError for an unknown key or value."""
    asked = Asked(**read_options(texts, Asked._fields))
    return asked._replace(modality=asked.modality and modality_of(asked.modality))


def ending_of(path: Path) -> str | None:
    """The longest ending of READERS that a file's name has (".nii.gz" before ".nii"), or None."""
    found = [ending for ending in READERS if path.name.lower().endswith(ending)]
    return max(found, key=len, default=None)


def name_of(path: Path) -> str:
    """A file's name without its ending, which may have two dots."""
    return path.name[: -len(ending_of(path) or "")] or path.name


# ---------------------------------------------------------------- one case


def read_case(
    path: Path, boxes_from_masks: bool = False, window: tuple | None = None, labels: bool = True, boxes: bool = True
) -> Case:
    """Read one file of any known format, or the folder of a DICOM series. InputError if it can't be used.

    boxes_from_masks: the boxes are the exact ones of the file's labels, in the order of the labels.
    window: for more than 8 bits, or all that --read says (`window_of`).   labels, boxes: whether to look for
    labels, and for a boxes.csv, beside it.
    """
    # results and the journal find a case by its file's name
    case = replace(_image_of(path, window), name=name_of(path))
    wants_labels = case.labels is None and (labels or boxes_from_masks) and ending_of(path) != ".npz"
    if wants_labels and (beside := imported("formats.partners:label_files")(path)):
        case = with_labels(case, path, beside)
    if boxes_from_masks:
        return replace(case, boxes=exact_boxes(case, path))
    if case.labels is not None and case.label_names:
        case = replace(case, boxes=None)  # those of masks, which nobody asked for
    if case.boxes is None and boxes and path.name in (named := boxes_in(path.parent)):
        found, names = named[path.name]
        found = check_boxes(found, case.grid_shape, path)
        case = replace(case, boxes=found, boxes_are="drawn", label_names=names)
    return case


def read_boxed(
    path: Path, boxes: list[list[float]] | None = None, looseness: float | None = None, window: tuple | None = None
) -> Case:
    """A case with the boxes that step 4 asks with. InputError if there are none.

    boxes: as they were given; else, with a looseness, the boxes of the case's labels, moved outwards by that
    share (0: exact ones); else those of its file, of boxes.csv or of a COCO file beside it.
    Boxes of labels and of the challenge's files are exact, all others drawn.
    """
    case = read_case(path, looseness is not None, window, labels=False, boxes=not boxes)
    if boxes:
        if len({len(box) for box in boxes}) > 1:
            raise InputError("--box: give 4 numbers for each, X0 Y0 X1 Y1, or in a volume 6, X0 Y0 Z0 X1 Y1 Z1")
        boxes = check_boxes(np.array(boxes), case.grid_shape, path)
        return replace(case, boxes=boxes, boxes_are="drawn", label_names=None)
    if looseness:
        return replace(case, boxes=drawn_boxes(case.name, case.boxes, looseness, case.grid_shape), boxes_are="drawn")
    if case.boxes is None and ending_of(path) in PICTURE_ENDINGS:
        from formats import annotations, partners

        first = next(iter(partners.label_files(path)), None)
        if first and first.suffix == ".json" and annotations.is_coco(first):
            as_shown(np.zeros(case.grid_shape, bool), first, path)  # refuses a photo whose view is not known
            found, names, is_exact = annotations.coco_boxes(first, path, case.grid_shape)
            found, kind = check_boxes(found, case.grid_shape, first, flat=is_exact), "exact" if is_exact else "drawn"
            case = replace(case, boxes=found, boxes_are=kind, label_names=names)
    if case.boxes is None:
        ways = "draw them with --page, put a boxes.csv beside it, or take them from masks with --boxes-from-masks"
        raise InputError(f"{path}: has no boxes (in .npz the key 'boxes'); give --box X0 Y0 X1 Y1, {ways}")
    return case


def read_pair(image: Path, labels: Path, name: str, window: tuple[float, float] | None = None) -> Case:
    """An image and its labels, of any formats that go together. InputError if they don't fit, or hold no object."""
    case = with_labels(_image_of(image, window).renamed(name), image, [labels])
    if not case.labels.any():
        raise InputError(f"{labels}: the mask holds no object; paint one, or leave the pair out")
    return case


def with_labels(case: Case, path: Path, beside: list[Path]) -> Case:
    """The case of an image file with the labels that lie beside it: one label map, or one mask picture for each object.

    Its boxes are the exact ones of whole objects, where they may overlap (COCO, several mask pictures); else None.
    """
    first, ending, names, boxes, shape = beside[0], ending_of(beside[0]), None, None, case.grid_shape
    if len(beside) > 1 and ending not in PICTURE_ENDINGS:
        names = ", ".join(file.name for file in beside)
        raise InputError(f"{path}: has labels in {names}; merge them into one label map, or keep one of them here")
    with told_in_a_sentence(first):
        if first.suffix == ".json":
            labels, names, boxes = imported("formats.annotations:read_annotations")(first, path, shape)
        elif ending in PICTURE_ENDINGS:
            labels, names, boxes = read_masks(beside) if len(beside) > 1 else (read_mask(first), None, None)
        elif ending in LABEL_READERS and READERS.get(ending_of(path)) == READERS[ending]:
            labels = imported(LABEL_READERS[ending])(first, path)
        else:
            raise InputError(f"{first}: labels of this kind don't go with {path.name}; convert one of the two")
    if ending_of(path) in PICTURE_ENDINGS:
        shown = as_shown(labels, first, path)
        labels, boxes = shown, boxes if shown is labels else None
    return replace(case, labels=check_labels(np.asarray(labels), shape, first), label_names=names, boxes=boxes)


def exact_boxes(case: Case, path: Path) -> np.ndarray:
    """Exact boxes of a case's labels, in their order. InputError if there are none."""
    if case.labels is None:
        where = f"in .npz the key 'gts', else a file such as {name_of(path)}_mask.png beside it"
        raise InputError(f"{path}: holds no masks to take boxes from ({where}); give files with masks")
    if case.boxes is not None and case.label_names:  # of whole objects: the label map may hide a part of one
        return case.boxes
    if not case.labels.any():
        raise InputError(f"{path}: its masks hold no object, so there is no box to take from them; leave the file out")
    return boxes_from_labels(case.labels)[1]


def _image_of(path: Path, window: tuple[float, float] | None) -> Case:
    """What a file's own reader gives. InputError for an unknown ending, or a link that leads out of the folder."""
    check_inside(path, path.parent)
    ending = ".dcm" if path.is_dir() else ending_of(path)
    if ending is None and path.is_file():  # only here: DICOM files may have no ending
        ending = ".dcm" if imported("formats.dicom:is_dicom")(path) else None
    if ending is None:
        raise InputError(f"{path}: no known format; known endings are {', '.join(READERS)}")
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: {'a pipe or a device' if path.exists() else 'no such file'}; check the path")
    reader, asked = imported(READERS[ending]), window if isinstance(window, Asked) else Asked(window)
    said = {} if asked.window is None else {"window": asked.window}
    if asked.modality and ending in (*SCAN_ENDINGS, *PICTURE_ENDINGS):  # of other files nothing depends on it
        said["modality"] = asked.modality
    with told_in_a_sentence(path):
        case = reader(path, **said)
    is_told = asked.modality and (ending not in DICOM_ENDINGS or case.modality == "Other")
    return replace(case, modality=asked.modality) if is_told else case


def check_inside(path: Path, folder: Path) -> None:
    """InputError for a link that leads out of its folder."""
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path}: is a link out of its folder, to {path.resolve()}; name that file, or copy it here")


def imported(row: Callable | str) -> Callable:
    """A function, or the one that "module:function" names: what few cases need is imported when one needs it."""
    if callable(row):
        return row
    module, name = row.split(":")
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------- a folder


def list_cases(folder: Path, with_boxes: bool = False) -> list[Path]:
    """The cases of a folder, sorted by name: files, and folders that hold a DICOM series. InputError if there is none.

    Files that hold the labels of another file are no cases, nor are pictures beside .npz cases.
    with_boxes: if the folder has a boxes.csv, only the files that it names.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a folder of cases, or make one with: python -m demo_data")
    if with_boxes and (named := boxes_in(folder)):
        return [folder / name for name in sorted(named)]
    by_ending = {path: ending_of(path) for path in entries_of(folder)}  # once each: a folder may hold a million files
    endings = set(by_ending.values()) - {None}
    files = [path for path, ending in by_ending.items() if ending]
    if ".npz" in endings:
        files = [path for path in files if by_ending[path] not in PICTURE_ENDINGS]
    # files without ending, and folders, may hold DICOM
    others = [path for path, ending in by_ending.items() if not ending and not path.suffix.strip(".0123456789")]
    if endings - {".npz", *PICTURE_ENDINGS} or not files or (others and ".npz" not in endings):
        is_dicom = imported("formats.dicom:is_dicom")
        dicom_cases = imported("formats.partners:dicom_cases")
        files = dicom_cases(folder, files + [path for path in others if path.is_dir() or is_dicom(path)])
    if endings - {".npz"} and files != [folder]:
        partners = imported("formats.partners:label_files_in")(folder)
        files = [path for path in files if path not in partners]
    if not files:
        known = ", ".join(sorted(READERS))
        raise InputError(f"{folder}: holds no case ({known}); name another folder, or make cases: python -m demo_data")
    return files


# ---------------------------------------------------------------- boxes.csv


def boxes_in(folder: Path) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """What the boxes.csv of a folder says of each file: its boxes (N, 4) or (N, 6), and a name for each; {} without one."""
    table = folder / "boxes.csv"
    return read_boxes(table, table.stat().st_mtime_ns) if table.is_file() else {}


@lru_cache(maxsize=4)  # one table for the whole folder: it is read once
def read_boxes(path: Path, _changed: int = 0) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """A table of boxes for step 4: columns file, x0, y0, x1, y1, in a volume also z0 and z1, slices counted from 0.

    A row is one box, pixels of the image, both ends inclusive; a file's rows are its boxes 1, 2, ... A column
    label, a name for the object, may be left out. InputError for a missing column, a path, or what is no number.
    """
    check_inside(path, path.parent)
    with told_in_a_sentence(path, "can't be read", "save it as CSV in UTF-8"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # -sig: spreadsheets begin a file with a mark
    separator = ";" if lines and lines[0].count(";") > lines[0].count(",") else ","  # some spreadsheets write ";"
    rows = csv.DictReader(lines, delimiter=separator, skipinitialspace=True)
    missing = {"file", "x0", "y0", "x1", "y1"} - set(rows.fieldnames or ())
    if missing:
        raise InputError(f"{path}: has no column {', '.join(sorted(missing))}; line 1 must name file, x0, y0, x1, y1")
    boxes, names = defaultdict(list), defaultdict(list)
    for row in rows:
        file, where = (row["file"] or "").strip(), f"{path}: line {rows.line_num}"
        if Path(file).name != file:
            raise InputError(f"{where} names {file!r}; give the name of a file that lies beside it")
        depth = any((row.get(key) or "").strip() for key in ("z0", "z1"))
        keys = ("x0", "y0", "z0", "x1", "y1", "z1") if depth else ("x0", "y0", "x1", "y1")
        try:
            boxes[file].append([float(row[key]) for key in keys])
        except (TypeError, ValueError) as error:
            raise InputError(f"{where} has no number in each of {', '.join(keys)}; fill it in") from error
        names[file].append((row.get("label") or "").strip())
        if len(boxes[file][0]) != len(keys):
            raise InputError(f"{where} has {len(keys)} numbers, the file's first row {len(boxes[file][0])}")
    if not boxes:
        raise InputError(f"{path}: holds no box; add a line for each")
    return {file: (np.array(rows), tuple(names[file])) for file, rows in boxes.items()}
