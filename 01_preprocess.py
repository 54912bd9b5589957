"""Step 1 of 5, preprocess. Reads images with masks, writes the cache that step 2 trains on. [P 2.1]

    python 01_preprocess.py -i data/train --val data/val                 folders of challenge cases (.npz with imgs, gts)
    python 01_preprocess.py --images scans --masks outlines --modality US_MyHospital      PNG, JPG, TIFF or BMP pairs
    python 01_preprocess.py --smoke                                      tiny synthetic cases, 5 s

Writes cache/imgs, cache/masks and cache/index.csv (see data.py), and the validation cases at their original size as
the challenge has them, cache/cases/imgs and cache/cases/gts: the input of steps 4 and 5. Run again after an
interruption, or with another folder for the same cache: what is done stays, and so does the split.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data import (
    CacheEntry,
    cache_case,
    image_path,
    is_readable,
    mask_path,
    read_index,
    slice_names,
    split_entries,
    write_index,
)
from files import InputError, bare_name, modality_of
from files.case import Case
from files.formats import list_cases, name_of, read_case, read_pair
from files.journal import (
    JOURNAL,
    CachedCase,
    in_parallel,
    journal_line,
    merged_entries,
    names_of_others,
    read_journal,
    split_warnings,
    start_cache,
    summary,
)
from files.npz import load_npz, write_case, write_training_case
from files.partners import list_pairs
from files.writing import save_json
from grid import promptable_labels


@dataclass(frozen=True)
class Source:
    """One file to read, or an image and its mask."""

    name: str
    path: Path
    mask: Path | None
    is_val: bool

    def stamp(self) -> str:
        """Tells the file from another or a changed one of the same name."""
        paths = [self.path.resolve()] + ([self.mask.resolve()] if self.mask else [])
        return " ".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)

    def read(self) -> Case:
        return read_pair(self.path, self.mask, self.name) if self.mask else read_case(self.path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("-i", "--input", type=Path, help="folder of challenge cases, .npz with imgs and gts")
    p.add_argument("--images", type=Path, help="folder of pictures, in place of --input")
    p.add_argument("--masks", type=Path, help="folder of mask pictures with the names of --images; values are labels")
    p.add_argument("--modality", help="with --images: modality, or Modality_Dataset, that the cases' names begin with")
    p.add_argument("-o", "--out", type=Path, help="folder for the cache (cache, or with --smoke a temporary one)")
    p.add_argument("--val", type=Path, help="folder of challenge cases to validate on, in place of drawing some")
    p.add_argument("--val-share", type=float, default=0.01, help="share of each modality to draw for validation")
    p.add_argument("--seed", type=int, default=0, help="seed of the draw, 0 or more")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    p.add_argument("--exclude", type=Path, help="text file of case or slice names to leave out, one a line")
    p.add_argument("--smoke", action="store_true", help="tiny synthetic cases in place of --input")
    args = p.parse_args(argv)
    pairs = (args.images, args.masks, args.modality)
    if not args.smoke and (any(pairs) == bool(args.input) or any(pairs) != all(pairs)):
        p.error("name the input: -i FOLDER, or --images FOLDER --masks FOLDER --modality NAME, or --smoke")
    if args.modality and (modality_of(args.modality) == "Other" or Path(args.modality).name != args.modality):
        p.error(f"--modality {args.modality}: begins with no known modality, such as CT, MR, US, X-Ray, Fundus, OCT")
    if not 0 < args.val_share <= 0.5 or args.seed < 0 or args.jobs < 1:
        p.error("--val-share must lie above 0 and up to 0.5, --seed be 0 or more, --jobs 1 or more")
    return args


def tell(problem: Exception | str) -> None:
    """One sentence to stderr that doesn't break the progress bar."""
    tqdm.write(f"01_preprocess.py: left out: {problem}", file=sys.stderr)


def list_sources(args: argparse.Namespace, excluded: set[str]) -> tuple[list[Source], int, int]:
    """Every file to read, sorted by name. -> (sources, number excluded, number left out as bad)"""
    found, problems = [], []
    for folder in filter(None, (args.val, args.input)):
        found += [Source(name_of(path), path, None, is_val=folder is args.val) for path in list_cases(folder)]
    if args.images:
        pairs, problems = list_pairs(args.images, args.masks)
        found += [Source(f"{args.modality}_{name_of(image)}", image, mask, is_val=False) for image, mask in pairs]
    sources = {}
    for source in found:  # validation comes first: a case in both is for validation
        first = sources.setdefault(source.name, source)
        if first is not source:
            where = first.path.parent
            problems.append(InputError(f"{source.path}: {where} holds a case of this name too, which is kept"))
    for problem in problems:
        tell(problem)
    kept = [source for name, source in sorted(sources.items()) if name not in excluded]
    return kept, len(sources) - len(kept), len(problems)


def cache_source(folder: Path, job: tuple[Source, CachedCase | None, set[str]]) -> tuple[CachedCase | None, str]:
    """In a worker: cache one file, unless it is done and whole. -> (what it became or None, what is wrong with it)"""
    cv2.setNumThreads(1)  # the other cores have workers of their own
    source, before, taken = job  # taken: names in the cache that other cases have
    try:
        stamp = source.stamp()
        same = before is not None and before.stamp == stamp
        if same and all(is_readable(folder, entry) for entry in before.entries):
            return before, ""
        case = source.read()
        if case.labels is None:
            raise InputError(f"{source.path}: has no key 'gts'; step 1 needs the masks, give training files")
        if clash := [name for name, z in slice_names(case) if name in taken and case.labels[z].any()]:
            raise InputError(f"{source.path}: its image {clash[0]} would replace another case's; rename one of the two")
    except (InputError, OSError) as error:
        return None, str(error)
    return cache_case(folder, case, source.path.name, stamp, keep_good=same), ""  # a full disk stops the run


