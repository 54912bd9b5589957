"""Table 5 measured: seconds of its fourteen cases by the published algorithm and by ours, engine by engine. [P 4.3]

    python benchmarks/table5.py                                       everything that is installed; hours, see --slices
    python benchmarks/table5.py --cases 2DBox_US_0525 encoder --repeats 1
    python benchmarks/table5.py --figure                              measures nothing: table and figure of times.csv
    python benchmarks/table5.py --smoke                               two tiny cases, 1 min, nothing is kept

The cases are drawn at the true sizes and numbers of objects, contents synthetic (table5_work.py says what that means).
Each measurement runs in a process of its own; systems take turns. Every finished one is appended to times.csv, and a run
that was stopped goes on where it was: after changing code or int8 files that are timed, remove times.csv or name another folder.
Writes times.csv, table.md and settings.json, and prints what was to be reached. Close other programs before.
--figure also writes stages.csv and assets/stages.png, where the time of three cases goes, and a sentence for each bar.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

import table5_report as report
from table5_report import PLAIN, Times, read_rows
from table5_work import BY_NAME, NSD_SHAPE, SIX_OBJECTS, SMOKE, TABLE5, draw, measure

import segment
from efficientvit import EMBED_DIM, EMBED_GRID
from fast.counts import count_macs
from fast.decoder import CELL, FastDecoder
from fast.engines import ENGINES
from files import InputError
from files.checkpoints import OUR_CHECKPOINT
from files.npz import write_case
from files.writing import csv_text, save_figure, save_json, save_text

PARTS = ("peak", "encoder", "nsd")  # measured apart from any case
FULL_SIZES = {"side": 2048, "calls": 9, "shape": NSD_SHAPE}  # of the parts' matrices, their calls, the NSD's phantom
FIGURE = Path("assets/stages.png")
PACKAGES = ("numpy", "opencv-python-headless", "openvino", "surface-distance", "scipy")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    everything = [*PARTS, SIX_OBJECTS.name, *(case.name for case in TABLE5)]
    p.add_argument("--cases", nargs="+", choices=everything, default=everything, metavar="NAME",
                   help=f"rows to measure: {', '.join(everything)}")  # fmt: skip
    p.add_argument("--engines", nargs="+", metavar="ENGINE",
                   help=f"what runs our own code; one that is not there is told and left out (default: {', '.join(ENGINES)})")  # fmt: skip
    p.add_argument("--models", nargs="+", choices=("proposed", "baseline"), default=["proposed"],
                   help="models that our own code runs; the published algorithm always runs both")  # fmt: skip
    p.add_argument("--repeats", type=int, default=3, help="runs of a system on a case; their median counts")
    p.add_argument("--slices", type=int, default=24,
                   help="slices of a volume that the published algorithm is timed on, 0 for all; the rest is multiplied")  # fmt: skip
    p.add_argument("--threads", type=int, default=2, help="CPU threads of PyTorch and OpenCV")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="float checkpoint of the proposed model")
    p.add_argument("--static", type=Path, help="NAME.static.xml for engine openvino-int8 (default: its own)")
    p.add_argument("--seed", type=int, default=0, help="seed of the drawn cases, 0 or more")
    p.add_argument("--drawn", type=Path, default=Path("out/table5"), help="folder for the drawn cases, 300 MB")
    p.add_argument("-o", "--out", type=Path, default=Path("results/table5"), help="folder for times and table")
    p.add_argument(
        "--figure", action="store_true", help=f"measure nothing; table, stages.csv and {FIGURE} of times.csv"
    )
    p.add_argument("--smoke", action="store_true", help="two tiny cases, once, PyTorch only unless --engines, 1 min")
    args = p.parse_args(argv)
    if min(args.repeats, args.threads) < 1 or args.seed < 0 or 0 > args.slices or 0 < args.slices < 3:
        p.error("--repeats and --threads must be 1 or more, --seed 0 or more, --slices 0 or 3 or more")
    args.engines = args.engines or (["fast"] if args.smoke else list(ENGINES))
    return args


# ---------------------------------------------------------------- what the numbers depend on


def cpu_name() -> str:
    """The processor's name, without the computer's."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of all packages that are timed; "not installed" for one that is missing."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def fast_decoder_macs() -> dict[str, int]:
    """Multiply-adds of FastDecoder: once an image, for each box, for each cell that is upscaled. Weights do not matter."""
    decoder, embedding = FastDecoder(segment.build("proposed")), torch.zeros(1, EMBED_DIM, EMBED_GRID, EMBED_GRID)

    def count(boxes: int, cells: int) -> int:
        decoder.seen = None
        region = torch.tensor([[0.0, 0, CELL * cells - 1, CELL * cells - 1]]).repeat(boxes, 1)
        in_place = {torch.ops.aten.addmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}  # which it does not know
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            decoder.decode(embedding, torch.full((boxes, 4), 9.0), region)
        return counter.get_total_flops() // 2

    one, two, large = count(1, 1), count(2, 1), count(1, 3)  # 1, 2 and 9 cells in all
    cell = (large - one) // 8
    return {"fast image": 2 * one - two, "fast box": two - one - cell, "fast cell": cell}


