"""Static int8 of nearly the whole image encoder, by NNCF, for OpenVINO: `python -m engines static`. (D17)

Dynamic int8 (quantize.py) measures the range of each activation when it arrives, and replaces linear layers only. Static
int8 measures ranges beforehand, on training images: they become constants. Then convolutions, nine tenths of the
encoder's work, can add up integers too. Weights have one scale for each output channel, activations one for each map.

NNCF quantizes the encoder as a transformer. That leaves in float what transformers are sensitive in: softmax,
normalization, the inputs of products of two activations. The encoder's linear attention stays float too: it sums over
all pixels, and these sums span more than 256 levels can tell. That is a small part of the work.

The decoder stays float. In the order of decoder.py it multiplies activations by activations, where int8 needs weights;
in model.py's order, which has weights, it takes longer, with int8 layers too.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from itertools import chain, islice
from pathlib import Path

import numpy as np

from data import CacheEntry, epoch_entries, read_index, validation_item
from engines.graphs import encoder_graph
from engines.openvino_engine import INSTALL, import_openvino
from formats import InputError
from formats.cache import check_version
from model import BoxSegmenter
from quantize import count_macs
from segment import Segmenter

# operations with multiply-adds in OpenVINO's graphs; the first input is the activation
COUNTED = ("Convolution", "GroupConvolution", "MatMul", "ScaledDotProductAttention")
KEPT_FLOAT = ".*context_module.*"  # names of layers: the encoder's linear attention


def quantize_static(segmenter: Segmenter, cache: Path, count: int) -> tuple:
    """A float segmenter -> the graph of its encoder with int8 layers, and the number of images that calibrated them.

    cache: of step 1, of which `count` training images are taken."""
    check_version(cache)
    chosen = calibration_entries(read_index(cache), count)
    if not chosen:
        raise InputError(f"{cache}: holds no training image to calibrate with; make a cache with 01_preprocess.py")
    images = [calibration_image(segmenter, cache, entry) for entry in chosen]
    return int8_encoder(segmenter.engine.network, images), len(chosen)


def calibration_entries(entries: list[CacheEntry], count: int) -> list[CacheEntry]:
    """`count` training images of a cache, one of each modality in turn; a small modality repeats its own."""
    train = [entry for entry in entries if entry.split == "train"]
    groups: dict[str, list[CacheEntry]] = defaultdict(list)
    for entry in epoch_entries(train, "equal", seed=0, epoch=0) if train else ():
        groups[entry.modality].append(entry)
    return list(islice(chain.from_iterable(zip(*groups.values(), strict=True)), count))


def calibration_image(segmenter: Segmenter, cache: Path, entry: CacheEntry) -> np.ndarray:
    """A training image as the encoder sees it, (1, 3, 256, 256)."""
    item = validation_item(cache, entry, segmenter.preset)
    return item["image" if segmenter.enhanced else "raw"][None]


def int8_encoder(network: BoxSegmenter, images: list[np.ndarray]):
    """The graph of a network's encoder with int8 layers, whose ranges are those of these images (1, 3, 256, 256)."""
    import_openvino()
    try:
        import nncf
    except ImportError as error:
        raise InputError(f"NNCF is not installed, which static int8 needs; run: {INSTALL}") from error
    nncf.set_log_level(logging.ERROR)
    return nncf.quantize(
        encoder_graph(network.image_encoder),
        nncf.Dataset(images),
        subset_size=len(images),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(patterns=[KEPT_FLOAT], validate=False),  # LiteMedSAM has none
    )


def static_reach(network: BoxSegmenter, graph) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """What int8 reaches, as quantize.int8_reach has it, and the layers' names.

    network: the float one.   graph: its encoder with int8 layers."""
    macs, int8_weights, layers = {True: 0, False: 0}, 0, []  # macs of the encoder: int8 or not -> multiply-adds
    for node in graph.get_ops():
        if node.get_type_name() in COUNTED:
            int8 = all(_comes_from_integers(node.input_value(i).get_node()) for i in range(2))
            macs[int8] += graph_macs(node)
            layers += [f"encoder: {node.get_friendly_name()}"] if int8 else []
        elif node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in ("i8", "u8"):
            int8_weights += math.prod(node.get_output_shape(0))
    encoder = sum(macs.values())
    decoder = sum(number for (part, _), number in count_macs(network).items() if part == "decoder")
    reach = {"weights": (int8_weights, sum(p.numel() for p in network.parameters()))}
    reach |= {"multiply-adds, encoder": (macs[True], encoder), "multiply-adds, decoder": (0, decoder)}
    return reach | {"multiply-adds": (macs[True], encoder + decoder)}, layers


def _comes_from_integers(node) -> bool:
    """Whether an input of a layer was rounded to 256 levels, or is a stored int8 weight."""
    while node.get_type_name() in ("Reshape", "Transpose", "Multiply", "Subtract", "Convert", "Unsqueeze"):
        node = node.input_value(0).get_node()  # the first input of Multiply and Subtract: the other is the scale
    if node.get_type_name() == "Constant":
        return node.get_element_type().get_type_name() in ("i8", "u8")
    return node.get_type_name() == "FakeQuantize"


def graph_macs(node) -> int:
    """Multiply-adds of one node of a graph with fixed shapes."""
    out, first, second = (list(shape) for shape in (node.get_output_shape(0), *map(node.get_input_shape, (0, 1))))
    kind = node.get_type_name()
    if kind == "Convolution":  # weight (out, in, kernel): each output value comes from all inputs under the kernel
        return math.prod(out) * math.prod(second[1:])
    if kind == "GroupConvolution":  # weight (groups, out, in, kernel)
        return math.prod(out) * math.prod(second[2:])
    if kind == "MatMul":
        return math.prod(out) * first[-2 if node.get_attributes()["transpose_a"] else -1]
    return 2 * math.prod(out) * second[-2]  # attention: queries x keys x width, twice
