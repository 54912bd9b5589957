"""Table 5 measured: seconds and memory of whole processes of step 4, beside the published algorithm. [P 4.3]

    python benchmarks/speed.py                                                             every case, in hours
    python benchmarks/speed.py --cases 2DBox_US_tiny 3DBox_CT_tiny --repeats 1 -o out/try         2 min

The challenge starts a process for each case, so each run here is one, from its start to its exit. Systems take turns. The
cases are drawn at the sizes of Table 5, as its files may not be redistributed: time depends on the size, the number of
objects, the colour, and in 3D on how many slices an object spans, hardly on what an image shows.
A system is "PRESET MODEL ENGINE". With preset `released`, `published_work` has all the work of the published code done.
Our code gives the masks of that preset with less.

Writes times.csv, a line a run, after each run; at the end table.md and settings.json.
"""

import hashlib
import importlib
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
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
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
from formats.npz import write_case
from formats.writing import csv_text, progress, save_json, save_text, script, tell
from grid import MaskPatch, grid_size
from metrics import inscribed_ellipse
from tables import PAPER_TABLES, pipe_table, read_rows

OURS = tuple(f"fixed proposed {engine}" for engine in segment.ENGINES)
RELEASED = "released proposed torch"
SYSTEMS = ("released baseline torch", RELEASED, *OURS)
INSIDE = ("read", "enhance", "encode", "decode", "upsample", "other", "write")  # of a case
STAGES = ("start", "load", *INSIDE, "exit")  # of a process; load: PyTorch or OpenVINO, weights, graphs
NAMES = ("case", "system", "repeat")
COLUMNS = (*NAMES, "seconds", "process_s", "peak_mb", *(f"{stage}_s" for stage in STAGES))
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
    """A case with its boxes and truth, the same for the same seed. Each object is an ellipsoid in a cell of its own."""
    rng = np.random.default_rng((seed, list(BY_NAME).index(case.name)))
    grid = case.shape if case.is_3d else case.shape[:2]
    in_depth = spans(case, rng)[:, None] if case.is_3d else np.empty((case.objects, 0, 2), int)
    image = rng.integers(40, 56, size=grid, dtype=np.uint8)
    sides = np.concatenate([in_depth, cells(case.objects, *grid[-2:], rng)], axis=1)  # (N, axes, first and last)
    labels = inscribed_ellipse(sides[:, ::-1].transpose(0, 2, 1).reshape(case.objects, -1), grid)
    image += np.append(0, 80 + 20 * (np.arange(case.objects) % 5)).astype(np.uint8)[labels]
    if not case.is_3d:  # the challenge stores gray pictures as three equal channels
        shades = (1.0, 1.0, 1.0) if case.name.split("_")[1] in ("US", "X-Ray") else (1.0, 0.8, 0.7)
        image = (image[..., None] * np.float32(shades)).astype(np.uint8)
    return Case(case.name, image, None, labels, SPACING_MM if case.is_3d else None, case.is_3d)


@contextmanager
def published_work() -> Iterator[None]:
    """Inside it, preset `released` does all the work of the released code (#7, #44, #45).

    It enhances at original size, encodes each slice once for each object, decodes box by box, and upsamples each mask
    to the whole image. Its float64 and its copies between are left out: the real one is slower, if anything."""
    anew = patch.multiple(volumes, EMBEDDINGS_KEPT=0, logits_to_original=whole_mask)
    with anew, patch.multiple(segment, BOX_CHUNK=1, logits_to_original=whole_mask):
        yield


def whole_mask(logits: np.ndarray, height: int, width: int) -> MaskPatch:
    """In place of grid.logits_to_original: upsamples all of a mask, wherever it lies. -> (H, W) bool, its rows, columns"""
    h, w = grid_size(height, width)
    small = torch.from_numpy(logits)[None, None, :h, :w]
    full = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
    return MaskPatch(torch.sigmoid(full)[0, 0].numpy() > 0.5, slice(None), slice(None))


def released_step(arguments: list[str]) -> None:
    """Step 4 with the work of the published algorithm."""
    with published_work():
        importlib.import_module("04_infer").main(arguments)


