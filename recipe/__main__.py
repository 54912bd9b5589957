"""Train our checkpoint: distill the encoder from LiteMedSAM, learn masks of both kinds of boxes, export.

    python -m recipe --cache cache --compile                              all, for a GPU
    python -m recipe --cache cache --stage masks both --init CHECKPOINT --batch 8 --set learning_rate=1e-4 objects=2
                                                                          on 2 CPU cores
    python -m recipe --average CHECKPOINT CHECKPOINT ... --out FOLDER     the mean of their weights
    python -m recipe --pack FOLDER --cache cache --init CHECKPOINT        for a machine without network (pack.py)
    python -m recipe --smoke                                              2 steps of each, 1 min

  masks    LiteMedSAM's own masks of CT images become labels too (own_masks.py, D25)
1 distill  the encoder learns LiteMedSAM's embedding and, with its frozen decoder, the masks (D13)
2 both     everything learns: exact and drawn boxes in turn, each kind with its own decoder (D24)
3 exact    the decoder of exact boxes alone
4 drawn    the decoder of drawn boxes alone: most are as loose as people draw them (D20)
In all runs every modality has the same chance, and images are augmented (batches.py, D14, D15).

Writes OUT/distill, OUT/both, OUT/exact and OUT/drawn, each with the files of 02_train.py; after each
but the first OUT/grays_anatomy_sam_l0.pt, its best weights as float16 without the rest; and
OUT/curve.png, the Dice of all runs. The same command with --resume goes on where it stopped.
With --minutes each run ends in time, with a learning rate that has fallen as in a whole run.
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
from formats.checkpoints import export_checkpoint, read_checkpoint, save_checkpoint, state_dict_of
from formats.writing import one_run, progress, save_figure, save_json, script, tell
from grid import drawn_boxes, grid_size
from presets import PRESETS, Preset, override
from recipe.batches import ResidentSlices
from recipe.loop import MODEL, RecipeStage, StageRun
from recipe.own_masks import BOXES, write_own_masks
from recipe.pack import write_pack
from segment import BOX_KINDS
from training import out_of_range, starting_network

EXPORTED = "grays_anatomy_sam_l0.pt"
EVERY = 6  # of the validation volumes every sixth slice is used: they are many, and alike
KINDS = tuple(BOX_KINDS)
STAGES = {
    stage.name: stage
    for stage in (
        RecipeStage("distill", 1700, 1.5e-3, 850, ("exact",), 0.3, distilled=True),
        RecipeStage("both", 3500, 4e-4, 1150, KINDS, 0.4),
        *(RecipeStage(kind, 400, 1e-4, 400, (kind,), 0.15, average=0.99, encoder=False) for kind in KINDS),
    )
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(prog="python -m recipe", description=__doc__.splitlines()[0], formatter_class=form)
    p.add_argument("--cache", type=Path, default=Path("cache"), help="folder of step 1")
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for the runs and the exported checkpoint")
    p.add_argument("--stage", nargs="+", choices=("masks", *STAGES), default=["masks", *STAGES],
                   help="which runs")  # fmt: skip
    p.add_argument("--init", type=Path, metavar="CHECKPOINT", help="where the first run starts (default: best.pt of "
                   "the run before)")  # fmt: skip
    p.add_argument(
        "--pack", type=Path, metavar="FOLDER", help="train nothing: write all that it needs, in files of 60 MB"
    )
    p.add_argument("--average", type=Path, nargs="+", metavar="CHECKPOINT", help="train nothing: write the mean of these "
                   "checkpoints' weights")  # fmt: skip
    p.add_argument("--resume", action="store_true", help="go on from last.pt where there is one")
    p.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the preset")
    p.add_argument("--steps", type=int, help="optimiser steps of each run (default: the run's)")
    p.add_argument("--batch", type=int, default=64, help="images a step")
    p.add_argument("--validate-every", type=int, help="steps between validations (default: the run's)")
    p.add_argument("--minutes", type=float, help="of all runs together, validation included")
    p.add_argument("--compile", action="store_true", help="compile the networks: slower to start, faster on a GPU")
    p.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    p.add_argument("--smoke", action="store_true", help="2 steps of each run on a tiny cache made on the spot")
    args = p.parse_args(argv)
    if bad := out_of_range(vars(args)):
        p.error(bad)
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        p.error("--minutes must be a number above 0")
    return args


def validation_items(folder: Path, entries: list[CacheEntry], preset: Preset, kind: str):
    """(modality, item) pairs of data.validation_item, with boxes of a kind: loosened by the middle of training's range."""
    for entry in entries:
        item = validation_item(folder, entry, preset)
        size, looseness = grid_size(entry.height, entry.width), BOX_KINDS[kind][1] / 2
        item["boxes"] = drawn_boxes(entry.name, item["boxes"], looseness, size).astype(np.float32)
        yield entry.modality, item


