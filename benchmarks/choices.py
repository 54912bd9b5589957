"""Does the enhancement help? Networks trained alike but for their input, scored on gray pictures. [P 4.5]

    python benchmarks/choices.py --cases val val_unseen --train cache        writes results/choices

For each input and seed a network is trained with the same start, images, boxes and steps; then steps 4 and 5, exact boxes.
The start is our checkpoint, which knows the three channels: a short run shows whether another input catches up, not what
a long one finds.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from itertools import product
from pathlib import Path

import torch
from accuracy import RELEASED_CHANNELS, System, Table, parts_of, prepare, rows_of, table_text  # it finds our modules

import tables
from data import read_split
from enhance import is_gray
from formats import InputError
from formats.checkpoints import OUR_CHECKPOINT
from formats.writing import csv_text, progress, save_text, script
from presets import PRESETS, override
from recipe.batches import ResidentSlices
from recipe.loop import RecipeStage, StageRun
from training import starting_network

RAW = "raw three times"  # what the others are compared with
INPUTS = {  # name -> changes of preset `fixed`
    "raw, diffused, equalized": (),
    RAW: ("iterations=0", "equalize=nothing"),
    "released channels": RELEASED_CHANNELS,
    "raw, diffused, diffused": ("equalize=nothing",),
    "raw, diffused, raw equalized": ("equalize=raw",),
}
TABLE = Table("Equal runs that differ in the input alone", (), parts=("folder",), only="pictures")
BATCH, OBJECTS, RATE = 4, 4, 1e-4
COLORED = ("Dermoscopy", "Endoscopy", "Fundus", "Microscopy")  # modalities whose images the enhancement leaves alone
EVERY = 6  # of a training volume's slices, which are alike, every sixth is loaded


def train(args: Namespace, name: str, seed: int, out: Path) -> str:
    """One run: everything learns, from our checkpoint, with one input. -> its checkpoint"""
    fields = ["jitter=scaled", f"objects={OBJECTS}", f"learning_rate={RATE}", *INPUTS[name]]
    preset, device = override(PRESETS["fixed"], fields), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entries = [entry for entry in read_split(args.train)[0] if entry.modality not in COLORED]
    entries = [entry for i, entry in enumerate(entries) if i % EVERY == 0 or not entry.name.startswith("3D_")]
    network, _ = starting_network("proposed", preset, args.weights, seed, device)
    stage = RecipeStage("choices", args.steps, RATE, args.steps, ("exact",), 1.0, BATCH, average=0.9, small=True)
    run = StageRun(stage, preset, network, device, {}, compiled=False)
    slices = ResidentSlices(args.train, entries, preset, BATCH, seed, device)
    for step in progress(range(args.steps), f"train {name}"):
        run.train_step(slices.batch(step), step / args.steps)
    run.save(out, model=run.average.state_dict())
    return str(out)


def with_means(rows: list[dict]) -> list[dict]:
    """The rows, whose system is "INPUT, seed N", and a row for each input and case: the mean over the seeds."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["folder"], row["input"], row["case"]), []).append(row)
    scores = tables.score_names()
    means = [{score: sum(run[score] for run in runs) / len(runs) for score in scores} for runs in groups.values()]
    return rows + [
        runs[0] | {"system": runs[0]["input"]} | mean for runs, mean in zip(groups.values(), means, strict=True)
    ]


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the differences."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument("--cases", type=Path, nargs="+", required=True, help="folders of .npz cases with imgs and gts")
    p.add_argument("--train", type=Path, required=True, metavar="CACHE", help="cache of step 1 to train with")
    p.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS)[:2], help="to compare")
    p.add_argument("--steps", type=int, default=60, help="steps of a run")
    p.add_argument("--seeds", type=int, default=3, help="runs of each input")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="checkpoint that all runs start from")
    p.add_argument("-o", "--out", type=Path, default=Path("results/choices"), help="folder for the tables")
    args = p.parse_args(argv)
    with script("choices.py") as work:
        if RAW not in args.inputs or len(args.inputs) < 2:
            raise InputError(f"--inputs: runs are compared with '{RAW}'; name it and another one")
        places, _ = prepare(TABLE, args.cases, work, lambda case: is_gray(case.image))
        rows, others = [], [name for name in args.inputs if name != RAW]
        for seed, name in product(range(args.seeds), args.inputs):
            system = System(f"{name}, seed {seed}", model=name, preset=("fixed", *INPUTS[name]))
            trained = train(args, name, seed, work / f"{system.name}.pt")
            found = rows_of([system], {name: trained}, places)
            rows += [row | {"input": name, "seed": seed} for row in found if row["system"] == system.name]
        every, ends = with_means(rows), ["", *(f", seed {seed}" for seed in range(args.seeds))]
        pairs = [(name + end, RAW + end) for name, end in product(others, ends)]
        lines = [part | one for part, here in parts_of(TABLE, every) for one in tables.paired_differences(here, pairs)]
        text = table_text(TABLE, [row for row in every if row["system"] in args.inputs], lines)
        text += f"Gray pictures; {args.steps} steps from our checkpoint, which was trained on the three channels. "
        text += "Without a seed: each case's mean over the seeds.\n"
        columns = ("folder", "system", "seed", "case", "modality", "dsc_strict", "nsd_strict")
        save_text(args.out / "runs.csv", csv_text([row | {"system": row["input"]} for row in rows], columns))
        save_text(args.out / "runs.md", text)
    print(text)
    return lines


if __name__ == "__main__":
    main()
