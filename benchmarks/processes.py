"""Whole processes of step 4, from start to exit, as the challenge times them: by engine, idle and beside another program. [P 4.3]

    python benchmarks/processes.py --static NAME.static                      every engine; 16 min on 2 cores
    python benchmarks/processes.py --cases 2DBox_US_tiny --engines torch openvino --repeats 1 -o out/try        1 min

Each run is a real process of 04_infer.py, started by processes_child.py, which books its time by stage. Engines take turns. The
graphs of OpenVINO are made and compiled beforehand. Beside: with another program at work, COMPETITOR, a process of PyTorch that
multiplies matrices with two threads for as long as the run lasts. Cases are those of table5_work.py.
Writes runs.csv, table.md, settings.json, stages.png.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

from processes_child import WRAPPED
from table5 import DRAWN, number, processor_name
from table5_work import BY_NAME, SIX_OBJECTS, draw, measure_peak

from fast.openvino_engine import has_bfloat16
from files import InputError
from files.npz import write_case
from files.writing import csv_text, save_figure, save_json, save_text
from tables import pipe_table

SCRATCH = Path("out/processes")  # graphs and label maps
CHILD = Path(__file__).with_name("processes_child.py")
STAGES = ("start of Python", "imports", *WRAPPED, "other", "exit")
COLUMNS = ("case", "engine", "beside", "repeat", "seconds", "cpu_s", "peak_mb", "differ", *(f"{s} s" for s in STAGES))
ENGINES = ("torch", "fast", "openvino f32", "openvino", "openvino-int8")  # f32: of --precision, whose default is auto
PICTURE, LARGEST = "2DBox_US_0525", "3DBox_CT_0566"
COMPETITOR = (  # it ends with its parent, also if that is killed
    "import os, torch; parent = os.getppid(); torch.set_num_threads(2); a = torch.rand(2048, 2048); a @ a\n"
    "print('at work', flush=True)\n"
    "while os.getppid() == parent: a @ a"
)


def arguments_of(engine: str, inputs: Path, args: Namespace) -> list[str]:
    """The command line of step 4.   inputs: a folder of cases."""
    name, _, precision = engine.partition(" ")
    found = ["-i", str(inputs), "-o", str(SCRATCH / "segs" / engine), "--engine", name]
    found += ["--precision", precision] if precision else []
    if name.startswith("openvino"):
        found += ["--engine-cache", str(args.engine_cache)]
    return found + (["--weights", str(args.static)] if name == "openvino-int8" and args.static else [])


def start(engine: str, case: str, args: Namespace) -> dict:
    """One process, from start to exit: seconds by the clock and by the processor, memory, seconds of each stage."""
    with tempfile.TemporaryDirectory() as scratch:
        marks = Path(scratch) / "marks.json"
        # a folder with one case: so no overlay is drawn, as in the challenge
        inputs = Path(scratch) / "imgs"
        inputs.mkdir()
        os.link((DRAWN / f"{case}.npz").resolve(), inputs / f"{case}.npz")
        command = arguments_of(engine, inputs, args)
        wall, began = time.time(), time.perf_counter()
        child = subprocess.Popen([sys.executable, str(CHILD), str(marks), *command], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            raise InputError(f"{case}, {engine}: 04_infer.py ended with {os.waitstatus_to_exitcode(status)}")
        found = json.loads(marks.read_text(encoding="utf-8"))
    stages = found["seconds"] | {"start of Python": found["first_line"] - wall, "exit": wall + seconds - found["end"]}
    row = {f"{stage} s": stages.get(stage, 0.0) for stage in STAGES}
    return row | {"seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": found["peak_mb"]}


def differing(engine: str, case: str) -> float:
    """Share of the pixels that torch labels otherwise; nan if torch did not run."""
    paths = [SCRATCH / "segs" / name / f"{case}.npz" for name in (engine, "torch")]
    if not paths[1].is_file():
        return float("nan")
    found, wanted = (np.load(path)["segs"] for path in paths)
    return float((found != wanted).mean())


def time_all(args: Namespace) -> list[dict]:
    """Every run; repeats are the outer loop, so that engines take turns."""
    rows = []
    for case in args.cases:
        if not (DRAWN / f"{case}.npz").is_file():
            write_case(DRAWN.parent, draw(BY_NAME[case]))
    for engine in args.engines:  # makes and compiles graphs, fills the disk's cache
        start(engine, args.cases[0], args)
    plan = [
        (repeat, case, beside, engine)
        for repeat in range(1, args.repeats + 1)
        for case in args.cases
        for beside in (("nothing", "competitor") if case in args.busy else ("nothing",))
        for engine in args.engines
        if case != LARGEST or (repeat == 1 and engine.startswith("openvino"))  # it is here for its memory
    ]
    for repeat, case, beside, engine in tqdm(plan, "runs", disable=None):
        other = None
        if beside == "competitor":
            other = subprocess.Popen([sys.executable, "-c", COMPETITOR], stdout=subprocess.PIPE, text=True)
            other.stdout.readline()  # it is at work
        try:
            row = start(engine, case, args)
        finally:
            if other:
                other.kill()
                other.wait()
        row |= {"case": case, "engine": engine, "beside": beside, "repeat": repeat}
        rows.append(row | {"differ": differing(engine, case)})
        save_text(args.out / "runs.csv", csv_text(rows, COLUMNS, ".5g"))
    return rows


def read_processes(path: Path) -> list[dict]:
    """The rows of runs.csv, numbers as numbers."""
    lines = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    names = ("case", "engine", "beside")
    return [{key: value if key in names else float(value or "nan") for key, value in line.items()} for line in lines]


def median(rows: list[dict], key: str, **where: str) -> float:
    """Median of a column over the repeats; nan if nothing was measured."""
    found = [row[key] for row in rows if all(row[name] == value for name, value in where.items())]
    return statistics.median(found) if found else float("nan")


def table_text(rows: list[dict], settings: dict) -> str:
    """table.md: start to exit, where the time goes, beside another program."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    blocks = []
    for case in dict.fromkeys(row["case"] for row in rows):
        header = ["engine", "start to exit, s", "torch / this", "CPU s", "peak MB", "pixels unlike torch's", *STAGES]
        busy = any(row["case"] == case and row["beside"] == "competitor" for row in rows)
        header += ["beside the competitor, s", "beside / alone"] if busy else []
        lines = []
        for engine in (engine for engine in engines if any((r["case"], r["engine"]) == (case, engine) for r in rows)):
            at = {"case": case, "engine": engine, "beside": "nothing"}
            seconds, beside = median(rows, "seconds", **at), median(rows, "seconds", **at | {"beside": "competitor"})
            ratio = median(rows, "seconds", **at | {"engine": "torch"}) / seconds
            cells = [number(seconds), number(ratio), *(number(median(rows, key, **at)) for key in ("cpu_s", "peak_mb"))]
            cells += [f"{median(rows, 'differ', **at):.1e}", *(number(median(rows, f"{s} s", **at)) for s in STAGES)]
            lines.append([engine, *cells, *([number(beside), number(beside / seconds)] if busy else [])])
        size = " x ".join(map(str, BY_NAME[case].shape))
        blocks.append(f"## {case}: {size}, {BY_NAME[case].objects} objects\n\n{pipe_table([header, *lines])}\n")
    head = (
        "# Whole processes of step 4\n\n"
        f"{settings['processor']}, {settings['cores']} cores, {settings['float32 G/s']:.0f} G multiply-adds a second in "
        f"float32 products; instructions for int8: {settings['int8']}, for bfloat16: {settings['bfloat16']}. Medians of "
        f"{max(row['repeat'] for row in rows):.0f} runs that took turns (the largest volume: one). Stages are seconds.\n"
        "The competitor is a process of PyTorch that multiplies matrices of 2,048 x 2,048 with two threads without a pause.\n"
    )
    return "\n".join([head, *blocks])


