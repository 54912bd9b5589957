"""Step 1 of 5, preprocess. Reads images with masks, writes the cache that step 2 trains on. [P 2.1]

    python 01_preprocess.py -i data/train --val data/val                 folders of challenge cases (.npz with imgs, gts)
    python 01_preprocess.py --images scans --masks outlines --modality US_MyHospital      two folders, or masks in a COCO file
    python 01_preprocess.py --recipe btcv -i FOLDER                      a public data set, see files/recipes.py
    python 01_preprocess.py -i data/train --shard 3/16                   a sixteenth of the work, see docs/cache.md
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
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2

from data import CacheEntry, cache_case, is_readable, read_index, slice_names, split_entries, write_index
from files import InputError, modality_of
from files.formats import list_cases, name_of
from files.index import CachedCase, start_cache
from files.journal import (
    done_by_all,
    in_parallel,
    journal_line,
    journal_name,
    mark_shard,
    merged_entries,
    missing_shards,
    names_of_others,
    read_journals,
    remove_leftovers,
    split_warnings,
    summary,
)
from files.npz import write_training_case
from files.partners import list_pairs
from files.recipes import RECIPES, list_recipe
from files.sources import Options, Source, parse_shard, read_source, shard_of, write_validation_case
from files.writing import save_json, tell


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("-i", "--input", type=Path, help="folder of images with labels in or beside them (docs/formats.md)")
    p.add_argument("--recipe", choices=RECIPES, help="--input is a public data set as it was downloaded, this one")
    p.add_argument("--images", type=Path, help="folder of images, in place of --input")
    p.add_argument("--masks", type=Path, help="folder of masks with the names of --images, or a COCO file")
    p.add_argument("--modality", help="with --images: modality, or Modality_Dataset, that the cases' names begin with")
    p.add_argument("-o", "--out", type=Path, help="folder for the cache (cache, or with --smoke a temporary one)")
    p.add_argument("--val", type=Path, help="folder of challenge cases to validate on, in place of drawing some")
    p.add_argument("--val-share", type=float, default=0.01, help="share of each modality to draw for validation")
    p.add_argument("--seed", type=int, default=0, help="seed of the draw, 0 or more")
    p.add_argument("--window", default="", help="cut intensities to soft, lung, brain, bone or WIDTH/LEVEL, or by percentile")  # fmt: skip
    p.add_argument("--instances", action="store_true", help="each connected part of a label becomes an object of its own")  # fmt: skip
    p.add_argument("--smallest", type=int, default=0, help="leave out objects of fewer pixels, in 3D voxels, than this")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    p.add_argument("--shard", help="K/N: do the K-th of N parts of the work; the last run to end writes the index")
    p.add_argument("--exclude", type=Path, help="text file of case or slice names to leave out, one a line")
    p.add_argument("--smoke", action="store_true", help="tiny synthetic cases in place of --input")
    args = p.parse_args(argv)
    pairs = (args.images, args.masks, args.modality)
    if not args.smoke and (any(pairs) == bool(args.input) or any(pairs) != all(pairs)):
        p.error("name the input: -i FOLDER, or --images FOLDER --masks FOLDER --modality NAME, or --smoke")
    if args.recipe and not args.input:
        p.error("--recipe needs -i FOLDER, where the data set was unpacked")
    if args.modality and (modality_of(args.modality) == "Other" or Path(args.modality).name != args.modality):
        p.error(f"--modality {args.modality}: begins with no known modality, such as CT, MR, US, X-Ray, Fundus, OCT")
    if not 0 < args.val_share <= 0.5 or min(args.seed, args.smallest) < 0 or args.jobs < 1:
        p.error("--val-share must lie above 0 and up to 0.5, --seed and --smallest be 0 or more, --jobs 1 or more")
    return args


def complain(problem: Exception | str, what: str = "left out: ") -> None:
    """One sentence to stderr that doesn't break the progress bar."""
    tell(f"01_preprocess.py: {what}{problem}", error=True)


def list_sources(args: argparse.Namespace, excluded: set[str]) -> tuple[list[Source], int, int]:
    """Every file to read, sorted by name. -> (sources, number excluded, number left out as bad)"""
    options, found, problems = Options(args.window, (), args.instances, args.smallest).checked(), [], []
    for folder in filter(None, (args.val, args.input if not args.recipe else None)):
        found += [Source(name_of(path), path, None, folder is args.val, options) for path in list_cases(folder)]
    if args.recipe:
        more, problems = list_recipe(args.recipe, args.input, options)
        found += more
        if not RECIPES[args.recipe].verified:
            complain(f"recipe {args.recipe} was written without its files at hand: look at some cached masks", "")
    if args.images:
        pairs, problems = list_pairs(args.images, args.masks)
        found += [Source(f"{args.modality}_{name_of(image)}", image, mask, False, options) for image, mask in pairs]
    sources = {}
    for source in found:  # validation comes first: a case in both is for validation
        first = sources.setdefault(source.name, source)
        if first is not source:
            where = first.path.parent
            problems.append(InputError(f"{source.path}: {where} holds a case of this name too, which is kept"))
    for problem in problems:
        complain(problem)
    kept = [source for name, source in sorted(sources.items()) if name not in excluded]
    return kept, len(sources) - len(kept), len(problems)


