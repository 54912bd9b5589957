"""OpenVINO's graphs of a network: made from PyTorch's, compared with it, and written (openvino_engine.py runs them).

A graph is made by running the network's code once and noting each operation, as PyTorch calls it: tracing. The
decoder's graphs are traced from decoder.py.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import segment
from efficientvit import EMBED_DIM, EMBED_GRID
from engines.decoder import ReorderedDecoder
from engines.openvino_engine import OpenVINOEngine, import_openvino, write_info
from formats import InputError
from grid import GRID
from model import BoxSegmenter

CONVOLUTION_AND_NORM = (("conv", "norm"), ("c", "bn"))  # their names in efficientvit.ConvNorm and baseline.ConvBN
# How far graphs may be from model.py: |found - wanted| / |wanted|, of all values together. Rounding gives below 1e-5.
ROUNDING = 1e-3


# ---------------------------------------------------------------- tracing


class EncoderGraph(nn.Module):
    """image (1, 3, 256, 256) -> embedding (4096, 256): cell by cell, as the last norm has it and the decoder wants it"""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        return self.encoder(image).flatten(2).transpose(1, 2).flatten(0, 1)


class DecoderGraph(nn.Module):
    """One of ReorderedDecoder's three functions as a module, which is what can be traced."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor):
        return self.function(*inputs)


@torch.no_grad()
def traced(module: nn.Module, *inputs: Tensor, shapes: list[tuple[int, ...]] | None = None):
    """A module as a graph, with inputs of these shapes.   shapes: other ones; -1 for any number."""
    shapes = shapes or [tuple(value.shape) for value in inputs]
    import_openvino()
    from openvino.tools.ovc import convert_model  # only here: it takes as long to import as all the rest of OpenVINO

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of each `if` on a shape; the shapes they ask for are fixed
        return convert_model(module, example_input=inputs, input=shapes)


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold every batch norm of a network into the convolution before it, in place. Returns the network.

    In inference a batch norm is y = g (x - m) / sqrt(v + eps) + b: one scale and one shift a channel. The convolution's
    weights take the scale, its bias the shift. OpenVINO would do this too, but then layers lose their names.
    """
    network.eval()
    with torch.no_grad():
        for layer in network.modules():
            for convolution, norm in CONVOLUTION_AND_NORM:
                pair = getattr(layer, convolution, None), getattr(layer, norm, None)
                if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                    setattr(layer, convolution, fuse_conv_bn_eval(*pair))
                    setattr(layer, norm, nn.Identity())
    return network.requires_grad_(False)


def encoder_graph(encoder: nn.Module):
    """An image encoder -> its float32 graph."""
    return traced(EncoderGraph(fold_batch_norms(copy.deepcopy(encoder))), torch.zeros(1, 3, GRID, GRID))


def decoder_graphs(network: BoxSegmenter) -> dict:
    """The graphs "image", "prompt" and "box" of a network's decoder."""
    only_decoder = BoxSegmenter(nn.Identity())
    only_decoder.prompt_encoder = copy.deepcopy(network.prompt_encoder)
    only_decoder.mask_decoder = copy.deepcopy(network.mask_decoder)
    # a graph's constants cannot be trained
    decoder, embedding = ReorderedDecoder(only_decoder.requires_grad_(False)), torch.zeros(EMBED_GRID**2, EMBED_DIM)
    prompt, corners, image_side = (
        torch.zeros(1, 2, EMBED_DIM),
        torch.tensor([7, 36, 5, 31]),
        decoder.of_image(embedding),
    )
    return {
        "image": traced(DecoderGraph(decoder.of_image), embedding),
        "prompt": traced(DecoderGraph(decoder.of_boxes), torch.zeros(2, 4), shapes=[(-1, 4)]),
        "box": traced(DecoderGraph(decoder.of_box), prompt, corners, *image_side),
    }


