"""Graphs of a network, for OpenVINO (openvino_engine.py runs them) and as ONNX: made, compared with it, and written.

A graph is made by running the network's code once and noting each operation, as PyTorch calls it: tracing. The
decoder's graphs for OpenVINO are traced from decoder.py.
"""

import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
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
from model import BoxSegmenter, TorchEngine

CONVOLUTION_AND_NORM = (("conv", "norm"), ("c", "bn"))  # their names in efficientvit.ConvNorm and baseline.ConvBN
# How far graphs may be from model.py: |found - wanted| / |wanted|, of all values together. Rounding gives below 1e-5.
ROUNDING = 1e-3


class Traceable(nn.Module):
    """A function of tensors as a module, which is what can be traced."""

    def __init__(self, function: Callable, encoder: nn.Module | None = None) -> None:
        """encoder: what the function calls, if its layers are to keep their names."""
        super().__init__()
        self.function, self.encoder = function, encoder

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
    weights take the scale, its bias the shift. OpenVINO would do this too, but then layers lose their names."""
    network.eval()
    with torch.no_grad():
        for layer in network.modules():
            for convolution, norm in CONVOLUTION_AND_NORM:
                pair = getattr(layer, convolution, None), getattr(layer, norm, None)
                if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                    setattr(layer, convolution, fuse_conv_bn_eval(*pair))
                    setattr(layer, norm, nn.Identity())
    return network.requires_grad_(False)


def encoder_graph(network: BoxSegmenter):
    """The float32 graph of a network's image encoder: image (1, 3, 256, 256) -> embedding (4096, 256), cell by cell."""
    encoder = fold_batch_norms(copy.deepcopy(network.image_encoder))
    # as the last norm has it and the decoder wants it
    by_cell = Traceable(lambda image: encoder(image).flatten(2).transpose(1, 2).flatten(0, 1), encoder)
    return traced(by_cell, torch.zeros(1, 3, GRID, GRID))


def decoder_graphs(network: BoxSegmenter, kind: str) -> dict:
    """The graphs "image", "prompt" and "box" of a network's decoder for a kind of boxes."""
    decoder, embedding = ReorderedDecoder(network, kind), torch.zeros(EMBED_GRID**2, EMBED_DIM)
    prompt, corners = torch.zeros(1, 2, EMBED_DIM), torch.tensor([7, 36, 5, 31])
    graphs = {
        "image": traced(Traceable(decoder.of_image), embedding),
        "prompt": traced(Traceable(decoder.of_boxes), torch.zeros(2, 4), shapes=[(-1, 4)]),
        "box": traced(Traceable(decoder.of_box), prompt, corners, *decoder.of_image(embedding)),
    }
    return {f"{name}-{kind}": graph for name, graph in graphs.items()}


def write_graphs(folder: Path, network: BoxSegmenter, info: dict, int8_encoder=None) -> None:
    """Make and write the graphs of a network, whole or not at all; a folder of before is replaced.

    info: for info.json.   int8_encoder: the graph for openvino-int8, which is not compared with the network.
    InputError if the graphs cannot be made, or do not compute what the network as written does."""

    def refusal(part: str) -> InputError:
        engine = "openvino" if int8_encoder is None else "openvino-int8"
        return InputError(f"engine {engine}: it cannot compute what this {part} does; use --engine torch")

    openvino, kinds, part = import_openvino(), ("exact", *network.mask_decoders), "image encoder"
    try:
        graphs = {"encoder": int8_encoder or encoder_graph(network)}
        part = "mask decoder"
        for kind in kinds:
            graphs |= decoder_graphs(network, kind)
    except Exception as error:  # edited code may hold anything, and OpenVINO's errors have no common class
        raise refusal(part) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        for name, graph in graphs.items():
            openvino.save_model(graph, made / f"{name}.xml", compress_to_fp16=False)
        write_info(made, info | {"kinds": kinds})
        for kind in kinds:
            for part in differing(answers(OpenVINOEngine(made), kind), answers(TorchEngine(network), kind)):
                if int8_encoder is None or part != "image encoder":
                    raise refusal(part)
        if folder.is_dir():
            shutil.move(folder, Path(scratch) / "before")
        shutil.move(made, folder)


