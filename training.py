"""Training: the losses of Table 3, one step, validation, saving and exact resuming. [P 3.2, Table 3]

02_train.py runs the paper's protocol with it. recipe/ adds what the paper does not have (`Extras`).
Letters: B images a batch, K objects an image, N = B K prompts, H, W the 256 grid.
Logits and masks are (N, 1, H, W), predicted IoU is (N, 1).
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files import InputError
from files.checkpoints import lite_medsam_path, load_weights, save_checkpoint
from model import BoxSegmenter
from presets import Preset
from segment import build

FACTOR, PATIENCE = 0.9, 5  # of ReduceLROnPlateau, which the paper names; both numbers are the released code's (#26)
BAND = 3  # pixels of the grid on both sides of a contour, see boundary_loss
OBJECT_CHUNK = 16  # objects of a validation image that are decoded together
CHECK_EVERY = 20  # steps after which losses on a GPU are read: reading makes the GPU wait
LOG_COLUMNS = ("step", "train_loss", "validation_loss", "validation_dice", "learning_rate")


# ---------------------------------------------------------------- losses


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - soft Dice with squared probabilities in the denominator, mean over prompts. If both are empty the loss is 0."""
    p = logits.sigmoid().flatten(1)
    t = masks.flatten(1)
    overlap = 2 * (p * t).sum(dim=1)
    return (1 - (overlap + 1e-5) / (p.square().sum(dim=1) + t.sum(dim=1) + 1e-5)).mean()


