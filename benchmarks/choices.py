"""Does the enhancement help? Networks trained alike but for their input, scored on gray pictures. [P 4.5]

    python benchmarks/choices.py --cases val val_unseen --train cache        writes results/choices

For each input and seed a network is trained with the same start, images, boxes and steps; then steps 4 and 5, exact boxes.
The start is our checkpoint, which knows the three channels: a short run shows whether another input catches up, not what
a long one finds.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

import torch
from accuracy import RELEASED_CHANNELS, System, Table, parts_of, prepare, rows_of  # it finds the repository's modules

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
SHOWN = {"dsc_strict": "DSC", "nsd_strict": "NSD"}
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


def equal_runs(args: Namespace, work: Path) -> list[dict]:
    """The rows of step 5 for every run and gray case, each with its `seed`. The system is the input."""
    systems = [System(name, model=name, preset=("fixed", *INPUTS[name])) for name in args.inputs]
    places, _ = prepare(TABLE, args.cases, work, lambda case: is_gray(case.image))
    found = []
    for seed in range(args.seeds):
        models = {name: train(args, name, seed, work / f"{name}, seed {seed}.pt") for name in args.inputs}
        found += [row | {"seed": seed} for row in rows_of(systems, models, places) if row["system"] in models]
    return found


def over_seeds(rows: list[dict]) -> list[dict]:
    """A row for each input and case: the mean of its scores over the seeds."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["system"], row["case"]), []).append(row)
    scores = tables.score_names()
    return [runs[0] | {score: sum(r[score] for r in runs) / len(runs) for score in scores} for runs in groups.values()]


def averages(rows: list[dict]) -> list[dict]:
    """Each input minus raw three times: DSC and NSD, mean over the modalities."""
    pairs = [(name, RAW) for name in dict.fromkeys(row["system"] for row in rows) if name != RAW]
    found = tables.paired_differences(rows, pairs)
    return [line for line in found if line["modality"] == tables.AVERAGE and line["score"] in SHOWN]


def differences(rows: list[dict]) -> list[dict]:
    """The averages of each folder: 95 % interval over cases, least and most of the seeds."""
    lines = []
    for part, here in parts_of(TABLE, rows):
        alone = [averages([row for row in here if row["seed"] == seed]) for seed in {row["seed"] for row in here}]
        for i, line in enumerate(averages(over_seeds(here))):
            values = [of_seed[i]["difference"] for of_seed in alone]
            lines.append(part | line | {"least seed": min(values), "most seed": max(values)})
    return lines


def runs_table(rows: list[dict], lines: list[dict], steps: int) -> str:
    """runs.md: means of every input, then the differences."""
    means = [["cases", "input", "number", *SHOWN.values()]]
    for part, here in parts_of(TABLE, rows):
        for (name, modality), line in tables.summarize(over_seeds(here)).items():
            if modality == tables.AVERAGE:
                cells = [f"{100 * line[score]:.2f}" for score in SHOWN]
                means.append([part["folder"], name, str(line["cases"]), *cells])
    changes = [["cases", f"input minus {RAW}", "score", "difference", "95 % interval", "seeds"]]
    for line in lines:
        keys = ("difference", "low", "high", "least seed", "most seed")
        mean, low, high, least, most = (f"{100 * line[key]:+.2f}" for key in keys)
        named = [line["folder"], line["system"], SHOWN[line["score"]]]
        changes.append([*named, mean, f"{low} to {high}", f"{least} to {most}"])
    note = (
        f"Per cent, strict, gray pictures, exact boxes, mean over modalities; {steps} steps, {len({r['seed'] for r in rows})} seeds,\n"
        "whose mean is taken case by case. All start from the checkpoint, which was trained on the three channels.\n"
    )
    return f"# {TABLE.title}\n\n{tables.pipe_table(means)}\n\n{tables.pipe_table(changes)}\n\n{note}"


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
        rows = equal_runs(args, work)
        lines = differences(rows)
        save_text(args.out / "runs.csv", csv_text(rows, ("folder", "system", "seed", "case", "modality", *SHOWN)))
        save_text(args.out / "runs.md", runs_table(rows, lines, args.steps))
    print(runs_table(rows, lines, args.steps))
    return lines


if __name__ == "__main__":
    main()
