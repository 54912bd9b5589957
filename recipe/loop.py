"""What the training of our checkpoint adds to Table 3: losses, a teacher, averages of weights.

Every run has a weight decay of 0.05, gradients clipped at norm 1, a learning rate of one cycle, and
a moving average of the weights, which is validated and exported. RecipeStage says what else it has.
Letters: B images a batch, K objects an image, N = B K prompts.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats.checkpoints import OF_KINDS, lite_medsam_path, load_weights
from model import BoxSegmenter
from presets import Preset
from segment import build
from training import Run, decode_batch, mean_of, segmentation_loss, validate

MODEL = "proposed"
WARM_UP = 0.05  # share of a run in which the rate rises
ENOUGH = 16  # images a step for means of their batch norms; a distillation has none to keep


@dataclass(frozen=True)
class RecipeStage:
    """A run: its size, and what it adds to Table 3."""

    name: str
    steps: int
    learning_rate: float  # peak of the cycle
    validate_every: int  # steps
    kinds: tuple[str, ...]  # of boxes (segment.BOX_KINDS), each step one, in turn
    share: float  # of the minutes that are left, if those are limited
    batch: int = 64  # images a step
    average: float = 0.999  # decay of the moving average
    # Beside the masks the encoder learns LiteMedSAM's embedding; its decoder is frozen (D13)
    distilled: bool = False
    # Whether the encoder learns; else the decoder of `kinds` learns alone, and the encoder only answers
    encoder: bool = True


# ---------------------------------------------------------------- learning rate, losses, teacher


def one_cycle(progress: float, peak: float) -> float:
    """Learning rate at a point of a run, 0..1: a short rise to the peak, then half a cosine to its thousandth."""
    if progress < WARM_UP:
        return peak * max(progress, 0.001) / WARM_UP
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of two embeddings (B, 256, 64, 64), in units of the teacher's variance.

    A student with the teacher's embedding has 0. A student that knows nothing about the image, and
    answers everywhere with the mean of the teacher's numbers, has 1.
    """
    return F.mse_loss(student, teacher) / teacher.var().clamp(min=1e-6)


def decoder_names(kind: str) -> tuple[str, ...]:
    """How the names of the weights that answer a kind of boxes begin."""
    return ("mask_decoder.", "prompt_encoder.") if kind == "exact" else tuple(f"{part}{kind}." for part in OF_KINDS)


def teacher_encoder() -> nn.Module:
    """LiteMedSAM's image encoder. The paper starts from EfficientViT-SAM's, distilled from SAM's largest."""
    network = build("baseline")
    load_weights(lite_medsam_path(), network)
    return network.image_encoder


def bfloat16_where_fast(device: torch.device) -> torch.autocast:
    """Context that computes in bfloat16. A CPU without the instructions would need minutes a step: it stays in float32."""
    fast = device.type == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


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
        decoders = () if stage.distilled else tuple(name for kind in stage.kinds for name in decoder_names(kind))
        learning = decoders + ("image_encoder.",) * stage.encoder
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(learning))
        self.encode, self.decode, self.teach = network.image_encoder, network.decode, self.teacher
        if compiled:
            self.encode, self.decode = torch.compile(self.encode), torch.compile(self.decode)
            self.teach = self.teacher and torch.compile(self.teacher)
        self.bfloat16 = bfloat16_where_fast(device)
        self.trainable = [p for p in network.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(self.trainable, weight_decay=0.05, fused=device.type == "cuda")
        super().__init__(MODEL, preset, network, optimiser, None, must_match, stage.name)

    def kind(self) -> str:
        """The kind of boxes of the step that comes."""
        return self.settings.kinds[self.step % len(self.settings.kinds)]

    def train_step(self, batch: dict[str, Tensor], progress: float) -> None:
        """One step. batch: image, raw (B, 3, 256, 256), boxes (B, K, 4) of `kind`, masks (B, K, 256, 256)
        progress: how much of the run is over, 0..1"""
        for group in self.optimiser.param_groups:
            group["lr"] = one_cycle(progress, self.preset.learning_rate)
        images, raw, boxes, masks = (batch[key].to(self.device) for key in ("image", "raw", "boxes", "masks"))
        masks = masks.flatten(0, 1).unsqueeze(1)  # (N, 1, 256, 256)
        # batch norm is the only layer that this changes: where few images a step would blur its means, it keeps them
        stage = self.settings
        self.network.train(stage.distilled or stage.encoder and stage.batch >= ENOUGH)
        with self.bfloat16:
            with torch.set_grad_enabled(self.settings.encoder):
                embedding = self.encode(images)  # (B, 256, 64, 64)
            decode = partial(self.decode, boxes_are=self.kind())
            logits, iou = decode_batch(decode, embedding, boxes)  # (N, 1, 256, 256), (N, 1)
        loss = segmentation_loss(logits, iou, masks)["loss"]
        if self.settings.distilled:
            with torch.no_grad(), self.bfloat16:
                wanted = self.teach(raw)
            loss = loss + distillation_loss(embedding.float(), wanted.float())
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

    def check(self, items: Callable[[str], Iterable], folder: Path) -> None:
        """Validate the average, write the log and, if its loss is the smallest so far, best.pt.

        items: a kind of boxes -> pairs of training.validate with such boxes. The kinds' means count."""

        def distance(embedding: Tensor, item: dict[str, Tensor]) -> Tensor:
            return distillation_loss(embedding.float(), self.teacher(item["raw"].unsqueeze(0)).float())

        extra = distance if self.teacher else None
        with self.bfloat16:
            each = [validate(self.average, items(kind), "image", extra, kind) for kind in self.settings.kinds]
        found = {name: mean_of([one[name] for one in each]) for name in ("validation_loss", "validation_dice")}
        found["dice"] = {name: mean_of([one["dice"][name] for one in each]) for name in each[0]["dice"]}
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
        load_weights(path, self.average, {"model": stored.get("average")})
        return stored
