"""The cache that step 1 fills: its index, its journal, and the cores or machines that fill it.

cache/index.csv has a row for each image; training reads it. cache/done.jsonl, the journal, has a
line for each finished case, written when its files are on the disk: a later run processes only the
cases that are not in it, or that have changed. One process writes both files.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from formats import InputError, patient_of, submodality_of
from formats.case import Case, told_in_a_sentence
from formats.writing import csv_cell, csv_text, progress, save_bytes, save_json, tell
from grid import label_ids

CACHE_VERSION = 3  # 3: masks are pickles that name nothing
SPLITS = ("train", "val")
JOURNAL = "done.jsonl"
TABLES = ("version.json", "index.csv", JOURNAL)
FOLDERS = ("imgs", "masks", "cases/imgs", "cases/gts")
CHUNK = 4  # jobs that a worker gets at once
AHEAD = 4  # chunks a worker that are handed out before the first one's results are taken


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
    # Range of the case's intensities, and the window WIDTH/LEVEL that they were cut to; blank for 8-bit input
    low: float | None = None
    high: float | None = None
    window: str = ""


COLUMNS = tuple(field.name for field in fields(CacheEntry))


@dataclass(frozen=True, slots=True)
class CachedCase:
    """What became of one case: a line of the journal."""

    name: str
    stamp: str  # size and time of its files, and the options: tells a changed one
    entries: list[CacheEntry]  # split still ""
    objects: int  # of the case, at its original size
    empty: int  # slices without an object, left out
    lost: int  # objects of a slice that are too small for the grid
    small: int = 0  # objects below the smallest size, left out


def case_of(case: Case, stamp: str, entries: list[CacheEntry]) -> CachedCase:
    """What became of a case of which these images were cached."""
    shown = [len(label_ids(case.labels[z])) for _, z in slice_names(case)]
    lost = sum(shown) - sum(entry.objects for entry in entries)
    return CachedCase(case.name, stamp, entries, len(label_ids(case.labels)), shown.count(0), lost)


def entry_of(case: Case, name: str, source: str, shape: tuple[int, int], labels: np.ndarray) -> CacheEntry:
    """The row of one cached image of a case.   shape : of the original, (height, width).   labels : on the grid."""
    groups = case.modality, submodality_of(case.name), patient_of(case.name)
    low, high = map(float, case.source_range) if case.source_range else (None, None)
    window = "" if not case.window else "{:g}/{:g}".format(*case.window) if case.window[0] else "percentile"
    return CacheEntry(name, *groups, source, *shape, "", len(label_ids(labels)), low, high, window)


def start_cache(folder: Path, *inputs: Path | None) -> None:
    """Mark a folder as a cache of this version. InputError if it holds another one, or is one of the inputs."""
    if folder.resolve() in [path.resolve() for path in inputs if path]:
        raise InputError(f"{folder}: input and output are the same folder; name another one with --out")
    if not any((folder / name).exists() for name in ("version.json", "index.csv")):
        save_json(folder / "version.json", {"cache": CACHE_VERSION})
    check_version(folder)


def check_version(folder: Path) -> None:
    """InputError unless the folder is a cache of this version, and its tables are files: a pipe or a device has no end."""
    if odd := [path for name in TABLES if (path := folder / name).exists() and not path.is_file()]:
        raise InputError(f"{odd[0]}: is no file; remove it, and run 01_preprocess.py again")
    found = None
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads((folder / "version.json").read_text(encoding="utf-8"))["cache"]
    if found != CACHE_VERSION:
        what = f"a cache of version {found}" if found else "no cache here (no good version.json)"
        first = f"delete an old cache, and run first: python 01_preprocess.py -o {folder}"
        raise InputError(f"{folder}: {what}, but this code reads version {CACHE_VERSION}; {first}")


def write_index(folder: Path, entries: list[CacheEntry]) -> None:
    """Write index.csv and version.json, rows sorted by name."""
    start_cache(folder)
    entries = sorted(entries, key=lambda entry: entry.name)
    rows = ({column: getattr(entry, column) for column in COLUMNS} for entry in entries)
    # a name that is not UTF-8 comes back as it is
    save_bytes(folder / "index.csv", csv_text(rows, COLUMNS, number="").encode(errors="surrogateescape"))


def read_index(folder: Path) -> list[CacheEntry]:
    """The entries of a cache. InputError if there is none, or one of another version or with other columns."""
    check_version(folder)
    path, entries = folder / "index.csv", []
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if tuple(header) != COLUMNS:
                raise ValueError(f"its columns are {', '.join(header)}")
            for row in ([csv_cell(cell) for cell in row] for row in rows):
                low, high = (float(value) if value else None for value in row[9:11])
                entry = CacheEntry(*row[:5], *map(int, row[5:7]), row[7], int(row[8]), low, high, row[11])
                if entry.split not in SPLITS or Path(entry.name).name != entry.name:
                    raise ValueError(f"a row has the name {entry.name!r} and the split {entry.split!r}")
                if not 0 < entry.height < 2**31 > entry.width > 0:
                    raise ValueError(f"{entry.name} has the size {entry.height} x {entry.width}")
                entries.append(entry)
    except OSError as error:
        raise InputError(f"{path}: cannot be read; run first: python 01_preprocess.py -o {folder}") from error
    except (ValueError, IndexError, csv.Error) as error:
        raise InputError(f"{path}: not an index of this cache ({error}); run 01_preprocess.py again") from error
    return entries


def fingerprint(folder: Path) -> str:
    """SHA-256 of the index, which a resumed training compares: its data must be the same."""
    return hashlib.sha256((folder / "index.csv").read_bytes()).hexdigest()


def read_journal(folder: Path) -> dict[str, CachedCase]:
    """The finished cases by name. If a case has two lines, the later one counts. A line that was cut short does not."""
    done = {}
    with suppress(FileNotFoundError), (folder / JOURNAL).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                record["entries"] = [CacheEntry(**entry) for entry in record["entries"]]
                done[record["name"]] = CachedCase(**record)
    return done


def cache_sources(
    folder: Path, sources: list, workers: int | str, excluded: set[str], cache_case: Callable, load_entry: Callable
) -> tuple[list[CacheEntry], list[tuple]]:
    """Cache every source that is not done and whole. -> (rows of the index, [(source, CachedCase)] of this run)

    excluded : names that the index must not have.   cache_case(folder, case, source, stamp) writes a
    case's files.   load_entry(folder, entry) reads an image's back.
    """
    known, done = read_journal(folder), []
    jobs = [(source, known.get(source.name)) for source in sources]
    results = in_parallel(partial(cache_source, folder, cache_case, load_entry), jobs, workers)
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        for source, found in zip(sources, progress(results, "files", len(jobs)), strict=True):
            if isinstance(found, str):
                tell(f"01_preprocess.py: left out: {found}", error=True)
                continue
            done.append((source, found))
            if found != known.get(source.name):
                known[source.name] = found
                # it begins with a line end, because the line before it may be cut short
                journal.write(f"\n{json.dumps(asdict(found))}")
                journal.flush()
    # this run's rows, with the split that was given, "" if it is still to be drawn; a row of the old index keeps its own
    given = {source.name: source.split for source, _ in done}
    splits = {row.name: row.split for row in read_index(folder)} if (folder / "index.csv").exists() else {}
    rows = [
        replace(entry, split=splits.get(entry.name) or given[case.name])
        for case in known.values()
        for entry in case.entries
        if (case.name in given or entry.name in splits) and not {case.name, entry.name} & excluded
    ]
    if not rows:
        raise InputError(f"{folder}: no file gave an image with an object, so there is nothing to train on")
    name, count = Counter(row.name for row in rows).most_common(1)[0]
    if count > 1:  # slice 3 of a volume CT_a, and a picture CT_a-003
        raise InputError(f"{folder}: two cases give an image {name}; rename one of them, and start with an empty --out")
    return sorted(rows, key=lambda row: row.name), done


def cache_source(folder: Path, cache_case: Callable, load_entry: Callable, job: tuple) -> CachedCase | str:
    """In a worker: cache one source, unless it is done and whole. -> what became of it, or why it is left out

    job : the source, and what the journal says of it.
    """
    cv2.setNumThreads(1)  # the other cores have workers of their own
    source, before = job
    try:
        with told_in_a_sentence(source.path):  # a full disk stops the run
            stamp = source.stamp()
            if before and before.stamp == stamp:
                with suppress(InputError):  # a damaged file: the case is done again
                    for entry in before.entries:
                        load_entry(folder, entry)
                    return before
            case, small = source.read()
            return replace(cache_case(folder, case, source.path.name, stamp), small=small)
    except InputError as error:
        return str(error)


def slice_names(case: Case) -> list[tuple[str, object]]:
    """[(name of the cached image, index of its plane)]: one for a picture, one a slice for a volume."""
    return [(f"{case.name}-{z:03d}", z) for z in range(len(case.image))] if case.is_3d else [(case.name, ...)]


def finish_cache(
    arguments: dict, entries: list[CacheEntry], cases: list[CachedCase], thin: int, excluded: int, bad: int
) -> None:
    """Write arguments.json, print what a run read, what the cache holds, what was left out. Warn of patients on both sides.

    cases : this run's.   thin : objects left out of validation cases.   excluded, bad : files left out,
    as --exclude says, or because they cannot be used: InputError if there are such.
    """
    folder = arguments["out"]
    save_json(folder / "arguments.json", arguments)
    sides = {split: {entry.patient for entry in entries if entry.split == split} for split in SPLITS}
    if both := sorted(sides["train"] & sides["val"]):  # a drawn split has none
        some = f"patients in training and in validation: {len(both)}, such as {', '.join(both[:3])}"
        why = "scores will be too good, unless these only share a name: move their files, or --exclude some"
        tell(f"01_preprocess.py: {some}; {why}", error=True)
    reasons = {
        "images or slices without an object": sum(case.empty for case in cases),
        "objects of a slice too small for the grid": sum(case.lost for case in cases),
        "objects below the smallest size": sum(case.small for case in cases),
        "objects too thin for a box in validation cases": thin,
        "files excluded": excluded,
    }
    left_out = ", ".join(f"{number:,} {what}" for what, number in reasons.items() if number) or "nothing"
    train, val = (sum(entry.split == split for entry in entries) for split in SPLITS)
    without = {entry.modality for entry in entries} - {entry.modality for entry in entries if entry.split == "val"}
    note = f"; no validation image of {', '.join(sorted(without))}, whose patients are too few" * bool(without)
    read = f"{len(cases):,} files with {sum(case.objects for case in cases):,} objects"
    held = f"{len(entries):,} images with {sum(e.objects for e in entries):,} objects, {train:,} train and {val:,} val"
    tell(f"01_preprocess.py: {read}; {folder} holds {held}; left out: {left_out}{note}")
    if bad:
        raise InputError(f"{len(cases)} of {len(cases) + bad} files done, {bad} left out as told above.")
    tell(
        f"01_preprocess.py: finished. Next: python 02_train.py {'--smoke' if arguments['smoke'] else f'--cache {folder}'}"
    )


def workers(text: str) -> int | str:
    """--jobs: how many processes, or the address of a Dask scheduler. ValueError for anything else."""
    if not re.fullmatch(r"[1-9]\d*|\w+://\S+", text):
        raise ValueError(text)
    return int(text) if text.isdecimal() else text


def in_parallel(function: Callable, jobs: Collection, workers: int | str) -> Iterator:
    """Results in the order of the jobs, which are handed out as they are needed: a million do not pile up.

    workers : how many processes, or the address of a Dask scheduler.
    """
    if workers == 1 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    left, waiting = iter(jobs), deque()
    of_all = dask_executor(workers) if isinstance(workers, str) else executor_of(workers, len(jobs))
    with of_all as (executor, count):
        try:
            while True:
                while len(waiting) < AHEAD * count and (chunk := list(islice(left, CHUNK))):
                    waiting.append(executor.submit(all_of, function, chunk, os.getcwd()))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        finally:  # a run that fails does not wait for what it has handed out
            for chunk in waiting:
                chunk.cancel()


def all_of(function: Callable, jobs: list, folder: str) -> list:
    """In a worker: the results of a few jobs, whose paths are relative to the main process's folder."""
    os.chdir(folder)
    return [function(job) for job in jobs]