def current_settings(args: argparse.Namespace) -> dict:
    """What every row of one times.csv must share, and what settings.json says besides."""
    if not args.weights.is_file():
        raise InputError(f"{args.weights}: no such checkpoint; name one with --weights")
    counts = fast_decoder_macs()
    for model, prefix in (("proposed", ""), ("baseline", "baseline ")):
        macs = count_macs(segment.build(model))
        for part in ("encoder", "decoder"):
            counts[prefix + part] = sum(number for (of, _), number in macs.items() if of == part)
    return {
        "processor": cpu_name(), "cores": os.cpu_count(), "threads": args.threads, "slices": args.slices, "seed": args.seed,
        "sha256 of weights": hashlib.sha256(args.weights.read_bytes()).hexdigest(),
        "versions": versions(), "multiply-adds": counts, "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def check_settings(args: argparse.Namespace, settings: dict) -> dict:
    """InputError if times.csv was begun under other settings: its rows would not compare. -> those of settings.json"""
    path, before = args.out / "settings.json", {}
    if (args.out / "times.csv").is_file() and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key, value in settings.items() if before.get(key) != value]
        if changed:
            raise InputError(f"{args.out}: its times were measured with other {changed[0]}; name another --out folder")
    save_json(path, before | settings)  # a note that was written beside them stays
    return before | settings


# ---------------------------------------------------------------- the measurements


def systems_of(case: str, args: argparse.Namespace) -> list[str]:
    """What measures a part or a case, in the order of its turns."""
    fixed = {
        "peak": ["float32", "int8"],
        "nsd": ["ours", "surface-distance"],
        "encoder": list(dict.fromkeys([PLAIN, *args.engines])),
    }
    ours = [f"fixed {model} {engine}" for model in args.models for engine in args.engines]
    return fixed.get(case, [report.BASELINE, report.RELEASED, *ours])


def in_child(job: dict) -> dict:
    """Do a job in a fresh process: its peak of memory is its own, and nothing is warm from the job before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, job).result()


def drawn(case: str, args: argparse.Namespace) -> Path | None:
    """The file of a drawn case, drawn now if it is not there; None for a part."""
    if case in PARTS:
        return None
    folder = args.drawn / f"seed{args.seed}"
    path = folder / "imgs" / f"{case}.npz"
    return path if path.is_file() else write_case(folder, draw(BY_NAME[case], args.seed))


def measure_all(args: argparse.Namespace, cases: list[str]) -> list[dict]:
    """Every measurement that times.csv does not hold yet; repeats are the outer loop, so that systems take turns."""
    path, skipped = args.out / "times.csv", set()
    done = {(row["case"], row["system"], row["repeat"]) for row in read_rows(path)}
    turns = [(c, s, r) for c in cases for r in range(1, args.repeats + 1) for s in systems_of(c, args)]
    sizes = {"side": 256, "calls": 2, "shape": (16, 32, 32)} if args.smoke else FULL_SIZES
    for case, system, repeat in tqdm([turn for turn in turns if turn not in done], "runs", disable=None):
        engine = system.split()[-1]
        if engine in skipped:
            continue
        job = {"case": case, "system": system, "repeat": repeat, "threads": args.threads, "slices": args.slices}
        job |= {"path": str(drawn(case, args)), "weights": str(args.weights)}
        job |= {"static": str(args.static or ""), **sizes}
        try:
            report.append_row(path, in_child(job))
        except BrokenProcessPool:
            tqdm.write(f"table5.py: left out: {case}, {system}: its process was killed, most likely for want of memory")
        except (InputError, ImportError) as error:
            if engine in ("torch", "fast"):  # PyTorch is always there, so this is no missing engine
                raise InputError(f"{case}, {system}: {error}") from error
            skipped.add(engine)
            tqdm.write(f"table5.py: left out: {engine}: {error}")
    return read_rows(path)


def figure(args: argparse.Namespace) -> list[dict]:
    """table.md, stages.csv and the figure of the times that are there. -> the rows of stages.csv"""
    path, rows = args.out / "times.csv", []
    if measured := read_rows(path):
        settings = json.loads((args.out / "settings.json").read_text(encoding="utf-8"))
        rows = report.stage_rows(Times(measured), settings["multiply-adds"])
    if not rows:
        cases = " ".join(report.DRAWN)
        raise InputError(f"{path}: holds no times of them; run first: python benchmarks/table5.py --cases peak {cases}")
    save_text(args.out / "table.md", report.times_text(measured, settings))
    save_text(args.out / "stages.csv", csv_text(rows, tuple(rows[0])))
    save_figure(FIGURE, report.stages_figure(rows))
    print("\n".join(map(report.sentence, rows)))
    print(f"table5.py: wrote {args.out / 'table.md'}, {args.out / 'stages.csv'} and {FIGURE}.")
    return rows


def run(args: argparse.Namespace) -> list[dict]:
    cases = [case.name for case in SMOKE] + ["encoder"] if args.smoke else args.cases
    settings = check_settings(args, current_settings(args))
    rows = measure_all(args, cases)
    text = report.times_text(rows, settings)
    save_text(args.out / "table.md", text)
    print(text if args.smoke else report.bars_text(Times(rows), settings))
    ours = Times(rows).best().removeprefix(report.PROPOSED)
    print(f"table5.py: {len(rows)} runs, best engine {ours}; {'removed again' if args.smoke else f'wrote {args.out}'}.")
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of times.csv, with --figure those of stages.csv."""
    args = parse(argv)
    try:
        if not args.smoke:
            return figure(args) if args.figure else run(args)
        with tempfile.TemporaryDirectory() as scratch:
            args.drawn, args.out, args.repeats = Path(scratch) / "drawn", Path(scratch) / "table5", 1
            return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"table5.py: {error}")


if __name__ == "__main__":
    main()
