"""Step 2 of 5, train. Reads the cache (step 1), writes checkpoints (steps 3 to 5). [P 3.2, Table 3]

    python 02_train.py --cache cache --out runs/distill --stage distill       the encoder learns the teacher's embedding
    python 02_train.py --cache cache --out runs/finetune --init runs/distill/best.pt      everything, on the masks
    python 02_train.py --smoke                                                4 steps on tiny synthetic cases, 1 min

Defaults are Table 3's; checkpoints/README.md has the flags that made our checkpoint. Writes last.pt, best.pt (smallest
validation loss), log.csv, dice_by_modality.csv and curve.png into --out; the same command with --resume goes on from
last.pt and ends in the same weights as a run that was never stopped, on a CPU bit for bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from cache import CacheEntry, cache_case, read_index, write_index
from dataset import SliceDataset, steps_of_epoch, validation_item
from model import build_model
from phantoms import tiny_case
from presets import PRESETS, Preset, override
from readers import Case, InputError
from resident import ResidentSlices
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
    p.add_argument("--schedule", choices=("plateau", "onecycle"), default="plateau", help="how the rate changes")
    p.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    p.add_argument("--clip", type=float, default=0.0, help="largest norm of the gradient, 0: not clipped")
    p.add_argument("--ema", type=float, default=0.0, help="keep a moving average of the weights, e.g. 0.999")
    p.add_argument("--resident", action="store_true", help="keep all images on the device, draw batches there")
    p.add_argument("--augment", action="store_true", help="with --resident: mirror, turn, zoom, shade images")
    p.add_argument("--compile", action="store_true", help="compile the networks: slower to start, faster on a GPU")
    p.add_argument(
        "--teacher-cache", type=Path, help="with --stage distill: folder to keep the teacher's embeddings in"
    )
    p.add_argument("--teacher-cache-gb", type=float, default=12.0, help="size that this folder may have")
    p.add_argument("--minutes", type=float, help="stop after so long, saved; --resume goes on")
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


def batches_of(args: argparse.Namespace, preset: Preset, training: list[CacheEntry], first: int, steps: int):
    """The batches of steps first to steps - 1, one after another; a batch depends on (seed, step) alone."""
    if args.resident:
        device = torch.device(args.device)
        slices = ResidentSlices(
            args.cache, training, preset, args.batch, args.objects, args.seed, device, args.augment, args.workers
        )
        return (slices.batch(step) for step in range(first, steps))
    data = SliceDataset(args.cache, training, preset, args.batch, args.objects, args.seed)
    plan = [[(step, place) for place in range(args.batch)] for step in range(first, steps)]
    return DataLoader(data, batch_sampler=plan, num_workers=args.workers)


def run(args: argparse.Namespace) -> dict:
    # 1. The data: entries of the cache, and what a step draws from them
    preset = override(PRESETS[args.preset], args.set)
    entries = read_index(args.cache)
    training, validation = ([e for e in entries if e.split == split] for split in ("train", "val"))
    if not training or not validation:
        raise InputError(
            f"{args.cache}: {len(training)} training and {len(validation)} validation images; both are needed"
        )
    if args.augment and not args.resident:
        raise InputError("--augment: works on batches that are made on the device; add --resident")
    if args.teacher_cache and (args.augment or args.compile or args.stage != "distill"):
        raise InputError("--teacher-cache: is for --stage distill without --augment and --compile; leave it out")
    an_epoch = steps_of_epoch(training, preset.sampling, args.batch)
    steps = args.steps if args.steps is not None else args.epochs * an_epoch
    validate_every = args.validate_every or an_epoch

    torch.backends.cudnn.benchmark = True  # every batch has the same shape: let the GPU find its fastest convolutions

    # 2. The model, from its starting weights or from where an earlier run stopped
    trainer = Trainer(args, preset, build_model() if args.resume else initial_model(args, preset), steps)
    if args.resume:
        trainer.resume()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"02_train.py: {args.stage}, {parameters:,} parameters, preset {preset.name}, {args.device}, seed {args.seed}, "
        f"{len(training)} images, {len(validation)} for validation, steps {trainer.step} to {steps}"
    )
    save_json(args.out / "arguments.json", vars(args) | {"preset_fields": vars(preset), "steps": steps})

    def validate() -> None:
        pairs = ((e.modality, validation_item(args.cache, e, preset)) for e in validation)
        dice = trainer.validate(pairs)
        tqdm.write(f"step {trainer.step}, Dice: " + ", ".join(f"{name} {d:.3f}" for name, d in dice.items()))

    # 3. The steps
    batches, start = batches_of(args, preset, training, trainer.step, steps), time.monotonic()
    for batch in (bar := tqdm(batches, initial=trainer.step, total=steps, disable=None)):
        trainer.train_step(batch)
        if trainer.step % validate_every == 0:
            validate()
        late = args.minutes is not None and time.monotonic() - start > 60 * args.minutes
        if trainer.step % args.save_every == 0 or trainer.step == steps or late:
            trainer.save("last.pt")
        bar.set_postfix(loss=f"{trainer.loss_sum / max(1, trainer.loss_count):.4f}")
        if late and trainer.step < steps:
            print(f"02_train.py: {args.minutes} minutes are over; the same command with --resume goes on")
            break

    # 4. Where it ended. last.pt is written before this validation: a longer run would not have made it here
    if not trainer.log or trainer.log[-1]["step"] != trainer.step:
        validate()
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
