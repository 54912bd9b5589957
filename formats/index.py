"""The cache's index, one row an image, which training reads; and the version of the whole format."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

from formats import InputError, patient_of, submodality_of
from formats.case import Case
from formats.writing import csv_text, save_json, save_text

CACHE_VERSION = 3  # 3: masks are pickles that name nothing
SPLITS = ("train", "val")


@dataclass(frozen=True, slots=True)  # slots: a million of them are in memory at once
class CacheEntry:
    """One cached image: a row of index.csv."""

    name: str  # of its files, without ending
    modality: str
    submodality: str  # the sampler's group
    patient: str
    source: str  # file that it was made from
    height: int  # of the original image, pixels
    width: int
    split: str  # "train" or "val"
    objects: int  # on the grid
    low: float | None = None  # range of the case's intensities before they were cut to a window; None where the input
    high: float | None = None  # has 8 bits
    window: str = ""  # WIDTH/LEVEL that they were cut to


@dataclass(frozen=True, slots=True)
class CachedCase:
    """What became of one case: a line of the journal."""

    name: str
    stamp: str  # size and time of its file, and the options: tells a changed one
    entries: list[CacheEntry]  # split still ""
    objects: int  # of the case, at its original size
    empty: int  # slices without an object, left out
    lost: int  # objects of a slice that are too small for the grid
    small: int = 0  # objects below the smallest size, left out
    bytes: int = 0  # of its files in the cache


def entry_of(case: Case, name: str, source: str, shape: tuple[int, int], objects: int) -> CacheEntry:
    """The row of one cached image of a case.   shape : of the original, (height, width).   objects : on the grid."""
    groups = case.modality, submodality_of(case.name), patient_of(case.name)
    low, high = map(float, case.source_range) if case.source_range else (None, None)
    width, level = case.window or (None, None)
    window = "" if width is None else f"{width:g}/{level:g}" if width else "percentile"
    return CacheEntry(name, *groups, source, *shape, "", objects, low, high, window)


def start_cache(folder: Path, *inputs: Path | None) -> None:
    """Mark a folder as a cache of this version. InputError if it holds another version, or is one of the `inputs`."""
    if folder.resolve() in [path.resolve() for path in inputs if path]:
        raise InputError(f"{folder}: input and output are the same folder; name another one with --out")
    if (folder / "version.json").exists() or (folder / "index.csv").exists():
        check_version(folder)
        return
    save_json(folder / "version.json", {"cache": CACHE_VERSION})


def check_version(folder: Path) -> None:
    """InputError unless the folder is a cache of this version."""
    try:
        found = json.loads((folder / "version.json").read_text(encoding="utf-8"))["cache"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: no cache here (no good version.json); run first: python 01_preprocess.py -o {folder}"
        ) from error
    if found != CACHE_VERSION:
        raise InputError(
            f"{folder}: a cache of version {found}, but this code reads version {CACHE_VERSION}; "
            "delete it and run 01_preprocess.py again"
        )


def write_index(folder: Path, entries: list[CacheEntry]) -> None:
    """Write index.csv and version.json, rows sorted by name."""
    columns = tuple(field.name for field in fields(CacheEntry))
    rows = (
        {column: getattr(entry, column) for column in columns}
        for entry in sorted(entries, key=lambda entry: entry.name)
    )
    start_cache(folder)
    save_text(folder / "index.csv", csv_text(rows, columns, number=""))


def read_index(folder: Path) -> list[CacheEntry]:
    """The entries of a cache. InputError if there is none, or one of another version or with other columns."""
    check_version(folder)
    path, columns, entries = folder / "index.csv", [field.name for field in fields(CacheEntry)], []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header != columns:
                raise ValueError(f"its columns are {', '.join(header)}")
            for row in rows:
                low, high = (float(value) if value else None for value in row[9:11])
                entry = CacheEntry(*row[:5], int(row[5]), int(row[6]), row[7], int(row[8]), low, high, row[11])
                if entry.split not in SPLITS or Path(entry.name).name != entry.name:
                    raise ValueError(f"a row has the name {entry.name!r} and the split {entry.split!r}")
                entries.append(entry)
    except OSError as error:
        raise InputError(f"{path}: cannot be read; run first: python 01_preprocess.py -o {folder}") from error
    except (ValueError, IndexError, csv.Error) as error:
        raise InputError(f"{path}: not an index of this cache ({error}); run 01_preprocess.py again") from error
    return entries


def fingerprint(folder: Path) -> str:
    """SHA-256 of the index, which a resumed training compares: its data must be the same."""
    return hashlib.sha256((folder / "index.csv").read_bytes()).hexdigest()
