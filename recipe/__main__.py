"""Train our checkpoint: distill the encoder from LiteMedSAM, fine-tune, learn loose boxes, export. See recipe/__init__.py.

    python -m recipe --cache cache --device cuda --compile                   the four runs
    python -m recipe --cache cache --stage loosen --init CHECKPOINT          the third: an hour on a CPU
    python -m recipe --cache cache --batch 8 --teacher-cache teacher         all on a CPU, in many hours
    python -m recipe --smoke                                                 2 steps of each, tiny cases, 1 min

Writes OUT/distill, OUT/finetune, OUT/loosen and OUT/contour, each with last.pt, best.pt, log.csv, dice_by_modality.csv and curve.png;
then OUT/grays_anatomy_sam_l0.pt: the best weights as float16, without the rest; and OUT/curve.png, the Dice of all runs.
The same command with --resume goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from data import CacheEntry, SliceDataset, read_split, validation_item
from figures import loss_curve, plot_dice
from files import InputError
from files.checkpoints import export_checkpoint
from files.index import fingerprint
from files.writing import csv_text, progress, save_figure, save_json, save_text, tell
from grid import drawn_boxes, grid_size
from presets import PRESETS, Preset, override
from recipe.average import export_average
from recipe.batches import ResidentSlices
from recipe.distill import Teacher, one_cycle
from segment import build
from training import LOG_COLUMNS, Extras, Training, starting_network

MODEL, EXPORTED = "proposed", "grays_anatomy_sam_l0.pt"
TEACHER_CACHE = 12 * 10**9  # bytes that the folder of the teacher's embeddings may have
EVERY = 6  # of the validation volumes every sixth slice is used: they are many, and alike


@dataclass(frozen=True)
class TrainingRun:
    """What differs between the runs."""

    name: str
    steps: int
    learning_rate: float  # peak of the cycle
    validate_every: int  # steps
    batch: int = 64  # images a step
    looseness: float = 0.0  # of the boxes (D20)
    extras: Extras = Extras(weight_decay=0.05, clip=1.0, average=0.999)


NECK = ("image_encoder.neck", "image_encoder.norm", "image_encoder.backbone.stages.4")  # and the encoder's last stage
LOOSEN = Extras(  # what a CPU can train in an hour
    weight_decay=0.05, clip=1.0, average=0.99, frozen_norms=True, bfloat16=True, encoder_share=0.2,
    only=("mask_decoder", "prompt_encoder", *NECK),
)  # fmt: skip
STAGES = {
    stage.name: stage
    for stage in (
        TrainingRun("distill", 1700, 1.5e-3, 850),
        TrainingRun("finetune", 3500, 4e-4, 1150),
        TrainingRun("loosen", 1000, 1e-4, 500, batch=4, looseness=0.3, extras=LOOSEN),
        TrainingRun("contour", 300, 1e-4, 300, batch=4, looseness=0.3, extras=replace(LOOSEN, boundary=0.5)),
    )
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m recipe", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )  # fmt: skip
    p.add_argument("--cache", type=Path, default=Path("cache"), help="folder of step 1")
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for the runs and the exported checkpoint")
    p.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="which run")
    p.add_argument("--init", type=Path, help="start from this checkpoint (default: best.pt of the run before)")
    p.add_argument(
        "--only", nargs="+", metavar="MODULE", help="train nothing else, such as mask_decoder (default: the run's)"
    )
    p.add_argument("--resume", action="store_true", help="go on from last.pt where there is one")
    p.add_argument("--steps", type=int, help="optimiser steps of each run (default: the run's)")
    p.add_argument("--validate-every", type=int, help="steps between validations (default: the run's)")
    p.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    p.add_argument("--batch", type=int, help="images a step (default: the run's)")
    p.add_argument("--objects", type=int, default=4, help="objects an image; they share one embedding")
    p.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the preset")
    p.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks, but not with --teacher-cache: slower to start, faster on a GPU",
    )
    p.add_argument(
        "--teacher-cache", type=Path, help="folder to keep the teacher's embeddings in; then nothing is augmented"
    )
    p.add_argument(
        "--average", nargs="+", metavar="CHECKPOINT=SHARE", help="train nothing: average these, see average.py"
    )
    p.add_argument("--minutes", type=float, help="stop a run after so long, saved; --resume goes on")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--workers", type=int, default=0, help="processes that load images")
    p.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    p.add_argument("--smoke", action="store_true", help="2 steps of each run on a tiny cache made on the spot, CPU")
    return p.parse_args(argv)


def batches_of(args: argparse.Namespace, preset: Preset, training: list, batch: int, steps: range):
    """One batch after another, which depends on (seed, step) alone: augmented, unless the teacher's answers are kept."""
    drawn = (args.cache, training, preset, batch, args.objects, args.seed)
    if args.teacher_cache is None:
        slices = ResidentSlices(*drawn, torch.device(args.device), augment=True, workers=args.workers)
        return map(slices.batch, steps)
    plan = [[(step, place) for place in range(batch)] for step in steps]
    return DataLoader(SliceDataset(*drawn), batch_sampler=plan, num_workers=args.workers)


def validation_items(folder: Path, entries: list[CacheEntry], preset: Preset):
    """(modality, item) pairs of data.validation_item.

    With a looseness each object is asked for twice: by its exact box, and by one that is half as loose as training's loosest.
    """
    for entry in entries:
        item = validation_item(folder, entry, preset)
        if preset.looseness:
            size = grid_size(entry.height, entry.width)
            loose = drawn_boxes(entry.name, item["boxes"], preset.looseness / 2, size)
            item["boxes"] = np.concatenate([item["boxes"], loose.astype(np.float32)])
            item["masks"] = np.concatenate([item["masks"], item["masks"]])
        yield entry.modality, item


