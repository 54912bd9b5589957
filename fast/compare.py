"""Does an engine compute what the network's code computes? Fixed inputs, a tolerance for rounding, the sentence of refusal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import segment
from efficientvit import EMBED_DIM, EMBED_GRID
from files import InputError
from grid import GRID

# How far an engine may be from model.py: |found - wanted| / |wanted|, of all values together. Rounding gives below 1e-5.
ROUNDING = 1e-3


def fixed_values(*shape: int) -> Tensor:
    """Random numbers in 0..1, always the same. PyTorch's own random state stays as it is."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def encoded(encoder: Callable[[Tensor], Tensor]) -> Tensor:
    """What an image encoder makes of a fixed random image: (1, 256, 64, 64)."""
    return encoder(fixed_values(1, 3, GRID, GRID))


@torch.inference_mode()
def decoded(decode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What a decoder makes of a fixed random embedding and two boxes: logits (2, 1, 256, 256), IoU (2, 1)."""
    boxes = torch.tensor([[20.0, 30, 120, 140], [100.5, 20.25, 180, 90.75]])
    embedding = 4 * fixed_values(1, EMBED_DIM, EMBED_GRID, EMBED_GRID) - 2  # about as large as a normalized one
    return decode(embedding, boxes)


def differs(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors differ by more than rounding, or in shape."""
    return found.shape != wanted.shape or not (found - wanted).norm() <= ROUNDING * wanted.norm()  # not: NaN differs


def refusal(engine: str, part: str) -> InputError:
    """The sentence of an engine that is not the network as written."""
    return InputError(f"engine {engine}: its {part} does not compute what the network's code does; use --engine torch")


def refuse_other(engine: str, part: str, found: Tensor, wanted: Tensor) -> None:
    """InputError if a part of an engine differs from the network as written."""
    if differs(found, wanted):
        raise refusal(engine, part)


def refuse_other_decoder(engine: str, decode: Callable, wanted: tuple[Tensor, Tensor]) -> None:
    """InputError if a decoder does not give the logits and IoU that the network as written gives, see `decoded`."""
    try:
        found = decoded(decode)
    except Exception as error:  # edited code may hold anything, such as a layer more or less
        raise refusal(engine, "mask decoder") from error
    for one, other in zip(found, wanted, strict=True):
        refuse_other(engine, "mask decoder", one, other)


def probe(model: str) -> dict[str, list[float]]:
    """What the network's code makes of fixed inputs with seeded random weights: some values of the embedding, logits and IoU.

    PyTorch's random state is left as it was. Weights that start all alike (norms: ones and zeros) are changed a little,
    so that their place in the code matters.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = segment.build(model).eval()
        for value in network.state_dict().values():
            if value.is_floating_point() and value.numel() > 1 and value.min() == value.max():
                value.add_(0.1 * torch.randn(value.shape))
    embedding, (logits, iou) = encoded(network.image_encoder), decoded(network.decode)
    found = {"embedding": embedding[0, ::16, ::8, ::8], "logits": logits[:, 0, ::8, ::8], "iou": iou}
    return {part: values.flatten().tolist() for part, values in found.items()}


def probes_differ(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> bool:
    """Whether two results of `probe` differ in any part by more than rounding."""
    return any(differs(torch.tensor(values), torch.tensor(wanted.get(part, []))) for part, values in found.items())
