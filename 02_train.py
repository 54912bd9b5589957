"""Step 2 of 5, train: Table 3 as one loop. Reads the cache (step 1), writes checkpoints. [P 3.2]

The paper starts from EfficientViT-SAM's image encoder and MedSAM's decoder (here LiteMedSAM's, #24) and
trains the network, 34.79 million parameters, for 300 epochs in batches of 32 images of 256 x 256 x 3:
113.2 hours on one GPU. An epoch of all images took more than a day, so one draws 1,000 of each 2D modality
and of each 3D sub-modality. (Our default, the preset `fixed`, draws equal numbers of each modality.) Nothing is
flipped or cropped, since a heart lies on the left: augmentation moves the sides of the box, and that is all
(by up to 5 pixels in the released code, #18).

For an object's box the network gives logits L of its mask and the IoU u that it expects of it; the truth
is the mask M. Table 3 names three losses, BCE, MSE and Dice; what they are of is the released code's. With
p = sigmoid(L), and sums and means over pixels:

    loss = BCE + Dice + MSE
    BCE  = - mean (M log p + (1 - M) log (1 - p))
    Dice = 1 - 2 sum p M / (sum p^2 + sum M^2)                        (#28)
    MSE  = (u - IoU)^2,   IoU = |A and M| / |A or M|,   A: where L > 0

AdamW starts with a learning rate of 5e-5. When more than PATIENCE validations in a row bring no clearly
smaller loss, ReduceLROnPlateau multiplies it by FACTOR. 1 % of the images validate; the weights of the smallest
validation loss are the final model.

    python 02_train.py --cache cache --init efficientvit_sam_l0.pt --preset paper     the paper's 300 epochs
    python 02_train.py --cache cache --init checkpoints/grays_anatomy_sam_l0.pt --steps 90 --batch 2

Writes checkpoints, log and curve into --out. Several GPUs: join_processes of training.py. How our
own checkpoint was trained: recipe/.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import SliceDataset, read_split, validation_item
from formats.writing import one_run, script
from presets import PRESETS, override
from segment import MODELS
from training import Run, decode_batch, dice_loss, join_processes, mask_iou, out_of_range, starting_network, validate

FACTOR, PATIENCE = 0.9, 5  # of ReduceLROnPlateau, the released code's (#26)


def run(args: Namespace) -> dict:
    device, preset = join_processes(args.batch), override(PRESETS[args.preset], args.set)

    # [P 3.2] 1 % of the images of each modality are for validation, the others for training
    train_set, validation_set = read_split(args.cache)
    # [P 3.2] 300 epochs, each of 1,000 images at most of a modality, in 3D of a sub-modality (`fixed`:
    # as many of each modality); only the boxes are augmented
    data = SliceDataset(args.cache, train_set, preset, args.batch, args.seed)
    steps = preset.epochs * data.steps_per_epoch if args.steps is None else args.steps
    # [P 2.1] the three channels; the baseline sees the image without enhancement
    channels = "image" if MODELS[args.model].enhanced else "raw"

    # [P Table 3] a pretrained network; AdamW, with PyTorch's weight decay, as the paper names none; and a
    # learning rate that falls when the loss does not
    init = args.out / "last.pt" if args.resume else args.init
    network, told = starting_network(args.model, preset, init, args.seed, device)
    on_gpu = device.type == "cuda"
    optimiser = torch.optim.AdamW(network.parameters(), lr=preset.learning_rate, weight_decay=0.01, fused=on_gpu)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=FACTOR, patience=PATIENCE)
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)

    run = Run(args.model, preset, network, optimiser, schedule)
    batches = run.start(told, data, len(validation_set), steps, vars(args))
    while True:
        # Validation: the loss of all objects at their exact boxes, a mean over the modalities (D16).
        # Before the first step too, so that the last line can say what training changed
        if run.step % (args.validate_every or data.steps_per_epoch) == 0 or run.step >= steps:
            items = ((entry.modality, validation_item(args.cache, entry, preset)) for entry in validation_set)
            with bfloat16:
                row = run.add_row(validate(network, items, channels), args.out)
            # The schedule and best.pt are about what was trained: they do not see step 0
            if run.step > 0:
                schedule.step(row[f"{preset.plateau}_loss"])  # [P Table 3]
                if row["validation_loss"] < run.best:  # [P 3.2] the smallest validation loss is the final model
                    run.best = row["validation_loss"]
                    run.save(args.out / "best.pt")
        if run.step >= steps:
            return run.finish(args.out / "best.pt", args.smoke)

        # B images of 256 x 256 x 3, the boxes of K objects of each, and N = B K true masks
        batch = next(batches)
        images, boxes, masks = (batch[key].to(device) for key in (channels, "boxes", "masks"))
        masks = masks.flatten(0, 1).unsqueeze(1)  # (N, 1, 256, 256)
        # An image is encoded once, whatever the number of its boxes: the encoder sees none of them [P Fig. 1].
        # Encoder, prompt encoder and decoder all learn
        network.train()
        with bfloat16:
            embedding = network.image_encoder(images)  # (B, 3, 256, 256) -> (B, 256, 64, 64)
            logits, iou = decode_batch(network.decode, embedding, boxes)  # (N, 1, 256, 256), (N, 1)

        # [P Table 3] three losses, added up. BCE asks each pixel, Dice the mask as a whole, however small it
        # is; the squared error teaches the network how good its mask is
        bce = F.binary_cross_entropy_with_logits(logits, masks)
        dice = dice_loss(logits, masks)
        mse = F.mse_loss(iou, mask_iou(logits, masks))
        loss = bce + dice + mse

        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        run.count(loss, args.out)


def main(argv: list[str] | None = None) -> dict:
    """Returns the last row of log.csv."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
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
    args = p.parse_args(argv)
    if bad := out_of_range(vars(args)):
        p.error(bad)
    with script("02_train.py", args, "demo_data:smoke_train"), one_run(args.out):
        return run(args)


if __name__ == "__main__":
    main()