def cache_source(folder: Path, turn: int, job: tuple[Source, CachedCase | None, set[str]]) -> tuple[str, str, str]:
    """In a worker: cache one file, unless it is done and whole. -> (its name, new line of the journal, what is wrong with it)

    The line is made here: one main process has many workers.
    """
    cv2.setNumThreads(1)  # the other cores have workers of their own
    source, before, taken = job  # taken: names in the cache that other cases have
    try:
        stamp = source.stamp()
        same = before is not None and before.stamp == stamp
        if same and all(is_readable(folder, entry) for entry in before.entries):
            return source.name, "", ""
        case, small = read_source(source)
        if clash := [name for name, z in slice_names(case) if name in taken and case.labels[z].any()]:
            raise InputError(f"{source.path}: its image {clash[0]} would replace another case's; rename one of the two")
    except (InputError, OSError) as error:
        return source.name, "", str(error)
    done = replace(cache_case(folder, case, source.path.name, stamp, keep_good=same), small=small)  # full disk: a stop
    return source.name, "" if done == before else journal_line(done, turn), ""


def cache_sources(sources: list[Source], listed: set[str], args: argparse.Namespace) -> list[str]:
    """Cache the files of this run; bad ones are told. -> names of the cases that are done

    listed: cases of all shards.   Each case is noted in this run's journal once its images are written.
    """
    known, turn = read_journals(args.out)
    finished, taken = [], names_of_others(listed, known)
    jobs = ((source, known.get(source.name), taken.get(source.name, set())) for source in sources)
    with (args.out / journal_name(args.shard)).open("a", encoding="utf-8") as journal:
        work = partial(cache_source, args.out, turn + 1)
        for name, line, problem in in_parallel(work, jobs, len(sources), args.jobs, "files"):
            if problem:
                complain(problem)
                continue
            finished.append(name)
            journal.write(line)
            journal.flush()
    return finished


def run(args: argparse.Namespace) -> list[CacheEntry]:
    # 1. What to read, and where to
    if args.out.resolve() in [path.resolve() for path in (args.input, args.images, args.masks, args.val) if path]:
        raise InputError(f"{args.out}: input and output are the same folder; name another one with --out")
    shard = args.shard = parse_shard(args.shard) if args.shard else None
    excluded = {line.strip() for line in args.exclude.read_text("utf-8").splitlines()} if args.exclude else set()
    listed, left_out, bad = list_sources(args, excluded)
    sources = [source for source in listed if shard_of(source.name, shard[1]) == shard[0]] if shard else listed
    start_cache(args.out)
    remove_leftovers(args.out, {source.name for source in sources} if shard else None)

    # 2. Images and masks on the grid, a line in the journal for each case
    mark_shard(args.out, shard, None)
    done = cache_sources(sources, {source.name for source in listed}, args)
    mark_shard(args.out, shard, {"files": len(sources), "done": len(done)})
    total, failed = len(sources) + bad, bad + len(sources) - len(done)
    entries = []
    if waiting := missing_shards(args.out, shard):
        print(f"01_preprocess.py: {len(done):,} files of this shard; no index yet, shards {waiting} have not ended")
    else:
        entries = complete(args, listed, done_by_all(args.out, listed) if shard else done, excluded, left_out)
    if failed:
        sys.exit(f"01_preprocess.py: {total - failed} of {total} files done, {failed} left out as told above.")
    return entries


def complete(
    args: argparse.Namespace, listed: list[Source], done: list[str], excluded: set[str], left_out: int
) -> list[CacheEntry]:
    """What follows when all cases are cached: index, split, validation cases, one line that sums up. -> the entries"""
    known, _ = read_journals(args.out)
    # 3. The index with the split
    splits = {source.name: "val" if source.is_val else "train" if args.val else "" for source in listed}
    before = read_index(args.out) if (args.out / "index.csv").exists() else []
    entries = merged_entries(before, done, known, splits, excluded)
    if not entries:
        raise InputError(f"{args.out}: no file gave an image with an object, so there is nothing to train on")
    entries = sorted(split_entries(entries, args.val_share, args.seed), key=lambda entry: entry.name)
    write_index(args.out, entries)

    # 4. Validation cases at original size
    held_out = {entry.name for entry in entries if entry.split == "val"}
    names = {name for name in done if any(entry.name in held_out for entry in known[name].entries)}
    jobs = [source for source in listed if source.name in names]
    write = partial(write_validation_case, args.out / "cases")
    thin = sum(in_parallel(write, jobs, len(jobs), args.jobs, "validation cases"))

    # 5. What was run, beside what it wrote
    save_json(args.out / "arguments.json", vars(args))
    sys.stderr.writelines(f"01_preprocess.py: {warning}\n" for warning in split_warnings(entries))
    size = sum(case.bytes for case in known.values())
    print(f"01_preprocess.py: {summary(args.out, [known[name] for name in done], entries, size, thin, left_out)}")
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
    """Returns the rows of index.csv; none while shards are to come."""
    args = parse(argv)
    try:
        args.out = args.out or (None if args.smoke else Path("cache"))
        entries = smoke(args) if args.smoke else run(args)
        next_step = "python 02_train.py " + ("--smoke" if args.smoke else f"--cache {args.out}")
        print(f"01_preprocess.py: finished. Next: {next_step if entries else 'the other shards'}")
        return entries
    except InputError as error:
        sys.exit(f"01_preprocess.py: {error}")
    except (OSError, BrokenProcessPool) as error:
        where = "" if getattr(error, "filename", None) else f"{args.out}: "
        sys.exit(f"01_preprocess.py: {where}{error}; mend that and run the same command again, what is done is kept")


if __name__ == "__main__":
    main()
