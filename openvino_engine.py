"""The engines `openvino` and `openvino-int8`: the same network, run by Intel's OpenVINO instead of PyTorch.

OpenVINO takes the whole network as a graph, once, and fits it to the processor: neighbouring layers become one, weights
lie as the processor reads them. A graph is two files, NAME.xml (its nodes) and NAME.bin (its weights). Ours are two:
    encoder   images (1, 3, 256, 256) -> embedding (1, 256, 64, 64)
    decoder   embedding (1, 256, 64, 64), boxes (N, 4) -> logits (N, 1, 256, 256), predicted IoU (N, 1)

"openvino": float32, the checkpoint's graphs. Converting them takes 10 s, so they are kept in a folder of the user's
            (`cache_folder`), under a name made from the checkpoint's content and OpenVINO's version.
"openvino-int8": graphs with int8 layers that `03_quantize.py --method static` wrote: NAME.static.xml, the encoder,
            and NAME.static.decoder.xml. They need neither a checkpoint nor a conversion.
The package is optional and imported only where it is used: pip install -r requirements-fast.txt
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fused import fused
from model import GRID, BoxSegmenter
from readers import InputError
from weights import OUR_CHECKPOINT

GRAPH_VERSION = 1  # raise it when the network's code changes what a checkpoint computes: old graphs are left aside
INFO = "grays_anatomy_sam"  # where a static graph keeps its architecture and preset
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


class OpenVINOModel:
    """Two compiled graphs behind the two calls that `Segmenter` makes of a model, tensors in and out."""

    def __init__(self, encoder: Path, decoder: Path, cache: Path) -> None:
        """encoder, decoder: .xml files.   cache: where OpenVINO may keep what it compiled, for the next start."""
        openvino = import_openvino()
        core = openvino.Core()
        core.set_property({"CACHE_DIR": str(cache / "compiled")})
        settings = {
            "PERFORMANCE_HINT": "LATENCY",  # one image at a time, all threads on it
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it: other masks elsewhere
        }
        # The decoder is compiled for any number of boxes. For a fixed one it would be a sixth faster, but with int8 layers
        # OpenVINO 2026.4 then answers nothing but zeros for some numbers of boxes, which ones depends on the threads.
        self.encoder, self.decoder = (
            core.compile_model(core.read_model(file), "CPU", settings) for file in (encoder, decoder)
        )

    def eval(self) -> OpenVINOModel:
        """Segmenter says it to every model; a graph knows no training."""
        return self

    def image_encoder(self, images: Tensor) -> Tensor:
        """(B, 3, 256, 256) -> (B, 256, 64, 64), one after another: the graph is made for one image."""
        return torch.from_numpy(np.concatenate([self.encoder(one[None].numpy())[0] for one in images]))

    def decode(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """embedding (1, 256, 64, 64), boxes (N, 4) -> logits (N, 1, 256, 256), predicted IoU (N, 1)"""
        found = self.decoder([embedding.numpy(), boxes.numpy()])
        logits, iou = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        if not logits.any():  # see __init__; no network gives a zero for every pixel
            raise InputError(
                f"OpenVINO answered zeros only for {len(boxes)} boxes, a fault of its own; use --engine torch"
            )
        return logits, iou


# ---------------------------------------------------------------- from a checkpoint


class _Decode(nn.Module):
    """`BoxSegmenter.decode` as a module, because that is what the converter takes."""

    def __init__(self, network: BoxSegmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.decode(embedding, boxes)


def graphs_of(network: BoxSegmenter) -> dict:
    """A PyTorch network -> {"encoder": graph, "decoder": graph}, float32. The decoder takes any number of boxes."""
    openvino = import_openvino()
    network = fused(copy.deepcopy(network))  # OpenVINO would fold too, but then layers lose their names
    image, embedding = torch.zeros(1, 3, GRID, GRID), torch.zeros(1, 256, 64, 64)
    boxes = torch.tensor([[20.0, 30, 120, 140], [40, 50, 200, 210], [5, 5, 9, 9]])  # 3: neither 1 nor any other size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of each `if` on a shape; the shapes they ask for are fixed
        encoder = openvino.convert_model(network.image_encoder, example_input=image, input=[tuple(image.shape)])
        decoder = openvino.convert_model(
            _Decode(network), example_input=(embedding, boxes), input=[tuple(embedding.shape), (-1, 4)]
        )
    return {"encoder": encoder, "decoder": decoder}


def converted(network: BoxSegmenter, weights: Path, cache: Path | None = None) -> OpenVINOModel:
    """A PyTorch network with the weights of a checkpoint, as OpenVINO runs it; converted at the first time only."""
    openvino, cache = import_openvino(), cache or cache_folder()
    with weights.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{weights.stem}-{content[:16]}-{GRAPH_VERSION}-openvino{openvino.__version__.split('-')[0]}"
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # whole or not at all
            for part, graph in graphs_of(network).items():
                openvino.save_model(graph, Path(scratch) / name / f"{part}.xml", compress_to_fp16=False)
            if not folder.is_dir():  # unless another run was faster
                shutil.move(Path(scratch) / name, folder)
    try:
        return OpenVINOModel(folder / "encoder.xml", folder / "decoder.xml", cache)
    except RuntimeError as error:
        raise InputError(f"{folder}: damaged; delete the folder, and the graphs are made again") from error


# ---------------------------------------------------------------- static int8 files


def default_static(architecture: str) -> Path:
    """The static int8 file of a model ("baseline" or "proposed") when none is named: in the folder checkpoints/."""
    name = "lite_medsam" if architecture == "baseline" else OUR_CHECKPOINT.stem
    return OUR_CHECKPOINT.with_name(f"{name}.static.xml")


def decoder_file(path: Path) -> Path:
    """NAME.static.xml, the encoder -> NAME.static.decoder.xml, which lies beside it."""
    return path.with_suffix(".decoder.xml")


def save_static(path: Path, encoder, decoder, info: dict) -> int:
    """Write both graphs with what must be known of them (architecture, preset). Returns the bytes of the four files."""
    openvino = import_openvino()
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder.set_rt_info(json.dumps(info), INFO)
    for file, graph in ((decoder_file(path), decoder), (path, encoder)):
        openvino.save_model(graph, file, compress_to_fp16=False)
    files = [f for xml in (path, decoder_file(path)) for f in (xml, xml.with_suffix(".bin"))]
    return sum(file.stat().st_size for file in files)


def load_static(path: Path, architecture: str, cache: Path | None = None) -> tuple[OpenVINOModel, dict]:
    """What `save_static` wrote -> the model and its info. InputError if a file is missing, damaged or another model's."""
    openvino = import_openvino()
    if path.suffix != ".xml":
        raise InputError(
            f"{path}: is no static int8 network; make one with 03_quantize.py --method static and give its "
            "NAME.static.xml with --weights"
        )
    for file in (path, path.with_suffix(".bin"), decoder_file(path), decoder_file(path).with_suffix(".bin")):
        if not file.is_file():
            raise InputError(f"{file}: no such file; make it with 03_quantize.py --method static")
    try:
        graph = openvino.Core().read_model(path)
        info = json.loads(graph.get_rt_info(INFO).astype(str))
        model = OpenVINOModel(path, decoder_file(path), cache or cache_folder())
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path}: no complete static network of ours; make it again with 03_quantize.py --method static"
        ) from error
    if info["architecture"] != architecture:
        raise InputError(f"{path}: is the {info['architecture']} model, not {architecture}; name it with --model")
    return model, info
