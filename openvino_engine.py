"""The engines `openvino` and `openvino-int8`: the same image encoder, run by Intel's OpenVINO instead of PyTorch.

OpenVINO takes a network as a graph, once, and fits it to the processor: neighbouring layers become one, weights lie as the
processor reads them. A graph is two files, NAME.xml (its nodes) and NAME.bin (its weights). Ours is the encoder up to its
last layer norm:   images (1, 3, 256, 256) -> (1, 64, 64, 256), channels last
PyTorch does the rest, by fast_decoder.py: that norm, which OpenVINO would lay out twice, and the decoder, which as a graph,
even with int8 layers, would take twice as long as in that order.

"openvino": float32, the checkpoint's graph. Converting it takes 5 s, so it is kept in a folder of the user's
            (`cache_folder`), under a name made from the checkpoint's content and OpenVINO's version.
"openvino-int8": a graph with int8 layers that `03_quantize.py --method static` wrote, NAME.static.xml, and beside it
            NAME.static.pt, the weights of the rest. They need neither a checkpoint nor a conversion.
The package is optional and imported only where it is used: pip install -r requirements-fast.txt
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from efficientvit import EMBED_DIM, LayerNorm2d
from fast_decoder import FastModel
from fused import fused
from model import GRID, BoxSegmenter
from readers import InputError
from weights import OUR_CHECKPOINT, load_weights, save_checkpoint

GRAPH_VERSION = 2  # raise it when the network's code changes what a checkpoint computes: old graphs are left aside
INSTALL = "pip install -r requirements-fast.txt"


def import_openvino():
    """The package `openvino`. InputError says how to install it.

    It and NNCF tell their maker of each use unless one opts out. Without `openvino_telemetry` they don't, so we hide it:
    a program for patients' images makes no calls.
    """
    sys.modules.setdefault("openvino_telemetry", None)
    try:
        import openvino
    except ImportError as error:
        raise InputError(f"OpenVINO is not installed, which this engine runs on; run: {INSTALL}") from error
    return openvino


def cache_folder() -> Path:
    """Where converted graphs are kept if no folder is named: ~/.cache/grays_anatomy_sam, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grays_anatomy_sam"


class OpenVINOEncoder:
    """A compiled graph and the last layer norm behind the call that `Segmenter` makes of an image encoder."""

    def __init__(self, graph: Path, norm: LayerNorm2d, cache: Path) -> None:
        """graph: .xml file.   cache: where OpenVINO may keep what it compiled, for the next start."""
        openvino = import_openvino()
        core = openvino.Core()
        core.set_property({"CACHE_DIR": str(cache / "compiled")})
        settings = {
            "PERFORMANCE_HINT": "LATENCY",  # one image at a time, all threads on it
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # PyTorch's threads are on the same cores
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it: other masks elsewhere
        }
        self.graph, self.norm = core.compile_model(core.read_model(graph), "CPU", settings), norm

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, 256, 256) -> (B, 256, 64, 64), one after another: the graph is made for one image."""
        threads = torch.get_num_threads()
        # one, because PyTorch's others would go on looking for work for 5 ms, on cores that the next graph needs
        torch.set_num_threads(1)
        try:
            maps = [self.norm(self.neck(one[None]).permute(0, 3, 1, 2)) for one in images]
        finally:
            torch.set_num_threads(threads)
        return maps[0] if len(maps) == 1 else torch.cat(maps)  # cat would copy the single one, 4 MB

    def neck(self, image: Tensor) -> Tensor:
        """(1, 3, 256, 256) -> (1, 64, 64, 256), in OpenVINO's own memory: the next call overwrites it."""
        return torch.from_numpy(self.graph(image.numpy(), share_outputs=True)[0])


# ---------------------------------------------------------------- from a checkpoint