def write_log(folder: Path, log: list[dict], stage: str) -> None:
    """log.csv, dice_by_modality.csv, curve.png."""
    save_text(folder / "log.csv", csv_text(log, LOG_COLUMNS, number=""))
    dice = [{"stage": stage, "step": row["step"]} | row["dice"] for row in log]
    save_text(folder / "dice_by_modality.csv", csv_text(dice, tuple(dice[0])))
    save_figure(folder / "curve.png", loss_curve(log))


def open_run(stage: TrainingRun, args: argparse.Namespace, preset: Preset, steps: int, must_match: dict) -> Training:
    """The run at its first step, from --init or the run before it, or where it stopped."""
    names, last = list(STAGES), args.out / stage.name / "last.pt"
    resume = args.resume and last.is_file()
    if resume:
        network, told = build(MODEL), f"all weights from {last}"
    else:
        before = None if stage.name == names[0] else args.out / names[names.index(stage.name) - 1] / "best.pt"
        network, told = starting_network(MODEL, preset, args.init or before, args.seed)
    print(f"recipe: {stage.name}, {told}")
    teacher = None
    if stage.name == "distill":
        teacher = Teacher(torch.device(args.device), args.teacher_cache, TEACHER_CACHE)
    changed = {"rate": partial(one_cycle, steps=steps, peak=preset.learning_rate), "teacher": teacher}
    changed |= {"compile": args.compile and not args.teacher_cache, "only": tuple(args.only or stage.extras.only)}
    run = Training(network, preset, args.device, replace(stage.extras, **changed))
    if resume:
        run.resume(last, must_match)
    return run


def run_stage(stage: TrainingRun, args: argparse.Namespace) -> bool:
    """One run. -> whether it is finished, or was stopped by --minutes."""
    # 1. Data and preset
    steps, validate_every = args.steps or stage.steps, args.validate_every or stage.validate_every
    out, batch_size, (training, validation) = args.out / stage.name, args.batch or stage.batch, read_split(args.cache)
    validation = [entry for i, entry in enumerate(validation) if i % EVERY == 0 or not entry.name.startswith("3D_")]
    settings = ["jitter=scaled", f"learning_rate={stage.learning_rate}", f"looseness={stage.looseness}"]
    preset = override(PRESETS["fixed"], [*settings, *args.set])

    # 2. Starting weights, and what Table 3 has not
    must_match = {"stage": stage.name, "steps": steps, "batch": batch_size, "objects": args.objects, "seed": args.seed}
    must_match |= {"only": args.only, "augmentation": args.teacher_cache is None, "data": fingerprint(args.cache)}
    run = open_run(stage, args, preset, steps, must_match)
    print(f"recipe: {len(training)} images, {len(validation)} for validation, steps {run.step} to {steps}")
    save_json(out / "arguments.json", vars(args) | {"preset_fields": vars(preset), "steps": steps})
    torch.backends.cudnn.benchmark = True  # every batch has the same shape: let the GPU find its fastest convolutions

    def validate() -> None:
        if run.validate(validation_items(args.cache, validation, preset)):
            run.save(out / "best.pt", must_match, best=True)
        write_log(out, run.log, stage.name)
        tell(f"step {run.step}, Dice {run.log[-1]['validation_dice']:.4f}")

    # 3. The steps
    batches, start = batches_of(args, preset, training, batch_size, range(run.step, steps)), time.monotonic()
    for batch in progress(batches, stage.name, steps, unit="step", initial=run.step):
        run.train_step(batch)
        if run.step % validate_every == 0:
            validate()
        late = args.minutes is not None and time.monotonic() - start > 60 * args.minutes
        if run.step % args.save_every == 0 or run.step == steps or late:
            run.save(out / "last.pt", must_match)
        if late and run.step < steps:
            break
    if not run.log or run.log[-1]["step"] != run.step:
        validate()
    return run.step >= steps


def finish(out: Path) -> None:
    """The exported checkpoint, and the Dice of all runs in one figure."""
    done = [name for name in STAGES if (out / name / "best.pt").is_file()]
    export_checkpoint(out / done[-1] / "best.pt", out / EXPORTED)
    rows = []
    for stage in STAGES:
        path = out / stage / "dice_by_modality.csv"
        rows += list(csv.DictReader(path.read_text("utf-8").splitlines())) if path.is_file() else []
    if len({row["stage"] for row in rows}) > 1:
        figure = Figure(figsize=(7, 4))
        plot_dice(rows, figure.subplots())
        save_figure(out / "curve.png", figure)


def main(argv: list[str] | None = None) -> bool:
    """Returns whether all that was asked for is finished."""
    args = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if args.smoke:
                from phantoms import tiny_cache

                args.cache, args.out = tiny_cache(Path(scratch) / "cache"), Path(scratch) / "runs"
                args.steps, args.batch, args.objects, args.device = 2, 2, 2, "cpu"
            if args.average:
                export_average(args.average, args.out / EXPORTED)
                print(f"recipe: wrote {args.out / EXPORTED}")
                return True
            for stage in STAGES.values() if args.stage == "all" else [STAGES[args.stage]]:
                if not run_stage(stage, args):
                    print(f"recipe: {args.minutes} minutes are over; the same command with --resume goes on")
                    return False
                args.init = None  # the next run starts from this one
            if args.stage != "distill":
                finish(args.out)
            print(f"recipe: finished, {'removed again' if args.smoke else f'wrote {args.out}'}")
            return True
    except (InputError, OSError) as error:
        sys.exit(f"recipe: {error}")


if __name__ == "__main__":
    main()
