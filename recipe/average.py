"""Average the weights of networks that started from one another: between two checkpoints lies a better one. (D21)

    python -m recipe --average runs/loosen/best.pt=0.6 lite_medsam=0.4 --out average

Fine-tuning gains where the data are and loses elsewhere; on the straight line back to where it started, much of the loss is
undone before much of the gain is. Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv:2109.01903.
`lite_medsam` stands for LiteMedSAM's prompt encoder and mask decoder, where ours started. It has no part of our image
encoder: there the other shares count alone. Shares are divided by their sum.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from files import InputError
from files.checkpoints import export_checkpoint, lite_medsam_path, load_weights, read_checkpoint, save_checkpoint
from segment import build

SHARED = ("prompt_encoder.", "mask_decoder.")  # modules that both models have


def read_weights(name: str) -> dict[str, Tensor]:
    """Weights of a checkpoint of the proposed model, or of `lite_medsam` those that both models have."""
    network = build("baseline" if name == "lite_medsam" else "proposed")
    load_weights(lite_medsam_path() if name == "lite_medsam" else Path(name), network)
    state = network.state_dict()
    return {k: v for k, v in state.items() if k.startswith(SHARED)} if name == "lite_medsam" else state


def average(shares: dict[str, float]) -> dict[str, Tensor]:
    """{checkpoint: share} -> weights, float32: each the mean over the checkpoints that have it, weighted by their shares."""
    states = {name: read_weights(name) for name in shares}
    mean = {}
    for key, value in next(state for name, state in states.items() if name != "lite_medsam").items():
        found = [(shares[name], state[key]) for name, state in states.items() if key in state]
        total = sum(share for share, _ in found)
        mean[key] = sum(share / total * part.float() for share, part in found).to(value.dtype)
    return mean


def read_shares(texts: list[str]) -> dict[str, float]:
    """["a.pt=0.6", "lite_medsam=0.4"] -> {"a.pt": 0.6, "lite_medsam": 0.4}. InputError if that says nothing."""
    shares = {}
    for text in texts:
        name, _, share = text.rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            shares[name] = -1.0
        if not name or shares[name] <= 0:
            raise InputError(f"{text}: give CHECKPOINT=SHARE with a share above 0, such as runs/loosen/best.pt=0.6")
    if set(shares) == {"lite_medsam"}:
        raise InputError("lite_medsam has no image encoder of ours; name a checkpoint of the proposed model too")
    return shares


@torch.inference_mode()
def export_average(texts: list[str], out: Path) -> None:
    """Write the average that `texts` ask for, see read_shares, as float16; preset, step and log are the first checkpoint's."""
    shares = read_shares(texts)
    first = next(name for name in shares if name != "lite_medsam")
    save_checkpoint(out, read_checkpoint(Path(first)) | {"model": average(shares)})
    export_checkpoint(out, out)
