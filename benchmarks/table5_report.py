"""Table 5's texts and figure, made of the measured rows: medians, the table beside the paper's seconds, what was to be
reached, and where the time goes. benchmarks/table5.py writes them. [P 4.3]

Seconds of a row are for the whole case, scaled where only some slices were timed.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from table5_work import BY_NAME, SIX_OBJECTS, STAGES, TimedCase, scaled

import segment
from figures import PALETTE
from files.writing import save_text
from tables import pipe_table

COUNTS = ("encoded", "encoded_of", "decoded", "decoded_of", "slices", "slices_of", "cells_of")
FLOATS = ("seconds", "peak_mb", *(f"{stage}_s" for stage in STAGES))
COLUMNS = ("case", "system", "repeat", *FLOATS, *COUNTS, "values")
PLAIN = "torch"  # the engine that runs model.py as written
BASELINE, RELEASED, OURS = f"released baseline {PLAIN}", f"released proposed {PLAIN}", "fixed proposed fast"
PROPOSED = "fixed proposed "  # ours by any engine: its name follows
CELLS, DERMOSCOPY = "2DBox_Microscope_0016", "2DBox_Dermoscopy_0003"
DRAWN = ("2DBox_US_0525", "3DBox_MR_0121", CELLS)  # the cases of the figure
FILES = ("read", "write")


# ---------------------------------------------------------------- times.csv


def append_row(path: Path, row: dict) -> None:
    """One measurement as a line at the end of times.csv; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        values = [row.get(column, "") for column in COLUMNS]
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])


def read_rows(path: Path) -> list[dict]:
    """The rows of times.csv, numbers as numbers; [] if it is not there. A last line that was cut off is removed."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        save_text(path, text)
    rows = []
    for line in csv.DictReader(text.splitlines()):
        row = {"case": line["case"], "system": line["system"], "repeat": int(line["repeat"]), "values": line["values"]}
        row |= {key: int(line[key]) for key in COUNTS if line[key]}
        row |= {key: float(line[key]) for key in FLOATS if line[key]}
        rows.append(row)
    return rows


# ---------------------------------------------------------------- medians


class Times:
    """The measured rows, asked by case and system."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows: dict[tuple[str, str], list[dict]] = {}
        for row in rows:
            self.rows.setdefault((row["case"], row["system"]), []).append(row)

    def median(self, case: str, system: str, of: Callable[[dict], float] = lambda row: row["seconds"]) -> float:
        """Median over the repeats; nan if the case was not measured by this system."""
        rows = self.rows.get((case, system), [])
        return statistics.median(of(row) for row in rows) if rows else math.nan

    def peak(self, kind: str) -> float:
        """Seconds of a thousand million multiply-adds at the machine's peak, "float32" or "int8"; nan if not measured."""
        return min((row["seconds"] for row in self.rows.get(("peak", kind), [])), default=math.nan)

    def ratio(self, case: str, slow: str, fast: str) -> float:
        """How many times as fast; nan if one was not measured."""
        return self.median(case, slow) / self.median(case, fast)

    def ratio_without_files(self, case: str, slow: str, fast: str) -> float:
        """The same, of what lies between reading and writing."""
        return self.median(case, slow, without_files) / self.median(case, fast, without_files)

    def stages(self, case: str, system: str) -> dict[str, float]:
        """Median seconds of each stage, for the whole case."""
        return {stage: self.median(case, system, lambda row, s=stage: scaled(row)[s]) for stage in STAGES}

    def systems(self) -> list[str]:
        """Those of our own runs of the proposed model, in the order of their first row."""
        return list(dict.fromkeys(system for _, system in self.rows if system.startswith(PROPOSED)))

    def best(self) -> str:
        """The engine with the least time over the cases that all of them did; one for all cases, as one would use it."""
        systems = self.systems() or [OURS]
        cases = [name for name in BY_NAME if all((name, system) in self.rows for system in systems)]
        return min(systems, key=lambda system: sum(self.median(case, system) for case in cases))


def without_files(row: dict) -> float:
    """Seconds of the whole case without reading and writing files."""
    return sum(value for stage, value in scaled(row).items() if stage not in FILES)


# ---------------------------------------------------------------- table.md