def write_graphs(folder: Path, network: BoxSegmenter, info: dict, engine: str, encoder=None) -> int:
    """Make and write the graphs of a network, whole or not at all; a folder of before is replaced. -> bytes

    info: for info.json.   engine: for the sentences.   encoder: its graph if it was made already, as the int8 one is.
    InputError if they do not compute what the network as written does, of which an int8 encoder is not asked.
    """
    network.eval()
    openvino, graphs, float_encoder = import_openvino(), {"encoder": encoder}, encoder is None
    if float_encoder:
        try:
            graphs["encoder"] = encoder_graph(network.image_encoder)
        except Exception as error:  # edited code may hold anything, and OpenVINO's errors have no common class
            raise InputError(f"engine {engine}: it can't convert this image encoder; use --engine torch") from error
    try:
        graphs |= decoder_graphs(network)
    except Exception as error:
        raise refusal(engine, "mask decoder") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        for name, graph in graphs.items():
            openvino.save_model(graph, made / f"{name}.xml", compress_to_fp16=False)
        compare_graphs(OpenVINOEngine(made), network, engine, float_encoder)
        write_info(made, info)
        size = sum(path.stat().st_size for path in made.iterdir())
        if folder.is_dir():
            shutil.move(folder, Path(scratch) / "before")
        shutil.move(made, folder)
    return size


# ---------------------------------------------------------------- do they compute what the network's code computes?


@torch.inference_mode()
def answers(encode: Callable, decode: Callable) -> dict[str, Tensor]:
    """What a network, or its graphs, make of fixed random inputs: an image, and an embedding with two boxes.

    encode: image (1, 3, 256, 256) -> embedding (1, 256, 64, 64).   decode: such an embedding, boxes (2, 4) -> logits
    (2, 1, 256, 256), IoU (2, 1). PyTorch's own random state stays as it is."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, GRID, GRID, generator=generator)
    # about as large as a normalized embedding
    embedding = 4 * torch.rand(1, EMBED_DIM, EMBED_GRID, EMBED_GRID, generator=generator.manual_seed(0)) - 2
    logits, iou = decode(embedding, torch.tensor([[20.0, 30, 120, 140], [100.5, 20.25, 180, 90.75]]))
    return {"embedding": encode(image), "logits": logits, "iou": iou}


def differs(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors differ by more than rounding, or in shape."""
    return found.shape != wanted.shape or not (found - wanted).norm() <= ROUNDING * wanted.norm()  # not: NaN differs


def refusal(engine: str, part: str) -> InputError:
    """The sentence of an engine that is not the network as written."""
    return InputError(f"engine {engine}: its {part} does not compute what the network's code does; use --engine torch")


def compare_graphs(engine: OpenVINOEngine, network: BoxSegmenter, name: str, float_encoder: bool) -> None:
    """InputError if graphs, run in float32, do not give what the network as written gives."""

    def encode(image: Tensor) -> Tensor:
        return torch.from_numpy(engine.encode(image[0].numpy())).T.reshape(1, EMBED_DIM, EMBED_GRID, EMBED_GRID)

    def decode(embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        found = engine.decode(np.ascontiguousarray(embedding.flatten(2)[0].T.numpy()), boxes.numpy())
        return tuple(torch.from_numpy(values)[:, None] for values in found)

    found, wanted = answers(encode, decode), answers(network.image_encoder, network.decode)
    if float_encoder and differs(found["embedding"], wanted["embedding"]):
        raise refusal(name, "image encoder")
    if differs(found["logits"], wanted["logits"]) or differs(found["iou"], wanted["iou"]):
        raise refusal(name, "mask decoder")


def probe(model: str) -> dict[str, list[float]]:
    """Some values of what the network's code makes of fixed inputs with seeded random weights.

    PyTorch's random state is left as it was. Weights that start all alike (norms: ones and zeros) are changed a little,
    so that their place in the code matters.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = segment.build(model).eval()
        for value in network.state_dict().values():
            if value.is_floating_point() and value.numel() > 1 and value.min() == value.max():
                value.add_(0.1 * torch.randn(value.shape))
    found = answers(network.image_encoder, network.decode)
    some = {"embedding": found["embedding"][0, ::16, ::8, ::8], "logits": found["logits"][:, 0, ::8, ::8]}
    return {part: values.flatten().tolist() for part, values in (some | {"iou": found["iou"]}).items()}


def probes_differ(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> bool:
    """Whether two results of `probe` differ in any part by more than rounding."""
    return any(differs(torch.tensor(values), torch.tensor(wanted.get(part, []))) for part, values in found.items())