class _ChannelsLast(nn.Module):
    """Stands in a graph where the last layer norm was."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def last_norm(encoder: nn.Module) -> tuple[str, LayerNorm2d]:
    """The layer norm with which an image encoder ends, and its name."""
    return [(name, layer) for name, layer in encoder.named_modules() if isinstance(layer, LayerNorm2d)][-1]


def encoder_graph(encoder: nn.Module):
    """A PyTorch image encoder -> its graph without the last layer norm, float32."""
    openvino = import_openvino()
    encoder = fused(copy.deepcopy(encoder))  # OpenVINO would fold too, but then layers lose their names
    parent, _, child = last_norm(encoder)[0].rpartition(".")
    setattr(encoder.get_submodule(parent), child, _ChannelsLast())
    image = torch.zeros(1, 3, GRID, GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of each `if` on a shape; the shapes they ask for are fixed
        return openvino.convert_model(encoder, example_input=image, input=[tuple(image.shape)])


def converted(network: BoxSegmenter, weights: Path, cache: Path | None = None) -> FastModel:
    """A PyTorch network with the weights of a checkpoint, as OpenVINO runs it; converted at the first time only."""
    openvino, cache = import_openvino(), cache or cache_folder()
    with weights.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{weights.stem}-{content[:16]}-{GRAPH_VERSION}-openvino{openvino.__version__.split('-')[0]}"
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # whole or not at all
            file = Path(scratch) / name / "encoder.xml"
            openvino.save_model(encoder_graph(network.image_encoder), file, compress_to_fp16=False)
            if not folder.is_dir():  # unless another run was faster
                shutil.move(Path(scratch) / name, folder)
    _, norm = last_norm(network.image_encoder)
    try:
        return FastModel(OpenVINOEncoder(folder / "encoder.xml", norm, cache), network)
    except RuntimeError as error:
        raise InputError(f"{folder}: damaged; delete the folder, and the graph is made again") from error


# ---------------------------------------------------------------- static int8 files


def default_static(architecture: str) -> Path:
    """The static int8 file of a model ("baseline" or "proposed") when none is named: in the folder checkpoints/."""
    name = "lite_medsam" if architecture == "baseline" else OUR_CHECKPOINT.stem
    return OUR_CHECKPOINT.with_name(f"{name}.static.xml")


def rest_file(path: Path) -> Path:
    """NAME.static.xml, the encoder -> NAME.static.pt, the weights of what PyTorch runs, which lies beside it."""
    return path.with_suffix(".pt")


def save_static(path: Path, graph, network: BoxSegmenter, info: dict) -> int:
    """Write an int8 encoder and the rest of its network; returns the bytes of all three files.

    info: "architecture", the model's name, and "preset" if the weights were trained with one.
    """
    openvino = import_openvino()
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = BoxSegmenter(last_norm(network.image_encoder)[1])  # named image_encoder.weight, image_encoder.bias
    rest.prompt_encoder, rest.mask_decoder = network.prompt_encoder, network.mask_decoder
    save_checkpoint(rest_file(path), {"static": info, "model": rest.state_dict()})
    openvino.save_model(graph, path, compress_to_fp16=False)
    return sum(file.stat().st_size for file in (path, path.with_suffix(".bin"), rest_file(path)))


def load_static(path: Path, architecture: str, cache: Path | None = None) -> tuple[FastModel, dict]:
    """What `save_static` wrote -> the model and its info. InputError if a file is missing, damaged or another model's."""
    import_openvino()
    if path.suffix != ".xml":
        raise InputError(
            f"{path}: is no static int8 network; make one with 03_quantize.py --method static and give its "
            "NAME.static.xml with --weights"
        )
    for file in (path, path.with_suffix(".bin"), rest_file(path)):
        if not file.is_file():
            raise InputError(f"{file}: no such file; make it with 03_quantize.py --method static")
    rest = BoxSegmenter(LayerNorm2d(EMBED_DIM))
    info = load_weights(rest_file(path), rest).get("static")
    if not isinstance(info, dict) or "architecture" not in info:
        raise InputError(f"{rest_file(path)}: does not say which model it is of; make it again with 03_quantize.py")
    if info["architecture"] != architecture:
        raise InputError(f"{path}: is the {info['architecture']} model, not {architecture}; name it with --model")
    try:
        encoder = OpenVINOEncoder(path, rest.image_encoder, cache or cache_folder())
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path}: no complete static network of ours; make it again with 03_quantize.py --method static"
        ) from error
    return FastModel(encoder, rest), info