def draw_stages(rows: list[dict], case: str) -> Figure:
    """A stacked bar an engine: where a process's time goes."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure = Figure(figsize=(9, 0.6 * len(engines) + 1.8))
    ax = figure.subplots()
    left = np.zeros(len(engines))
    for i, stage in enumerate(STAGES):
        part = [median(rows, f"{stage} s", case=case, engine=engine, beside="nothing") for engine in engines]
        ax.barh(engines, part, left=left, label=stage, color=f"C{i}")
        left += part
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:.2f} s", va="center")
    ax.invert_yaxis()
    ax.set(
        xlabel="seconds from start to exit, medians", xlim=(0, 1.12 * max(left)), title=f"{case}, one process an image"
    )
    ax.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def this_machine() -> dict:
    """The machine, as table.md says it."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) & {"avx512_vnni", "avx_vnni", "amx_int8"} if info.is_file() else set()
    return {
        "processor": processor_name(), "cores": os.cpu_count(),
        "int8": ", ".join(sorted(flags)) or "none", "bfloat16": "yes" if has_bfloat16() else "none",
        "float32 G/s": 1 / measure_peak({"system": "float32"})["seconds"],
    }  # fmt: skip


def parse(argv: list[str] | None) -> Namespace:
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "--cases", nargs="+", choices=BY_NAME, default=[PICTURE, SIX_OBJECTS.name, LARGEST], help="of Table 5"
    )
    p.add_argument("--busy", nargs="*", choices=BY_NAME, default=[SIX_OBJECTS.name], help="cases also timed in company")
    p.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="torch is what others are held to"
    )
    p.add_argument("--static", type=Path, help="NAME.static for engine openvino-int8 (default: its own)")
    p.add_argument("--engine-cache", type=Path, default=SCRATCH / "graphs", help="where OpenVINO keeps graphs")
    p.add_argument("--repeats", type=int, default=5, help="runs of each")
    p.add_argument("--table", action="store_true", help="measure nothing: table and figure of runs.csv")
    p.add_argument("-o", "--out", type=Path, default=Path("results/processes"), help="folder for the results")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of runs.csv."""
    args = parse(argv)
    try:
        if args.table:
            settings = json.loads((args.out / "settings.json").read_text(encoding="utf-8"))
        else:
            settings = this_machine()
            save_json(args.out / "settings.json", settings)
        rows = read_processes(args.out / "runs.csv") if args.table else time_all(args)
        save_text(args.out / "table.md", table_text(rows, settings))
        save_figure(args.out / "stages.png", draw_stages(rows, rows[0]["case"]))
    except (InputError, OSError) as error:
        sys.exit(f"processes.py: {error}")
    print(f"processes.py: wrote {args.out / 'table.md'}")
    return rows


if __name__ == "__main__":
    main()
