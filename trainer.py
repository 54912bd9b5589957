"""One training run: model, optimiser, schedule and counters, and how they are saved and resumed. [P 3.2, Table 3]

`02_train.py` is the script; this is what it steps through. Letters: B images a batch, K objects an image.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable

import torch

from cache import fingerprint
from figures import save_loss_curve
from losses import distillation_loss, segmentation_loss
from model import BoxSegmenter, build_model
from presets import Preset
from readers import InputError
from segment import load_segmenter
from tables import csv_text
from teacher import Teacher
from weights import load_weights, save_checkpoint
from writers import save_text

FACTOR, PATIENCE = 0.9, 5  # of ReduceLROnPlateau; the text names the schedule only, the numbers are the release's (#26)
OBJECT_CHUNK = 16  # objects of a validation image that are decoded together
WARM_UP = 0.05  # share of a one-cycle run in which the rate rises
CHECK_EVERY = 20  # steps after which a GPU's losses are looked at: looking makes it wait
COLUMNS = ("step", "train_loss", "validation_loss", "validation_dice", "learning_rate")


def initial_model(args: argparse.Namespace, preset: Preset) -> BoxSegmenter:
    """A model with the stage's starting weights, and a line that says where they come from. [P 2.2; #24]"""
    torch.manual_seed(args.seed)
    model, source, ours = build_model(), "random weights", False
    if args.init is not None:
        ours = "preset" in load_weights(args.init, model)
        source = str(args.init)
    decoder = "the same"
    if preset.decoder == "lite_medsam" and not ours:
        baseline = load_segmenter("baseline", plain=True).model
        model.prompt_encoder.load_state_dict(baseline.prompt_encoder.state_dict())
        model.mask_decoder.load_state_dict(baseline.mask_decoder.state_dict())
        decoder = "LiteMedSAM"
    elif preset.decoder == "random" and not ours:
        fresh = build_model()
        model.prompt_encoder, model.mask_decoder, decoder = fresh.prompt_encoder, fresh.mask_decoder, "random weights"
    print(f"02_train.py: encoder from {source}, prompt encoder and mask decoder from {decoder}")
    return model


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: a short linear rise to the peak, then half a cosine down to a thousandth of it."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2)


