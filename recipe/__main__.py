"""Train our checkpoint: distill the encoder from LiteMedSAM, fine-tune, learn loose boxes, export.

    python -m recipe --cache cache --compile                         four runs, for a GPU
    python -m recipe --cache cache --stage loosen --init CHECKPOINT  run 3: 1 h on 2 CPU cores in bfloat16
    python -m recipe --smoke                                         2 steps of each, 1 min
    python -m recipe --stage average --init runs/loosen/best.pt=0.6 lite_medsam=0.4

1 distill    the encoder learns LiteMedSAM's embedding and, with its frozen decoder, the masks (D13)
2 finetune   everything learns the masks
3 loosen     most boxes are as loose as people draw them (D20); decoder, neck and last stage of the
             encoder learn, the rest is frozen, so that a CPU suffices
4 contour    the same with a loss at the contour (D22)
  average    no training: the mean of checkpoints' weights (D21)
In all runs every modality has the same chance, and images are augmented (batches.py, D14, D15).

Writes OUT/distill, OUT/finetune, OUT/loosen and OUT/contour, each with the files of 02_train.py;
then OUT/grays_anatomy_sam_l0.pt, the best weights as float16 without the rest, and OUT/curve.png,
the Dice of all runs. The same command with --resume goes on where it stopped.
"""

import argparse
import csv
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from data import CacheEntry, read_split, validation_item
from figures import plot_dice
from formats import InputError
from formats.cache import fingerprint
from formats.checkpoints import export_checkpoint, save_checkpoint
from formats.writing import progress, save_figure, save_json, script
from grid import drawn_boxes, grid_size
from presets import PRESETS, Preset, override
from recipe.batches import ResidentSlices
from recipe.loop import MODEL, RecipeStage, StageRun, average_weights
from training import starting_network

