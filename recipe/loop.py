"""What the training of our checkpoint adds to Table 3: losses, a teacher, averages of weights.

Every run has a weight decay of 0.05, gradients clipped at norm 1, a learning rate of one cycle, and
a moving average of the weights, which is validated and exported. RecipeStage says what else it has.
Letters: B images a batch, K objects an image, N = B K prompts.
"""

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats import InputError
from formats.checkpoints import lite_medsam_path, load_weights, read_checkpoint
from model import BoxSegmenter
from presets import Preset
from segment import build
from training import Run, decode_batch, segmentation_loss, validate

MODEL = "proposed"
BAND = 3  # pixels of the grid on both sides of a contour, see boundary_loss
WARM_UP = 0.05  # share of a run in which the rate rises
SHARED = ("prompt_encoder.", "mask_decoder.")  # modules that LiteMedSAM and the proposed model have


@dataclass(frozen=True)
class RecipeStage:
    """A run: its size, and what it adds to Table 3."""

    name: str
    steps: int
    learning_rate: float  # peak of the cycle
    validate_every: int  # steps
    batch: int = 64  # images a step
    looseness: float = 0.0  # of the boxes (D20)
    average: float = 0.999  # decay of the moving average
    # Beside the masks the encoder learns LiteMedSAM's embedding; its decoder is frozen (D13)
    distilled: bool = False
    # For few images a step, on a CPU: batch norms keep their means, and a CPU that has the instructions
    # computes in bfloat16
    small: bool = False
    only: tuple[str, ...] = ()  # modules that learn, by the beginning of their names; (): all
    encoder_share: float = 1.0  # the image encoder's learning rate as a share of the others'
    boundary: float = 0.0  # weight of boundary_loss in training; validation stays Table 3's


# ---------------------------------------------------------------- learning rate, losses, teacher


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: a short rise to the peak, then half a cosine to its thousandth."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2)


def boundary_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """BCE of the pixels within BAND of the true contour, a mean by prompt, then over prompts. (D22)

    Of a whole image few pixels lie at a contour, and fewer still if the object is small.
    """
    grown, shrunk = (F.max_pool2d(sign * masks, 2 * BAND + 1, stride=1, padding=BAND) for sign in (1, -1))
    band = grown + shrunk  # max of -m is -min of m: 1 where the neighbourhood holds both object and background
    error = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return ((error * band).flatten(1).sum(dim=1) / band.flatten(1).sum(dim=1).clamp(min=1)).mean()


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of two embeddings (B, 256, 64, 64), in units of the teacher's variance.

    A student with the teacher's embedding has 0. A student that knows nothing about the image, and
    answers everywhere with the mean of the teacher's numbers, has 1.
    """
    return F.mse_loss(student, teacher) / teacher.var().clamp(min=1e-6)


def teacher_encoder() -> nn.Module:
    """LiteMedSAM's image encoder. The paper starts from EfficientViT-SAM's, distilled from SAM's largest."""
    network = build("baseline")
    load_weights(lite_medsam_path(), network)
    return network.image_encoder


# ---------------------------------------------------------------- one run