def measure(case: str, system: str) -> dict:
    """One process: its seconds and its memory. InputError if it fails."""
    path, out, marks = WORK / case / "imgs" / f"{case}.npz", WORK / "segs" / system, WORK / "marks.json"
    if not path.is_file():
        write_case(WORK / case, draw(BY_NAME[case]))
    preset, model, engine = system.split()
    function = ("speed", "released_step") if preset == "released" else ("04_infer", "main")
    # a folder with one case: so no overlay is drawn, as in the challenge
    flags = ["-i", path.parent, "-o", out, "--model", model, "--preset", preset, "force=yes", "--engine", engine]
    command = [sys.executable, "-c", CHILD, marks, *function, *flags]
    place = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
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
    return row | {"seconds": float(found["total_s"]), "process_s": end - start}


def measure_all(args: Namespace) -> list[dict]:
    """The rows of times.csv. Repeats are the outer loop, so that systems take turns."""
    for system in OURS:
        with suppress(InputError):
            measure(TINY[0].name, system)  # makes and compiles graphs, fills the disk's cache
    rows = []
    turns = [
        {"case": case, "system": system, "repeat": repeat}
        for repeat, case, system in product(range(1, args.repeats + 1), args.cases, SYSTEMS)
    ]
    for turn in progress(turns, "runs"):
        try:
            rows.append(turn | measure(turn["case"], turn["system"]))
        except InputError as error:
            tell(f"speed.py: left out: {error}")
        save_text(args.out / "times.csv", csv_text(rows, COLUMNS, ".6g"))
    return rows


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
    found, nothing = medians(rows, case.name), {"seconds": math.nan, "process_s": math.nan}
    header = ["system", "seconds", "released / this", "start to exit, s", "torch / this"]
    lines = [[*header, *(f"{stage}, s" for stage in STAGES), "peak MB"]]
    for name, seconds in (("paper baseline", case.paper_baseline_s), ("paper proposed", case.paper_proposed_s)):
        if not math.isnan(seconds):
            lines.append([f"{name}, on its machine", number(seconds), *["-"] * (len(lines[0]) - 2)])
    for system, of in found.items():
        released = found.get(RELEASED, nothing)["seconds"]
        in_torch = found.get(OURS[0], nothing)["process_s"]
        numbers = [of["seconds"], released / of["seconds"], of["process_s"], in_torch / of["process_s"]]
        lines.append([system, *map(number, [*numbers, *(of[f"{stage}_s"] for stage in STAGES), of["peak_mb"]])])
    size = " x ".join(map(str, case.shape))
    return f"## {case.name}: {size}, {case.objects} object{'s' * (case.objects > 1)}\n\n{pipe_table(lines)}\n"


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of times.csv."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    cases = [SIX_OBJECTS.name, *(case.name for case in TABLE5)]
    p.add_argument("--cases", nargs="+", choices=BY_NAME, default=cases, metavar="NAME", help="rows of Table 5")
    p.add_argument("--repeats", type=int, default=3, help="runs of a system on a case; their median counts")
    p.add_argument("-o", "--out", type=Path, default=Path("results/speed"), help="folder for times and tables")
    args = p.parse_args(argv)
    if args.repeats < 1:
        p.error("--repeats must be 1 or more")
    with script("speed.py"):
        rows, info = measure_all(args), Path("/proc/cpuinfo")
        if not rows:
            raise InputError("no run went well, see above")
        named = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
        settings = {"processor": named[1] if named else platform.machine(), "cores": os.cpu_count()}
        settings["sha256"] = hashlib.sha256(OUR_CHECKPOINT.read_bytes()).hexdigest()
        settings["versions"] = {name: version(name) for name in ("torch", "numpy", "openvino") if find_spec(name)}
        save_json(args.out / "settings.json", settings)
        text = [
            "# Table 5 measured\n",
            f"{settings['processor']}, {settings['cores']} cores. Medians of up to {args.repeats} runs that took turns, each in a process",
            "of its own. Seconds are from reading the file to the written label map; load is PyTorch or OpenVINO, weights, network",
            "or graphs. Released: the published algorithm in plain PyTorch float32.\n",
            *(case_table(rows, case) for case in BY_NAME.values() if case.name in {row["case"] for row in rows}),
        ]
        save_text(args.out / "table.md", "\n".join(text))
    print(f"speed.py: {len(rows)} runs; wrote {args.out}")
    return rows


if __name__ == "__main__":
    main()
