"""Step 2 of 5, train. Reads the cache (step 1), writes checkpoints (steps 3 to 5). [P 3.2, Table 3]

    python 02_train.py --cache cache --init efficientvit_sam_l0.pt        the paper's 300 epochs; wants a GPU
    python 02_train.py --cache cache --init checkpoints/grays_anatomy_sam_l0.pt --steps 200 --batch 2     go on from ours
    python 02_train.py --smoke                                            4 steps on tiny synthetic cases, 1 min

The flags' defaults are Table 3's protocol. How our own checkpoint was made is in recipe/. Writes last.pt, best.pt (smallest
validation loss), losses.csv, log.csv, dice_by_modality.csv and curve.png into --out. The same command with --resume goes on from last.pt,
and ends in the same weights as a run that was never stopped: on a CPU bit for bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from data import SliceDataset, read_split, steps_of_epoch, validation_item
from files import InputError
from files.index import fingerprint
from files.writing import csv_text, progress_bar, save_figure, save_json, save_text, tell
from presets import PRESETS, Preset, override
from segment import MODELS, build
from training import LOG_COLUMNS, Training, starting_network

CURVE_EVERY, CURVE_UNTIL = (
    10,
    200,
)  # steps: a run that has just begun is looked at often; later saves and validations draw


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--cache", type=Path, default=Path("cache"), help="folder of step 1")
    p.add_argument("--out", type=Path, default=Path("runs/table3"), help="folder for checkpoints, log and curve")
    p.add_argument("--model", choices=MODELS, default="proposed", help="which network; proposed is the paper's")
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
    p.add_argument("--minutes", type=float, help="stop after so long, saved; --resume goes on")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--workers", type=int, default=0, help="processes that prepare batches")
    p.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    p.add_argument("--smoke", action="store_true", help="4 steps on a tiny cache made on the spot, CPU")
    return p.parse_args(argv)


def write_log(folder: Path, log: list[dict], losses: list[tuple[int, float]]) -> None:
    """losses.csv, log.csv, the Dice of each modality, and the losses as a picture."""
    from figures import loss_curve  # only here: it brings matplotlib

    rows = [{"step": step, "loss": loss} for step, loss in losses]
    save_text(folder / "losses.csv", csv_text(rows, ("step", "loss"), number=""))
    save_figure(folder / "curve.png", loss_curve(log, losses))
    if log:
        save_text(folder / "log.csv", csv_text(log, LOG_COLUMNS, number=""))  # all digits of the learning rate
        dice = [{"stage": "finetune", "step": row["step"]} | row["dice"] for row in log]
        save_text(folder / "dice_by_modality.csv", csv_text(dice, tuple(dice[0])))


def start_run(args: argparse.Namespace, preset: Preset, must_match: dict) -> Training:
    """A run at its first step, or where an earlier one stopped, if all settings of `must_match` are equal."""
    if args.resume:
        run = Training(build(args.model), preset, args.device)
        run.resume(args.out / "last.pt", must_match)
        return run
    network, told = starting_network(args.model, preset, args.init, args.seed)
    print(f"02_train.py: {told}")
    return Training(network, preset, args.device)


def run(args: argparse.Namespace) -> dict:
    # 1. The data: which images there are, and what a step draws from them
    preset = override(PRESETS[args.preset], args.set)
    training, validation = read_split(args.cache)
    an_epoch = steps_of_epoch(training, preset.sampling, args.batch)
    steps = args.steps if args.steps is not None else args.epochs * an_epoch
    validate_every = args.validate_every or an_epoch

    # 2. The network, from its starting weights or from where an earlier run stopped
    must_match = {name: getattr(args, name) for name in ("model", "batch", "objects", "seed")}
    must_match["data"] = fingerprint(args.cache)
    run = start_run(args, preset, must_match)
    parameters = sum(p.numel() for p in run.network.parameters())
    print(
        f"02_train.py: {parameters:,} parameters, preset {preset.name}, {args.device}, seed {args.seed}, "
        f"{len(training)} images, {len(validation)} for validation, steps {run.step} to {steps}"
    )
    save_json(args.out / "arguments.json", vars(args) | {"preset_fields": vars(preset), "steps": steps})

    def validate() -> None:
        items = ((e.modality, validation_item(args.cache, e, preset)) for e in validation)
        if run.validate(items):
            run.save(args.out / "best.pt", must_match, best=True)
        dice = run.log[-1]["dice"].items()
        tell(f"step {run.step}, Dice: " + ", ".join(f"{modality} {value:.3f}" for modality, value in dice))
        write_log(args.out, run.log, run.losses)

    # 3. The steps. A batch depends on (seed, step) alone
    data = SliceDataset(args.cache, training, preset, args.batch, args.objects, args.seed)
    plan = [[(step, place) for place in range(args.batch)] for step in range(run.step, steps)]
    batches, start = DataLoader(data, batch_sampler=plan, num_workers=args.workers), time.monotonic()
    for batch in (bar := progress_bar(batches, "train", steps, unit="step", initial=run.step)):
        run.train_step(batch)
        if run.step % validate_every == 0:
            validate()
        late = args.minutes is not None and time.monotonic() - start > 60 * args.minutes
        if run.step % args.save_every == 0 or run.step == steps or late:
            run.save(args.out / "last.pt", must_match)
            write_log(args.out, run.log, run.losses)
        elif run.step % CURVE_EVERY == 0 and run.step <= CURVE_UNTIL:
            write_log(args.out, run.log, run.losses)
        bar.set_postfix(loss=f"{run.loss_sum / max(1, run.loss_count):.4f}")
        if late and run.step < steps:
            print(f"02_train.py: {args.minutes} minutes are over; the same command with --resume goes on")
            break

    # 4. Where it ended. last.pt is written before this validation: a longer run would not have made it here
    if not run.log or run.log[-1]["step"] != run.step:
        validate()
    last = run.log[-1]
    print(
        f"02_train.py: step {run.step}, validation loss {last['validation_loss']:.4f}, Dice "
        f"{last['validation_dice']:.4f}, wrote {args.out / 'last.pt'} and best.pt. Next: python 03_quantize.py --model "
        f"{args.out / 'best.pt'}"
    )
    return last


def main(argv: list[str] | None = None) -> dict:
    """Returns the last row of log.csv."""
    args = parse(argv)
    try:
        if not args.smoke:
            return run(args)
        from phantoms import tiny_cache  # only here: it draws, and no other run does

        with tempfile.TemporaryDirectory() as folder:
            args.cache, args.out = tiny_cache(Path(folder) / "cache"), Path(folder) / "run"
            args.steps, args.batch, args.objects, args.device = 4, 2, 2, "cpu"
            return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"02_train.py: {error}")


if __name__ == "__main__":
    main()