@contextmanager
def executor_of(workers: int, most: int) -> Iterator[tuple[Executor, int]]:
    """Processes of this machine, at most `most`. -> (executor, how many)"""
    count = min(workers, most, 61 if os.name == "nt" else most)  # Windows waits for 61 at most
    try:
        with ProcessPoolExecutor(count, initializer=end_with_the_main_process) as executor:
            yield executor, count
    except BrokenProcessPool as error:
        raise ChildProcessError("a process was killed; if memory is short, give fewer --jobs") from error


@contextmanager
def dask_executor(address: str) -> Iterator[tuple[Executor, int]]:
    """The processes of a Dask scheduler, which gives the jobs of a lost worker to another one. -> (executor, how many)"""
    try:
        from distributed import CancelledError, Client, KilledWorker
    except ImportError as error:
        raise InputError(f"--jobs {address}: needs Dask; run: pip install -r requirements-cluster.txt") from error
    try:
        with Client(address) as client:
            client.wait_for_workers(1, timeout=60)
            for run in (client.run_on_scheduler, client.run):  # without the modules, workers would end in silence
                run(import_module, __name__)
            yield client.get_executor(pure=False), sum(client.nthreads().values())
    except ModuleNotFoundError as error:
        raise InputError(f"--jobs {address}: {error} there; run there, in this folder: pip install -e .") from error
    except (CancelledError, KilledWorker) as error:
        raise ChildProcessError(f"--jobs {address}: lost the scheduler, or too many workers ({error})") from error


def end_with_the_main_process() -> None:
    """In a new process: end when the main process is killed. Else it would wait for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
