"""Where the time goes: seconds of each stage, and how near the network comes to the machine's peak, as a figure. [P 4.3]

    python benchmarks/stages.py            from results/table5/times.csv, which benchmarks/table5.py writes
    python benchmarks/stages.py --smoke    from made-up times, nothing is kept

Measures nothing: it reads the stages of one 2D, one 3D and one crowded case, by the published algorithm and by ours.
Writes stages.csv beside times.csv and assets/stages.png, and prints a sentence for each bar: multiply-adds over the
measured peak of a matrix product is the time that no program of this precision can beat.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

from table5_cases import BY_NAME
from table5_report import CELLS, COUNTS, OURS, PROPOSED, RELEASED, Times, append_row, read_rows
from table5_work import STAGES

from figures import PALETTE, save_figure
from readers import InputError
from tables import csv_text
from writers import save_json, save_text

CASES = ("2DBox_US_0525", "3DBox_MR_0121", CELLS)
GRAY = (0.7, 0.7, 0.7)  # of "other"; the stages take the palette's colours


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--times", type=Path, default=Path("results/table5"), help="folder of times.csv and settings.json")
    p.add_argument("--figure", type=Path, default=Path("assets/stages.png"), help="figure to write")
    p.add_argument("--smoke", action="store_true", help="made-up times, nothing is kept, 2 s")
    return p.parse_args(argv)


def title(system: str) -> str:
    """A system as the figure names it."""
    return "released algorithm" if system == RELEASED else f"ours, {system.removeprefix(PROPOSED)}"


def roofline(row: dict, times: Times, counts: dict[str, int]) -> dict:
    """Multiply-adds of a case, the seconds that the float32 and int8 peaks would need, and those that were measured."""
    macs = counts["encoder"] * row["encoded"]
    if row["system"] == RELEASED or row["system"].endswith("torch-int8"):
        macs += counts["decoder"] * row["decoded"]
    else:  # fast_decoder.py
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


def plot_stages(rows: list[dict], figure: Figure) -> None:
    """A panel a case, a bar a system, a colour a stage; seconds, each panel on its own scale."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    axes = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    colors = {stage: PALETTE[i] / 255 for i, stage in enumerate(s for s in STAGES if s != "other")} | {"other": GRAY}
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


def run(args: argparse.Namespace) -> list[dict]:
    path, settings = args.times / "times.csv", args.times / "settings.json"
    if not path.is_file() or not settings.is_file():
        raise InputError(f"{path}: no times yet; run first: python benchmarks/table5.py --cases peak {' '.join(CASES)}")
    times, counts = Times(read_rows(path)), json.loads(settings.read_text(encoding="utf-8"))["multiply-adds"]
    systems = dict.fromkeys((RELEASED, OURS, times.best()))
    rows = []
    for key in ((case, system) for case in CASES for system in systems if (case, system) in times.rows):
        first = times.rows[key][0]
        row = {"case": key[0], "system": key[1], "encoded": first["encoded_of"], "decoded": first["decoded_of"]}
        row["cells"] = first["cells_of"]
        row |= times.stages(*key)
        rows.append(row | roofline(row, times, counts))
    if not rows:
        raise InputError(f"{path}: holds none of {', '.join(CASES)}; measure them: python benchmarks/table5.py --cases")
    save_text(args.times / "stages.csv", csv_text(rows, tuple(rows[0])))
    figure = Figure(figsize=(9, 1 + 1.6 * len(CASES)))
    plot_stages(rows, figure)
    save_figure(args.figure, figure)
    print("\n".join(map(sentence, rows)))
    told = "removed again" if args.smoke else f"wrote {args.figure} and {args.times / 'stages.csv'}"
    print(f"stages.py: {told}.")
    return rows


def made_up_times(folder: Path) -> None:
    """A times.csv and settings.json with every stage 1 s, so that the figure can be looked at without a measurement."""
    for case in CASES:
        for system in (RELEASED, OURS, f"{PROPOSED}openvino"):
            row = {"case": case, "system": system, "repeat": 1, "seconds": 7.0, "peak_mb": 500.0}
            row |= {f"{stage}_s": 1.0 for stage in STAGES}
            row |= dict.fromkeys(COUNTS, 1)
            append_row(folder / "times.csv", row)
    counts = {"encoder": 17_000_000_000, "decoder": 2_000_000_000, "fast image": 0, "fast box": 10**9, "fast cell": 0}
    for kind, seconds in (("float32", 0.01), ("int8", 0.0025)):
        append_row(folder / "times.csv", {"case": "peak", "system": kind, "repeat": 1, "seconds": seconds})
    save_json(folder / "settings.json", {"multiply-adds": counts})


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of stages.csv."""
    args = parse(argv)
    try:
        if not args.smoke:
            return run(args)
        with tempfile.TemporaryDirectory() as scratch:
            args.times, args.figure = Path(scratch), Path(scratch) / "stages.png"
            made_up_times(args.times)
            return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"stages.py: {error}")


if __name__ == "__main__":
    main()
