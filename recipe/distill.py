"""The teacher of distillation, LiteMedSAM's image encoder, and its answers kept on disk; the one-cycle learning rate. (D13)

The paper starts from EfficientViT-SAM, whose encoder was distilled from SAM's largest. Ours is distilled from LiteMedSAM.

Without augmentation the teacher sees the same image in every epoch and costs more than the student, so an answer is
kept in a file named by the image's content: (256, 64, 64) float16, 2 MB. Files may be deleted at any time.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from files.checkpoints import lite_medsam_path, load_weights
from files.writing import save_bytes
from segment import build

WARM_UP = 0.05  # share of a one-cycle run in which the rate rises
SHAPE = (256, 64, 64)
SIZE = 2 * int(np.prod(SHAPE))  # bytes of a file


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: a short linear rise to the peak, then half a cosine down to a thousandth of it."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2)


def teacher_encoder() -> nn.Module:
    """LiteMedSAM's image encoder with its published weights."""
    network = build("baseline")
    load_weights(lite_medsam_path(), network)
    return network.image_encoder


class Teacher(nn.Module):
    """raw (B, 3, 256, 256) -> embedding (B, 256, 64, 64) of LiteMedSAM, no gradient.

    folder : where answers are kept; None: nowhere.   limit : bytes that the folder may hold; what is over is not kept.
    With a folder every answer is rounded to float16, also one that was just computed, and computed for one image at
    a time: a run that finds it in the file and one that does not go on in the same bits.
    """

    def __init__(self, device: torch.device, folder: Path | None = None, limit: int = 0) -> None:
        super().__init__()
        self.encoder = teacher_encoder().requires_grad_(False).to(device).eval()
        self.folder, self.room = folder, 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.room = limit // SIZE - sum(1 for _ in folder.glob("*.f16"))

    @torch.no_grad()
    def forward(self, raw: Tensor) -> Tensor:
        if self.folder is None:
            return self.encoder(raw)
        return torch.cat([self.kept(image) for image in raw.split(1)])

    def kept(self, image: Tensor) -> Tensor:
        """The answer (1, 256, 64, 64) for one image (1, 3, 256, 256), from its file if it is there and whole."""
        content = image.cpu().contiguous().numpy().tobytes()
        path = self.folder / f"{zlib.crc32(content):08x}{zlib.adler32(content):08x}.f16"
        if path.is_file() and path.stat().st_size == SIZE:
            stored = torch.from_numpy(np.fromfile(path, np.float16)).reshape(1, *SHAPE)
            return stored.to(image.device).float()
        answer = self.encoder(image).half()
        if self.room > 0:
            save_bytes(path, answer.cpu().numpy().tobytes())
            self.room -= 1
        return answer.float()
