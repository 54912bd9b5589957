"""An image encoder run by Intel's OpenVINO instead of PyTorch, and the files of a static int8 network.

OpenVINO takes a network as a graph and fits it to the processor: neighbouring layers become one, weights are laid out as
the processor reads them. A graph is two files, NAME.xml (its nodes) and NAME.bin (its weights). Ours is the encoder up to
its last layer norm:   image (1, 3, 256, 256) -> (1, 64, 64, 256), channels last
PyTorch does the rest: that norm, which OpenVINO would lay out twice, and the decoder, by decoder.py.

A static int8 network is a graph NAME.static.xml and .bin, and beside it NAME.static.pt: the weights of the rest.
The package is optional and imported only where it is used: pip install -r requirements-fast.txt
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from efficientvit import EMBED_DIM, LayerNorm2d
from files import InputError
from files.checkpoints import LITE_MEDSAM_FILE, OUR_CHECKPOINT, load_weights, save_checkpoint
from grid import GRID
from model import BoxSegmenter
from segment import architecture

INSTALL = "pip install -r requirements-fast.txt"


def import_openvino():
    """The package `openvino`. InputError says how to install it.

    OpenVINO and NNCF report over the network that they are used, if the package `openvino_telemetry` can be imported.
    It is hidden here: a program for patients' images sends nothing.
    """
    sys.modules.setdefault("openvino_telemetry", None)
    try:
        import openvino
    except ImportError as error:
        raise InputError(f"OpenVINO is not installed, which this engine runs on; run: {INSTALL}") from error
    return openvino


def cache_folder() -> Path:
    """Where graphs are kept if no folder is named: ~/.cache/grays_anatomy_sam, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grays_anatomy_sam"


class OpenVINOEncoder:
    """A compiled graph and the last layer norm: image (1, 3, 256, 256) -> embedding (1, 256, 64, 64)."""

    def __init__(self, graph, norm: LayerNorm2d, cache: Path | None = None) -> None:
        """graph: an .xml file, or a graph in memory.   cache: where OpenVINO may keep what it compiled, for the next
        start; nothing is kept by default."""
        core = import_openvino().Core()
        if cache is not None:
            core.set_property({"CACHE_DIR": str(cache / "compiled")})
        settings = {
            "PERFORMANCE_HINT": "LATENCY",  # one image at a time, all threads on it
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # PyTorch's threads are on the same cores
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it: other masks elsewhere
        }
        graph = core.read_model(graph) if isinstance(graph, Path) else graph
        self.graph, self.norm = core.compile_model(graph, "CPU", settings), norm

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """(1, 3, 256, 256) -> (1, 256, 64, 64)"""
        threads = torch.get_num_threads()
        # one, because PyTorch's others would go on looking for work, on cores that the next graph needs
        torch.set_num_threads(1)
        try:
            maps = torch.from_numpy(self.graph(image.numpy(), share_outputs=True)[0])  # OpenVINO's own memory
            return self.norm(maps.permute(0, 3, 1, 2))  # new memory: the next call overwrites `maps`
        finally:
            torch.set_num_threads(threads)


class _ChannelsLast(nn.Module):
    """Stands in a graph where the last layer norm was."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def last_norm(encoder: nn.Module) -> tuple[str, LayerNorm2d]:
    """The layer norm with which an image encoder ends, and its name. InputError if it has none."""
    found = [(name, layer) for name, layer in encoder.named_modules() if isinstance(layer, LayerNorm2d)]
    if not found:
        raise InputError(
            "OpenVINO's engines run encoders that end with a LayerNorm2d, and this has none; use --engine fast"
        )
    return found[-1]


def encoder_graph(encoder: nn.Module):
    """A PyTorch image encoder -> its float32 graph without the last layer norm, which this takes away in place."""
    openvino = import_openvino()
    parent, _, child = last_norm(encoder)[0].rpartition(".")
    setattr(encoder.get_submodule(parent), child, _ChannelsLast())
    image = torch.zeros(1, 3, GRID, GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of each `if` on a shape; the shapes they ask for are fixed
        return openvino.convert_model(encoder, example_input=image, input=[tuple(image.shape)])


# ---------------------------------------------------------------- static int8 files


def default_static(model: str) -> Path:
    """The static int8 file of a model when none is named: in the folder checkpoints/, named after its checkpoint."""
    known = {"baseline": Path(LITE_MEDSAM_FILE), "proposed": OUR_CHECKPOINT}  # also if the checkpoint is not there
    checkpoint = known.get(model) or architecture(model).weights()
    return OUR_CHECKPOINT.with_name(f"{checkpoint.stem}.static.xml")


def rest_file(path: Path) -> Path:
    """NAME.static.xml, the encoder -> NAME.static.pt, the weights of what PyTorch runs, which lies beside it."""
    return path.with_suffix(".pt")


def save_static(path: Path, graph, network: BoxSegmenter, info: dict) -> int:
    """Write an int8 encoder and the rest of its network; returns the bytes of all three files.

    info: "architecture", the model's name; "preset" if the weights were trained with one; engines.code_info.
    """
    openvino = import_openvino()
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = BoxSegmenter(last_norm(network.image_encoder)[1])  # named image_encoder.weight, image_encoder.bias
    rest.prompt_encoder, rest.mask_decoder = network.prompt_encoder, network.mask_decoder
    save_checkpoint(rest_file(path), {"static": info, "model": rest.state_dict()})
    openvino.save_model(graph, path, compress_to_fp16=False)
    return sum(file.stat().st_size for file in (path, path.with_suffix(".bin"), rest_file(path)))


def load_static(path: Path, model: str, cache: Path) -> tuple[OpenVINOEncoder, BoxSegmenter, dict]:
    """What `save_static` wrote -> the encoder, a network with its decoder, and its info.
    InputError if a file is missing, damaged or another model's."""
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
    if info["architecture"] != model:
        raise InputError(f"{path}: is the {info['architecture']} model, not {model}; name it with --model")
    try:
        return OpenVINOEncoder(path, rest.image_encoder, cache), rest, info
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path}: no complete static network of ours; make it again with 03_quantize.py --method static"
        ) from error
