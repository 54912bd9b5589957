"""The training losses of Table 3: BCE + Dice on the masks, MSE on the predicted IoU, all with weight 1. [P Table 3]

Letters: N prompts, H, W the 256 grid. Logits and masks are (N, 1, H, W), IoU (N, 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - soft Dice with squared probabilities in the denominator, mean over prompts. Both empty costs nothing."""
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
    """The three terms and their sum, `loss`. The true IoU is measured, not differentiated."""
    terms = {
        "bce": F.binary_cross_entropy_with_logits(logits, masks),
        "dice": dice_loss(logits, masks),
        "mse": F.mse_loss(iou, mask_iou(logits.detach(), masks)),
    }
    return terms | {"loss": sum(terms.values())}


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two embeddings (B, 256, 64, 64), as a share of the teacher's own variance: 1 for a
    student that always answers with the mean."""
    return F.mse_loss(student, teacher) / teacher.var().clamp(min=1e-6)
