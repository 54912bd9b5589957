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

import logging
from collections import defaultdict
from itertools import chain, islice
from pathlib import Path

from data import CacheEntry, epoch_entries, read_index, validation_item
from engines.graphs import encoder_graph
from engines.openvino_engine import INSTALL
from formats import InputError
from formats.cache import check_version
from segment import Segmenter

KEPT_FLOAT = ".*context_module.*"  # names of layers: the encoder's linear attention


def quantize_static(segmenter: Segmenter, cache: Path, count: int) -> tuple:
    """A float segmenter -> the graph of its encoder with int8 layers, and the number of images that calibrated them.

    cache: of step 1, of which `count` training images are taken, or all if it holds fewer."""
    check_version(cache)
    chosen, key = calibration_entries(read_index(cache), count), "image" if segmenter.enhanced else "raw"
    if not chosen:
        raise InputError(f"{cache}: holds no training image to calibrate with; make a cache with 01_preprocess.py")
    graph = encoder_graph(segmenter.engine.network)
    try:
        import nncf
    except ImportError as error:
        raise InputError(f"NNCF is not installed, which static int8 needs; run: {INSTALL}") from error
    nncf.set_log_level(logging.ERROR)
    quantized = nncf.quantize(
        graph,
        # each image as the encoder sees it, (1, 3, 256, 256)
        nncf.Dataset([validation_item(cache, entry, segmenter.preset)[key][None] for entry in chosen]),
        subset_size=len(chosen),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(patterns=[KEPT_FLOAT], validate=False),  # LiteMedSAM has none
    )
    return quantized, len(chosen)


def calibration_entries(entries: list[CacheEntry], count: int) -> list[CacheEntry]:
    """`count` training images of a cache, one of each modality in turn; a small modality repeats its own."""
    train = [entry for entry in entries if entry.split == "train"]
    groups: dict[str, list[CacheEntry]] = defaultdict(list)
    for entry in epoch_entries(train, "equal", seed=0, epoch=0) if train else ():
        groups[entry.modality].append(entry)
    return list(islice(chain.from_iterable(zip(*groups.values(), strict=True)), count))
