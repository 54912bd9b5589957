"""Lets step 1 run in parallel, be stopped, resumed, and run again for more files: journal, name clashes, merged index.

cache/done.jsonl has a line for each finished file. A line is written when the file's images are on the disk. A run
that comes later reads the journal, and does again only what is not in it, or what has changed since.
An entry here is a data.CacheEntry; only its fields are used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from files import InputError
from files.writing import save_json

JOURNAL = "done.jsonl"
CACHE_VERSION = 1


@dataclass(frozen=True)
class CachedCase:
    """What became of one case: a line of the journal."""

    name: str
    stamp: str  # path, size and time of its file: tells a changed one
    entries: list  # its data.CacheEntry, split still ""
    objects: int  # labels of the case
    empty: int  # slices without an object, left out
    lost: int  # objects of a slice that are too small for the grid


def in_parallel(function, jobs: list, processes: int, what: str) -> Iterator:
    """Results in the order of the jobs, with a progress bar."""
    if processes == 1 or len(jobs) < 2:
        yield from tqdm(map(function, jobs), total=len(jobs), desc=what, disable=None)
        return
    with ProcessPoolExecutor(min(processes, len(jobs))) as pool:
        try:
            yield from tqdm(pool.map(function, jobs, chunksize=4), total=len(jobs), desc=what, disable=None)
        finally:
            pool.shutdown(cancel_futures=True)


def start_cache(folder: Path) -> None:
    """Mark a folder as a cache of this version. InputError if it holds one of another version."""
    if (folder / "version.json").exists() or (folder / "index.csv").exists():
        check_version(folder)
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


def fingerprint(folder: Path) -> str:
    """SHA-256 of the index, which a resumed training compares: its data must be the same."""
    return hashlib.sha256((folder / "index.csv").read_bytes()).hexdigest()


def read_journal(folder: Path, build: Callable[[dict], object]) -> dict:
    """What earlier runs finished, by name. A line cut short by an interruption counts as not done.

    build: a line's record -> its CachedCase. If it raises ValueError, KeyError or TypeError, the line is skipped.
    """
    path, done = folder / JOURNAL, {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            case = build(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        done[case.name] = case
    return done


def journal_line(cached) -> str:
    """A case as a line of the journal. It begins with a line end, because the line before it may be cut short."""
    return f"\n{json.dumps(asdict(cached))}"


def names_of_others(names: Iterable[str], known: dict) -> dict[str, set[str]]:
    """{case: names in the cache that it must not use, because another case owns them}.

    names : cases of this run.   known : the journal; a name that it gives to a case stays that case's.
    A volume CT_a and a picture CT_a-003 collide: the volume's slice 3 is cached as CT_a-003 too.
    """
    owner = {entry.name: case for case, cached in known.items() for entry in cached.entries}
    names, taken = set(names), defaultdict(set)
    for name in {*names, *owner}:
        could_write = {name, re.sub(r"-\d{3,}$", "", name)}  # a picture of this name, or a volume's slice
        for case in (could_write & names) - {owner.get(name, name)}:
            taken[case].add(name)
    return taken


def merged_entries(before: list, finished: list, known: dict, splits: dict[str, str], excluded: set[str]) -> list:
    """The entries of an index after a run: the old ones, with those of files that were done again replaced.

    before: entries of the index.   finished: cases of this run.   known: the journal before the run.
    splits: the split given to each case's entries, "" if data.split_entries is to draw it; an entry that has a split keeps it.
    """
    kept_splits = {entry.name: entry.split for entry in before}
    replaced = {entry.name for case in finished if case.name in known for entry in known[case.name].entries}
    entries = {entry.name: entry for entry in before if entry.name not in replaced}
    for case in finished:
        entries |= {e.name: replace(e, split=kept_splits.get(e.name, splits[case.name])) for e in case.entries}
    gone = excluded | {entry.name for name in excluded & set(known) for entry in known[name].entries}
    return [entry for name, entry in entries.items() if name not in gone]


def split_warnings(entries: list, limit: int = 5) -> list[str]:
    """A sentence for each patient who is in both training and validation; beyond `limit` patients, their number.

    Only a warning: two patients may share a key (see `patient_of`), or the split was made so on purpose.
    """
    sides = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        sides[entry.patient][entry.split].append(entry.name)
    shared = [(patient, side["train"], side["val"]) for patient, side in sorted(sides.items()) if len(side) == 2]
    told = [
        f"patient {patient} is in training ({len(train)}, such as {train[0]}) and in validation ({len(val)}, such as "
        f"{val[0]}): scores will be too good, unless these are two patients; move the files, or --exclude some"
        for patient, train, val in shared[:limit]
    ]
    more = len(shared) - limit
    return told + [f"so {'is 1 patient' if more == 1 else f'are {more} patients'} more"] * (more > 0)


def summary(folder: Path, finished: list, entries: list, size: int, thin: int, excluded: int) -> str:
    """One line: what a run of step 1 read, what the cache holds (`size` bytes), what was left out and why."""
    count = Counter(entry.split for entry in entries)
    reasons = {
        "images or slices without an object": sum(case.empty for case in finished),
        "objects of a slice too small for the grid": sum(case.lost for case in finished),
        "objects too thin for a box in validation cases": thin,
        "files excluded": excluded,
    }
    left_out = ", ".join(f"{number:,} {what}" for what, number in reasons.items() if number) or "nothing"
    without = {entry.modality for entry in entries} - {entry.modality for entry in entries if entry.split == "val"}
    note = f"; no validation image of {', '.join(sorted(without))}, whose patients are too few" if without else ""
    return (
        f"{len(finished):,} files with {sum(case.objects for case in finished):,} objects; {folder} holds {len(entries):,} "
        f"images with {sum(e.objects for e in entries):,} objects, {count['train']:,} train and {count['val']:,} val, "
        f"{size / 1e6:.1f} MB; left out: {left_out}{note}"
    )
