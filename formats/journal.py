"""How step 1 works through many cases: on many cores or machines, stopped and resumed at any moment.

cache/done.jsonl, the journal, has a line for each finished case, written when its files are on the
disk. A later run reads the journal, and does again only what is not in it, or what has changed
since. One process writes it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path

import cv2

from formats import InputError
from formats.case import Case
from formats.index import CachedCase, CacheEntry, read_index
from formats.sources import Source, leave_out, read_source, write_validation_case
from formats.writing import progress, progress_bar, tell

JOURNAL = "done.jsonl"
CHUNK = 4  # jobs that a worker gets at once
AHEAD = 4  # chunks a worker that are handed out before the first one's results are taken


# ---------------------------------------------------------------- many cores, many machines


def workers(text: str) -> int | str:
    """--jobs: how many processes, or the address of a Dask scheduler. ValueError for anything else."""
    if not re.fullmatch(r"[1-9]\d*|\w+://\S+", text):
        raise ValueError(text)
    return int(text) if text.isdecimal() else text


def in_parallel(function: Callable, jobs: Iterable, total: int, workers: int | str, what: str) -> Iterator:
    """Results in the order of the jobs, with a progress bar.

    Jobs are drawn as they are needed: a million do not pile up.
    workers : how many processes, or the address of a Dask scheduler.
    """
    if workers == 1 or total < 2:
        yield from progress(map(function, jobs), what, total)
        return
    jobs, waiting = iter(jobs), deque()
    with executor_of(workers, total) as (executor, count), progress_bar(None, what, total) as bar:
        while True:
            while len(waiting) < AHEAD * count and (chunk := list(islice(jobs, CHUNK))):
                waiting.append(executor.submit(all_of, function, chunk, os.getcwd()))
            if not waiting:
                return
            for result in waiting.popleft().result():
                bar.update()
                yield result


def all_of(function: Callable, jobs: list, folder: str) -> list:
    """In a worker: the results of a few jobs, whose paths are relative to the main process's folder."""
    os.chdir(folder)
    return [function(job) for job in jobs]


@contextmanager
def executor_of(workers: int | str, total: int) -> Iterator[tuple[Executor, int]]:
    """Processes of this machine, or those of a Dask scheduler: one interface. -> (executor, processes)

    If a Dask worker ends, the scheduler gives its jobs to another one. A job that is done twice
    writes the same bytes.
    """
    if isinstance(workers, int):
        count = min(workers, total, 61) if os.name == "nt" else min(workers, total)  # Windows waits for 61 at most
        with ProcessPoolExecutor(count, initializer=start_worker) as executor:
            try:
                yield executor, count
            except BrokenProcessPool as error:
                raise ChildProcessError("a process was killed; if memory is short, give fewer --jobs") from error
            finally:
                executor.shutdown(cancel_futures=True)
        return
    try:
        from distributed import CancelledError, Client, KilledWorker
    except ImportError as error:
        raise InputError(f"--jobs {workers}: needs Dask; run: pip install -r requirements-cluster.txt") from error
    try:
        with Client(workers) as client:
            client.wait_for_workers(1, timeout=60)
            client.run_on_scheduler(import_module, __name__)
            client.run(import_module, __name__)
            yield client.get_executor(pure=False), sum(client.nthreads().values())
    except ModuleNotFoundError as error:
        raise InputError(f"--jobs {workers}: {error} there; run there, in this folder: pip install -e .") from error
    except (CancelledError, KilledWorker) as error:
        raise ChildProcessError(f"--jobs {workers}: lost the scheduler, or too many workers ({error})") from error


def start_worker() -> None:
    """In a new process: see to it that it ends when the main process is killed; else it waits for ever.

    And let the C library keep an image's memory for the next image. It keeps blocks smaller than
    the largest block freed so far. To get them anew from the system took a tenth of the time.
    """
    bytearray(30 << 20)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------- the cases


def slice_names(case: Case) -> list[tuple[str, object]]:
    """[(name of the cached image, index of its plane)]: one for a picture, one a slice for a volume."""
    if not case.is_3d:
        return [(case.name, ...)]
    return [(f"{case.name}-{z:03d}", z) for z in range(len(case.image))]


def cache_sources(
    folder: Path, sources: list[Source], workers: int | str, cache_case: Callable, load_entry: Callable
) -> tuple[list[Source], dict[str, CachedCase]]:
    """Cache every source that is not done and whole. -> (the sources that are done, the journal)

    cache_case(folder, case, source, stamp) writes a case's files.   load_entry(folder, entry) reads
    an image's back.   A line on stderr says why a source is left out.
    """
    remove_leftovers(folder)
    known, finished = read_journal(folder), []
    taken = names_of_others({source.name for source in sources}, known)
    jobs = ((source, known.get(source.name), taken.get(source.name, set())) for source in sources)
    work = partial(cache_source, folder, cache_case, load_entry)
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        results = in_parallel(work, jobs, len(sources), workers, "files")
        for source, (line, problem) in zip(sources, results, strict=True):
            if problem:
                leave_out(problem)
                continue
            finished.append(source)
            journal.write(line)
            journal.flush()
    return finished, read_journal(folder)


def cache_source(
    folder: Path, cache_case: Callable, load_entry: Callable, job: tuple[Source, CachedCase | None, set[str]]
) -> tuple[str, str]:
    """In a worker: cache one source, unless it is done and whole. -> (its journal line, what is wrong)

    The line is made here, because one main process has many workers.
    """
    cv2.setNumThreads(1)  # the other cores have workers of their own
    source, before, taken = job  # taken: names in the cache that other cases have
    try:
        stamp = source.stamp()
        if before and before.stamp == stamp:
            with suppress(InputError):  # a damaged file: the case is done again
                for entry in before.entries:
                    load_entry(folder, entry)
                return "", ""
        case, small = read_source(source)
        if clash := [name for name, z in slice_names(case) if name in taken and case.labels[z].any()]:
            raise InputError(f"{source.path}: its image {clash[0]} would replace another case's; rename one of the two")
    except (InputError, OSError) as error:
        return "", str(error)
    done = replace(cache_case(folder, case, source.path.name, stamp), small=small)  # a full disk stops the run
    return "" if done == before else journal_line(done), ""