def answers(engine: OpenVINOEngine | TorchEngine, kind: str = "exact") -> dict[str, np.ndarray]:
    """What an engine makes of fixed random inputs: of an image, and of an embedding with two boxes of a kind."""
    rng = np.random.default_rng(0)
    found = engine.encode(rng.random((3, GRID, GRID), np.float32))
    # about as large as a normalized embedding
    embedding = 4 * rng.random((EMBED_GRID**2, EMBED_DIM), np.float32) - 2
    if isinstance(engine, TorchEngine):  # its embeddings are (1, 256, 64, 64)
        found = found.flatten(2)[0].T.numpy()
        embedding = torch.from_numpy(embedding.T.reshape(1, EMBED_DIM, EMBED_GRID, EMBED_GRID))
    logits, iou = engine.decode(embedding, np.float32([[20, 30, 120, 140], [100.5, 20.25, 180, 90.75]]), None, kind)
    return {"image encoder": found, "mask decoder": logits, "prediction of IoU": iou}


def differing(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], most: float = ROUNDING) -> list[str]:
    """Names of the results that differ by more than rounding, |found - wanted| / |wanted|, or in shape."""

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        return a.shape == b.shape and bool(np.linalg.norm(a - b) <= most * np.linalg.norm(b))  # NaN is not

    return [name for name, values in found.items() if not same(values, wanted[name])]


# ---------------------------------------------------------------- ONNX


def export_onnx(model: str | Path, folder: Path) -> list[Path]:
    """A model as ONNX files, which many runtimes read (examples/onnx_example.py). Each is run in ONNX Runtime when it is
    made, and compared with model.py. -> their paths

    encoder.onnx        image (1, 3, 256, 256) float32, see enhance.network_input   -> embedding (1, 256, 64, 64)
    decoder-KIND.onnx   embedding, boxes (N, 4) x0 y0 x1 y1 on the 256 grid         -> logits (N, 1, 256, 256), iou (N, 1)
    InputError if a package is missing, or if a file answers differently."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  PyTorch's exporter needs it
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; run: pip install -r requirements-onnx.txt") from error
    engine = segment.load(model).engine
    network, random = engine.network, torch.Generator().manual_seed(0)
    image, corner = torch.rand(1, 3, GRID, GRID, generator=random), torch.rand(5, 2, generator=random) * GRID / 2
    with torch.no_grad():
        embedding = network.image_encoder(image)
    boxes = torch.cat([corner, corner + GRID / 3], dim=1)
    parts = {"encoder": (network.image_encoder, {"image": image}, ["embedding"], None)}
    for kind in engine.kinds:
        decoder = Traceable(partial(network.decode, boxes_are=kind), network).eval()
        any_number = ((None, {0: torch.export.Dim("boxes", min=1)}),)
        parts[f"decoder-{kind}"] = (decoder, {"embedding": embedding, "boxes": boxes}, ["logits", "iou"], any_number)

    folder.mkdir(parents=True, exist_ok=True)
    for name, (module, inputs, outputs, shapes) in parts.items():
        path, names = folder / f"{name}.onnx", {"input_names": list(inputs), "output_names": outputs}
        with tempfile.TemporaryDirectory(dir=folder) as scratch, torch.no_grad():
            # Noted with two boxes, compared with five
            made, example = Path(scratch) / path.name, tuple(value[:2] for value in inputs.values())
            torch.onnx.export(module, example, made, dynamic_shapes=shapes, external_data=False, verbose=False, **names)
            found = onnxruntime.InferenceSession(made).run(None, {key: value.numpy() for key, value in inputs.items()})
            wanted = module(*inputs.values())
            wanted = [value.numpy() for value in (wanted if len(outputs) > 1 else (wanted,))]
            if differing(dict(zip(outputs, found, strict=True)), dict(zip(outputs, wanted, strict=True)), most=1e-4):
                raise InputError(f"{path}: ONNX Runtime computes something else than model.py; it was not written")
            made.replace(path)
    return [folder / f"{name}.onnx" for name in parts]
