"""Table 5 measured: seconds of its fourteen cases by the published algorithm and by ours, engine by engine. [P 4.3]

    python benchmarks/table5.py                                       everything that is installed; hours, see --slices
    python benchmarks/table5.py --cases 2DBox_US_tiny 3DBox_CT_tiny --repeats 1 -o out/try                     1 min
    python benchmarks/table5.py --figure                              measures nothing: table and figure of times.csv

The cases are drawn at the true sizes (see table5_work.py). Each measurement runs in a process of its own and is appended
to times.csv; systems take turns. A run that was stopped goes on where it was: after changing what is timed, name another
folder. Writes times.csv, table.md, settings.json; --figure also stages.csv and assets/stages.png, where the time goes.
"""

import csv
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path

# as in 04_infer.py: NumPy's threads, once used, wait on a core that the network needs
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

from table5_work import BY_NAME, PARTS, SIX_OBJECTS, STAGES, TABLE5, draw, measure, scaled

import segment
from efficientvit import EMBED_DIM, EMBED_GRID
from fast.cells import CELL
from fast.counts import count_macs
from fast.decoder import FastDecoder
from fast.engines import ENGINES
from figures import PALETTE
from files import InputError
from files.checkpoints import OUR_CHECKPOINT
from files.npz import write_case
from files.writing import csv_text, save_figure, save_json, save_text
from tables import pipe_table

PLAIN = "torch"  # the engine that runs model.py as written
BASELINE, RELEASED, OURS = f"released baseline {PLAIN}", f"released proposed {PLAIN}", "fixed proposed fast"
PROPOSED = "fixed proposed "  # ours by any engine: its name follows
IN_FIGURE = ("2DBox_US_0525", "3DBox_MR_0121", "2DBox_Microscope_0016")
FIGURE = Path("assets/stages.png")
DRAWN = Path("out/table5/imgs")  # the drawn cases, 300 MB
COUNTS = ("encoded", "encoded_of", "decoded", "decoded_of", "slices", "slices_of", "cells_of")
COLUMNS = ("case", "system", "repeat", "seconds", "peak_mb", *(f"{stage}_s" for stage in STAGES), *COUNTS, "values")
SECONDS = itemgetter("seconds")
PACKAGES = ("numpy", "opencv-python-headless", "openvino", "surface-distance", "scipy")


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


def processor_name() -> str:
    """As Linux has it, else the kind of machine."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def current_settings(args: Namespace) -> dict:
    """What all rows of one times.csv share: settings.json."""
    counts = fast_decoder_macs()
    for model, prefix in (("proposed", ""), ("baseline", "baseline ")):
        for (part, _), macs in count_macs(segment.build(model)).items():
            counts[prefix + part] = counts.get(prefix + part, 0) + macs
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    return {
        "processor": processor_name(), "cores": os.cpu_count(),
        "threads": args.threads, "slices": args.slices,
        "sha256 of weights": hashlib.sha256(OUR_CHECKPOINT.read_bytes()).hexdigest(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: installed.get(name, "not installed") for name in PACKAGES},
        "multiply-adds": counts, "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def append_row(path: Path, row: dict) -> None:
    """One measurement as a line at the end of times.csv; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, line = csv_text([row], COLUMNS, ".6g").splitlines(keepends=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(line if file.tell() else header + line)


def read_times(path: Path) -> list[dict]:
    """The rows of times.csv, numbers as numbers; [] if it is not there. A last line that was cut off is removed."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        save_text(path, text)
    types = dict.fromkeys(("case", "system", "values"), str) | dict.fromkeys(("repeat", *COUNTS), int)
    lines = csv.DictReader(text.splitlines())
    return [{key: types.get(key, float)(value) for key, value in line.items() if value} for line in lines]


def in_child(job: dict) -> dict:
    """Do a job in a fresh process: its peak of memory is its own, and nothing is warm from the job before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, job).result()


