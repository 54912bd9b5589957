"""Table 5 measured: seconds and memory of whole processes of step 4, beside the published algorithm. [P 4.3]

    python benchmarks/speed.py                                       every case and engine, in hours
    python benchmarks/speed.py --cases 2DBox_US_tiny 3DBox_CT_tiny --repeats 1 -o out/try                    2 min
    python benchmarks/speed.py --table -o results/speed              measures nothing: tables of times.csv

The challenge starts a process for each case, so each run here is one, from its start to its exit. Systems take turns. The
cases are drawn at the sizes of Table 5, as its files may not be redistributed: time depends on the size, the number of
objects, the colour, and in 3D on how many slices an object spans, hardly on what an image shows.
A system is "PRESET MODEL ENGINE". With preset `released`, `released_algorithm` does all the work of the published code.
Our code gives the masks of that preset with less.

Writes times.csv, a line a run, and goes on there when it was stopped; table.md, settings.json.
After an edit of what is timed, name another folder.
"""

import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

import segment
import volumes
from formats import InputError
from formats.case import Case
from formats.checkpoints import OUR_CHECKPOINT
from formats.npz import load_npz, read_npz, write_case
from formats.writing import csv_text, progress, save_json, save_npz, save_text, script, tell
from grid import MaskPatch, grid_size
from segment import MODELS, Segmenter, load
from tables import PAPER_TABLES, pipe_table, read_rows

ENGINES = ("torch", "torch-int8", "openvino", "openvino-int8")
INSIDE = ("read", "enhance", "encode", "decode", "upsample", "other", "write")  # of a case
STAGES = ("start", "load", *INSIDE, "exit")  # of a process; load: PyTorch or OpenVINO, weights, graphs
COUNTS = ("encoded", "decoded")  # images encoded, boxes decoded
COLUMNS = ("case", "system", "repeat", "seconds", "process_s", "peak_mb", *(f"{s}_s" for s in STAGES), *COUNTS)
RELEASED = "released proposed torch"
BESIDE = " beside"  # at the end of a system's name: while COMPETITOR ran
NAMES = ("case", "system", "repeat")
HERE = Path(__file__).resolve().parent
WORK = Path("out/speed")  # drawn cases and label maps
SPACING_MM = (2.5, 0.8, 0.8)  # (z, y, x) of all volumes
SECONDS_A_SLICE = 0.40  # of the paper's baseline, by 2DBox_US_0525: its 3D loop encodes each slice of each object anew
CHILD = """
import importlib, json, pathlib, re, sys, time
file, module, function, *arguments = sys.argv[1:]
call = getattr(importlib.import_module(module), function)
marks = {"imported": time.time()}
call(arguments)
status = pathlib.Path("/proc/self/status")  # of Linux; other ways to ask also count what the parent holds
held = re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text()) if status.is_file() else None
marks["peak_mb"] = int(held[1]) * 1024 / 1e6 if held else float("nan")
marks["done"] = time.time()
pathlib.Path(file).write_text(json.dumps(marks))
"""
COMPETITOR = """
import os, torch
parent = os.getppid()
torch.set_num_threads(2)
a = torch.rand(2048, 2048)
a @ a
print("at work", flush=True)
while os.getppid() == parent:  # it ends with its parent, also if that is killed
    a @ a
"""


# ---------------------------------------------------------------- the cases, drawn


class TimedCase(NamedTuple):
    """One row of Table 5, or a case of ours that the paper has no seconds for."""

    name: str
    shape: tuple[int, ...]  # (H, W, 3), or (D, H, W) if the name starts with 3D
    objects: int
    paper_baseline_s: float = math.nan
    paper_proposed_s: float = math.nan

    @property
    def is_3d(self) -> bool:
        return self.name.startswith("3D")


TABLE5 = tuple(
    TimedCase(
        row["case"], tuple(map(int, row["size"].strip("()").split(","))), int(row["objects"]),
        float(row["Baseline s"]), float(row["Proposed s"]),
    )
    for row in read_rows(PAPER_TABLES / "table5.csv")
)  # fmt: skip
SIX_OBJECTS = TimedCase("3DBox_CT_six-objects", (24, 512, 512), 6)  # all six in every slice
TINY = (TimedCase("2DBox_US_tiny", (64, 80, 3), 2), TimedCase("3DBox_CT_tiny", (5, 48, 40), 2))
BY_NAME = {case.name: case for case in (*TABLE5, SIX_OBJECTS, *TINY)}


