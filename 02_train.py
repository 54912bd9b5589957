"""Step 2 of 5, train. Reads the cache (step 1), writes checkpoints (steps 3 to 5). [P 3.2, Table 3]

    python 02_train.py --cache cache --out runs/distill --stage distill       the encoder learns the teacher's embedding
    python 02_train.py --cache cache --out runs/finetune --init runs/distill/best.pt      everything, on the masks
    python 02_train.py --smoke                                                4 steps on tiny synthetic cases, 1 min

Defaults are Table 3's. Writes last.pt, best.pt (smallest validation loss), log.csv and curve.png into --out; the
same command with --resume goes on from last.pt and ends in the same weights as a run that was never stopped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from cache import cache_case, read_index, write_index
from dataset import SliceDataset
from model import build_model
from phantoms import tiny_case
from presets import PRESETS, override
from readers import Case, InputError
from trainer import Trainer, initial_model
from writers import save_json


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--cache", type=Path, default=Path("cache"), help="folder of step 1")
    p.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder for checkpoints, log and curve")
    p.add_argument("--stage", choices=("finetune", "distill"), default="finetune", help="what is learnt")
    p.add_argument("--init", type=Path, help="start from this checkpoint, or from efficientvit_sam_l0.pt")
    p.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    p.add_argument("--preset", choices=PRESETS, default="fixed", help="reading of the paper")
    p.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the preset")
    p.add_argument("--epochs", type=int, default=300, help="epochs, if --steps is not given")
    p.add_argument("--steps", type=int, help="optimiser steps in all, resumed ones included")
    p.add_argument("--batch", type=int, default=32, help="images a step")
    p.add_argument("--objects", type=int, default=1, help="objects an image; they share one embedding")
    p.add_argument("--validate-every", type=int, help="steps between validations (default: an epoch)")
    p.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--workers", type=int, default=0, help="processes that prepare batches")
    p.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    p.add_argument("--smoke", action="store_true", help="4 steps on a tiny cache made on the spot, CPU")
    return p.parse_args(argv)


def make_smoke_cache(folder: Path) -> Path:
    """A cache of three tiny images and three tiny volumes; the first of each is for validation. Returns the folder."""
    entries = []
    for seed, dims in ((seed, dims) for seed in range(3) for dims in (2, 3)):
        tiny = tiny_case(seed, dims)
        case = Case(tiny.name, tiny.image, None, tiny.labels, tiny.spacing_mm, dims == 3)
        found = cache_case(folder, case, source="phantoms.py").entries
        entries += [replace(entry, split="train" if seed else "val") for entry in found]
    write_index(folder, entries)
    return folder


def run(args: argparse.Namespace) -> dict:
    # 1. The data: entries of the cache, and what a step draws from them
    preset = override(PRESETS[args.preset], args.set)
    entries = read_index(args.cache)
    training, validation = ([e for e in entries if e.split == split] for split in ("train", "val"))
    if not training or not validation:
        raise InputError(
            f"{args.cache}: {len(training)} training and {len(validation)} validation images; both are needed"
        )
    data = SliceDataset(args.cache, training, preset, args.batch, args.objects, args.seed)
    steps = args.steps if args.steps is not None else args.epochs * data.steps_per_epoch
    validate_every = args.validate_every or data.steps_per_epoch

    # 2. The model, from its starting weights or from where an earlier run stopped
    trainer = Trainer(args, preset, build_model() if args.resume else initial_model(args, preset))
    if args.resume:
        trainer.resume()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"02_train.py: {args.stage}, {parameters:,} parameters, preset {preset.name}, {args.device}, seed {args.seed}, "
        f"{len(training)} images, {len(validation)} for validation, steps {trainer.step} to {steps}"
    )
    save_json(args.out / "arguments.json", vars(args) | {"preset_fields": vars(preset), "steps": steps})

    # 3. The steps; a batch depends on (seed, step) alone
    plan = [[(step, place) for place in range(args.batch)] for step in range(trainer.step, steps)]
    batches = DataLoader(data, batch_sampler=plan, num_workers=args.workers)
    bar = tqdm(batches, initial=trainer.step, total=steps, disable=None)
    for batch in bar:
        trainer.train_step(batch)
        if trainer.step % validate_every == 0:
            trainer.validate(args.cache, validation)
        if trainer.step % args.save_every == 0 or trainer.step == steps:
            trainer.save("last.pt")
        bar.set_postfix(loss=f"{trainer.loss_sum / max(1, trainer.loss_count):.4f}")

    # 4. Where it ended. last.pt is written before this validation: a longer run would not have made it here
    if not trainer.log or trainer.log[-1]["step"] != trainer.step:
        trainer.validate(args.cache, validation)
    last = trainer.log[-1]
    print(
        f"02_train.py: step {trainer.step}, validation loss {last['validation_loss']:.4f}, Dice "
        f"{last['validation_dice']:.4f}, wrote {args.out / 'last.pt'} and best.pt. Next: python 03_quantize.py --model "
        f"proposed --weights {args.out / 'best.pt'}"
    )
    return last


def main(argv: list[str] | None = None) -> dict:
    """Returns the last row of log.csv."""
    args = parse(argv)
    try:
        if not args.smoke:
            return run(args)
        with tempfile.TemporaryDirectory() as folder:
            args.cache, args.out = make_smoke_cache(Path(folder) / "cache"), Path(folder) / "run"
            args.steps, args.batch, args.objects, args.device = 4, 2, 2, "cpu"
            return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"02_train.py: {error}")


if __name__ == "__main__":
    main()