def measure_all(args: Namespace) -> None:
    """Every measurement that times.csv does not hold yet; repeats are the outer loop, so that systems take turns."""
    path, skipped = args.out / "times.csv", set()
    done = {(row["case"], row["system"], row["repeat"]) for row in read_times(path)}
    published = [RELEASED] if args.without_baseline else [BASELINE, RELEASED]
    systems = dict.fromkeys(BY_NAME, [*published, *(PROPOSED + engine for engine in args.engines)])
    systems |= {"peak": ["float32", "int8"], "nsd": ["ours", "surface-distance"]}
    systems["encoder"] = list(dict.fromkeys([PLAIN, *args.engines]))
    turns = [(c, s, r) for c in args.cases for r in range(1, args.repeats + 1) for s in systems[c]]
    for case, system, repeat in tqdm([turn for turn in turns if turn not in done], "runs", disable=None):
        engine, file = system.split()[-1], DRAWN / f"{case}.npz"
        if engine in skipped:
            continue
        if case in BY_NAME and not file.is_file():
            write_case(DRAWN.parent, draw(BY_NAME[case]))
        job = {"case": case, "system": system, "repeat": repeat, "threads": args.threads, "slices": args.slices}
        try:
            append_row(path, in_child(job | {"path": file, "static": args.static}))
        except BrokenProcessPool:
            tqdm.write(f"table5.py: left out: {case}, {system}: its process was killed, most likely for want of memory")
        except (InputError, ImportError) as error:
            if engine in ("torch", "fast"):  # PyTorch is always there, so this is no missing engine
                raise InputError(f"{case}, {system}: {error}") from error
            skipped.add(engine)
            tqdm.write(f"table5.py: left out: {engine}: {error}")


def without_files(row: dict) -> float:
    return sum(value for stage, value in scaled(row).items() if stage not in ("read", "write"))


class Times:
    """The measured rows, asked by case and system. Seconds are for the whole case; nan where nothing was measured."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows: dict[tuple[str, str], list[dict]] = {}
        for row in rows:
            self.rows.setdefault((row["case"], row["system"]), []).append(row)
        self.ours = list(dict.fromkeys(system for _, system in self.rows if system.startswith(PROPOSED)))

    def median(self, case: str, system: str, of: Callable[[dict], float] = SECONDS) -> float:
        """Median over the repeats."""
        rows = self.rows.get((case, system))
        return statistics.median(map(of, rows)) if rows else math.nan

    def peak(self, kind: str) -> float:
        """Seconds of a thousand million multiply-adds at the machine's peak, "float32" or "int8": a peak is the best."""
        return min(map(SECONDS, self.rows.get(("peak", kind), [])), default=math.nan)

    def best(self) -> str:
        """Of ours the one with the least time over the cases that all of them did: one for all, as one would use it."""
        cases = [name for name in BY_NAME if all((name, system) in self.rows for system in self.ours)]
        return min(self.ours or [OURS], key=lambda system: sum(self.median(case, system) for case in cases))


def number(value: float) -> str:
    """Three significant digits, "-" for nan."""
    return "-" if math.isnan(value) else f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def times_text(rows: list[dict], settings: dict) -> str:
    """table.md: a row for each measured case, and what must be known to read it."""
    best = (times := Times(rows)).best()
    engine = best.removeprefix(PROPOSED)
    header = ["case", "size", "objects", "paper baseline s", "paper proposed s", "ratio", "released baseline s"]
    header += ["released proposed s", "ours, float s", f"ours, {engine} s", "ratio of the released two"]
    header += ["released / ours, float", f"baseline / ours, {engine}", f"released / ours, {engine}"]
    header += [f"peak MB: baseline / released / ours, float / ours, {engine}", "of the released algorithm"]
    lines, systems = [], (BASELINE, RELEASED, OURS, best)
    for name, case in ((name, BY_NAME[name]) for name in BY_NAME if name in {row["case"] for row in rows}):
        released = [row for row in rows if (row["case"], row["system"]) in ((name, BASELINE), (name, RELEASED))]
        paper = (case.paper_baseline_s or math.nan, case.paper_proposed_s or math.nan)
        cells = [name, " x ".join(map(str, case.shape)), str(case.objects), *map(number, (*paper, paper[0] / paper[1]))]
        cells += [number(times.median(name, system)) for system in systems]
        for slow, fast in ((BASELINE, RELEASED), (RELEASED, OURS), (BASELINE, best), (RELEASED, best)):
            ratios = [times.median(name, slow, of) / times.median(name, fast, of) for of in (SECONDS, without_files)]
            cells.append("{} ({})".format(*map(number, ratios)))
        cells.append(" / ".join(number(times.median(name, system, itemgetter("peak_mb"))) for system in systems))
        parts = sorted({(row["slices"], row["slices_of"]) for row in released if row["slices"] < row["slices_of"]})
        lines.append([*cells, "; ".join(f"{part} of {whole} slices timed" for part, whole in parts)])
    repeats = max((row["repeat"] for row in rows), default=0)
    head = f"# Table 5 measured\n\n{pipe_table([header, *lines])}\n"
    text = (
        f"{settings['processor']}, {settings['threads']} threads, median of up to {repeats} repeats, systems in turns, each run in a process\n"
        "of its own. Seconds are from reading the file to the written label map, as the challenge's script counts them; start,\n"
        "imports, loading of weights and compiling are not in them. In brackets: the ratio without reading and writing files.\n"
        "Peak memory is the process's, libraries included.\n\n"
        "The cases are drawn by us at the sizes and numbers of objects of Table 5: time hardly depends on contents. How many\n"
        "slices an object spans the paper does not print; here it is what the paper's own baseline seconds mean, at 0.40 s an\n"
        "image, so that the work is about that of its files. Its seconds are from another machine: compare ratios.\n\n"
        "Released: the published algorithm in plain PyTorch float32: enhanced at full size, each slice encoded once for each\n"
        'object, box by box, masks upsampled whole. Where "N of M slices timed", objects were made thinner and the times of\n'
        "enhancing, encoding, decoding and upsampling multiplied by the number of calls. Ours is always timed whole.\n"
    )
    note = f"{settings['note']}\n" if "note" in settings else ""
    return "\n".join(filter(None, (head, engines_text(times), parts_text(times, settings), text, note)))


