"""What each choice buys: small training runs of equal length that differ in one thing, and what the trained model loses
when its input is changed. [P 4.5]

    python benchmarks/choices.py --cache cache --steps 60 --batch 6            hours on a CPU, minutes on a GPU
    python benchmarks/choices.py --cases val                                   the second table, from our checkpoint

A run is one of recipe/, without its augmentation, moving average and weight decay. It starts from random encoder weights
and sees the same images, objects and boxes as the others. The changed inputs say what the trained network leans on, not
what a network trained with them would score. Finished runs are kept. Writes runs.csv and inputs.csv into --out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

from fast import engines
from files import InputError
from files.checkpoints import save_checkpoint
from files.formats import list_cases, read_case
from files.writing import csv_text, save_npz, save_text
from grid import boxes_from_labels, promptable_labels
from recipe.__main__ import MODEL, STAGES, run_stage
from recipe.__main__ import parse as recipe_flags
from segment import build
from tables import AVERAGE, score_case, summarize
from training import Extras

GRAY_THREE_TIMES = ["iterations=0", "equalize=nothing"]
RELEASED = ["iterations=1", "diffusion_range=1.0", "border=wrap", "rounding=truncate", "equalize=raw"]
RUNS = {  # name -> stage of recipe/, settings; the first is what the others are compared with
    "three channels, colour kept, MedSAM's decoder, distilled": ("distill", []),
    "gray three times": ("distill", GRAY_THREE_TIMES),
    "released channels": ("distill", RELEASED),
    "colour turned gray": ("distill", ["color=gray"]),
    "random decoder, all learnt, no teacher": ("finetune", ["decoder=random"]),
    "MedSAM's decoder, all learnt, no teacher": ("finetune", []),
}
INPUTS = {"as trained": [], "gray three times": GRAY_THREE_TIMES, "released channels": RELEASED, "gray": ["color=gray"]}


def train_runs(args: argparse.Namespace) -> None:
    """One run for each of RUNS, and a row each: the last line of its log."""
    random, rows = args.work / "random.pt", []
    torch.manual_seed(args.seed)
    save_checkpoint(
        random, {"model": build(MODEL).state_dict()}
    )  # where "finetune" starts, as "distill" does by itself
    numbers = {"steps": args.steps, "validate-every": args.steps, "batch": args.batch, "objects": 2, "seed": args.seed}
    flags = [f"--{name}={value}" for name, value in numbers.items()]
    flags += [f"--device={args.device}", f"--cache={args.cache}", f"--init={random}"]
    flags += [f"--teacher-cache={args.work / 'teacher'}"]  # it turns augmentation off, without a teacher too
    for number, (name, (stage, settings)) in enumerate(RUNS.items()):
        out = args.work / f"run{number}"
        log = out / stage / "log.csv"  # is written after the last step
        if not log.is_file():
            own = [f"--out={out}", "--set", "jitter=both", f"learning_rate={args.rate}", *settings]
            print(f"{name}:")
            run_stage(STAGES[stage], recipe_flags([*flags, *own]), Extras(clip=1.0))
        dice = float(list(csv.DictReader(log.read_text(encoding="utf-8").splitlines()))[-1]["validation_dice"])
        rows.append({"run": name, "images": args.steps * args.batch, "Dice": dice})
        print(f"{name}: Dice {dice:.3f} after {rows[-1]['images']} image-steps")
        save_text(args.out / "runs.csv", csv_text(rows, ("run", "images", "Dice")))


def changed_inputs(args: argparse.Namespace) -> None:
    """DSC and NSD of our checkpoint on 2D cases under each of INPUTS, same boxes."""
    gts, rows, cases = args.work / "gts", [], {}
    for path in list_cases(args.cases):
        case = read_case(path, boxes_from_masks=True)
        if not case.is_3d:
            labels, _ = promptable_labels(case.labels)
            file, boxes = f"{case.name}.npz", boxes_from_labels(labels)[1]
            cases[file] = case.image, boxes
            save_npz(gts / file, gts=labels, boxes=boxes)
    for name, settings in INPUTS.items():
        segmenter, folder = engines.load("proposed", settings=settings), args.work / "segs"
        for file, (image, boxes) in tqdm(cases.items(), name, disable=None):
            save_npz(folder / file, segs=segmenter.segment_image(image, boxes))
            found, problems = score_case(gts / file, {name: folder}, ("strict",))
            if problems:
                raise InputError(problems[0])
            rows += [row for row in found if row["system"] == name]
    table = [
        {"input": name, "modality": modality, "cases": line["cases"], "DSC": line["dsc_strict"], "NSD": line["nsd_strict"]}
        for (name, modality), line in summarize(rows).items()
    ]  # fmt: skip
    save_text(args.out / "inputs.csv", csv_text(table, ("input", "modality", "cases", "DSC", "NSD")))
    for row in table:
        if row["modality"] == AVERAGE:
            print(f"{row['input']}: DSC {100 * row['DSC']:.2f}, NSD {100 * row['NSD']:.2f}, {row['cases']} cases")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--cache", type=Path, help="folder of step 1, for the training runs")
    p.add_argument("--cases", type=Path, help="folder of .npz cases with imgs and gts, for the changed inputs")
    p.add_argument("--steps", type=int, default=60, help="optimiser steps of a run")
    p.add_argument("--batch", type=int, default=6, help="images a step")
    p.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--work", type=Path, default=Path("out/choices"), help="folder for runs and label maps")
    p.add_argument("-o", "--out", type=Path, default=Path("results/choices"), help="folder for the tables")
    args = p.parse_args(argv)
    try:
        if not args.cache and not args.cases:
            raise InputError("give --cache FOLDER for the runs, or --cases FOLDER for the changed inputs, or both")
        if args.cases:
            changed_inputs(args)
        if args.cache:
            train_runs(args)
    except (InputError, OSError) as error:
        sys.exit(f"choices.py: {error}")


if __name__ == "__main__":
    main()
