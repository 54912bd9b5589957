"""Does the enhancement help? Networks trained alike but for their input, and ours with its input changed. [P 4.5]

    python benchmarks/choices.py --cases val                                 writes results/choices/inputs.csv
    python benchmarks/choices.py --cases val val_unseen --train cache        writes runs.csv, runs.md and runs.png

Inputs: our trained network gets another input than it was trained on. This says nothing about a network that was trained on it.
Runs: for each input and seed the same start, images, boxes and steps; everything learns. Scored on gray pictures, exact boxes.
The start is our checkpoint, which knows the three channels: a short run shows whether gray catches up, not what a long one finds.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

import table4

import tables
from data import read_split
from enhance import is_gray
from fast import engines
from files import InputError
from files.checkpoints import OUR_CHECKPOINT
from files.npz import read_npz
from files.writing import csv_text, save_figure, save_npz, save_text
from metrics import PROTOCOLS
from presets import PRESETS, override
from recipe.batches import ResidentSlices
from recipe.distill import one_cycle
from segment import Segmenter
from training import Extras, Training, starting_network
from volumes import segment_case

evaluate = importlib.import_module("05_evaluate")

INPUTS = {  # name -> changes of preset `fixed`
    "as trained": [],
    "gray three times": ["iterations=0", "equalize=nothing"],
    "released channels": ["iterations=1", "diffusion_range=1.0", "border=wrap", "rounding=truncate", "equalize=raw"],
    "gray": ["color=gray"],
}
RAW = "raw three times"
RUNS = {  # of the equal runs; the text's three channels, and what they are compared with
    "raw, diffused, equalized": [],
    RAW: INPUTS["gray three times"],
    "released channels": INPUTS["released channels"],
    "raw, diffused, diffused": ["equalize=nothing"],
    "raw, diffused, raw equalized": ["equalize=raw"],
}
SHOWN = {"dsc_strict": "DSC", "nsd_strict": "NSD"}
BATCH, OBJECTS, RATE = 4, 4, 1e-4
COLORED = ("Dermoscopy", "Endoscopy", "Fundus", "Microscopy")  # modalities whose images the enhancement leaves alone
EVERY = 6  # of a training volume's slices, which are alike, every sixth is loaded


def exact_cases(folders: Iterable[Path], work: Path, only_2d: bool = True) -> list[tuple[str, Path, str]]:
    """Exact boxes of all pictures, or of all cases. -> [(folder's name, where they are, case)]"""
    found, exact = [], {"exact": table4.box_kinds(5, [], 0)["exact"]}
    for folder in folders:
        place = work / folder.name
        only = ["--2d-only"] if only_2d else []
        names, _ = table4.prepare(exact, table4.parse(["--cases", str(folder), *only, "--predictions", str(place)]))
        found += [(folder.name, place / "exact", name) for name in names]
    return found


def scores_of(segmenter: Segmenter, cases: list, title: str, work: Path, gray_only: bool = False) -> list[dict]:
    """05_evaluate.score_case's rows of one segmenter on prepared cases."""
    rows = []
    for folder, place, name in tqdm(cases, title, disable=None):
        case = read_npz(place / "imgs" / name)
        if gray_only and not is_gray(case.image):
            continue
        save_npz(work / "segs" / name, segs=segment_case(segmenter, case))
        found, problems = evaluate.score_case(place / "gts" / name, {title: work / "segs"}, PROTOCOLS)
        if problems:
            raise InputError(problems[0])
        rows += [row | {"folder": folder} for row in found if row["system"] == title]
    return rows


def changed_inputs(cases: list, work: Path) -> list[dict]:
    """DSC and NSD (strict, 0..1) of our checkpoint under each of INPUTS, by modality."""
    rows = []
    for title, settings in INPUTS.items():
        rows += scores_of(engines.load("proposed", settings=settings), cases, title, work)
    return [{"input": title, "modality": modality, "cases": line["cases"]}
            | {"DSC": line["dsc_strict"], "NSD": line["nsd_strict"]}
            for (title, modality), line in tables.summarize(rows).items()]  # fmt: skip


def train(args: argparse.Namespace, settings: list[str], seed: int, out: Path) -> Path:
    """One run: everything learns, from our checkpoint, with one input. -> its checkpoint"""
    preset = override(PRESETS["fixed"], ["jitter=scaled", "looseness=0.3", f"learning_rate={RATE}", *settings])
    entries = [entry for entry in read_split(args.train)[0] if entry.modality not in COLORED]
    entries = [entry for i, entry in enumerate(entries) if i % EVERY == 0 or not entry.name.startswith("3D_")]
    network, _ = starting_network("proposed", preset, args.weights, seed)
    rate = partial(one_cycle, steps=args.steps, peak=RATE)
    extras = Extras(weight_decay=0.05, clip=1.0, average=0.9, rate=rate, frozen_norms=True, bfloat16=True)
    run, device = Training(network, preset, args.device, extras), torch.device(args.device)
    slices = ResidentSlices(args.train, entries, preset, BATCH, OBJECTS, seed, device, augment=True, workers=0)
    for step in tqdm(range(args.steps), "train", disable=None):
        run.train_step(slices.batch(step))
    run.save(out / "run.pt", {}, best=True)
    return out / "run.pt"


def equal_runs(args: argparse.Namespace, cases: list, work: Path) -> list[dict]:
    """05_evaluate.score_case's rows of every run on every gray case, each with `folder` and `seed`; the system is the input."""
    found = []
    for seed in range(args.seeds):
        for title in args.inputs:
            path = train(args, RUNS[title], seed, work)
            segmenter = engines.load("proposed", path, "fixed", "fast", settings=RUNS[title])
            found += [row | {"seed": seed} for row in scores_of(segmenter, cases, title, work, gray_only=True)]
    return found


def over_seeds(rows: list[dict]) -> list[dict]:
    """A row for each input and case: the mean of its scores over the seeds."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["system"], row["case"]), []).append(row)
    scores = tables.score_names()
    return [
        group[0] | {score: sum(r[score] for r in group) / len(group) for score in scores} for group in groups.values()
    ]


def differences(rows: list[dict]) -> list[dict]:
    """Each input minus raw three times, mean over modalities: 95 % interval over cases, least and most of the seeds."""
    inputs, seeds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("system", "seed"))
    pairs, lines = [(title, RAW) for title in inputs if title != RAW], []

    def averages(chosen: list[dict]) -> list[dict]:
        found = tables.paired_differences(chosen, pairs)
        return [line for line in found if line["modality"] == tables.AVERAGE and line["score"] in SHOWN]

    for folder in dict.fromkeys(row["folder"] for row in rows):
        here = [row for row in rows if row["folder"] == folder]
        alone = [averages([row for row in here if row["seed"] == seed]) for seed in seeds]
        for i, line in enumerate(averages(over_seeds(here))):
            values = [of_seed[i]["difference"] for of_seed in alone]
            lines.append(line | {"folder": folder, "least seed": min(values), "most seed": max(values)})
    return lines


def runs_table(rows: list[dict], lines: list[dict], steps: int) -> str:
    """runs.md: means of every input, then the differences."""
    out = [
        "# Equal runs that differ in the input alone",
        "",
        "| cases | input | number | DSC | NSD |",
        "| --- " * 5 + "|",
    ]
    for folder in dict.fromkeys(row["folder"] for row in rows):
        summary = tables.summarize(over_seeds([row for row in rows if row["folder"] == folder]))
        for system in dict.fromkeys(row["system"] for row in rows):
            line = summary[system, tables.AVERAGE]
            out.append(f"| {folder} | {system} | {line['cases']} | "
                       + " | ".join(f"{100 * line[score]:.2f}" for score in SHOWN) + " |")  # fmt: skip
    out += ["", f"| cases | input minus {RAW} | score | difference | 95 % interval | seeds |", "| --- " * 6 + "|"]
    for line in lines:
        value = {key: 100 * line[key] for key in ("difference", "low", "high", "least seed", "most seed")}
        out.append(f"| {line['folder']} | {line['system']} | {SHOWN[line['score']]} | {value['difference']:+.2f} | "
                   f"{value['low']:+.2f} to {value['high']:+.2f} | {value['least seed']:+.2f} to {value['most seed']:+.2f} |")  # fmt: skip
    seeds = len({row["seed"] for row in rows})
    return "\n".join([*out, "", f"Per cent, strict, gray pictures, exact boxes, mean over modalities; {steps} steps of {BATCH} images and {OBJECTS} boxes,",
                      f"{seeds} seeds, whose mean is taken case by case; all start from the checkpoint, which was trained on the three channels.", ""])  # fmt: skip


def difference_plot(lines: list[dict]) -> Figure:
    """The differences with their intervals, a panel a score; dots: the seeds' least and most."""
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(lines) / 2), layout="constrained")
    for ax, (score, name) in zip(figure.subplots(1, 2, sharey=True), SHOWN.items(), strict=True):
        chosen = [line for line in lines if line["score"] == score]
        for y, line in enumerate(chosen):
            ax.plot([100 * line["low"], 100 * line["high"]], [y, y], color="tab:blue")
            ax.plot(100 * line["difference"], y, "s", color="tab:blue")
            ax.plot([100 * line["least seed"], 100 * line["most seed"]], [y, y], ".", color="tab:orange")
        ax.axvline(0, color="0.6", linewidth=1)
        ax.set_yticks(range(len(chosen)), [f"{line['system']}, {line['folder']}" for line in chosen])
        ax.set_title(f"{name}, points above {RAW}", fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--cases", type=Path, nargs="+", required=True, help="folders of .npz cases with imgs and gts")
    p.add_argument("--train", type=Path, metavar="CACHE", help="make the equal runs, with this cache of step 1")
    p.add_argument("--inputs", nargs="+", choices=RUNS, default=list(RUNS)[:2], help="of the equal runs")
    p.add_argument("--steps", type=int, default=60, help="steps of an equal run")
    p.add_argument("--seeds", type=int, default=3, help="runs of each input")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="checkpoint that all runs start from")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("-o", "--out", type=Path, default=Path("results/choices"), help="folder for tables and figure")
    args = p.parse_args(argv)
    try:
        if args.train and (RAW not in args.inputs or len(args.inputs) < 2):
            raise InputError(f"--inputs: equal runs are compared with '{RAW}'; name it and another one")
        with tempfile.TemporaryDirectory() as work:
            cases = exact_cases(args.cases, Path(work))
            if args.train:
                rows = equal_runs(args, cases, Path(work))
                lines = differences(rows)
                columns = ("folder", "system", "seed", "case", "modality", *SHOWN)
                save_text(args.out / "runs.csv", csv_text(rows, columns))
                save_text(args.out / "runs.md", runs_table(rows, lines, args.steps))
                save_figure(args.out / "runs.png", difference_plot(lines))
                print(runs_table(rows, lines, args.steps))
                return
            table = changed_inputs(cases, Path(work))
        save_text(args.out / "inputs.csv", csv_text(table, tuple(table[0])))
    except (InputError, OSError) as error:
        sys.exit(f"choices.py: {error}")
    for row in table:
        if row["modality"] == tables.AVERAGE:
            print(f"{row['input']}: DSC {100 * row['DSC']:.2f}, NSD {100 * row['NSD']:.2f}, {row['cases']} cases")


if __name__ == "__main__":
    main()
