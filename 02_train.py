"""Step 2 of 5, train: Table 3 as one loop. Reads the cache (step 1), writes checkpoints. [P 3.2]

The paper starts from EfficientViT-SAM's weights and trains the whole network for 300 epochs, in
batches of 32 images of 256 x 256 x 3. An epoch of all images took more than a day, so one draws 1,000
of each 2D modality and of each 3D sub-modality (`fixed`: as many of each modality). Nothing is flipped
or cropped, since a heart lies on the left: augmentation moves the sides of the box, by up to 5 pixels
(#18), and that is all. For an object's box the network gives logits L of its mask and the IoU u that
it expects of it; the truth is the mask M:

    loss = BCE(L, M) + Dice(L, M) + (u - IoU(L > 0, M))^2

AdamW starts with a learning rate of 5e-5, which ReduceLROnPlateau lowers when the loss stays as it is.
1 % of the images validate; the weights of the smallest validation loss are the final model.

    python 02_train.py --cache cache --init efficientvit_sam_l0.pt    the paper's 300 epochs
    python 02_train.py --cache cache --init checkpoints/grays_anatomy_sam_l0.pt --steps 90 --batch 2
    python 02_train.py --smoke                              4 steps on tiny synthetic cases, 1 min
    torchrun --nproc-per-node 2 02_train.py --cache cache --init efficientvit_sam_l0.pt

Writes last.pt, best.pt, losses.csv, log.csv, dice_by_modality.csv and curve.png into --out. --resume
goes on from last.pt and ends, on a CPU bit for bit, as a run that was never stopped. Under torchrun
each process takes its part of the batch, and gradients are averaged. Only batch norm differs: each
process has the mean and variance of its part, and the first one's running means are kept. How our own
checkpoint was made: recipe/.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from data import SliceDataset, read_split, steps_of_epoch, validation_item
from formats import InputError, usable_cores
from formats.cache import fingerprint
from formats.writing import progress_bar, save_json
from presets import PRESETS, override
from segment import MODELS
from training import Run, decode_batch, dice_loss, join_processes, mask_iou, process_mean, starting_network, validate

FACTOR, PATIENCE = 0.9, 5  # of ReduceLROnPlateau, the released code's (#26)


def parse(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    p.add_argument("--cache", type=Path, default=Path("cache"), help="folder of step 1")
    p.add_argument("--out", type=Path, default=Path("runs/table3"), help="folder for checkpoints, log and curve")
    p.add_argument("--model", choices=MODELS, default="proposed", help="which network; proposed is the paper's")
    p.add_argument("--init", type=Path, help="start from this checkpoint, or from efficientvit_sam_l0.pt")
    p.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    p.add_argument("--preset", choices=PRESETS, default="fixed", help="reading of the paper")
    p.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override the preset, such as epochs=10")
    p.add_argument("--steps", type=int, help="optimiser steps, resumed ones included; None: those of all epochs")
    p.add_argument("--batch", type=int, default=32, help="images a step")
    p.add_argument("--validate-every", type=int, help="steps between validations; None: an epoch")
    p.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    p.add_argument("--smoke", action="store_true", help="4 steps on a tiny cache made on the spot")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> list[dict]:
    """-> the rows of log.csv"""
    rank, processes, device = join_processes(args.batch)  # 0 and 1, unless torchrun started more
    preset, last, on_gpu = override(PRESETS[args.preset], args.set), args.out / "last.pt", device.type == "cuda"

    # [P 3.2] 1 % of each modality is for validation; an epoch draws 1,000 images of each at most
    train_set, validation_set = read_split(args.cache)
    epoch = steps_of_epoch(train_set, preset.sampling, args.batch)
    steps = preset.epochs * epoch if args.steps is None else args.steps
    validate_every = args.validate_every or epoch
    channels = "image" if MODELS[args.model].enhanced else "raw"  # the three channels [P 2.1], or none of them

    # [P Table 3] a pretrained network, AdamW, a learning rate that falls when the loss does not
    init = last if args.resume else args.init
    network, told = starting_network(args.model, preset, init, args.seed, device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=preset.learning_rate, weight_decay=0.01, fused=on_gpu)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=FACTOR, patience=PATIENCE)
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)

    must_match = {"batch": args.batch, "seed": args.seed, "data": fingerprint(args.cache)}
    run = Run(args.model, preset, network, optimiser, schedule, must_match)
    if args.resume:
        run.resume(last)
    print(f"02_train.py: {told}\n02_train.py: {sum(p.numel() for p in network.parameters()):,} parameters, {device.type}, "
          f"{len(train_set)} images, {len(validation_set)} for validation, steps {run.step} to {steps}")  # fmt: skip
    if rank == 0:
        save_json(args.out / "arguments.json", vars(args) | {"preset_fields": vars(preset)})

    # What a batch holds depends on (seed, step, place) alone: a resumed run draws the same
    data = SliceDataset(args.cache, train_set, preset, args.batch, args.seed)
    plan = ([(step, place) for place in range(rank, args.batch, processes)] for step in range(run.step, steps))
    batches = iter(DataLoader(data, batch_sampler=plan, num_workers=min(8, usable_cores()) if on_gpu else 0))
    bar = progress_bar(None, "train", steps, unit="step", initial=run.step, disable=rank > 0)
    while True:
        # Validation, before the first step too, so that the last line can say what training changed
        if run.step % validate_every == 0 or run.step >= steps:
            items = ((entry.modality, validation_item(args.cache, entry, preset)) for entry in validation_set)
            with bfloat16:
                found = validate(network, items, channels)  # loss and Dice, means over the modalities
            row = run.add_row(found, args.out)
            # The schedule and best.pt are about what was trained: they do not see step 0
            if run.step > 0:
                schedule.step(row[f"{preset.plateau}_loss"])  # [P Table 3]
                if row["validation_loss"] < run.best:  # [P 3.2] the smallest validation loss is the final model
                    run.best = row["validation_loss"]
                    run.save(args.out / "best.pt")
        if run.step >= steps:
            bar.close()
            return run.log

        batch = next(batches)
        images, boxes, masks = (batch[key].to(device) for key in (channels, "boxes", "masks"))
        masks = masks.flatten(0, 1).unsqueeze(1)  # (N, 1, 256, 256); N = B K: B images, K objects of each
        network.train()
        with bfloat16:
            embedding = network.image_encoder(images)  # (B, 3, 256, 256) -> (B, 256, 64, 64), once an image
            logits, iou = decode_batch(network.decode, embedding, boxes)  # (N, 1, 256, 256), (N, 1)

        # [P Table 3] three losses, weights 1; the third teaches the network how good its mask is
        bce = F.binary_cross_entropy_with_logits(logits, masks)
        dice = dice_loss(logits, masks)
        mse = F.mse_loss(iou, mask_iou(logits, masks))
        loss = bce + dice + mse
        run.note(loss)

        optimiser.zero_grad()
        loss.backward()
        process_mean(*(parameter.grad for parameter in network.parameters()))  # of torchrun
        optimiser.step()
        run.step += 1

        bar.set_postfix(loss=f"{run.losses[-1]['loss']:.4f}")
        bar.update()
        run.keep(args.out, now=run.step == steps)  # last.pt, log and curve, from time to time


def main(argv: list[str] | None = None) -> dict:
    """Returns the last row of log.csv."""
    args = parse(argv)
    best = args.out / "best.pt"
    end = f"wrote last.pt and {best}. Next: python 03_quantize.py --model {best}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            if args.smoke:
                from demo_data import tiny_cache  # only here: it draws, and no other run does

                args.cache, args.out = tiny_cache(Path(folder) / "cache"), Path(folder) / "run"
                args.steps, args.batch, args.set = 4, 2, [*args.set, "objects=2"]
                end = "its files were removed again. Next: python 03_quantize.py --smoke"
            log = run(args)
    except (InputError, OSError) as error:
        sys.exit(f"02_train.py: {error}")
    loss, dice = (f"{log[0][key]:.4f} -> {log[-1][key]:.4f}" for key in ("validation_loss", "validation_dice"))
    print(f"02_train.py: steps {log[0]['step']} -> {log[-1]['step']}, validation loss {loss}, Dice {dice}; {end}")
    return log[-1]


if __name__ == "__main__":
    main()
