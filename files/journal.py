"""Lets step 1 run in parallel, be stopped, resumed, shared among machines, and run again for more files.

cache/done.jsonl has a line for each finished file. A line is written when the file's images are on the disk. A run
that comes later reads the journal, and does again only what is not in it, or what has changed since.
A shard, one of N runs that share the work, has a journal of its own, done-03-of-16.jsonl, so that no two machines write
one file; its shard-03-of-16.json says that it has come to its end. All journals together say what the cache holds.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

from files import InputError, bare_name
from files.index import CachedCase, CacheEntry
from files.writing import progress, progress_bar, save_json

JOURNAL = "done.jsonl"
CHUNK = 4  # jobs that a worker gets at once
AHEAD = 4  # chunks a worker that are handed out before the first one's results are taken


# ---------------------------------------------------------------- in parallel


def in_parallel(function: Callable, jobs: Iterable, total: int, processes: int, what: str) -> Iterator:
    """Results in the order of the jobs, with a progress bar. Jobs are drawn as they are needed: a million do not pile up."""
    if processes == 1 or total < 2:
        yield from progress(map(function, jobs), what, total)
        return
    processes, jobs, waiting = min(processes, total), iter(jobs), deque()
    with (
        ProcessPoolExecutor(processes, initializer=start_worker) as pool,
        progress_bar(None, what, total) as bar,
    ):
        try:
            while True:
                while len(waiting) < AHEAD * processes and (chunk := list(islice(jobs, CHUNK))):
                    waiting.append(pool.submit(all_of, function, chunk))
                if not waiting:
                    return
                for result in waiting.popleft().result():
                    bar.update()
                    yield result
        finally:
            pool.shutdown(cancel_futures=True)


def all_of(function: Callable, jobs: list) -> list:
    """In a worker: the results of a few jobs."""
    return [function(job) for job in jobs]


def start_worker() -> None:
    """In a new worker: see to it that it ends when the main process is killed, for it would wait for work for ever.

    And keep its memory: what an image has used is used again for the next one, in place of going back to the system and
    coming anew, page by page, which took a tenth of the time. The C library keeps what is smaller than the largest block freed.
    """
    bytearray(30 << 20)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def remove_leftovers(folder: Path, names: set[str] | None = None) -> int:
    """Remove the temporary files that a killed run left in a cache. -> how many

    names : cases of this shard, if others may be writing now; their temporary files stay. None: all go.
    """
    mine = {bare_name(name) for name in names or ()}  # validation cases have 2DBox_ before it
    found = 0
    for place in (folder, *(folder / sub for sub in ("imgs", "masks", "cases/imgs", "cases/gts"))):
        if not place.is_dir():
            continue
        with os.scandir(place) as files:  # a million names: no list of them, and no look at each file
            stale = [Path(file.path) for file in files if file.name.endswith(".tmp")]
        for path in stale:
            owner = bare_name(re.sub(r"\.\w+(\.[0-9a-f]{8})?\.tmp$", "", path.name))
            if names is None or {owner, case_of_slice(owner)} & mine:
                path.unlink(missing_ok=True)
                found += 1
    return found


# ---------------------------------------------------------------- the journals


def journal_name(shard: tuple[int, int] | None) -> str:
    """done.jsonl, or the journal of a shard (3, 16)."""
    return f"done-{shard_name(shard)}.jsonl" if shard else JOURNAL


def shard_name(shard: tuple[int, int]) -> str:
    """(3, 16) -> "03-of-16": names sort as numbers do."""
    digits = max(2, len(str(shard[1])))
    return f"{shard[0]:0{digits}}-of-{shard[1]:0{digits}}"


def mark_shard(folder: Path, shard: tuple[int, int] | None, finished: dict | None) -> None:
    """Note that a shard has come to its end, and with what; None: that it has begun. A run without shards needs no mark."""
    if shard and finished:
        save_json(folder / f"shard-{shard_name(shard)}.json", finished)
    elif shard:
        (folder / f"shard-{shard_name(shard)}.json").unlink(missing_ok=True)


def missing_shards(folder: Path, shard: tuple[int, int] | None) -> list[int]:
    """The numbers of the shards, of as many as this one is of, that have not come to their end."""
    parts = range(1, shard[1] + 1) if shard else ()
    return [k for k in parts if not (folder / f"shard-{shard_name((k, shard[1]))}.json").exists()]


def done_by_all(folder: Path, listed: list) -> list[str]:
    """The cases that all shards together have done. InputError if some were read with other options than the others.

    listed: the files.sources.Source of all shards.
    """
    known, _ = read_journals(folder)
    found = [source for source in listed if source.name in known]
    other = [source for source in found if not known[source.name].stamp.endswith(f"| {source.options}")]
    if other:
        raise InputError(
            f"{folder}: {len(other)} cases such as {other[0].name} were cached with other options than this shard's; "
            "run all shards with the same ones, or once without --shard"
        )
    return [source.name for source in found]


def read_journals(folder: Path) -> tuple[dict[str, CachedCase], int]:
    """What all runs finished, by name, and the highest turn. A line cut short by an interruption counts as not done.

    A run's turn is 1 more than the highest that it finds. Of two lines for one case that of the later turn counts, and
    in one journal the later line: no clock is needed, which machines would have to agree on.
    """
    done, turns = {}, {}
    for path in sorted(folder.glob("done*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    turn = int(record.pop("turn"))
                    entries = [CacheEntry(**shared_text(entry)) for entry in record["entries"]]
                    name = sys.intern(record["name"])
                    if turn >= turns.get(name, 0):
                        done[name] = CachedCase(**record | {"name": name, "entries": entries})
                        turns[name] = turn
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
    return done, max(turns.values(), default=0)


def shared_text(record: dict) -> dict:
    """An entry's record whose texts are stored once, however many entries have them."""
    return {column: sys.intern(value) if isinstance(value, str) else value for column, value in record.items()}


