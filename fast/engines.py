"""The five engines: what can run a network. `load` builds a segmenter for any of them. docs/speed.md compares them.

torch and torch-int8 are model.py as written (segment.load). The other three compute the same in other ways, while model.py may
be edited. So each is compared with it, and refuses to load if it differs by more than rounding:
- all three, when they load: their decoder with model.py's, on a fixed random embedding;
- fast, when it loads: its encoder with the encoder as written, on a fixed random image;
- openvino: the same, when it makes its graph. The graph's name has a hash of the network's code, so edited code gets a
  graph of its own;
- openvino-int8: that hash with the one in its file. If they differ, what the code computes with seeded random weights,
  then and now (`probe`). The int8 layers themselves cannot be compared: they do not equal the float ones.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fast
import segment
from efficientvit import EMBED_DIM, EMBED_GRID
from fast import openvino_engine
from fast.decoder import FastDecoder
from fast.openvino_engine import OpenVINOEncoder, cache_folder, encoder_graph, import_openvino, last_norm
from files import InputError
from grid import GRID
from model import BoxSegmenter
from segment import Segmenter

ENGINES = (*segment.ENGINES, *fast.ENGINES)
# How far an engine may be from model.py: |found - wanted| / |wanted|, of all values together. Rounding gives below 1e-5.
ROUNDING = 1e-3
CONVOLUTION_AND_NORM = (("conv", "norm"), ("c", "bn"))  # their names in efficientvit.ConvNorm and baseline.ConvBN
NETWORK_CODE = ("efficientvit", "model", "baseline")  # modules; and that of the model's encoder, see segment.MODELS


def load(
    model: str,
    weights: Path | None = None,
    preset: str | None = None,
    engine: str = "fast",
    force: bool = False,
    settings: Sequence[str] = (),
    cache: Path | None = None,
) -> Segmenter:
    """A model by name with its weights and preset, ready to segment, as `segment.load`, for every engine of ENGINES.

    weights: a checkpoint, or for openvino-int8 a NAME.static.xml (default: the model's own).
    cache: folder in which OpenVINO's engines keep graphs (default: openvino_engine.cache_folder).
    Raises InputError, one sentence, for all that segment.load refuses, for a package that is not installed, and if the
    engine computes something else than model.py.
    """
    row = segment.architecture(model)
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r}: unknown; choose one of {', '.join(ENGINES)}")
    if engine in segment.ENGINES:
        return segment.load(model, weights, preset, engine, force, settings)
    if engine == "openvino-int8":
        path = weights or openvino_engine.default_static(model)
        made, info = static_engine(path, model, cache)
        chosen = segment.chosen_preset(path, preset, info.get("preset"), force, settings)
        return Segmenter(made, chosen, row.enhanced)
    path = weights or row.weights()
    network, _, chosen = segment.load_network(model, path, preset, "torch", force, settings)
    made = fast_engine(network) if engine == "fast" else graph_engine(network, model, path, cache)
    return Segmenter(made, chosen, row.enhanced)


class FastEngine:
    """Some image encoder and `FastDecoder` behind the two calls of model.TorchEngine."""

    def __init__(self, encoder: Callable[[Tensor], Tensor], network: BoxSegmenter) -> None:
        """encoder: image (1, 3, 256, 256) -> embedding (1, 256, 64, 64).   network: its decoder is used."""
        self.encoder, self.network, self.decoder = encoder, network, FastDecoder(network)

    @torch.inference_mode()
    def encode(self, image: np.ndarray) -> Tensor:
        """image (3, 256, 256) float32, see enhance.network_input -> its embedding"""
        return self.encoder(torch.from_numpy(image).unsqueeze(0))

    @torch.inference_mode()
    def decode(
        self, embedding: Tensor, boxes: np.ndarray, within: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """boxes (N, 4) on the grid -> logits (N, 256, 256) on the grid, predicted IoU (N,), float32

        within: (N, 4) x0 y0 x1 y1 on the grid, where each mask is wanted; elsewhere logits are decoder.OUTSIDE.
        """
        asked = torch.as_tensor(boxes, dtype=torch.float32)
        logits, iou = self.decoder.decode(embedding, asked, None if within is None else torch.as_tensor(within))
        return logits[:, 0].numpy(), iou[:, 0].numpy()


# ---------------------------------------------------------------- fast


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold every batch norm of a network into the convolution before it, in place. Returns the network.

    In inference a batch norm is y = g (x - m) / sqrt(v + eps) + b: one scale and one shift a channel. The convolution's
    weights take the scale, its bias the shift, and one pass over the map less is made. Then maps lie in memory channel
    by channel of each pixel (channels last), as these convolutions read them fastest.
    A folded network can't be trained, and its weights have other names than the checkpoint's: save the plain one.
    """
    network.eval()
    with torch.no_grad():
        for layer in network.modules():
            for convolution, norm in CONVOLUTION_AND_NORM:
                pair = getattr(layer, convolution, None), getattr(layer, norm, None)
                if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                    setattr(layer, convolution, fuse_conv_bn_eval(*pair))
                    setattr(layer, norm, nn.Identity())
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def fast_engine(network: BoxSegmenter) -> FastEngine:
    """A network with its batch norms folded away, in place. InputError if the result is not the network as written."""
    network.eval()
    embedding, masks = encoded(network.image_encoder), decoded(network.decode)  # before anything is folded
    fold_batch_norms(network)
    refuse_other("fast", "image encoder", encoded(network.image_encoder), embedding)
    return with_fast_decoder("fast", network.image_encoder, network, masks)


# ---------------------------------------------------------------- the same as model.py, or not at all


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


def with_fast_decoder(
    engine: str, encoder: Callable[[Tensor], Tensor], network: BoxSegmenter, masks: tuple[Tensor, Tensor]
) -> FastEngine:
    """A FastEngine, if its decoder gives the `masks` (logits and IoU) that the network as written gives; or InputError."""
    try:
        made = FastEngine(encoder, network)
        found = decoded(made.decoder.decode)
    except Exception as error:  # edited code may hold anything, such as a layer more or less
        raise refusal(engine, "mask decoder") from error
    for one, wanted in zip(found, masks, strict=True):
        refuse_other(engine, "mask decoder", one, wanted)
    return made


def network_sources(model: str) -> list[str]:
    """The source texts that say what a model's network computes."""
    modules = {*NETWORK_CODE, segment.architecture(model).module}
    return [Path(importlib.import_module(name).__file__).read_text(encoding="utf-8") for name in sorted(modules)]


def code_hash(sources: Iterable[str]) -> str:
    """A hash of Python source texts that comments, docstrings and layout do not change."""
    found = hashlib.sha256()
    for text in sources:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        found.update(ast.dump(tree).encode())
    return found.hexdigest()


def probe(model: str) -> Tensor:
    """What the network's code makes of a fixed random image with seeded random weights: some values of the embedding.

    PyTorch's random state is left as it was. Weights that start all alike (norms: ones and zeros) are changed a little,
    so that their place in the code matters.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = segment.build(model).eval()
        for value in network.image_encoder.state_dict().values():
            if value.is_floating_point() and value.numel() > 1 and value.min() == value.max():
                value.add_(0.1 * torch.randn(value.shape))
    return encoded(network.image_encoder)[0, ::16, ::8, ::8].clone()  # (16, 8, 8)


# ---------------------------------------------------------------- openvino, openvino-int8


def folded_graph(encoder: nn.Module):
    """A PyTorch image encoder -> its float32 graph, see `encoder_graph`. OpenVINO would fold the batch norms too, but
    then layers lose their names."""
    return encoder_graph(fold_batch_norms(copy.deepcopy(encoder)))


def graph_engine(network: BoxSegmenter, model: str, weights: Path, cache: Path | None = None) -> FastEngine:
    """A network with the weights of a checkpoint, its encoder run by OpenVINO. The graph is made at the first time and
    then kept in `cache`, under a name of all that it depends on. InputError if it is not the network as written."""
    openvino, cache = import_openvino(), cache or cache_folder()
    network.eval()
    with weights.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    own = Path(openvino_engine.__file__).read_text(encoding="utf-8")  # the form of the graph
    code = code_hash([*network_sources(model), own])
    folder = cache / f"{weights.stem}-{content[:16]}-{code[:16]}-openvino{openvino.__version__.split('-')[0]}"
    _, norm = last_norm(network.image_encoder)
    if not folder.is_dir():
        try:
            graph = folded_graph(network.image_encoder)
        except Exception as error:  # edited code may hold anything, and OpenVINO's errors have no common class
            raise InputError("engine openvino: it can't convert this image encoder; use --engine torch") from error
        refuse_other("openvino", "image encoder", encoded(OpenVINOEncoder(graph, norm)), encoded(network.image_encoder))
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # whole or not at all
            made = Path(scratch) / folder.name
            openvino.save_model(graph, made / "encoder.xml", compress_to_fp16=False)
            if not folder.is_dir():  # unless another run was faster
                shutil.move(made, folder)
    try:
        encoder = OpenVINOEncoder(folder / "encoder.xml", norm, cache)
    except RuntimeError as error:
        raise InputError(f"{folder}: damaged; delete the folder, and the graph is made again") from error
    return with_fast_decoder("openvino", encoder, network, decoded(network.decode))


def code_info(model: str) -> dict:
    """What a static int8 file keeps of the code that it was made from."""
    return {"code": code_hash(network_sources(model)), "probe": probe(model)}


def static_engine(path: Path, model: str, cache: Path | None = None) -> tuple[FastEngine, dict]:
    """What a NAME.static.xml holds -> the engine, and its info. InputError if the network's code computes something
    else now than when the file was made."""
    encoder, network, info = openvino_engine.load_static(path, model, cache or cache_folder())
    if info.get("code") != code_hash(network_sources(model)):
        if not isinstance(info.get("probe"), Tensor):
            raise InputError(f"{path}: does not say of which code it was made; make it again with 03_quantize.py")
        if differs(probe(model), info["probe"]):
            raise InputError(
                f"{path}: was made before the code of the image encoder was edited, and that computes something else "
                "now; make it again with 03_quantize.py --method static, or use --engine torch"
            )
    network.eval()
    return with_fast_decoder("openvino-int8", encoder, network, decoded(network.decode)), info