class Trainer:
    """Model, optimiser, schedule and counters: all that a checkpoint has to hold.

    steps : optimiser steps of the whole run, which the one-cycle schedule has to know.
    """

    def __init__(self, args: argparse.Namespace, preset: Preset, model: BoxSegmenter, steps: int) -> None:
        self.args, self.preset, self.device, self.steps = args, preset, torch.device(args.device), steps
        self.model = model.to(self.device)
        if self.device.type == "cuda":  # the layout that its convolutions are fast in
            self.model.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if args.ema else None
        self.teacher = None
        if args.stage == "distill":  # the decoder is the ruler that the embedding is measured with: it stays
            self.teacher = Teacher(self.device, args.teacher_cache, int(args.teacher_cache_gb * 1e9))
            model.prompt_encoder.requires_grad_(False)
            model.mask_decoder.requires_grad_(False)
        self.encode, self.decode = self.model.image_encoder, self.model.decode
        self.teach = self.teacher
        if args.compile:
            self.encode, self.decode = torch.compile(self.encode), torch.compile(self.decode)
            self.teach = self.teacher and torch.compile(self.teacher.encoder)
        self.learnt = [p for p in model.parameters() if p.requires_grad]
        fused = {"fused": True} if self.device.type == "cuda" else {}
        self.optimiser = torch.optim.AdamW(
            self.learnt, lr=preset.learning_rate, weight_decay=args.weight_decay, **fused
        )
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimiser, factor=FACTOR, patience=PATIENCE)
        self.step, self.best, self.log = 0, math.inf, []
        self.loss_sum, self.loss_count = 0.0, 0  # since the last validation
        self.unseen: list[tuple[int, torch.Tensor]] = []  # step and loss of the last steps, not looked at yet

    def embed(self, batch: dict[str, torch.Tensor], encode, teach) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Images (B, 3, 256, 256) -> embedding (B, 256, 64, 64), and its distance from the teacher's, if there is one."""
        with self.precision():
            embedding = encode(batch["image"].to(self.device))
        if teach is None:
            return embedding, 0.0
        with torch.no_grad(), self.precision():
            wanted = teach(batch["raw"].to(self.device))
        return embedding, distillation_loss(embedding.float(), wanted.float())

    def segment(self, decode, embedding: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor):
        """boxes (B, K, 4), masks (B, K, 256, 256) -> loss, logits (B K, 1, 256, 256)"""
        boxes, masks = boxes.to(self.device), masks.to(self.device)
        image_of_box = torch.arange(len(boxes), device=self.device).repeat_interleave(boxes.shape[1])
        with self.precision():
            logits, iou = decode(embedding, boxes.flatten(0, 1), image_of_box)
        return segmentation_loss(logits.float(), iou.float(), masks.flatten(0, 1).unsqueeze(1))["loss"], logits

    def precision(self):
        """bfloat16 on a GPU; the linear attention stays in float32 (efficientvit.py), float16 overflows there."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def train_step(self, batch: dict[str, torch.Tensor]) -> None:
        """One optimiser step. InputError if a loss is not finite; last.pt still holds good weights then."""
        self.model.train()
        if self.args.schedule == "onecycle":
            for group in self.optimiser.param_groups:
                group["lr"] = one_cycle(self.step, self.steps, self.preset.learning_rate)
        embedding, distance = self.embed(batch, self.encode, self.teach)
        loss = self.segment(self.decode, embedding, batch["boxes"], batch["masks"])[0] + distance
        self.unseen.append((self.step, loss.detach()))
        if self.device.type == "cpu":
            self.look()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.args.clip:
            torch.nn.utils.clip_grad_norm_(self.learnt, self.args.clip)
        self.optimiser.step()
        self.step += 1
        if self.average is not None:
            self.follow()
        if len(self.unseen) >= CHECK_EVERY:
            self.look()

    def look(self) -> None:
        """Add the losses of the last steps to the sum; InputError if one is not finite."""
        for step, loss in [(step, loss.item()) for step, loss in self.unseen]:
            if not math.isfinite(loss):
                raise InputError(
                    f"step {step}: the loss is {loss}; lower the rate (--set learning_rate=...) and go on from "
                    f"{self.args.out / 'last.pt'} with --resume"
                )
            self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        self.unseen = []

    @torch.no_grad()
    def follow(self) -> None:
        """The moving average goes towards the model; faster at first, when it knows little."""
        keep = min(self.args.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        for mean, now in zip(self.average.buffers(), self.model.buffers(), strict=True):
            mean.copy_(now)

    @torch.no_grad()
    def validate(self, items: Iterable[tuple[str, dict[str, torch.Tensor]]]) -> dict[str, float]:
        """Mean loss and Dice of (modality, item) pairs, every modality weighing the same; then the schedule's step.

        Of the moving average, if there is one. Adds a row to log. Returns the Dice of each modality.
        """
        self.look()
        model = (self.model if self.average is None else self.average).eval()
        losses, dices = defaultdict(list), defaultdict(list)
        for modality, item in items:
            one = {key: value.unsqueeze(0) for key, value in item.items()}
            # the plain functions, not the compiled ones: those were compiled for a batch
            embedding, distance = self.embed(one, model.image_encoder, self.teacher)
            total, dice = 0.0, []
            for some in range(0, len(item["boxes"]), OBJECT_CHUNK):  # an image may hold hundreds of objects
                boxes, masks = (item[key][some : some + OBJECT_CHUNK].to(self.device) for key in ("boxes", "masks"))
                loss, logits = self.segment(model.decode, embedding, boxes.unsqueeze(0), masks.unsqueeze(0))
                total += loss.item() * len(boxes)
                found, true = (logits[:, 0] > 0).flatten(1), (masks > 0.5).flatten(1)
                dice += (2 * (found & true).sum(dim=1) / (found.sum(dim=1) + true.sum(dim=1))).tolist()
            losses[modality].append(total / len(dice) + float(distance))
            dices[modality].append(sum(dice) / len(dice))
        loss, dice = (mean_of(mean_of(v) for v in group.values()) for group in (losses, dices))
        train_loss = self.loss_sum / max(1, self.loss_count)
        rate = self.optimiser.param_groups[0]["lr"]
        row = (self.step, train_loss, loss, dice, rate)
        by_modality = {modality: mean_of(values) for modality, values in sorted(dices.items())}
        self.log.append(dict(zip(COLUMNS, row, strict=True)) | {"dice": by_modality})
        if self.args.schedule == "plateau":
            self.schedule.step(train_loss if self.preset.plateau == "train" else loss)
        self.loss_sum, self.loss_count = 0.0, 0
        if loss < self.best:
            self.best = loss
            self.save("best.pt")
        return by_modality

    def save(self, name: str) -> None:
        """Checkpoint, log and curve into --out. best.pt holds the moving average as its model, if there is one."""
        self.look()
        averaged = name == "best.pt" and self.average is not None
        state = {
            "model": (self.average if averaged else self.model).state_dict(),
            "average": self.average.state_dict() if self.average is not None and not averaged else None,
            "preset": self.preset.name,
            "preset_fields": vars(self.preset),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "best": self.best,
            "log": self.log,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "rng": torch.get_rng_state(),
            "arguments": {key: str(value) for key, value in vars(self.args).items()},
            "data": fingerprint(self.args.cache),
        }
        save_checkpoint(self.args.out / name, state)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")  # all digits of the rate
        writer.writeheader()
        writer.writerows(self.log)
        save_text(self.args.out / "log.csv", text.getvalue())
        dice = [{"stage": self.args.stage, "step": row["step"]} | row["dice"] for row in self.log]
        if dice:
            save_text(self.args.out / "dice_by_modality.csv", csv_text(dice, tuple(dice[0])))
        save_loss_curve(self.args.out / "curve.png", self.log)

    def resume(self) -> None:
        """Everything back from last.pt. InputError if it belongs to another preset, stage or cache."""
        path = self.args.out / "last.pt"
        stored = load_weights(path, self.model)
        for what, now in (("preset_fields", vars(self.preset)), ("data", fingerprint(self.args.cache))):
            if stored.get(what) != now:
                raise InputError(f"{path}: was trained with another {what}; use the same, or another --out")
        fixed = ["stage", "batch", "objects", "seed", "schedule", "weight_decay", "clip", "ema", "resident", "augment"]
        for key in [*fixed, *["steps"] * (self.args.schedule == "onecycle")]:
            if stored["arguments"].get(key) != str(getattr(self.args, key)):
                raise InputError(
                    f"{path}: was trained with --{key.replace('_', '-')} {stored['arguments'].get(key)}; use the same, "
                    "or another --out"
                )
        if self.average is not None:
            self.average.load_state_dict(stored["average"])
        self.optimiser.load_state_dict(stored["optimiser"])
        self.schedule.load_state_dict(stored["schedule"])
        self.step, self.best, self.log = stored["step"], stored["best"], stored["log"]
        self.loss_sum, self.loss_count = stored["loss_sum"], stored["loss_count"]
        torch.set_rng_state(stored["rng"])


def mean_of(values: Iterable[float]) -> float:
    """Plain mean."""
    values = list(values)
    return sum(values) / len(values)