def mask_iou(logits: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of the mask (logits above 0) and the truth. -> (N, 1); both empty counts as 1 (#29)."""
    p, t = (logits > 0).flatten(1), (masks > 0.5).flatten(1)
    union = (p | t).sum(dim=1, keepdim=True)
    return torch.where(union > 0, (p & t).sum(dim=1, keepdim=True) / union.clamp(min=1), 1.0)


def segmentation_loss(logits: Tensor, iou: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """BCE and Dice on the masks, MSE on the predicted IoU, and their sum, `loss`; all weights are 1. [P Table 3]

    No gradient flows through the true IoU.
    """
    terms = {
        "bce": F.binary_cross_entropy_with_logits(logits, masks),
        "dice": dice_loss(logits, masks),
        "mse": F.mse_loss(iou, mask_iou(logits.detach(), masks)),
    }
    return terms | {"loss": sum(terms.values())}


def boundary_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """BCE of the pixels within BAND of the true contour, mean over each prompt's pixels, then over prompts. Not in Table 3 (D22).

    Over the whole image a contour's pixels are few, and those of a small object fewer.
    """
    grown, shrunk = (F.max_pool2d(sign * masks, 2 * BAND + 1, stride=1, padding=BAND) for sign in (1, -1))
    band = grown + shrunk  # max of -m is -min of m: 1 where the neighbourhood holds both object and background
    error = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return ((error * band).flatten(1).sum(dim=1) / band.flatten(1).sum(dim=1).clamp(min=1)).mean()


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two embeddings (B, 256, 64, 64), divided by the teacher's variance.

    Always answering with one number, the mean of all the teacher's values, gives 1; with its mean embedding, less.
    """
    return F.mse_loss(student, teacher) / teacher.var().clamp(min=1e-6)


# ---------------------------------------------------------------- where a run starts


def starting_network(model: str, preset: Preset, init: Path | None, seed: int) -> tuple[BoxSegmenter, str]:
    """A network with the weights that training starts from, and a sentence that says which. [P 2.2; #24]

    init: a checkpoint of ours, of which all is used, or efficientvit_sam_l0.pt, of which only the encoder is used.
    """
    torch.manual_seed(seed)
    network, encoder, decoder, ours = build(model), "random weights", "the same file", False
    if init is not None:
        ours, encoder = "preset" in load_weights(init, network), str(init)
    if preset.decoder == "lite_medsam" and not ours:
        donor, decoder = build("baseline"), "LiteMedSAM"
        load_weights(lite_medsam_path(), donor)
        network.prompt_encoder.load_state_dict(donor.prompt_encoder.state_dict())
        network.mask_decoder.load_state_dict(donor.mask_decoder.state_dict())
    elif preset.decoder == "random" and not ours:
        fresh, decoder = build(model), "random weights"
        network.prompt_encoder, network.mask_decoder = fresh.prompt_encoder, fresh.mask_decoder
    return network, f"encoder from {encoder}, prompt encoder and mask decoder from {decoder}"


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Extras:
    """What a run may have beyond Table 3; recipe/ uses it. The defaults are Table 3's protocol."""

    weight_decay: float = 0.01  # of AdamW
    clip: float = 0.0  # largest norm of the gradient; 0: not clipped
    average: float = 0.0  # decay of an exponential moving average of the weights; 0: none
    rate: Callable[[int], float] | None = None  # step -> learning rate, in place of ReduceLROnPlateau
    teacher: nn.Module | None = (
        None  # of distillation: raw images -> embeddings; prompt encoder and mask decoder are then frozen
    )
    only: tuple[str, ...] = ()  # modules that learn, by the beginning of their names; the rest is frozen; (): all learn
    encoder_share: float = 1.0  # the image encoder's learning rate as a share of the others'
    frozen_norms: bool = False  # batch norms keep the means that they have: for batches of few images
    boundary: float = 0.0  # weight of boundary_loss in training; validation stays Table 3's
    bfloat16: bool = False  # compute in bfloat16 on a CPU too; a GPU always does
    compile: bool = False  # compile the networks: slower to start, faster on a GPU


class Training:
    """Network, optimiser, schedule and counters: all that a checkpoint has to hold."""

    def __init__(
        self, network: BoxSegmenter, preset: Preset, device: str = "cpu", extras: Extras | None = None
    ) -> None:
        self.preset, self.device, self.extras = preset, torch.device(device), extras or Extras()
        self.network = network.to(self.device)
        if self.device.type == "cuda":  # the layout in which its convolutions are fast
            self.network.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.network).requires_grad_(False) if self.extras.average else None
        if self.extras.teacher is not None:  # they were trained on the teacher's embeddings, and stay
            network.prompt_encoder.requires_grad_(False)
            network.mask_decoder.requires_grad_(False)
        if self.extras.only:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name.startswith(self.extras.only))
        self.encode, self.decode, self.teach = network.image_encoder, network.decode, self.extras.teacher
        if self.extras.compile:
            self.encode, self.decode = torch.compile(self.encode), torch.compile(self.decode)
            self.teach = self.teach and torch.compile(self.teach)
        self.trainable = [p for p in network.parameters() if p.requires_grad]
        fused = {"fused": True} if self.device.type == "cuda" else {}
        of_encoder = {id(p) for p in network.image_encoder.parameters()}
        groups = [([p for p in self.trainable if id(p) not in of_encoder], 1.0)]
        groups += [([p for p in self.trainable if id(p) in of_encoder], self.extras.encoder_share)]
        self.optimiser = torch.optim.AdamW(
            [{"params": part, "share": share, "lr": share * preset.learning_rate} for part, share in groups if part],
            weight_decay=self.extras.weight_decay,
            **fused,
        )
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimiser, factor=FACTOR, patience=PATIENCE)
        self.step, self.best, self.log = 0, math.inf, []
        self.loss_sum, self.loss_count = 0.0, 0  # since the last validation
        self.losses: list[tuple[int, float]] = []  # (step, loss) of every step, for the curve
        self.pending_losses: list[tuple[int, Tensor]] = []  # steps and losses that were not read yet

    def train_step(self, batch: dict[str, Tensor]) -> None:
        """One optimiser step. InputError if a loss is not finite, before such weights are saved.

        batch: image, raw (B, 3, 256, 256), boxes (B, K, 4), masks (B, K, 256, 256), see data.SliceDataset.
        """
        self.network.train(not self.extras.frozen_norms)  # the network has no other layer that training changes
        if self.extras.rate is not None:
            for group in self.optimiser.param_groups:
                group["lr"] = group["share"] * self.extras.rate(self.step)
        embedding, distance = self.embed(batch, self.encode, self.teach)
        loss, logits = self.mask_loss(self.decode, embedding, batch["boxes"], batch["masks"])
        loss = loss + distance
        if self.extras.boundary:
            masks = batch["masks"].to(self.device).flatten(0, 1).unsqueeze(1)
            loss = loss + self.extras.boundary * boundary_loss(logits.float(), masks)
        self.pending_losses.append((self.step, loss.detach()))
        if self.device.type == "cpu":
            self.check_losses()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.extras.clip:
            torch.nn.utils.clip_grad_norm_(self.trainable, self.extras.clip)
        self.optimiser.step()
        self.step += 1
        if self.average is not None:
            self.update_average()
        if len(self.pending_losses) >= CHECK_EVERY:
            self.check_losses()

    def embed(self, batch: dict[str, Tensor], encode, teach) -> tuple[Tensor, Tensor | float]:
        """Images (B, 3, 256, 256) -> embedding (B, 256, 64, 64), and its distance from the teacher's, if there is one."""
        with self.precision():
            embedding = encode(batch["image"].to(self.device))
        if teach is None:
            return embedding, 0.0
        with torch.no_grad(), self.precision():
            wanted = teach(batch["raw"].to(self.device))
        return embedding, distillation_loss(embedding.float(), wanted.float())

    def mask_loss(self, decode, embedding: Tensor, boxes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """boxes (B, K, 4), masks (B, K, 256, 256) -> loss, logits (B K, 1, 256, 256)"""
        boxes, masks = boxes.to(self.device), masks.to(self.device)
        with self.precision():
            if self.device.type == "cpu":  # the boxes of one image share the decoder's first steps: a third less time
                parts = [decode(one.unsqueeze(0), asked) for one, asked in zip(embedding, boxes, strict=True)]
                logits, iou = (torch.cat(part) for part in zip(*parts, strict=True))
            else:
                image_of_box = torch.arange(len(boxes), device=self.device).repeat_interleave(boxes.shape[1])
                logits, iou = decode(embedding, boxes.flatten(0, 1), image_of_box)
        return segmentation_loss(logits.float(), iou.float(), masks.flatten(0, 1).unsqueeze(1))["loss"], logits

    def precision(self):
        """bfloat16 on a GPU; the linear attention stays in float32 (efficientvit.py), float16 overflows there."""
        enabled = self.device.type == "cuda" or self.extras.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def check_losses(self) -> None:
        """Read the losses of the last steps and add them to the sum; InputError if one is not finite."""
        for step, loss in [(step, loss.item()) for step, loss in self.pending_losses]:
            if not math.isfinite(loss):
                raise InputError(
                    f"step {step}: the loss is {loss}; lower the rate (--set learning_rate=...) and go on from last.pt "
                    "with --resume"
                )
            self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
            self.losses.append((step + 1, loss))
        self.pending_losses = []

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the network; faster in the first steps, in which the network changes most."""
        keep = min(self.extras.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - keep)
        for mean, now in zip(self.average.buffers(), self.network.buffers(), strict=True):
            mean.copy_(now)

    @torch.no_grad()
    def validate(self, items: Iterable[tuple[str, dict[str, np.ndarray]]]) -> bool:
        """Loss and Dice of (modality, item) pairs, see data.validation_item, as means over the modalities (D16).

        Uses the moving average, if there is one. Adds a row to `log`, and lets the schedule see the loss. Returns whether
        the loss is the smallest so far.
        """
        self.check_losses()
        network = (self.network if self.average is None else self.average).eval()
        losses, dices = defaultdict(list), defaultdict(list)
        for modality, item in items:
            loss, dice = self.validate_item(network, {key: torch.from_numpy(value) for key, value in item.items()})
            losses[modality].append(loss)
            dices[modality].append(dice)
        loss, dice = (mean_of(mean_of(v) for v in group.values()) for group in (losses, dices))
        train_loss = self.loss_sum / max(1, self.loss_count)
        row = (self.step, train_loss, loss, dice, self.optimiser.param_groups[0]["lr"])
        by_modality = {modality: mean_of(values) for modality, values in sorted(dices.items())}
        self.log.append(dict(zip(LOG_COLUMNS, row, strict=True)) | {"dice": by_modality})
        if self.extras.rate is None:
            self.schedule.step(train_loss if self.preset.plateau == "train" else loss)
        self.loss_sum, self.loss_count = 0.0, 0
        improved, self.best = loss < self.best, min(loss, self.best)
        return improved

    def validate_item(self, network: BoxSegmenter, item: dict[str, Tensor]) -> tuple[float, float]:
        """Mean loss and Dice of all objects of one image."""
        # not the compiled functions: they expect a full batch
        one = {key: value.unsqueeze(0) for key, value in item.items()}
        embedding, distance = self.embed(one, network.image_encoder, self.extras.teacher)
        total, dice = 0.0, []
        for first in range(0, len(item["boxes"]), OBJECT_CHUNK):  # an image may hold hundreds of objects
            boxes, masks = (item[key][first : first + OBJECT_CHUNK].to(self.device) for key in ("boxes", "masks"))
            loss, logits = self.mask_loss(network.decode, embedding, boxes.unsqueeze(0), masks.unsqueeze(0))
            total += loss.item() * len(boxes)
            found, true = (logits[:, 0] > 0).flatten(1), (masks > 0.5).flatten(1)
            dice += (2 * (found & true).sum(dim=1) / (found.sum(dim=1) + true.sum(dim=1))).tolist()
        return total / len(dice) + float(distance), sum(dice) / len(dice)

    def save(self, path: Path, must_match: dict, best: bool = False) -> None:
        """Write a checkpoint, whole or not at all.

        must_match: settings that must be equal when the run is resumed, by name: flags, and the data's fingerprint.
        best: for inference; the moving average, if there is one, takes the network's place.
        """
        self.check_losses()
        averaged = best and self.average is not None
        state = {
            "model": (self.average if averaged else self.network).state_dict(),
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
            "losses": self.losses,
            "rng": torch.get_rng_state(),
            "must_match": {key: str(value) for key, value in must_match.items()},
        }
        save_checkpoint(path, state)

    def resume(self, path: Path, must_match: dict) -> None:
        """Everything back from a checkpoint. InputError if it belongs to another preset, to other flags or other data."""
        stored = load_weights(path, self.network)
        if stored.get("preset_fields") != vars(self.preset):
            raise InputError(f"{path}: was trained with another preset; use the same, or another --out")
        for name, value in must_match.items():
            if (before := stored.get("must_match", {}).get(name)) != str(value):
                raise InputError(
                    f"{path}: was trained with {name} {before}, not {value}; use the same, or another --out"
                )
        if self.average is not None:
            self.average.load_state_dict(stored["average"])
        self.optimiser.load_state_dict(stored["optimiser"])
        self.schedule.load_state_dict(stored["schedule"])
        self.step, self.best, self.log = stored["step"], stored["best"], stored["log"]
        self.loss_sum, self.loss_count = stored["loss_sum"], stored["loss_count"]
        self.losses = stored.get("losses", [])  # checkpoints of before this existed have none
        torch.set_rng_state(stored["rng"])


def mean_of(values: Iterable[float]) -> float:
    """Plain mean."""
    values = list(values)
    return sum(values) / len(values)
