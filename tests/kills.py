"""Scripts that are killed at a random moment and started again, and pairs of runs of step 1 on one cache.

After a kill, the same command (of step 2 with --resume) must give the files of a run that nothing disturbed, and leave
no temporary file and no worker behind.
"""

import csv
import importlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from commands import Done, Running, command, small_checkpoint, use_stand_ins

from demo_data import tiny_cache, tiny_case
from formats import writing
from formats.cache import read_index
from formats.checkpoints import read_checkpoint
from formats.npz import write_case, write_training_case
from formats.writing import save_npz

SLOW = 0.004  # seconds between a file's last byte and its name: a kill meets that moment now and then
TIMES = ("seconds", "total_s", "predicted_iou")  # columns that may differ from run to run


def use_slow_disk() -> None:
    """In a fork: the stand-ins, checkpoints every step, and a disk that takes time."""
    use_stand_ins()
    importlib.import_module("training").SAVE_EVERY = 1
    replace = os.replace

    def slowly(*places) -> None:
        time.sleep(SLOW)
        replace(*places)

    writing.os.replace = slowly


# ---------------------------------------------------------------- what is run


def of_step_1(folder: Path) -> tuple:
    for seed in range(4):
        write_training_case(folder / "train", tiny_case(seed, 2 + seed % 2))
    return "01_preprocess.py", "-i", folder / "train", "-o", folder / "out", "--jobs", "2"


def of_step_2(folder: Path) -> tuple:
    tiny_cache(folder / "cache")
    plan = ("--steps", "5", "--batch", "1", "--validate-every", "2", "--set", "decoder=random", "objects=1")
    resume = ("--resume",) * (folder / "out" / "last.pt").is_file()
    return "02_train.py", "--cache", folder / "cache", "--out", folder / "out", *plan, *resume


def of_step_3(folder: Path) -> tuple:
    weights = small_checkpoint(folder / "small.pt")
    for seed in range(4):
        write_case(folder, tiny_case(seed, 2 + seed % 2))
    return (
        "03_quantize.py",
        "--model",
        weights,
        "-o",
        folder / "out" / "a.dynamic.pt",
        "-i",
        folder / "imgs",
        "--repeats",
        "1",
    )


def of_step_4(folder: Path) -> tuple:
    weights = small_checkpoint(folder / "small.pt")
    for seed in range(4):
        write_case(folder, tiny_case(seed, 2 + seed % 2))
    return "04_infer.py", "-i", folder / "imgs", "-o", folder / "out", "--model", weights


def of_step_5(folder: Path) -> tuple:
    for seed in range(4):
        case = tiny_case(seed, 2 + seed % 2)
        write_case(folder, case)
        save_npz(folder / "segs" / f"{case.name}.npz", segs=np.roll(case.labels, 1, -1))
    return "05_evaluate.py", "-s", folder / "segs", "-g", folder / "gts", "-o", folder / "out", "--jobs", "2"


KILLS: dict[str, Callable[[Path], tuple]] = {
    "01_preprocess.py": of_step_1, "02_train.py": of_step_2, "03_quantize.py": of_step_3,
    "04_infer.py": of_step_4, "05_evaluate.py": of_step_5,
}  # fmt: skip


# ---------------------------------------------------------------- what is compared


def content_of(path: Path) -> bytes:
    """What two equal runs have in common of a file: tensors of a checkpoint, a table without seconds, else the bytes."""
    if path.suffix == ".pt":
        stored = read_checkpoint(path)
        tensors = {name: value for name, value in stored["model"].items() if isinstance(value, torch.Tensor)}
        kept = {name: value.numpy().tobytes() for name, value in tensors.items()}
        return repr((sorted(kept.items()), stored.get("step"), stored.get("losses"), stored.get("log"))).encode()
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(path.read_text()))
        return repr(
            [{k: v for k, v in row.items() if k not in TIMES and not k.endswith("_s")} for row in rows]
        ).encode()
    return path.read_bytes()