def engines_text(times: Times) -> str:
    """Seconds of each engine and case, if there is more than one."""
    if len(times.ours) < 2:
        return ""
    cases = [name for name in BY_NAME if any((name, system) in times.rows for system in times.ours)]
    lines = [[name, *(number(times.median(name, system)) for system in times.ours)] for name in cases]
    sums = [number(sum(times.median(name, system) for name in cases)) for system in times.ours]
    header = ["case", *(system.removeprefix(PROPOSED) for system in times.ours)]
    return f"## Ours by engine, seconds\n\n{pipe_table([header, *lines, ['all of these', *sums]])}\n"


def parts_text(times: Times, settings: dict) -> str:
    """What is measured apart from any case: the encoder by each engine, beside the machine's peaks, and the NSD."""
    macs = settings["multiply-adds"]["encoder"] / 1e9
    floors = {kind: macs * times.peak(kind) for kind in ("float32", "int8")}
    titles = {"encoder": f"encoder, {macs:.1f} G multiply-adds", "nsd": "NSD of six organs in 256 x 512 x 512"}
    first, lines, notes = {"encoder": PLAIN, "nsd": "surface-distance"}, [], []
    for part, system in (key for key in times.rows if key[0] in titles):
        took = times.median(part, system)
        over = [took / floor if part == "encoder" else math.nan for floor in floors.values()]
        lines.append([titles[part], system, *map(number, (took, times.median(part, first[part]) / took, *over))])
    for kind, floor in floors.items():
        rate, best = number(1 / times.median("peak", kind)), number(1e3 * floor)
        notes.append(
            f"- {kind} peak, of large matrix products: {rate} G a second (median); the encoder's in {best} ms at best."
        )
    both = [times.rows.get(("nsd", system)) for system in ("ours", "surface-distance")]
    if all(both):
        values = [map(float, rows[0]["values"].split()) for rows in both]
        notes.append(f"- The two NSDs differ by at most {max(abs(a - b) for a, b in zip(*values, strict=True)):.1e}.")
    header = ["part", "by", "seconds", "times as fast as torch or surface-distance", "/ float32 peak", "/ int8 peak"]
    return f"## Parts\n\n{pipe_table([header, *lines])}\n\n" + "\n".join([*notes, ""]) if lines else ""


def stage_rows(times: Times, counts: dict[str, int]) -> list[dict]:
    """Rows of stages.csv: seconds of each stage of three cases, by the published algorithm and ours, beside the peaks.

    network_s was measured for gmacs thousand million multiply-adds; *_floor_s is what a matrix product would need for
    as many, and no program of this precision can be faster. counts: multiply-adds, of settings.json.
    """
    rows, systems = [], dict.fromkeys((RELEASED, OURS, times.best()))
    for case, system in ((c, s) for c in IN_FIGURE for s in systems if (c, s) in times.rows):
        first = times.rows[case, system][0]
        stages = {stage: times.median(case, system, lambda row, s=stage: scaled(row)[s]) for stage in STAGES}
        encoded, decoded, cells = (first[f"{what}_of"] for what in ("encoded", "decoded", "cells"))
        macs = counts["encoder"] * encoded
        if system.split()[-1] in segment.ENGINES:  # the decoder of model.py
            macs += counts["decoder"] * decoded
        else:
            macs += counts["fast image"] * encoded + counts["fast box"] * decoded + counts["fast cell"] * cells
        row = {"case": case, "system": system, "encoded": encoded, "decoded": decoded, "cells": cells, **stages}
        row |= {"gmacs": macs / 1e9, "network_s": stages["encode"] + stages["decode"]}
        rows.append(row | {f"{kind}_floor_s": macs / 1e9 * times.peak(kind) for kind in ("float32", "int8")})
    return rows