def number(value: float) -> str:
    """Three significant digits, "-" for nan."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def part_timed(times: Times, case: TimedCase) -> str:
    """What of a case was timed, where that is not all: "24 of 150 slices timed"."""
    rows = times.rows.get((case.name, RELEASED), []) + times.rows.get((case.name, BASELINE), [])
    parts = {(row["slices"], row["slices_of"]) for row in rows if row["slices"] < row["slices_of"]}
    return "; ".join(f"{part} of {whole} slices timed" for part, whole in sorted(parts))


def case_line(times: Times, case: TimedCase, best: str) -> list[str]:
    """The cells of one case."""
    paper = (case.paper_baseline_s or math.nan, case.paper_proposed_s or math.nan)
    systems = (BASELINE, RELEASED, *dict.fromkeys((OURS, best)))
    ratios = [times.ratio(case.name, slow, best) for slow in (BASELINE, RELEASED)]
    peaks = [times.median(case.name, system, lambda row: row["peak_mb"]) for system in (BASELINE, RELEASED, OURS, best)]
    return [
        case.name,
        " x ".join(map(str, case.shape)),
        str(case.objects),
        *map(number, (*paper, paper[0] / paper[1])),
        *(number(times.median(case.name, system)) for system in systems),
        *map(number, (times.ratio(case.name, BASELINE, RELEASED), times.ratio(case.name, RELEASED, OURS), *ratios)),
        " / ".join(map(number, peaks)),
        part_timed(times, case),
    ]


def times_text(rows: list[dict], settings: dict) -> str:
    """table.md: a row for each measured case, and what must be known to read it."""
    times = Times(rows)
    best = times.best()
    engine = best.removeprefix(PROPOSED)
    ours = ["ours, float s"] + ([f"ours, {engine} s"] if best != OURS else [])
    header = ["case", "size", "objects", "paper baseline s", "paper proposed s", "ratio"]
    header += ["released baseline s", "released proposed s", *ours, "ratio of the released two"]
    header += ["released / ours, float", f"baseline / ours, {engine}", f"released / ours, {engine}"]
    header += [f"peak MB: baseline / released / ours, float / ours, {engine}", "of the released algorithm"]
    measured = {case for case, _ in times.rows}
    lines = [case_line(times, case, best) for case in BY_NAME.values() if case.name in measured]
    repeats = max((row["repeat"] for row in rows), default=0)
    parts = [f"# Table 5 measured\n\n{pipe_table([header, *lines])}\n"]
    parts.append(engines_text(times))
    parts.append(f"## What was to be reached\n\n{bars_text(times, settings)}\n")
    parts.append(
        f"{settings['processor']}, {settings['threads']} threads, median of up to {repeats} repeats, systems in turns, each run in a process\n"
        "of its own. Seconds are from reading the file to the written label map, as the challenge's script counts them; start,\n"
        "imports, loading of weights and compiling are not in them. Peak memory is the process's, libraries included.\n\n"
        "The cases are drawn by us at the sizes and numbers of objects of Table 5: time hardly depends on contents. How many\n"
        "slices an object spans the paper does not print; here it is what the paper's own baseline seconds mean, at 0.40 s an\n"
        "image, so that the work is about that of its files. Its seconds are from another machine: compare ratios.\n\n"
        "Released: the published algorithm in plain PyTorch float32: enhanced at full size, each slice encoded once for each\n"
        'object, box by box, masks upsampled whole. Where "N of M slices timed", objects were made thinner and the times of\n'
        "enhancing, encoding, decoding and upsampling multiplied by the number of calls. Ours is always timed whole.\n"
    )
    if "note" in settings:
        parts.append(f"{settings['note']}\n")
    return "\n".join(parts)


def engines_text(times: Times) -> str:
    """Seconds of each engine and case, if there is more than one."""
    systems = times.systems()
    others = list(dict.fromkeys(s for _, s in times.rows if s.startswith("fixed baseline ")))
    if len(systems) + len(others) < 2:
        return ""
    cases = [name for name in BY_NAME if any((name, system) in times.rows for system in systems)]
    lines = [[name, *(number(times.median(name, system)) for system in systems + others)] for name in cases]
    total = [[times.median(name, system) for name in cases] for system in systems + others]
    lines.append(["all of these", *(number(sum(column)) for column in total)])
    titles = [s.removeprefix(PROPOSED) for s in systems] + [s.removeprefix("fixed ") for s in others]
    return f"## Ours by engine, seconds\n\n{pipe_table([['case', *titles], *lines])}\n"


# ---------------------------------------------------------------- what was to be reached


def faster(times: Times, case: str, slow: str, fast: str, bar: float) -> list:
    """A bar on how many times as fast a case must be: [measured text, met or None if not measured]."""
    ratio, inner = times.ratio(case, slow, fast), times.ratio_without_files(case, slow, fast)
    if math.isnan(ratio):
        return ["not measured", None]
    return [f"{ratio:.1f} x ({inner:.1f} x without reading and writing files)", ratio >= bar]


def encoder_bars(times: Times, settings: dict) -> list[list]:
    """Encoder: against model.py as written, and against what the int8 peak allows."""
    engines = [system for case, system in times.rows if case == "encoder" and system != PLAIN]
    bars = [f"encoder, best engine: >= 4 x {PLAIN} float32", "encoder, best engine: <= 2.5 x its int8 floor"]
    if not engines:
        return [[bar, "not measured", None] for bar in bars]
    best = min(engines, key=lambda engine: times.median("encoder", engine))
    seconds, ratio = times.median("encoder", best), times.ratio("encoder", PLAIN, best)
    macs = settings["multiply-adds"]["encoder"] / 1e9
    floors = {kind: macs * times.peak(kind) for kind in ("int8", "float32")}
    found = [[bars[0], f"{ratio:.2f} x, {1e3 * seconds:.0f} ms ({best})", ratio >= 4]]
    text = ", ".join(
        f"{seconds / floor:.2f} x the {kind} floor, {macs:.1f} G multiply-adds at {1 / times.median('peak', kind):.0f} G/s = {1e3 * floor:.0f} ms"
        for kind, floor in floors.items()
        if not math.isnan(floor)
    )
    if math.isnan(floors["int8"]):
        return [*found, [bars[1], text or "not measured", None]]
    return [*found, [bars[1], text, seconds <= 2.5 * floors["int8"]]]


def nsd_bars(times: Times) -> list[list]:
    """NSD: against the package, in time and value."""
    titles = [
        "NSD of six organs in 256 x 512 x 512: >= 3 x the package surface-distance",
        "NSD: the same values, to 1e-9",
    ]
    ratio = times.ratio("nsd", "surface-distance", "ours")
    if math.isnan(ratio):
        return [[title, "not measured", None] for title in titles]
    values = [
        [float(word) for word in times.rows["nsd", system][0]["values"].split()]
        for system in ("ours", "surface-distance")
    ]
    apart = max(abs(a - b) for a, b in zip(*values, strict=True))
    slow, fast = times.median("nsd", "surface-distance"), times.median("nsd", "ours")
    return [
        [titles[0], f"{ratio:.1f} x, {slow:.1f} s and {fast:.1f} s", ratio >= 3],
        [titles[1], f"{apart:.1e}", apart <= 1e-9],
    ]


def bars(times: Times, settings: dict) -> list[list]:
    """[bar, measured, met: True, False, or None where it was not measured] of each."""
    best = times.best()
    engine, six = best.removeprefix(PROPOSED), SIX_OBJECTS.name
    wanted = (
        (f"6 objects in 24 slices, {engine}: >= 10 x the released algorithm", six, RELEASED, best, 10),
        (f"6 objects in 24 slices, {engine}: >= 40 x the released baseline", six, BASELINE, best, 40),
        ("6 objects in 24 slices, PyTorch float32: >= 4 x the released algorithm", six, RELEASED, OURS, 4),
        (f"241 objects in 1920 x 2560, {engine}: >= 6 x the released algorithm", CELLS, RELEASED, best, 6),
        (f"dermoscopy 3024 x 4032, {engine}: faster than the released baseline", DERMOSCOPY, BASELINE, best, 1),
        (f"dermoscopy 3024 x 4032, {engine}: >= 5 x the released algorithm", DERMOSCOPY, RELEASED, best, 5),
    )
    found = [[title, *faster(times, case, slow, fast, bar)] for title, case, slow, fast, bar in wanted]
    return [*encoder_bars(times, settings), *found, *nsd_bars(times)]


def bars_text(times: Times, settings: dict) -> str:
    """The bars as a Markdown table: bar, measured, met."""
    words = {True: "yes", False: "NO", None: "-"}
    return pipe_table(
        [["bar", "measured", "met"], *([bar, text, words[met]] for bar, text, met in bars(times, settings))]
    )


# ---------------------------------------------------------------- where the time goes


def stage_rows(times: Times, counts: dict[str, int]) -> list[dict]:
    """Rows of stages.csv: seconds of each stage of one 2D, one 3D and one crowded case, and their `roofline`.

    By the published algorithm, by ours in float, and by our best engine. counts: multiply-adds, of settings.json.
    """
    rows, systems = [], dict.fromkeys((RELEASED, OURS, times.best()))
    for key in ((case, system) for case in DRAWN for system in systems if (case, system) in times.rows):
        first = times.rows[key][0]
        row = {"case": key[0], "system": key[1], "encoded": first["encoded_of"], "decoded": first["decoded_of"]}
        row |= {"cells": first["cells_of"]} | times.stages(*key)
        rows.append(row | roofline(row, times, counts))
    return rows


def title(system: str) -> str:
    """A system as the figure names it."""
    return "released algorithm" if system == RELEASED else f"ours, {system.removeprefix(PROPOSED)}"


def roofline(row: dict, times: Times, counts: dict[str, int]) -> dict:
    """Multiply-adds of a case, the seconds that were measured for them, and those that the machine's peaks would need.

    The peak is that of a matrix product, float32 or int8: no program of this precision can be faster.
    """
    macs = counts["encoder"] * row["encoded"]
    if row["system"].split()[-1] in segment.ENGINES:  # the decoder of model.py
        macs += counts["decoder"] * row["decoded"]
    else:  # FastDecoder
        macs += counts["fast image"] * row["encoded"] + counts["fast box"] * row["decoded"]
        macs += counts["fast cell"] * row["cells"]
    macs /= 1e9
    floors = {kind: macs * times.peak(kind) for kind in ("float32", "int8")}
    return {"gmacs": macs, "network_s": row["encode"] + row["decode"]} | {f"{k}_floor_s": v for k, v in floors.items()}


def sentence(row: dict) -> str:
    """The roofline of one bar in words."""
    start = (
        f"{row['case']}, {title(row['system'])}: {sum(row[stage] for stage in STAGES):.3g} s, of which encode and decode "
        f"{row['network_s']:.3g} s for {row['gmacs']:.0f} G multiply-adds"
    )
    if math.isnan(row["float32_floor_s"]) or math.isnan(row["int8_floor_s"]):
        return start + "; no peak was measured."
    return start + (
        f"; at the float32 peak {row['float32_floor_s']:.3g} s ({row['network_s'] / row['float32_floor_s']:.1f} x), "
        f"at the int8 peak {row['int8_floor_s']:.3g} s ({row['network_s'] / row['int8_floor_s']:.1f} x)."
    )


def stages_figure(rows: list[dict]) -> Figure:
    """A panel a case, a bar a system, a colour a stage; seconds, each panel on its own scale. rows: `stage_rows`'s."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(9, 1 + 1.6 * len(DRAWN)))
    axes = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    colors = {stage: PALETTE[i] / 255 for i, stage in enumerate(s for s in STAGES if s != "other")} | {"other": "0.7"}
    for case, ax in zip(cases, axes, strict=True):
        mine = [row for row in rows if row["case"] == case]
        names = [title(row["system"]) for row in mine]
        left = [0.0] * len(mine)
        for stage in STAGES:
            values = [row[stage] for row in mine]
            ax.barh(names, values, left=left, color=colors[stage], label=stage)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for name, end in zip(names, left, strict=True):
            ax.text(end, name, f" {end:.3g} s", va="center")
        ax.invert_yaxis()
        ax.set_xlim(0, 1.15 * max(left))
        shape, count = " x ".join(map(str, BY_NAME[case].shape)), BY_NAME[case].objects
        ax.set_title(f"{case}: {shape}, {count} object{'s' * (count > 1)}", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds")
    axes[0].legend(ncols=len(STAGES), frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.45, 1.15))
    figure.tight_layout()
    return figure
