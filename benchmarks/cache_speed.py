"""How fast step 1 is, what its time goes to, and whether it grows with the number of pairs as it should: linearly.

    python benchmarks/cache_speed.py                     10 minutes on 2 idle cores; writes results/cache_speed

Makes pairs of image and label map, challenge files of 512 x 512 pixels, and times step 1 on more and more of them. The image is
smooth clouds and ellipses under noise of 8 gray levels, so that zip and PNG have as much to do as with ultrasound or CT: noise
is what they cannot shrink. The label map has three ellipses. Files were just written, so they are read from memory, not from the disk.
"""

import csv
import importlib
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from zlib import crc32

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

from processes_child import peak_mb

from data import (
    CachedCase,
    CacheEntry,
    cache_case,
    encode_runs,
    image_path,
    mask_path,
    read_index,
    split_entries,
    write_index,
)
from files.journal import journal_line, merged_entries, read_journals
from files.npz import load_npz, read_npz
from files.sources import Options
from files.writing import csv_text, save_bytes, save_json, save_npz, save_text
from grid import GRID, label_ids, pad_to_square, resize_labels_to_grid, resize_to_grid

ROOT = Path(__file__).resolve().parent.parent
SIDE = 512
RUN_COLUMNS = ("pairs", "repeat", "seconds", "cpu_s", "images_per_s_core", "main_mb", "worker_mb")
# in a process of its own, so that its peak memory is its own; the time is without the start of Python and the imports
TIMED_RUN = """
import importlib, json, resource, sys, time
preprocess = importlib.import_module("01_preprocess")
start, imports = time.perf_counter(), time.process_time()
preprocess.main(sys.argv[1:])
seconds = time.perf_counter() - start
main, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
cpu = main.ru_utime + main.ru_stime + workers.ru_utime + workers.ru_stime - imports
sys.path.append("benchmarks")
from processes_child import peak_mb
print(json.dumps({"seconds": seconds, "main_mb": peak_mb(), "worker_mb": workers.ru_maxrss * 1024 / 1e6, "cpu_s": cpu}))
"""


def parse(argv: list[str] | None) -> Namespace:
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument("--pairs", type=int, nargs="+", default=[1250, 2500, 5000, 10_000], help="sizes of the runs")
    p.add_argument("--repeats", type=int, default=3, help="runs of each size; the median counts")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    p.add_argument("--sample", type=int, default=300, help="pairs on which the parts are timed")
    p.add_argument("--index", type=int, default=1_000_000, help="made-up cases of which the end of a run is timed")
    p.add_argument("--files", type=int, default=0, help="also write so many tiny files into one folder, and into 256")
    p.add_argument("--work", type=Path, help="folder for pairs and caches, 4 GB (a temporary one)")
    p.add_argument("-o", "--out", type=Path, default=Path("results/cache_speed"), help="folder for tables and summary")
    p.add_argument("--smoke", action="store_true", help="24 and 48 pairs, once")
    args = p.parse_args(argv)
    if args.smoke:
        args.pairs, args.repeats, args.sample, args.index, args.files = [24, 48], 1, 8, 200, 50
    return args