class StageRun(Run):
    """training.Run with a moving average of the weights, and the training step of a RecipeStage."""

    def __init__(
        self, stage: RecipeStage, preset: Preset, network: BoxSegmenter, device: torch.device, must_match: dict, compiled: bool
    ) -> None:  # fmt: skip
        """network: on the device.   compiled: slower to start, faster on a GPU."""
        self.settings, self.device = stage, device
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.teacher = teacher_encoder().requires_grad_(False).to(device).eval() if stage.distilled else None
        for name, parameter in network.named_parameters():
            frozen = stage.distilled and name.startswith(SHARED)
            parameter.requires_grad_(not frozen and name.startswith(stage.only or ""))
        self.encode, self.decode, self.teach = network.image_encoder, network.decode, self.teacher
        if compiled:
            self.encode, self.decode = torch.compile(self.encode), torch.compile(self.decode)
            self.teach = self.teacher and torch.compile(self.teacher)
        # A CPU without the instructions takes minutes a step in bfloat16: it stays in float32
        quick = stage.small and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        self.bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or quick)
        self.trainable = [p for p in network.parameters() if p.requires_grad]
        encoder = set(network.image_encoder.parameters())
        parts = ([p for p in self.trainable if p not in encoder], [p for p in self.trainable if p in encoder])
        groups = [{"params": p, "share": s} for p, s in zip(parts, (1.0, stage.encoder_share), strict=True) if p]
        optimiser = torch.optim.AdamW(groups, weight_decay=0.05, fused=device.type == "cuda")
        super().__init__(MODEL, preset, network, optimiser, None, must_match, stage.name)

    def train_step(self, batch: dict[str, Tensor]) -> None:
        """One step. batch: image, raw (B, 3, 256, 256), boxes (B, K, 4), masks (B, K, 256, 256)"""
        for group in self.optimiser.param_groups:
            group["lr"] = group["share"] * one_cycle(self.step, self.settings.steps, self.preset.learning_rate)
        images, raw, boxes, masks = (batch[key].to(self.device) for key in ("image", "raw", "boxes", "masks"))
        masks = masks.flatten(0, 1).unsqueeze(1)  # (N, 1, 256, 256)
        self.network.train(not self.settings.small)  # batch norm is the only layer that this changes
        with self.bfloat16:
            embedding = self.encode(images)  # (B, 256, 64, 64)
            logits, iou = decode_batch(self.decode, embedding, boxes)  # (N, 1, 256, 256), (N, 1)
        loss = segmentation_loss(logits, iou, masks)["loss"]
        if self.settings.distilled:
            with torch.no_grad(), self.bfloat16:
                wanted = self.teach(raw)
            loss = loss + distillation_loss(embedding.float(), wanted.float())
        if self.settings.boundary:
            loss = loss + self.settings.boundary * boundary_loss(logits, masks)
        self.note(loss)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimiser.step()
        self.step += 1
        self.update_average()

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the network; faster at first, when that changes most."""
        keep = min(self.settings.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - keep)
        for mean, now in zip(self.average.buffers(), self.network.buffers(), strict=True):
            mean.copy_(now)

    def check(self, items, folder: Path) -> None:
        """Validate the average, write the log and, if its loss is the smallest so far, best.pt."""

        def distance(embedding: Tensor, item: dict[str, Tensor]) -> Tensor:
            return distillation_loss(embedding.float(), self.teacher(item["raw"].unsqueeze(0)).float())

        with self.bfloat16:
            found = validate(self.average, items, extra=distance if self.teacher else None)
        self.add_row(found, folder)
        if found["validation_loss"] < self.best:
            self.best = found["validation_loss"]
            self.save(folder / "best.pt", model=self.average.state_dict())

    def save(self, path: Path, **changed) -> None:
        """A checkpoint with the average beside the network, or, in best.pt, in place of it."""
        super().save(path, average=None if changed else self.average.state_dict(), **changed)

    def resume(self, path: Path) -> dict:
        """training.Run's, and the average."""
        stored = super().resume(path)
        self.average.load_state_dict(stored["average"])
        return stored


# ---------------------------------------------------------------- the average of trained networks


def average_weights(texts: list[str]) -> dict:
    """["a.pt=0.6", "lite_medsam=0.4"] -> the first file's content with the mean of the weights. (D21)

    Fine-tuning gains where the data are and loses elsewhere. On the straight line back to where it
    started, much of the loss is undone before much of the gain is. Source: Wortsman et al., "Robust
    fine-tuning of zero-shot models" (WiSE-FT), arXiv:2109.01903.
    `lite_medsam` stands for LiteMedSAM's prompt encoder and mask decoder, where ours started. Our
    image encoder has no part of it: there the other shares count alone. Shares are divided by their sum.
    """
    shares, states, ours = {}, {}, []
    for text in texts:
        name, _, share = text.rpartition("=")
        shares[name] = float(share) if re.fullmatch(r"\d*\.?\d+", share) else 0.0
        if not name or not shares[name]:
            raise InputError(f"{text}: give CHECKPOINT=SHARE with a share above 0, such as runs/loosen/best.pt=0.6")
    for name in shares:
        donor = name == "lite_medsam"
        network = build("baseline" if donor else MODEL)
        load_weights(lite_medsam_path() if donor else Path(name), network)
        states[name] = network.state_dict()
        ours += [] if donor else [name]
    if not ours:
        raise InputError("lite_medsam has no image encoder of ours; name a checkpoint of the proposed model too")
    mean = {}
    for key, value in states[ours[0]].items():
        found = [(shares[name], states[name][key]) for name in shares if name in ours or key.startswith(SHARED)]
        total = sum(share for share, _ in found)
        mean[key] = sum(share / total * part.float() for share, part in found).to(value.dtype)
    return read_checkpoint(Path(ours[0])) | {"model": mean}