def write_validation_cases(
    folder: Path, done: list[Source], known: dict[str, CachedCase], entries: list[CacheEntry], workers: int | str
) -> int:
    """Write the cases of which an image is for validation, at their original size. -> objects left out of them"""
    held_out = {entry.name for entry in entries if entry.split == "val"}
    chosen = [source for source in done if any(entry.name in held_out for entry in known[source.name].entries)]
    write = partial(write_validation_case, folder)
    return sum(in_parallel(write, chosen, len(chosen), workers, "validation cases"))


# ---------------------------------------------------------------- the journal


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed run left in a cache."""
    for place in ("", "imgs", "masks", "cases/imgs", "cases/gts"):
        for path in (folder / place).glob("*.tmp"):
            path.unlink(missing_ok=True)


def read_journal(folder: Path) -> dict[str, CachedCase]:
    """The finished cases by name. Of a case's two lines the later is used; one that was cut short is none."""
    done = {}
    if not (folder / JOURNAL).exists():
        return done
    with (folder / JOURNAL).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                for entry in record["entries"]:  # a text is stored once, however many entries have it
                    entry |= {key: sys.intern(text) for key, text in entry.items() if isinstance(text, str)}
                record["entries"] = [CacheEntry(**entry) for entry in record["entries"]]
                done[record["name"]] = CachedCase(**record)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return done


def journal_line(cached: CachedCase) -> str:
    """A case as a line of the journal. It begins with a line end, because the line before it may be cut short."""

    def record(thing: CachedCase | CacheEntry) -> dict:  # as dataclasses.asdict, in a tenth of its time
        return {column: getattr(thing, column) for column in thing.__slots__}

    return f"\n{json.dumps(record(cached) | {'entries': [record(entry) for entry in cached.entries]})}"


def names_of_others(names: set[str], known: dict[str, CachedCase]) -> dict[str, set[str]]:
    """{case: names of images that it must not write, because another case has them}.

    names : cases of this run.   known : the journal.   A volume CT_a and a picture CT_a-003 collide,
    because the volume's slice 3 is called so too. The picture has the name, unless the journal gives
    it to the volume.
    """
    taken = defaultdict(set)
    for name in names | known.keys():
        volume = re.sub(r"-\d{3,}$", "", name)
        if volume in known and name not in known and any(entry.name == name for entry in known[volume].entries):
            taken[name].add(name)
        elif volume != name:
            taken[volume].add(name)
    return taken


# ---------------------------------------------------------------- from the journal to the index


def merged_entries(
    folder: Path, done: list[Source], known: dict[str, CachedCase], excluded: set[str]
) -> list[CacheEntry]:
    """The rows of the index after a run: this run's, and those that the index had. Sorted by name.

    done : cases of this run.   known : the journal.   A row keeps the split that it had in the index.
    A new row has that of its source; "" is still to be drawn. InputError if there is no row.
    """
    splits = {row.name: row.split for row in read_index(folder)} if (folder / "index.csv").exists() else {}
    given = {source.name: source.split for source in done}
    rows = [
        replace(entry, split=splits.get(entry.name) or given[case.name])
        for case in known.values()
        for entry in case.entries
        if (case.name in given or entry.name in splits) and not {case.name, entry.name} & excluded
    ]
    if not rows:
        raise InputError(f"{folder}: no file gave an image with an object, so there is nothing to train on")
    return sorted(rows, key=lambda row: row.name)


def tell_summary(
    folder: Path, done: list[Source], known: dict[str, CachedCase], entries: list[CacheEntry], thin: int, excluded: int
) -> None:
    """Print what a run read, what the cache holds, what was left out; warn of patients on both sides.

    done : cases of this run.   known : the journal.   thin : objects left out of validation cases.
    excluded : files left out.
    """
    sides = defaultdict(set)
    for entry in entries:
        sides[entry.patient].add(entry.split)
    if both := sorted(patient for patient, splits in sides.items() if len(splits) == 2):  # a drawn split has none
        text = f"patients in training and in validation: {len(both)}, such as {', '.join(both[:3])}"
        advice = "scores will be too good, unless these only share a name: move their files, or --exclude some"
        tell(f"01_preprocess.py: {text}; {advice}", error=True)
    finished, count = [known[source.name] for source in done], Counter(entry.split for entry in entries)
    reasons = {
        "images or slices without an object": sum(case.empty for case in finished),
        "objects of a slice too small for the grid": sum(case.lost for case in finished),
        "objects below the smallest size": sum(case.small for case in finished),
        "objects too thin for a box in validation cases": thin,
        "files excluded": excluded,
    }
    left_out = ", ".join(f"{number:,} {what}" for what, number in reasons.items() if number) or "nothing"
    without = {entry.modality for entry in entries} - {entry.modality for entry in entries if entry.split == "val"}
    note = f"; no validation image of {', '.join(sorted(without))}, whose patients are too few" if without else ""
    tell(
        f"01_preprocess.py: {len(finished):,} files with {sum(case.objects for case in finished):,} objects; "
        f"{folder} holds {len(entries):,} images with {sum(e.objects for e in entries):,} objects, "
        f"{count['train']:,} train and {count['val']:,} val, {sum(case.bytes for case in known.values()) / 1e6:.1f} MB; left out: {left_out}{note}"
    )