def results_in(folder: Path) -> dict[str, bytes]:
    """{path: content} of what a run wrote, but for pages and tables of times, and what says how it was called."""
    skipped = (".json", ".jsonl", ".md", ".html", ".png") if not (folder / "version.json").exists() else (".jsonl",)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in skipped]
    paths = [path for path in paths if path.name != "arguments.json" and "lock" not in path.name]
    return {str(path.relative_to(folder)): content_of(path) for path in paths}


@lru_cache
def undisturbed(name: str) -> tuple[dict[str, bytes], float]:
    """-> results, and seconds"""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arguments, start = KILLS[name](folder), time.monotonic()
        done = command(*arguments, patch=use_slow_disk)
        assert done.code == 0, done
        return results_in(folder / "out"), time.monotonic() - start


def kill_once(name: str, number: int) -> str:
    """Kill a script at a random moment, start it again. -> what is wrong, or "" """
    wanted, end = undisturbed(name)
    rng = np.random.default_rng((number, len(name), ord(name[1])))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = Running(*KILLS[name](folder), patch=use_slow_disk)
        time.sleep(rng.uniform(0, 1.1 * end))
        workers = run.kill()
        done = command(*KILLS[name](folder), patch=use_slow_disk)
        return wrong_after(folder / "out", done, wanted) or f"{len(workers)} workers lived on" * bool(workers)


def wrong_after(out: Path, done: Done, wanted: dict[str, bytes]) -> str:
    """What is wrong with what a run left."""
    if done.code != 0:
        return f"the second run ended with {done.code or done.signal}: {done.err.strip().splitlines()[-1:]}"[:250]
    found = results_in(out)
    if found.keys() != wanted.keys():
        return f"other files: {sorted(found.keys() ^ wanted.keys())[:4]}"
    if other := [name for name in wanted if found[name] != wanted[name]]:
        return f"other content: {other[:4]}"
    if temporary := [path.name for path in out.rglob("*.tmp")] + done.left:
        return f"left: {temporary[:3]}"
    return ""


# ---------------------------------------------------------------- two at once


def one_pair(number: int) -> str:
    """Two runs of step 1 with two inputs and one cache. -> what is wrong, or "" """
    rng = np.random.default_rng(number)
    with tempfile.TemporaryDirectory() as place:
        folder, cases = Path(place), []
        for side, seeds in (("a", (0, 1)), ("b", (2, 3))):
            names = []
            for seed in seeds:
                case = tiny_case(seed).renamed(f"2DBox_US_{side}{seed}")
                write_training_case(folder / side, case)
                names.append(f"2D_US_{side}{seed}")
            cases.append(set(names))
        start = lambda side: Running(  # noqa: E731
            "01_preprocess.py", "-i", folder / side, "-o", folder / "cache", "--jobs", "1", patch=use_slow_disk
        )
        first = start("a")
        time.sleep(rng.uniform(0, 0.3) ** 2)
        second = start("b")
        ends = [first.finish(), second.finish()]
        if bad := [done for done in ends if done.signal or "Traceback" in done.err]:
            return f"{bad[0].signal} {bad[0].err.strip().splitlines()[-1:]}"[:250]
        good = [names for names, done in zip(cases, ends, strict=True) if done.code == 0]
        if not good:
            return f"both were refused: {[done.err.strip()[-150:] for done in ends]}"
        if refused := [done for done in ends if done.code]:
            if len(refused[0].sentences()) != 1:
                return f"a refusal of {len(refused[0].sentences())} sentences"
        rows = {entry.name for entry in read_index(folder / "cache")}
        if rows != set.union(*good):
            return f"half an index: {sorted(rows)} of {sorted(set.union(*good))}, exit codes {[done.code for done in ends]}"
        there = {path.stem for path in (folder / "cache" / "imgs").glob("*.png")}
        if not rows <= there or list((folder / "cache").rglob("*.tmp")):
            return f"the index names images that are not there, or .tmp files stayed: {sorted(rows - there)}"
        return ""