EXPORTED = "grays_anatomy_sam_l0.pt"
EVERY = 6  # of the validation volumes every sixth slice is used: they are many, and alike
NECK = ("image_encoder.neck", "image_encoder.norm", "image_encoder.backbone.stages.4")  # and the encoder's last stage
LOOSEN = RecipeStage(  # what a CPU with bfloat16 can train in an hour
    "loosen", 1000, 1e-4, 500, batch=4, looseness=0.3, average=0.99, small=True,
    only=("mask_decoder", "prompt_encoder", *NECK), encoder_share=0.2,
)  # fmt: skip
STAGES = {
    stage.name: stage
    for stage in (
        RecipeStage("distill", 1700, 1.5e-3, 850, distilled=True),
        RecipeStage("finetune", 3500, 4e-4, 1150),
        LOOSEN,
        replace(LOOSEN, name="contour", steps=300, validate_every=300, boundary=0.5),
    )
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(prog="python -m recipe", description=__doc__.splitlines()[0], formatter_class=form)
    p.add_argument("--cache", type=Path, default=Path("cache"), help="folder of step 1")
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for the runs and the exported checkpoint")
    p.add_argument("--stage", choices=(*STAGES, "all", "average"), default="all", help="which run")
    p.add_argument("--init", nargs="+", metavar="CHECKPOINT", help="start from this checkpoint (default: best.pt of the "
                   "run before); of --stage average CHECKPOINT=SHARE ...")  # fmt: skip
    p.add_argument(
        "--only", nargs="+", metavar="MODULE", help="train these alone, as mask_decoder (default: the run's)"
    )
    p.add_argument("--resume", action="store_true", help="go on from last.pt where there is one")
    p.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the preset")
    p.add_argument("--steps", type=int, help="optimiser steps of each run (default: the run's)")
    p.add_argument("--batch", type=int, help="images a step (default: the run's)")
    p.add_argument("--validate-every", type=int, help="steps between validations (default: the run's)")
    p.add_argument("--minutes", type=float, help="stop a run after so long, saved; --resume goes on")
    p.add_argument("--compile", action="store_true", help="compile the networks: slower to start, faster on a GPU")
    p.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    p.add_argument("--smoke", action="store_true", help="2 steps of each run on a tiny cache made on the spot")
    return p.parse_args(argv)


def validation_items(folder: Path, entries: list[CacheEntry], preset: Preset):
    """(modality, item) pairs of data.validation_item. With a looseness each object is asked for twice: by
    its exact box, and by one that is half as loose as training's loosest."""
    for entry in entries:
        item = validation_item(folder, entry, preset)
        if preset.looseness:
            size = grid_size(entry.height, entry.width)
            loose = drawn_boxes(entry.name, item["boxes"], preset.looseness / 2, size)
            item["boxes"] = np.concatenate([item["boxes"], loose.astype(np.float32)])
            item["masks"] = np.concatenate([item["masks"], item["masks"]])
        yield entry.modality, item


def run_stage(stage: RecipeStage, args: argparse.Namespace) -> bool:
    """One run, from --init or the run before it, or from where it stopped. -> whether it is finished"""
    out, (training, validation) = args.out / stage.name, read_split(args.cache)
    validation = [entry for i, entry in enumerate(validation) if i % EVERY == 0 or not entry.name.startswith("3D_")]
    settings = ["jitter=scaled", "objects=4", f"learning_rate={stage.learning_rate}", f"looseness={stage.looseness}"]
    preset = override(PRESETS["fixed"], [*settings, *args.set])

    names, last = list(STAGES), out / "last.pt"
    resumed = args.resume and last.is_file()
    before = None if stage.name == names[0] else args.out / names[names.index(stage.name) - 1] / "best.pt"
    init = last if resumed else Path(args.init[0]) if args.init else before
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, told = starting_network(MODEL, preset, init, args.seed, device)
    must_match = {"stage": stage.name, "steps": stage.steps, "batch": stage.batch, "seed": args.seed}
    must_match |= {"only": stage.only, "data": fingerprint(args.cache)}
    run = StageRun(stage, preset, network, device, must_match, args.compile)
    if resumed:
        run.resume(last)
    print(f"recipe: {stage.name}, {told}; {len(training)} images, {len(validation)} for validation, "
          f"steps {run.step} to {stage.steps}")  # fmt: skip
    save_json(out / "arguments.json", vars(args) | {"preset_fields": vars(preset), "stage_fields": vars(stage)})
    torch.backends.cudnn.benchmark = True  # every batch has the same shape: let the GPU find its fastest convolutions

    # A batch depends on (seed, step) alone
    slices, start = ResidentSlices(args.cache, training, preset, stage.batch, args.seed, device), time.monotonic()
    for step in progress(range(run.step, stage.steps), stage.name, stage.steps, unit="step", initial=run.step):
        run.train_step(slices.batch(step))
        late = args.minutes is not None and time.monotonic() - start > 60 * args.minutes
        if run.step % stage.validate_every == 0:
            run.check(validation_items(args.cache, validation, preset), out)
        run.keep(out, now=late or run.step == stage.steps)
        if late:
            break
    if not run.log or run.log[-1]["step"] != run.step:
        run.check(validation_items(args.cache, validation, preset), out)
    return run.step >= stage.steps


def finish(out: Path) -> None:
    """The exported checkpoint, and the Dice of all runs in one figure."""
    done = [name for name in STAGES if (out / name / "best.pt").is_file()]
    export_checkpoint(out / done[-1] / "best.pt", out / EXPORTED)
    found = [path for name in STAGES if (path := out / name / "dice_by_modality.csv").is_file()]
    rows = [row for path in found for row in csv.DictReader(path.read_text("utf-8").splitlines())]
    if len({row["stage"] for row in rows}) > 1:
        figure = Figure(figsize=(7, 4))
        plot_dice(rows, figure.subplots())
        save_figure(out / "curve.png", figure)


def run_all(args: argparse.Namespace) -> bool:
    """The runs that were asked for, and the export. -> whether all are finished"""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("the recipe trains in one process; start it without torchrun")
    if args.stage == "average":
        save_checkpoint(args.out / EXPORTED, average_weights(args.init or []))
        export_checkpoint(args.out / EXPORTED, args.out / EXPORTED)
        print(f"recipe: wrote {args.out / EXPORTED}")
        return True
    if args.init and len(args.init) > 1:
        raise InputError("--init: a run starts from one checkpoint; several are for --stage average")
    for stage in STAGES.values() if args.stage == "all" else [STAGES[args.stage]]:
        changed = {"steps": args.steps, "batch": args.batch, "validate_every": args.validate_every}
        changed["only"] = args.only and tuple(args.only)
        if not run_stage(replace(stage, **{name: value for name, value in changed.items() if value}), args):
            print(f"recipe: {args.minutes} minutes are over; the same command with --resume goes on")
            return False
        args.init = None  # the next run starts from this one
    if args.stage != "distill":
        finish(args.out)
    print(f"recipe: finished, {'removed again' if args.smoke else f'wrote {args.out}'}")
    return True


def main(argv: list[str] | None = None) -> bool:
    """Returns whether all that was asked for is finished."""
    args = parse(argv)
    with script("recipe", args, "demo_data:smoke_train"):
        args.steps = 2 if args.smoke else args.steps
        return run_all(args)


if __name__ == "__main__":
    main()