def make_pair(folder: Path, number: int) -> None:
    """One pair, drawn by its number."""
    rng = np.random.default_rng(number)
    clouds = cv2.resize(rng.normal(100, 45, (12, 12)).astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    image, labels = clouds + 8 * rng.standard_normal((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.uint8)
    for label in (1, 2, 3):
        mask = np.zeros_like(labels)
        centre, axes = rng.integers(90, SIDE - 90, 2).tolist(), rng.integers(20, 80, 2).tolist()
        cv2.ellipse(mask, centre, axes, rng.uniform(0, 180), 0, 360, 1, -1)
        image[mask > 0] += 30
        labels[mask > 0] = label
    save_npz(folder / f"US_drawn_{number:05d}.npz", imgs=np.clip(np.rint(image), 0, 255).astype(np.uint8), gts=labels)


def time_parts(paths: list[Path], folder: Path) -> list[dict]:
    """Milliseconds an image of each part of step 1, one process, and of all of them as step 1 does them."""
    cv2.setNumThreads(1)
    rows = []

    def timed(part: str, work, things: list) -> list:
        times, found = [], []
        for thing in things:
            start = time.perf_counter()
            found.append(work(thing))
            times.append(time.perf_counter() - start)
        rows.append({"part": part, "ms": 1000 * median(times)})  # the median: first calls load what later ones have
        return found

    timed("read: unpack the zip", load_npz, paths)
    cases = timed("read: unpack and check", read_npz, paths)
    timed("labels: find the objects", lambda case: label_ids(case.labels), cases)
    images = timed("resize: image", lambda case: pad_to_square(resize_to_grid(case.image), GRID), cases)
    masks = timed("resize: labels", lambda case: pad_to_square(resize_labels_to_grid(case.labels), GRID), cases)
    pngs = timed("encode: PNG", lambda image: cv2.imencode(".png", image)[1].tobytes(), images)
    runs = timed("encode: run lengths", lambda mask: pickle.dumps(encode_runs(mask), protocol=4), masks)
    places = enumerate(zip(pngs, runs, strict=True))
    timed(
        "write: two files",
        lambda p: [save_bytes(folder / "parts" / f"{p[0]}.{i}", p[1][i]) for i in (0, 1)],
        list(places),
    )
    timed("resize, encode and write together", lambda case: cache_case(folder / "together", case, "drawn"), cases)
    timed("everything", lambda path: cache_case(folder / "everything", read_npz(path), "drawn"), paths)
    return rows


def time_run(source: Path, cache: Path, jobs: int) -> dict:
    """One run of step 1: seconds, and the peak memory of the main process and of the largest worker, MB."""
    command = [sys.executable, "-c", TIMED_RUN, "-i", str(source), "-o", str(cache), "--jobs", str(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"step 1 failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def end_of_run(folder: Path, count: int) -> dict:
    """What one process does when all is cached: seconds and MB for a journal of `count` made-up pictures."""
    folder.mkdir()
    with (folder / "done.jsonl").open("w", encoding="utf-8") as journal:
        for i in range(count):
            name = f"US_set{i % 97}_{i:07d}"
            entry = CacheEntry(name, "US", "US", name, f"{name}.npz", SIDE, SIDE, "", 3)
            journal.write(
                journal_line(
                    CachedCase(name, f"set/{name}.npz 191175 {i:019d} | {Options()}", [entry], 3, 0, 0, 0, 41000), 1
                )
            )
    start = time.perf_counter()
    known, _ = read_journals(folder)
    read = time.perf_counter() - start
    entries = merged_entries([], list(known), known, dict.fromkeys(known, ""), set())
    entries = split_entries(entries)
    write_index(folder, entries)
    write = time.perf_counter() - start - read
    written = peak_mb()
    del known, entries
    start = time.perf_counter()
    read_index(folder)
    again = time.perf_counter() - start
    return {"index_images": count, "read_journal_s": read, "split_and_write_index_s": write, "read_index_s": again,
            "index_mb_memory": written, "index_mb_file": (folder / "index.csv").stat().st_size / 1e6,
            "journal_mb_file": (folder / "done.jsonl").stat().st_size / 1e6}  # fmt: skip


def folder_times(folder: Path, count: int) -> dict:
    """Microseconds to write a tiny file, for the last tenth of `count`: all in one folder, or spread over 256."""
    found = {"tiny_files": count}
    for folders in (1, 256):
        for i in range(count):
            if i == count - count // 10:
                start = time.process_time()
            name = f"US_set{i % 97}_{i:07d}"
            save_bytes(folder / str(folders) / f"{crc32(name.encode()) % folders:02x}" / f"{name}.png", b"x")
        found[f"us_a_file_in_{folders}_folders"] = 1e6 * (time.process_time() - start) / (count // 10)
    return found


def first_pairs(folder: Path, paths: list[Path], count: int) -> Path:
    """A folder of the first `count` pairs, as links."""
    some = folder / f"first_{count}"
    some.mkdir()
    for path in paths[:count]:
        os.link(path, some / path.name)
    return some


def time_everything(args: Namespace, folder: Path) -> tuple[list[dict], list[dict], dict]:
    """-> (rows of the parts, rows of the runs, summary)"""
    (folder / "pairs").mkdir(parents=True)
    with ProcessPoolExecutor(args.jobs) as pool:
        list(pool.map(partial(make_pair, folder / "pairs"), range(max(args.pairs)), chunksize=16))
    paths = sorted((folder / "pairs").iterdir())
    parts = time_parts(paths[: args.sample], folder)
    runs = []
    cache = None
    for count in args.pairs:
        source = first_pairs(folder, paths, count)
        for repeat in range(args.repeats):
            if cache:  # what a run leaves to be written to the disk would slow the next one
                shutil.rmtree(cache)
                os.sync()
            cache = folder / f"cache_{count}_{repeat}"
            found = time_run(source, cache, args.jobs)
            runs.append(
                {"pairs": count, "repeat": repeat} | found | {"images_per_s_core": count / found["seconds"] / args.jobs}
            )
            print(
                f"cache_speed.py: {count:,} pairs: {found['seconds']:.1f} s, {runs[-1]['images_per_s_core']:.0f} images/s a core"
            )
    again = time_run(source, cache, args.jobs)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        end = pool.submit(end_of_run, folder / "index", args.index).result()
    with (cache / "index.csv").open(newline="") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    per_pair = {n: median(row["seconds"] for row in runs if row["pairs"] == n) / n for n in args.pairs}
    cpu = {n: median(row["cpu_s"] for row in runs if row["pairs"] == n) / n for n in args.pairs}
    small, large = min(args.pairs), max(args.pairs)
    memory = {n: max(row["main_mb"] for row in runs if row["pairs"] == n) for n in (small, large)}
    summary = {
        "images_per_s_core": 1 / per_pair[large] / args.jobs,
        "images_per_cpu_s": large / median(row["cpu_s"] for row in runs if row["pairs"] == large),
        "images_per_s_core_when_all_is_done": large / again["seconds"] / args.jobs,
        "seconds_per_pair_largest_over_smallest": per_pair[large] / per_pair[small],
        "cpu_seconds_per_pair_largest_over_smallest": cpu[large] / cpu[small],
        "linear_within_15_percent": all(abs(of[large] / of[small] - 1) <= 0.15 for of in (per_pair, cpu)),
        "main_mb": memory[large],
        "main_kb_per_pair": 1024 * (memory[large] - memory[small]) / (large - small) if large > small else 0.0,
        "worker_mb": max(row["worker_mb"] for row in runs),
        **end,
        **(folder_times(folder / "tiny", args.files) if args.files else {}),
        "npz_kb": mean(path.stat().st_size for path in paths) / 1000,
        "png_kb": mean(image_path(cache, name).stat().st_size for name in names) / 1000,
        "pkl_kb": mean(mask_path(cache, name).stat().st_size for name in names) / 1000,
        "jobs": args.jobs,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "opencv": cv2.__version__,
    }
    return parts, runs, summary


def plan_table(summary: dict, pairs: int = 1_000_000) -> str:
    """What a million such pairs take, computed from the measured rate and sizes, if the disks keep up. docs/cache.md shows it."""
    lines = ["| cores | images a second | time | read | written |", "| --- | --- | --- | --- | --- |"]
    cached_kb = summary["png_kb"] + summary["pkl_kb"]
    for cores, words in ((2, "2"), (16, "16"), (256, "16 x 16, as 16 shards")):
        rate = cores * summary["images_per_s_core"]
        hours = pairs / rate / 3600
        time_words = (
            f"{hours:.1f} h"
            if hours >= 0.95
            else f"{60 * hours:.0f} min"
            if hours > 1 / 30
            else f"{3600 * hours:.0f} s"
        )
        read, written = (f"{rate * kb / 1000:,.0f} MB/s" for kb in (summary["npz_kb"], cached_kb))
        lines.append(f"| {words} | {rate:,.0f} | {time_words} | {read} | {written} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    importlib.import_module("01_preprocess")  # compiled now, so that the first run is not the slowest
    try:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            parts, runs, summary = time_everything(args, Path(folder))
        save_text(args.out / "parts.csv", csv_text(parts, ("part", "ms"), ".3f"))
        save_text(args.out / "runs.csv", csv_text(runs, RUN_COLUMNS, ".3f"))
        save_json(args.out / "summary.json", summary)
        save_text(args.out / "plan.md", plan_table(summary))
    except OSError as error:
        sys.exit(f"cache_speed.py: {error}")
    for row in parts:
        print(f"  {row['part']:36} {row['ms']:6.2f} ms")
    print(
        f"cache_speed.py: {summary['images_per_s_core']:.0f} images/s a core, main process {summary['main_mb']:.0f} MB, wrote {args.out}"
    )
    return summary


if __name__ == "__main__":
    main()
