"""OpenVINO's graphs of a network: made from PyTorch's, compared with it, and written to a folder (openvino_engine.py runs them).

A graph is made by running the network's code once and noting each operation, as PyTorch calls it: tracing. The decoder's graphs
are traced from decoder.py, which the engine `fast` runs too.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from efficientvit import EMBED_DIM, EMBED_GRID
from fast.compare import decoded, encoded, refusal, refuse_other, refuse_other_decoder
from fast.decoder import FastDecoder
from fast.openvino_engine import OpenVINOEngine, import_openvino, write_info
from fast.torch_engine import fold_batch_norms
from files import InputError
from grid import GRID
from model import BoxSegmenter


class EncoderGraph(nn.Module):
    """image (1, 3, 256, 256) -> embedding (4096, 256): cell by cell, as the encoder's last norm has it and the decoder wants it"""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        return self.encoder(image).flatten(2).transpose(1, 2).flatten(0, 1)


class ImageGraph(nn.Module):
    """embedding (4096, 256) -> what `FastDecoder.of_image` says"""

    def __init__(self, decoder: FastDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.decoder.of_image(embedding)


class PromptGraph(nn.Module):
    """boxes (N, 4) on the grid -> their prompts (N, 2, 256)"""

    def __init__(self, decoder: FastDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, boxes: Tensor) -> Tensor:
        return self.decoder.prompts(boxes)[0]


class BoxGraph(nn.Module):
    """prompt (1, 2, 256); corners (4,) of the cells that are wanted: first row, row after the last, the same of columns; the
    image side -> logits of these cells' pixels (4 R, 4 C), predicted IoU (1, 1)"""

    def __init__(self, decoder: FastDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, prompt: Tensor, corners: Tensor, *image_side: Tensor) -> tuple[Tensor, Tensor]:
        cells, weights, iou = self.decoder.of_prompts(prompt, image_side)
        top, bottom, left, right = corners
        return self.decoder.upscale(cells[0][top:bottom, left:right], weights[0]), iou


@torch.no_grad()
def traced(module: nn.Module, *inputs: Tensor, shapes: list[tuple[int, ...]] | None = None):
    """A module as a graph, with inputs of these shapes.   shapes: other ones; -1 for any number."""
    shapes = shapes or [tuple(value.shape) for value in inputs]
    import_openvino()
    from openvino.tools.ovc import convert_model  # only here: it takes as long to import as all the rest of OpenVINO

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of each `if` on a shape; the shapes they ask for are fixed
        return convert_model(module, example_input=inputs, input=shapes)


def encoder_graph(encoder: nn.Module):
    """An image encoder -> its float32 graph. OpenVINO would fold the batch norms too, but then layers lose their names."""
    return traced(EncoderGraph(fold_batch_norms(copy.deepcopy(encoder))), torch.zeros(1, 3, GRID, GRID))


def decoder_graphs(network: BoxSegmenter) -> dict:
    """The graphs "image", "prompt" and "box" of a network's decoder."""
    frozen = nn.ModuleDict({"prompts": network.prompt_encoder, "decoder": network.mask_decoder})
    frozen = copy.deepcopy(frozen).requires_grad_(False)  # a graph's constants cannot be trained
    only_decoder = BoxSegmenter(nn.Identity())
    only_decoder.prompt_encoder, only_decoder.mask_decoder = frozen["prompts"], frozen["decoder"]
    decoder, embedding = FastDecoder(only_decoder), torch.zeros(EMBED_GRID**2, EMBED_DIM)
    with torch.no_grad():
        side = decoder.of_image(embedding)
    corners = torch.tensor([7, 36, 5, 31])
    return {
        "image": traced(ImageGraph(decoder), embedding),
        "prompt": traced(PromptGraph(decoder), torch.zeros(2, 4), shapes=[(-1, 4)]),
        "box": traced(BoxGraph(decoder), torch.zeros(1, 2, EMBED_DIM), corners, *side),
    }


def write_graphs(folder: Path, network: BoxSegmenter, info: dict, engine: str, encoder=None) -> int:
    """Make and write the graphs of a network, whole or not at all; a folder of before is replaced. -> bytes

    info: for info.json.   engine: for the sentences.   encoder: the encoder's graph if it was made already, as the int8 one is.
    InputError if they do not compute what the network as written does, of which an int8 encoder is not asked.
    """
    network.eval()
    openvino, graphs = import_openvino(), {"encoder": encoder}
    if encoder is None:
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
        compare_graphs(OpenVINOEngine(made), network, engine, float_encoder=encoder is None)
        write_info(made, info)
        size = sum(path.stat().st_size for path in made.iterdir())
        if folder.is_dir():
            shutil.move(folder, Path(scratch) / "before")
        shutil.move(made, folder)
    return size


def compare_graphs(engine: OpenVINOEngine, network: BoxSegmenter, name: str, float_encoder: bool) -> None:
    """InputError if graphs, run in float32, do not give what the network as written gives."""

    def encode(image: Tensor) -> Tensor:
        return torch.from_numpy(engine.encode(image[0].numpy())).T.reshape(1, EMBED_DIM, EMBED_GRID, EMBED_GRID)

    def decode(embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        found = engine.decode(np.ascontiguousarray(embedding.flatten(2)[0].T.numpy()), boxes.numpy())
        return tuple(torch.from_numpy(values)[:, None] for values in found)

    if float_encoder:
        refuse_other(name, "image encoder", encoded(encode), encoded(network.image_encoder))
    refuse_other_decoder(name, decode, decoded(network.decode))