def stages_figure(rows: list[dict]) -> Figure:
    """A panel a case, a bar a system, a colour a stage; seconds, each panel on its own scale. rows: `stage_rows`'s."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(9, 1 + 1.6 * len(IN_FIGURE)))
    axes = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    colors = {stage: PALETTE[i] / 255 for i, stage in enumerate(s for s in STAGES if s != "other")} | {"other": "0.7"}
    for case, ax in zip(cases, axes, strict=True):
        bars = {row["system"].replace(PROPOSED, "ours, "): row for row in rows if row["case"] == case}
        bars = {name.replace(RELEASED, "released algorithm"): row for name, row in bars.items()}
        ends = np.zeros(len(bars))
        for stage in STAGES:
            values = [row[stage] for row in bars.values()]
            ax.barh(list(bars), values, left=ends, color=colors[stage], label=stage)
            ends = ends + values
        for name, end in zip(bars, ends, strict=True):
            ax.text(end, name, f" {end:.3g} s", va="center")
        ax.invert_yaxis()
        ax.set_xlim(0, 1.15 * max(ends))
        shape, count = " x ".join(map(str, BY_NAME[case].shape)), BY_NAME[case].objects
        ax.set_title(f"{case}: {shape}, {count} object{'s' * (count > 1)}", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds")
    axes[0].legend(ncols=len(STAGES), frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.45, 1.15))
    figure.tight_layout()
    return figure


def run(args: Namespace) -> list[dict]:
    path, rows = args.out / "settings.json", read_times(args.out / "times.csv")
    settings = json.loads(path.read_text(encoding="utf-8")) if rows else {}
    if not args.figure:
        now = current_settings(args)
        if rows and settings | now != settings:
            raise InputError(f"{args.out}: its times were measured with other settings; name another --out folder")
        save_json(path, settings := settings | now)  # a note that was written beside them stays
        measure_all(args)
        rows = read_times(args.out / "times.csv")
    else:
        stages = stage_rows(Times(rows), settings.get("multiply-adds", {}))
        if not stages:
            cases = " ".join(IN_FIGURE)
            raise InputError(f"{args.out}: no times; run first: python benchmarks/table5.py --cases peak {cases}")
        save_text(args.out / "stages.csv", csv_text(stages, tuple(stages[0])))
        save_figure(FIGURE, stages_figure(stages))
    save_text(args.out / "table.md", times_text(rows, settings))
    print(f"table5.py: {len(rows)} runs, best engine {Times(rows).best().removeprefix(PROPOSED)}; wrote {args.out}")
    return stages if args.figure else rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of times.csv, with --figure those of stages.csv."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    everything = [*PARTS, SIX_OBJECTS.name, *(case.name for case in TABLE5)]
    p.add_argument("--cases", nargs="+", choices=[*PARTS, *BY_NAME], default=everything, metavar="NAME", help="rows")
    p.add_argument("--engines", nargs="+", default=list(ENGINES), metavar="ENGINE", help="what runs our own code")
    p.add_argument("--repeats", type=int, default=3, help="runs of a system on a case; their median counts")
    p.add_argument(
        "--slices", type=int, default=24, help="of a volume, by the published algorithm; 0: all; rest is scaled"
    )
    p.add_argument("--threads", type=int, default=2, help="CPU threads of PyTorch and OpenCV")
    p.add_argument("--without-baseline", action="store_true", help="leave out LiteMedSAM, which takes longest")
    p.add_argument("--static", type=Path, help="NAME.static for engine openvino-int8 (default: its own)")
    p.add_argument("-o", "--out", type=Path, default=Path("results/table5"), help="folder for times and table")
    p.add_argument("--figure", action="store_true", help="measure nothing; table, stages.csv and figure of times.csv")
    args = p.parse_args(argv)
    if min(args.repeats, args.threads) < 1 or 0 > args.slices or 0 < args.slices < 3:
        p.error("--repeats and --threads must be 1 or more, --slices 0 or 3 or more")
    try:
        return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"table5.py: {error}")


if __name__ == "__main__":
    main()
