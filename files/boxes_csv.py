"""boxes.csv: the boxes of a folder of images, for step 4.

Columns: file, x0, y0, x1, y1, in a volume also z0 and z1 (slices, counted from 0); label, a name for the object, may be left out.
A row is one box: pixels of the image, both ends inclusive. The rows of a file, in their order, are its boxes 1, 2, ...
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import InputError

BOXES_FILE = "boxes.csv"


class NamedBoxes(NamedTuple):
    """The boxes of one file: (N, 4) or (N, 6), and a name for each, "" where none was given."""

    boxes: np.ndarray
    names: tuple[str, ...]


def read_boxes(path: Path) -> dict[str, NamedBoxes]:
    """{file name: its boxes}. InputError, one sentence, for a missing column or something that is no number."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: spreadsheets begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error}); save it as CSV in UTF-8") from error
    lines = text.splitlines()
    separator = ";" if lines and lines[0].count(";") > lines[0].count(",") else ","  # some spreadsheets write ";"
    rows = csv.DictReader(lines, delimiter=separator, skipinitialspace=True)
    missing = {"file", "x0", "y0", "x1", "y1"} - set(rows.fieldnames or ())
    if missing:
        raise InputError(
            f"{path}: has no column {', '.join(sorted(missing))}; its first line must name file, x0, y0, x1, y1"
        )
    found: dict[str, list[tuple[list[float], str]]] = {}
    for row in rows:
        depth = [key for key in ("z0", "z1") if (row.get(key) or "").strip()]
        keys = ("x0", "y0", "z0", "x1", "y1", "z1") if depth else ("x0", "y0", "x1", "y1")
        try:
            numbers = [float(row[key]) for key in keys]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path}: line {rows.line_num} has no number in each of {', '.join(keys)}; fill it in"
            ) from error
        boxes = found.setdefault((row["file"] or "").strip(), [])
        if boxes and len(boxes[0][0]) != len(numbers):
            raise InputError(
                f"{path}: line {rows.line_num} has {len(numbers)} numbers, the file's first row {len(boxes[0][0])}"
            )
        boxes.append((numbers, (row.get("label") or "").strip()))
    if not found:
        raise InputError(f"{path}: holds no box; add a line for each")
    return {
        file: NamedBoxes(np.array([b for b, _ in rows]), tuple(name for _, name in rows))
        for file, rows in found.items()
    }