def spans(case: TimedCase, rng: np.random.Generator) -> np.ndarray:
    """First and last slice (n, 2) of each object of a volume: overlapping, as organs of one region do, of unequal length."""
    depth, count = case.shape[0], case.objects
    if math.isnan(case.paper_baseline_s):
        return np.tile((0, depth - 1), (count, 1))
    mean = case.paper_baseline_s / SECONDS_A_SLICE / count + 2  # the released loop leaves both end slices out
    length = np.clip(np.rint(mean * ((np.arange(count) + 0.5) / count + 0.5)), 3, depth)
    first = np.clip(np.rint((depth - length) / 2 + rng.uniform(-0.25, 0.25, count) * mean), 0, depth - length)
    return np.stack([first, first + length - 1], axis=1).astype(int)


def cells(count: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Sides (count, 2, 2), (y0, y1) and (x0, x1), inclusive, of a box in each cell of a grid that has room for `count`."""
    columns = math.ceil(math.sqrt(count * width / height))
    room = np.array([height / math.ceil(count / columns), width / columns])
    corner = np.stack(np.divmod(np.arange(count), columns), axis=1) * room
    size = np.maximum(np.rint(room * rng.uniform(0.4, 0.8, (count, 2))), 4)
    first = np.ceil(corner + rng.uniform(0, 1, (count, 2)) * (room - size - 1))
    return np.stack([first, first + size - 1], axis=-1).astype(int)


def draw(case: TimedCase, seed: int = 0) -> Case:
    """A case with its truth, the same for the same seed. Each object is an ellipsoid in a cell of its own."""
    rng = np.random.default_rng((seed, list(BY_NAME).index(case.name)))
    grid = case.shape if case.is_3d else case.shape[:2]
    in_depth = spans(case, rng)[:, None] if case.is_3d else np.empty((case.objects, 0, 2), int)
    image, labels = rng.integers(40, 56, size=grid, dtype=np.uint8), np.zeros(grid, np.uint16)
    for i, bounds in enumerate(np.concatenate([in_depth, cells(case.objects, *grid[-2:], rng)], axis=1).tolist()):
        where = tuple(slice(first, last + 1) for first, last in bounds)
        axes = [np.square((np.arange(z - a + 1, dtype=np.float32) + 0.5) * 2 / (z - a + 1) - 1) for a, z in bounds]
        mask = sum(np.ix_(*axes)) <= 1  # touches each of the box's faces
        image[where][mask] += np.uint8(80 + 20 * (i % 5))
        labels[where][mask] = i + 1
    if not case.is_3d:  # the challenge stores gray pictures as three equal channels
        shades = (1.0, 1.0, 1.0) if case.name.split("_")[1] in ("US", "X-Ray") else (1.0, 0.8, 0.7)
        image = (image[..., None] * np.float32(shades)).astype(np.uint8)
    return Case(case.name, image, None, labels, SPACING_MM if case.is_3d else None, case.is_3d)


# ---------------------------------------------------------------- the published algorithm


def released_algorithm(segmenter: Segmenter, case: Case) -> np.ndarray:
    """Masks of preset `released`, with the work of the released code (#7, #44, #45). -> the label map

    It enhances at original size, encodes each slice once for each object, decodes box by box, and upsamples each mask
    to the whole image. Its float64 and its copies between are left out: the real one is slower, if anything.
    """
    anew = patch.multiple(volumes, EMBEDDINGS_KEPT=0, logits_to_original=whole_mask)
    with anew, patch.multiple(segment, BOX_CHUNK=1, logits_to_original=whole_mask):
        return volumes.segment_case(segmenter, case)


def whole_mask(logits: np.ndarray, height: int, width: int) -> MaskPatch:
    """In place of grid.logits_to_original: upsamples all of a mask, wherever it lies. -> (H, W) bool, its rows, columns"""
    h, w = grid_size(height, width)
    small = torch.from_numpy(logits)[None, None, :h, :w]
    full = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
    return MaskPatch(torch.sigmoid(full)[0, 0].numpy() > 0.5, slice(None), slice(None))


def released_step(arguments: list[str]) -> None:
    """What a process of the published algorithm does in place of step 4. arguments: a case's file, folder, model."""
    segmenter, out, start = load(arguments[2], preset="released", force=True), Path(arguments[1]), time.perf_counter()
    with segmenter.stage("read"):
        case = read_npz(Path(arguments[0]))
    labels = released_algorithm(segmenter, case)
    with segmenter.stage("write"):
        save_npz(out / f"{case.name}.npz", segs=labels.astype(np.uint8) if labels.max() <= 255 else labels)
    row = {f"{stage}_s": segmenter.seconds[stage] for stage in INSIDE} | {"total_s": time.perf_counter() - start}
    save_text(out / "efficiency.csv", csv_text([row], tuple(row)))


def work(boxes: np.ndarray, released: bool) -> tuple[int, int]:
    """How many images are encoded and boxes decoded; boxes (N, 4) or (N, 6).

    Ours encodes a slice once for all its objects. The released loop encodes it once for each object, and leaves the
    first and the last slice of an object out, but for the middle one (#41).
    """
    if boxes.shape[1] == 4:
        return 1, len(boxes)
    visited = [
        range(min(low + released, (low + high) // 2), high + 1 - released) for low, high in boxes[:, [2, 5]].astype(int)
    ]
    decoded = sum(map(len, visited))
    return (decoded if released else len(set().union(*visited))), decoded


# ---------------------------------------------------------------- one run


@contextmanager
def competitor() -> Iterator[None]:
    """Another program at work: PyTorch that multiplies matrices with two threads without a pause."""
    other = subprocess.Popen([sys.executable, "-c", COMPETITOR], stdout=subprocess.PIPE, text=True)
    try:
        other.stdout.readline()  # it is at work
        yield
    finally:
        other.kill()
        other.wait()


def command_of(system: str, path: Path, out: Path, args: Namespace) -> list:
    """What the process of a system runs: module, function, and their arguments. path: of a case."""
    preset, model, engine, *_ = system.split()
    if preset == "released":
        return ["speed", "released_step", path, out, model]
    if engine == "openvino-int8" and args.static:
        model = args.static
    # a folder with one case: so no overlay is drawn, as in the challenge
    return ["04_infer", "main", "-i", path.parent, "-o", out, "--model", model, "--preset", preset, "--engine", engine]


def measure(case: str, system: str, args: Namespace) -> dict:
    """One process: its seconds, its memory, and how much work it was. InputError if it fails."""
    path, out, marks = WORK / case / "imgs" / f"{case}.npz", WORK / "segs" / system, WORK / "marks.json"
    if not path.is_file():
        write_case(WORK / case, draw(BY_NAME[case]))
    command = [sys.executable, "-c", CHILD, marks, *command_of(system, path, out, args)]
    place = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    with competitor() if system.endswith(BESIDE) else nullcontext():
        start = time.time()
        done = subprocess.run([str(word) for word in command], env=place, capture_output=True, text=True)
        end = time.time()
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it was killed, most likely for want of memory"])[-1]
        raise InputError(f"{case}, {system}: {why}")
    noted, (found,) = json.loads(marks.read_text(encoding="utf-8")), read_rows(out / "efficiency.csv")
    row = {f"{stage}_s": float(found[f"{stage}_s"]) for stage in INSIDE if stage != "other"}
    row["other_s"] = float(found["total_s"]) - sum(row.values())
    row |= {"start_s": noted["imported"] - start, "exit_s": end - noted["done"], "peak_mb": noted["peak_mb"]}
    row["load_s"] = noted["done"] - noted["imported"] - float(found["total_s"])
    row["encoded"], row["decoded"] = work(load_npz(path)["boxes"], system.startswith("released"))
    return row | {"seconds": float(found["total_s"]), "process_s": end - start}


def read_times(path: Path) -> list[dict]:
    """The rows of times.csv, numbers as numbers; [] if it is not there."""
    if not path.is_file():
        return []
    # values: of results/table5, by the script before this one
    types = dict.fromkeys(("case", "system", "values"), str) | dict.fromkeys(("repeat", *COUNTS), int)
    return [{key: types.get(key, float)(value) for key, value in row.items() if value} for row in read_rows(path)]


def measure_all(rows: list[dict], args: Namespace) -> None:
    """Adds every run that is missing to the rows and to times.csv. Repeats are the outer loop, so that systems take turns."""
    done = {(row["repeat"], row["case"], row["system"]) for row in rows}
    published = [f"released {model} torch" for model in args.released]
    ours = [f"{args.preset} proposed {engine}" for engine in args.engines]
    turns = [
        (repeat, case, system)
        for repeat in range(1, args.repeats + 1)
        for case in args.cases
        for system in (*published, *ours, *(system + BESIDE for system in ours if case in args.beside))
        if (repeat, case, system) not in done
    ]
    for system in {system for _, _, system in turns}.intersection(ours):
        with suppress(InputError):
            measure(TINY[0].name, system, args)  # makes and compiles graphs, fills the disk's cache
    for repeat, case, system in progress(turns, "runs"):
        try:
            row = measure(case, system, args)
        except InputError as error:
            tell(f"speed.py: left out: {error}")
            continue
        rows.append({"case": case, "system": system, "repeat": repeat} | row)
        save_text(args.out / "times.csv", csv_text(rows, COLUMNS, ".6g"))


# ---------------------------------------------------------------- tables


def number(value: float) -> str:
    """Three significant digits, "-" for nan."""
    return "-" if math.isnan(value) else f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def medians(rows: list[dict], case: str) -> dict[str, dict[str, float]]:
    """{system: {column: median over the repeats}} of a case. Stages are of the whole case."""
    found = {}
    for system in dict.fromkeys(row["system"] for row in rows if row["case"] == case):
        runs = [row for row in rows if (row["case"], row["system"]) == (case, system)]
        found[system] = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key not in NAMES}
    return found


def case_table(rows: list[dict], case: TimedCase) -> str:
    """A case's section of table.md: a row a system, the paper's two first."""
    found = medians(rows, case.name)
    lines = [["system", "seconds", "released / this", "start to exit, s", "torch / this", *(f"{s}, s" for s in STAGES)]]
    lines[0] += ["peak MB", "encoded", "decoded"]
    for name, seconds in (("paper baseline", case.paper_baseline_s), ("paper proposed", case.paper_proposed_s)):
        if not math.isnan(seconds):
            lines.append([f"{name}, on its machine", number(seconds), *["-"] * (len(lines[0]) - 2)])
    for system, of in found.items():
        plain = f"{system.split()[0]} proposed torch" + (BESIDE if system.endswith(BESIDE) else "")
        ratios = [found.get(RELEASED, {}).get("seconds", math.nan) / of["seconds"]]
        ratios += [found.get(plain, {}).get("process_s", math.nan) / of["process_s"]]
        cells = [of["seconds"], ratios[0], of["process_s"], ratios[1]]
        cells += [*(of[f"{stage}_s"] for stage in STAGES), of.get("peak_mb", math.nan), of["encoded"], of["decoded"]]
        lines.append([system, *map(number, cells)])
    size = " x ".join(map(str, case.shape))
    return f"## {case.name}: {size}, {case.objects} object{'s' * (case.objects > 1)}\n\n{pipe_table(lines)}\n"


def times_text(rows: list[dict], settings: dict) -> str:
    """table.md: a section a case, and what must be known to read them."""
    return "\n".join([
        "# Table 5 measured\n",
        f"{settings['processor']}, {settings['cores']} cores. Medians of up to {max(row['repeat'] for row in rows)} runs that took",
        "turns, each in a process of its own. Seconds are from reading the file to the written label map; load is PyTorch or",
        "OpenVINO, weights, network or graphs; encoded and decoded are numbers of images and boxes. Released: the published",
        "algorithm in plain PyTorch float32. Beside: while a process of PyTorch multiplied matrices with two threads.\n",
        *(case_table(rows, case) for case in BY_NAME.values() if case.name in {row["case"] for row in rows}),
    ])  # fmt: skip


# ---------------------------------------------------------------- the program


def current_settings() -> dict:
    """What all rows of one folder share: settings.json."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    packages = {found.name: found.version for found in distributions() if found.name in ("torch", "numpy", "openvino")}
    machine = {"processor": named[1] if named else platform.machine(), "cores": os.cpu_count()}
    return machine | {"sha256": hashlib.sha256(OUR_CHECKPOINT.read_bytes()).hexdigest(), "versions": packages}


def run(args: Namespace) -> list[dict]:
    path, rows = args.out / "settings.json", read_times(args.out / "times.csv")
    settings = json.loads(path.read_text(encoding="utf-8")) if rows else {}
    if not args.table:
        now = current_settings()
        if not rows:
            save_json(path, settings := now)
        elif now != settings:
            raise InputError(f"{args.out}: its times were measured with other settings; name another --out folder")
        measure_all(rows, args)
    if not rows:
        raise InputError(f"{args.out}: no times; run first: python benchmarks/speed.py -o {args.out}")
    save_text(args.out / "table.md", times_text(rows, settings))
    print(f"speed.py: {len(rows)} runs; wrote {args.out}")
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of times.csv."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    cases = [SIX_OBJECTS.name, *(case.name for case in TABLE5)]
    p.add_argument("--cases", nargs="+", choices=BY_NAME, default=cases, metavar="NAME", help="rows of Table 5")
    p.add_argument("--beside", nargs="*", choices=BY_NAME, default=[], metavar="NAME", help="of them, timed in company")
    p.add_argument("--engines", nargs="*", choices=ENGINES, default=ENGINES, help="what runs our own code")
    p.add_argument("--preset", choices=("fixed", "paper"), default="fixed", help="of our own code")
    p.add_argument("--released", nargs="*", choices=MODELS, default=tuple(MODELS), help="networks, as published")
    p.add_argument("--static", type=Path, help="NAME.static for engine openvino-int8 (default: its own)")
    p.add_argument("--repeats", type=int, default=3, help="runs of a system on a case; their median counts")
    p.add_argument("-o", "--out", type=Path, default=Path("results/speed"), help="folder for times and tables")
    p.add_argument("--table", action="store_true", help="measure nothing; tables of times.csv")
    args = p.parse_args(argv)
    if args.repeats < 1:
        p.error("--repeats must be 1 or more")
    with script("speed.py"):
        return run(args)


if __name__ == "__main__":
    main()