def run_stage(stage: RecipeStage, args: argparse.Namespace, init: Path | None, minutes: float | None) -> None:
    """One run, from `init`, or from where it stopped. It ends with its last step, or when its minutes are over."""
    out, (training, validation), start = args.out / stage.name, read_split(args.cache), time.monotonic()
    validation = [entry for i, entry in enumerate(validation) if i % EVERY == 0 or not entry.name.startswith("3D_")]
    settings = ["jitter=scaled", "objects=4", f"learning_rate={stage.learning_rate}"]
    preset, last = override(PRESETS["fixed"], [*settings, *args.set]), out / "last.pt"

    resumed = args.resume and last.is_file()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, told = starting_network(MODEL, preset, last if resumed else init, args.seed, device, KINDS[1:])
    must_match = {"stage": stage.name, "steps": stage.steps, "batch": stage.batch, "seed": args.seed}
    run = StageRun(stage, preset, network, device, must_match | {"data": fingerprint(args.cache)}, args.compile)
    if resumed:
        run.resume(last)
    tell(f"recipe: {stage.name}, {told}; {len(training)} images, {len(validation)} for validation, "
          f"steps {run.step} to {stage.steps}")  # fmt: skip
    save_json(out / "arguments.json", vars(args) | {"preset_fields": vars(preset), "stage_fields": vars(stage)})
    torch.backends.cudnn.benchmark = True  # every batch has the same shape: let the GPU find its fastest convolutions

    def check() -> None:
        run.check(lambda kind: validation_items(args.cache, validation, preset, kind), out)

    # A batch depends on (seed, step) alone
    slices = ResidentSlices(args.cache, training, preset, stage.batch, args.seed, device)
    for step in progress(range(run.step, stage.steps), stage.name, stage.steps, unit="step", initial=run.step):
        done = step / stage.steps
        if minutes is not None:
            done = max(done, (time.monotonic() - start) / (60 * max(minutes, 1e-9)))
        if done >= 1:
            break
        run.train_step(slices.batch(step, run.kind()), done)
        if run.step % stage.validate_every == 0:
            check()
        run.keep(out, now=run.step == stage.steps)
    if not run.log or run.log[-1]["step"] != run.step:
        run.keep(out, now=True)
        check()
    tell(f"recipe: {stage.name}, {run.step} steps, {(time.monotonic() - start) / 60:.1f} minutes")


def write_average(paths: list[Path], out: Path) -> None:
    """OUT/grays_anatomy_sam_l0.pt: the mean of the weights of checkpoints of one network, as float16. (D21)"""
    stored = [read_checkpoint(path) for path in paths]
    each = [state_dict_of(one) for one in stored]
    if len({tuple((name, value.shape) for name, value in weights.items()) for weights in each}) > 1:
        raise InputError("--average: these checkpoints are of different networks; name those of one")
    mean = {
        name: torch.stack([weights[name].float() for weights in each]).mean(dim=0).half() if value.is_floating_point() else value
        for name, value in each[-1].items()
    }  # fmt: skip
    save_checkpoint(out / EXPORTED, {key: stored[-1].get(key) for key in ("architecture", "preset")} | {"model": mean})


def draw_curve(out: Path) -> None:
    """The Dice of all runs in one figure."""
    found = [path for name in STAGES if (path := out / name / "dice_by_modality.csv").is_file()]
    rows = [row for path in found for row in csv.DictReader(path.read_text("utf-8").splitlines())]
    if len({row["stage"] for row in rows}) > 1:
        figure = Figure(figsize=(7, 4))
        plot_dice(rows, figure.subplots())
        save_figure(out / "curve.png", figure)


def run_all(args: argparse.Namespace) -> None:
    """The runs that were asked for, and after each the export."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("the recipe trains in one process; start it without torchrun")
    if args.average:
        write_average(args.average, args.out)
        tell(f"recipe: wrote {args.out / EXPORTED}, the mean of {len(args.average)} checkpoints")
        return
    if "masks" in args.stage:
        boxes = 6 if args.smoke else BOXES
        count = write_own_masks(args.cache, read_split(args.cache)[0], PRESETS["fixed"], boxes)
        tell(f"recipe: masks, {count} new ones in {args.cache / 'own'}")
    if args.pack:
        tell(f"recipe: wrote {', '.join(write_pack(args.pack, args.cache, args.init))} to {args.pack}")
        return
    names, end = list(STAGES), args.minutes and time.monotonic() + 60 * args.minutes
    stages, init = [STAGES[name] for name in names if name in args.stage], args.init
    for i, stage in enumerate(stages):
        if init is None and stage.name != names[0]:
            init = args.out / names[names.index(stage.name) - 1] / "best.pt"
        changed = {"steps": args.steps, "batch": args.batch, "validate_every": args.validate_every}
        stage = replace(stage, **{name: value for name, value in changed.items() if value})
        left = sum(one.share for one in stages[i:])
        run_stage(stage, args, init, end and (end - time.monotonic()) / 60 * stage.share / left)
        init = args.out / stage.name / "best.pt"  # the next run starts from this one
        if not stage.distilled:
            export_checkpoint(init, args.out / EXPORTED)
    draw_curve(args.out)
    tell(f"recipe: finished, {'removed again' if args.smoke else f'wrote {args.out}'}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with script("recipe", args, "demo_data:smoke_train"), one_run(args.out, *STAGES):
        args.steps = 2 if args.smoke else args.steps
        run_all(args)


if __name__ == "__main__":
    main()