def journal_line(cached: CachedCase, turn: int) -> str:
    """A case as a line of the journal. It begins with a line end, because the line before it may be cut short."""

    def record(thing: CachedCase | CacheEntry) -> dict:  # as dataclasses.asdict, in a tenth of its time
        return {column: getattr(thing, column) for column in thing.__slots__}

    return f"\n{json.dumps({'turn': turn} | record(cached) | {'entries': [record(entry) for entry in cached.entries]})}"


def case_of_slice(name: str) -> str:
    """The volume that an image would be a slice of, by its name: "CT_a-003" -> "CT_a"; other names as they are."""
    return re.sub(r"-\d{3,}$", "", name)


def names_of_others(names: set[str], known: dict[str, CachedCase]) -> dict[str, set[str]]:
    """{case: names in the cache that it must not use, because another case owns them}.

    names : cases of this run, of all shards.   known : the journals; a name that they give to a case stays that case's.
    A volume CT_a and a picture CT_a-003 collide: the volume's slice 3 is cached as CT_a-003 too.
    """

    taken = defaultdict(set)
    for case in known.values():
        for entry in case.entries:
            if entry.name != case.name and entry.name in names:  # a slice; the picture of this name came later
                taken[entry.name].add(entry.name)
            elif entry.name == case.name and (volume := case_of_slice(entry.name)) != entry.name and volume in names:
                taken[volume].add(entry.name)
    for name in names:
        volume = case_of_slice(name)
        if volume != name and volume in names and name not in taken.get(name, ()):
            taken[volume].add(name)
    return taken


def merged_entries(
    before: list[CacheEntry], done: list[str], known: dict[str, CachedCase], splits: dict[str, str], excluded: set[str]
) -> list[CacheEntry]:
    """The entries of an index after a run: those of the index before, as the journals have them now, and the new ones.

    before: entries of the index.   done: cases of this run (with shards, of all of them).   known: the journals.
    splits: the split given to each case's entries, "" if data.split_entries is to draw it; an entry that has a split keeps it.
    """
    entries, kept_splits = {}, {}
    for old in before:
        owners = [known[case] for case in {old.name, case_of_slice(old.name)} if case in known]
        new = next((entry for case in owners for entry in case.entries if entry.name == old.name), None)
        if new or not owners:  # else the journal has its case without this slice: the file has changed
            entries[old.name] = replace(new, split=old.split) if new else old
            kept_splits[old.name] = old.split
    for case in done:
        entries |= {e.name: replace(e, split=kept_splits.get(e.name, splits[case])) for e in known[case].entries}
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


def summary(
    folder: Path, finished: list[CachedCase], entries: list[CacheEntry], size: int, thin: int, excluded: int
) -> str:
    """One line: what a run of step 1 read, what the cache holds (`size` bytes), what was left out and why."""
    count = Counter(entry.split for entry in entries)
    reasons = {
        "images or slices without an object": sum(case.empty for case in finished),
        "objects of a slice too small for the grid": sum(case.lost for case in finished),
        "objects below --smallest": sum(case.small for case in finished),
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