def write_validation_case(folder: Path, source: Source) -> int:
    """In a worker: one case as a challenge input, at original size. -> objects left out of it, no box can prompt them"""
    case = source.read()
    truth, left_out = promptable_labels(case.labels)
    name = f"{'3DBox' if case.is_3d else '2DBox'}_{bare_name(case.name)}"
    try:
        stored = [load_npz(folder / kind / f"{name}.npz")[kind] for kind in ("imgs", "gts")]
        whole = np.array_equal(stored[0], case.image) and np.array_equal(stored[1], truth)
    except (InputError, KeyError):
        whole = False
    if truth.any() and not whole:
        write_case(folder, replace(case, name=name, labels=truth))
    return left_out


def cache_sources(sources: list[Source], known: dict[str, CachedCase], args: argparse.Namespace) -> list[CachedCase]:
    """Cache every file; bad ones are told. Each is noted in the journal once its images are written."""
    finished, taken = [], names_of_others((source.name for source in sources), known)
    jobs = [(source, known.get(source.name), taken.get(source.name, set())) for source in sources]
    with (args.out / JOURNAL).open("a", encoding="utf-8") as journal:
        for done, problem in in_parallel(partial(cache_source, args.out), jobs, args.jobs, "files"):
            if done is None:
                tell(problem)
                continue
            finished.append(done)
            if done != known.get(done.name):
                journal.write(journal_line(done))
                journal.flush()
    return finished


def cached_case(record: dict) -> CachedCase:
    """A line of the journal as what it stands for."""
    return CachedCase(**record | {"entries": [CacheEntry(**entry) for entry in record["entries"]]})


def run(args: argparse.Namespace) -> list[CacheEntry]:
    # 1. What to read, and where to
    if args.out.resolve() in [path.resolve() for path in (args.input, args.images, args.masks, args.val) if path]:
        raise InputError(f"{args.out}: input and output are the same folder; name another one with --out")
    excluded = {line.strip() for line in args.exclude.read_text("utf-8").splitlines()} if args.exclude else set()
    sources, left_out, bad = list_sources(args, excluded)
    start_cache(args.out)
    splits = {source.name: "val" if source.is_val else "train" if args.val else "" for source in sources}

    # 2. Images and masks on the grid, the index with the split
    known = read_journal(args.out, cached_case)
    finished = cache_sources(sources, known, args)
    before = read_index(args.out) if (args.out / "index.csv").exists() else []
    entries = merged_entries(before, finished, known, splits, excluded)
    if not entries:
        raise InputError(f"{args.out}: no file gave an image with an object, so there is nothing to train on")
    entries = sorted(split_entries(entries, args.val_share, args.seed), key=lambda entry: entry.name)
    write_index(args.out, entries)

    # 3. Validation cases at original size
    held_out = {entry.name for entry in entries if entry.split == "val"}
    names = {case.name for case in finished if any(entry.name in held_out for entry in case.entries)}
    jobs = [source for source in sources if source.name in names]
    thin = sum(in_parallel(partial(write_validation_case, args.out / "cases"), jobs, args.jobs, "validation cases"))

    # 4. What was run, beside what it wrote
    save_json(args.out / "arguments.json", vars(args))
    sys.stderr.writelines(f"01_preprocess.py: {warning}\n" for warning in split_warnings(entries))
    size = sum(path(args.out, entry.name).stat().st_size for entry in entries for path in (image_path, mask_path))
    print(f"01_preprocess.py: {summary(args.out, finished, entries, size, thin, left_out)}")
    total, bad = len(sources) + bad, bad + len(sources) - len(finished)
    if bad:
        sys.exit(f"01_preprocess.py: {total - bad} of {total} files done, {bad} left out as told above.")
    return entries


def smoke(args: argparse.Namespace) -> list[CacheEntry]:
    """A run on six tiny cases, 2D and 3D."""
    from phantoms import tiny_case  # only here: it draws, and no other run does

    with tempfile.TemporaryDirectory() as folder:
        args.input = Path(folder) / "train"
        for case in (tiny_case(seed, dims) for seed in range(3) for dims in (2, 3)):
            write_training_case(args.input, case)
        args.out = args.out or Path(folder) / "cache"
        return run(args)


def main(argv: list[str] | None = None) -> list[CacheEntry]:
    """Returns the rows of index.csv."""
    args = parse(argv)
    try:
        args.out = args.out or (None if args.smoke else Path("cache"))
        entries = smoke(args) if args.smoke else run(args)
        next_step = "--smoke" if args.smoke else f"--cache {args.out}"
        print(f"01_preprocess.py: finished. Next: python 02_train.py {next_step}")
        return entries
    except InputError as error:
        sys.exit(f"01_preprocess.py: {error}")
    except (OSError, BrokenProcessPool) as error:
        where = "" if getattr(error, "filename", None) else f"{args.out}: "
        sys.exit(f"01_preprocess.py: {where}{error}; mend that and run the same command again, what is done is kept")


if __name__ == "__main__":
    main()
