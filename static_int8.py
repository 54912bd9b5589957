"""Static int8 of nearly the whole image encoder, by NNCF, for OpenVINO: what `03_quantize.py --method static` does.

Dynamic int8 (quantize.py) measures the range of each activation when it arrives, which pays only in linear layers. Static
int8 measures them beforehand, on training images: the ranges become constants, and convolutions, nine tenths of the
encoder's work, can add up integers too. Weights have one scale for each output channel, activations one for each map.

Calibrated as a transformer, which keeps in float what a transformer is sensitive in: softmax, normalization, the inputs
of products of two activations. The encoder's linear attention stays float too: its sums over all pixels span more than 256
levels can tell. It is 2 % of the multiply-adds and costs no measurable time. In the embedding it made more than half of the
error (26 % with it in int8, 11 % without, after 51 calibration images, on 25 validation images); after 198 the error
without it was 26 % as well, on 10 images, and yet the masks scored the same. Leaving out any other stage changed next to nothing.

The decoder stays float. Int8 wants weights to multiply activations, as in model.py's order of sums: 23 ms a box on 2 cores. In
the order of fast_decoder.py, 8 to 15 ms in float, activations multiply activations, whose ranges nobody knows beforehand.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from itertools import chain, islice
from pathlib import Path

from cache import CacheEntry, check_version, read_index
from dataset import epoch_entries, validation_item
from openvino_engine import INSTALL, encoder_graph, import_openvino
from quantize import count_macs
from readers import InputError
from segment import Segmenter

# operations with multiply-adds in OpenVINO's graphs; the first input is the activation
COUNTED = ("Convolution", "GroupConvolution", "MatMul", "ScaledDotProductAttention")
KEPT_FLOAT = ".*context_module.*"  # names of layers: the encoder's linear attention


def calibration_entries(entries: list[CacheEntry], count: int) -> list[CacheEntry]:
    """`count` training images of a cache, one of each modality in turn; a small modality repeats its own."""
    train = [entry for entry in entries if entry.split == "train"]
    groups: dict[str, list[CacheEntry]] = defaultdict(list)
    for entry in epoch_entries(train, "equal", seed=0, epoch=0) if train else ():
        groups[entry.modality].append(entry)
    return list(islice(chain.from_iterable(zip(*groups.values(), strict=True)), count))


def quantize_static(segmenter: Segmenter, cache: Path, count: int) -> tuple:
    """A float segmenter -> the graph of its encoder with int8 layers, and the number of images that calibrated them."""
    import_openvino()
    try:
        import nncf
    except ImportError as error:
        raise InputError(f"NNCF is not installed, which static int8 needs; run: {INSTALL}") from error
    nncf.set_log_level(logging.ERROR)
    check_version(cache)
    chosen = calibration_entries(read_index(cache), count)
    if not chosen:
        raise InputError(f"{cache}: holds no training image to calibrate with; make a cache with 01_preprocess.py")

    def image(entry: CacheEntry):
        item = validation_item(cache, entry, segmenter.preset)
        return item["image" if segmenter.enhanced else "raw"][None].numpy()

    graph = nncf.quantize(
        encoder_graph(segmenter.model.image_encoder),
        nncf.Dataset(chosen, image),
        subset_size=len(chosen),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(patterns=[KEPT_FLOAT], validate=False),  # LiteMedSAM has none
    )
    return graph, len(chosen)


def static_reach(segmenter: Segmenter, graph) -> dict:
    """What int8 reaches: counts and shares of weights and of multiply-adds of one image and one box."""
    macs, int8_weights, layers = {True: 0, False: 0}, 0, []  # macs of the encoder: int8 or not -> multiply-adds
    for node in graph.get_ops():
        if node.get_type_name() in COUNTED:
            int8 = all(_comes_from_integers(node.input_value(i).get_node()) for i in range(2))
            macs[int8] += graph_macs(node)
            layers += [f"encoder: {node.get_friendly_name()}"] if int8 else []
        elif node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in ("i8", "u8"):
            int8_weights += math.prod(node.get_output_shape(0))
    weights = sum(p.numel() for p in segmenter.model.parameters())
    encoder = sum(macs.values())
    decoder = sum(number for (part, _), number in count_macs(segmenter.model).items() if part == "decoder")
    return {
        "layers": layers,
        "weights": {"total": weights, "int8": int8_weights, "share": int8_weights / weights},
        "macs": {"encoder": encoder, "decoder": decoder, "total": encoder + decoder},
        "mac_share": {"encoder": macs[True] / encoder, "decoder": 0.0, "total": macs[True] / (encoder + decoder)},
    }


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
