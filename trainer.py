"""One training run: model, optimiser, schedule and counters, and how they are saved and resumed. [P 3.2, Table 3]

`02_train.py` is the script; this is what it steps through. Letters: B images a batch, K objects an image.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from pathlib import Path

import torch

from cache import CacheEntry, fingerprint
from dataset import validation_item
from figures import save_loss_curve
from losses import distillation_loss, segmentation_loss
from model import BoxSegmenter, build_model
from presets import Preset
from readers import InputError
from segment import load_segmenter
from weights import load_weights, save_checkpoint
from writers import save_text

FACTOR, PATIENCE = 0.9, 5  # of ReduceLROnPlateau; the text names the schedule only, the numbers are the release's (#26)
OBJECT_CHUNK = 16  # objects of a validation image that are decoded together
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
        baseline = load_segmenter("baseline").model
        model.prompt_encoder.load_state_dict(baseline.prompt_encoder.state_dict())
        model.mask_decoder.load_state_dict(baseline.mask_decoder.state_dict())
        decoder = "LiteMedSAM"
    elif preset.decoder == "random" and not ours:
        fresh = build_model()
        model.prompt_encoder, model.mask_decoder, decoder = fresh.prompt_encoder, fresh.mask_decoder, "random weights"
    print(f"02_train.py: encoder from {source}, prompt encoder and mask decoder from {decoder}")
    return model


class Trainer:
    """Model, optimiser, schedule and counters: all that a checkpoint has to hold."""

    def __init__(self, args: argparse.Namespace, preset: Preset, model: BoxSegmenter) -> None:
        self.args, self.preset, self.device = args, preset, torch.device(args.device)
        self.model = model.to(self.device)
        self.teacher = None
        if args.stage == "distill":  # the decoder is the ruler that the embedding is measured with: it stays
            self.teacher = load_segmenter("baseline").model.to(self.device).eval()
            model.prompt_encoder.requires_grad_(False)
            model.mask_decoder.requires_grad_(False)
        learnt = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(learnt, lr=preset.learning_rate)
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimiser, factor=FACTOR, patience=PATIENCE)
        self.step, self.best, self.log = 0, math.inf, []
        self.loss_sum, self.loss_count = 0.0, 0  # since the last validation

    def embed(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Images (B, 3, 256, 256) -> embedding (B, 256, 64, 64), and its distance from the teacher's, if there is one."""
        with self.precision():
            embedding = self.model.image_encoder(batch["image"].to(self.device))
        if self.teacher is None:
            return embedding, 0.0
        with torch.no_grad():
            wanted = self.teacher.image_encoder(batch["raw"].to(self.device))
        return embedding, distillation_loss(embedding.float(), wanted)

    def segment(self, embedding: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor):
        """boxes (B, K, 4), masks (B, K, 256, 256) -> loss, logits (B K, 1, 256, 256)"""
        boxes, masks = boxes.to(self.device), masks.to(self.device)
        image_of_box = torch.arange(len(boxes), device=self.device).repeat_interleave(boxes.shape[1])
        with self.precision():
            logits, iou = self.model.decode(embedding, boxes.flatten(0, 1), image_of_box)
        return segmentation_loss(logits.float(), iou.float(), masks.flatten(0, 1).unsqueeze(1))["loss"], logits

    def precision(self):
        """bfloat16 on a GPU; the linear attention stays in float32 (efficientvit.py), float16 overflows there."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def train_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.model.train()
        embedding, distance = self.embed(batch)
        loss = self.segment(embedding, batch["boxes"], batch["masks"])[0] + distance
        if not loss.isfinite():
            raise InputError(
                f"step {self.step}: the loss is {loss.item()}; lower the rate (--set learning_rate=...) and go on from "
                f"{self.args.out / 'last.pt'} with --resume"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.step += 1
        self.loss_sum, self.loss_count = self.loss_sum + loss.item(), self.loss_count + 1

    @torch.no_grad()
    def validate(self, folder: Path, entries: list[CacheEntry]) -> None:
        """Mean loss and Dice over all objects of all validation images; then the schedule's step. Adds a row to log."""
        self.model.eval()
        losses, dices = [], []
        for entry in entries:
            item = validation_item(folder, entry, self.preset)
            embedding, distance = self.embed({key: value.unsqueeze(0) for key, value in item.items()})
            total, dice = 0.0, []
            for some in range(0, len(item["boxes"]), OBJECT_CHUNK):  # an image may hold hundreds of objects
                boxes, masks = (item[key][some : some + OBJECT_CHUNK] for key in ("boxes", "masks"))
                loss, logits = self.segment(embedding, boxes.unsqueeze(0), masks.unsqueeze(0))
                total += loss.item() * len(boxes)
                found, true = (logits[:, 0] > 0).flatten(1).cpu(), (masks > 0.5).flatten(1)
                dice += (2 * (found & true).sum(dim=1) / (found.sum(dim=1) + true.sum(dim=1))).tolist()
            losses.append(total / len(dice) + float(distance))
            dices.append(sum(dice) / len(dice))
        train_loss, loss = self.loss_sum / max(1, self.loss_count), sum(losses) / len(losses)
        rate = self.optimiser.param_groups[0]["lr"]
        row = (self.step, train_loss, loss, sum(dices) / len(dices), rate)
        self.log.append(dict(zip(COLUMNS, row, strict=True)))
        self.schedule.step(train_loss if self.preset.plateau == "train" else loss)
        self.loss_sum, self.loss_count = 0.0, 0
        if loss < self.best:
            self.best = loss
            self.save("best.pt")

    def save(self, name: str) -> None:
        """Checkpoint, log and curve into --out."""
        state = {
            "model": self.model.state_dict(),
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
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.log)
        save_text(self.args.out / "log.csv", text.getvalue())
        save_loss_curve(self.args.out / "curve.png", self.log)

    def resume(self) -> None:
        """Everything back from last.pt. InputError if it belongs to another preset, stage or cache."""
        path = self.args.out / "last.pt"
        stored = load_weights(path, self.model)
        for what, now in (("preset_fields", vars(self.preset)), ("data", fingerprint(self.args.cache))):
            if stored.get(what) != now:
                raise InputError(f"{path}: was trained with another {what}; use the same, or another --out")
        for key in ("stage", "batch", "objects", "seed"):
            if stored["arguments"][key] != str(getattr(self.args, key)):
                raise InputError(
                    f"{path}: was trained with --{key} {stored['arguments'][key]}; use the same, or another --out"
                )
        self.optimiser.load_state_dict(stored["optimiser"])
        self.schedule.load_state_dict(stored["schedule"])
        self.step, self.best, self.log = stored["step"], stored["best"], stored["log"]
        self.loss_sum, self.loss_count = stored["loss_sum"], stored["loss_count"]
        torch.set_rng_state(stored["rng"])
