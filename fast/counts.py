"""Multiply-adds and seconds of a network's parts, and the shares that int8 linear layers reach. (#39)

A multiply-add is one product and its addition to a sum. Norms, activations and additions are not counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grid import GRID
from model import BoxSegmenter

CPU_ATTENTION = {  # the decoder's, which PyTorch's counter does not know on a CPU: q k^T, and its product with v
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * math.prod(q) * k[-2]
}
BOX = (50.0, 60.0, 180.0, 200.0)  # the box that is counted and timed: x0 y0 x1 y1 on the grid


def weight_counts(network: nn.Module) -> dict[str, int]:
    """Of a float network: numbers in all its parameters, and those in the weights and biases of `nn.Linear`."""
    linear = [layer for layer in network.modules() if type(layer) is nn.Linear]
    return {
        "total": sum(p.numel() for p in network.parameters()),
        "linear": sum(layer.weight.numel() for layer in linear),
        "linear_bias": sum(layer.bias.numel() for layer in linear if layer.bias is not None),
    }


def count_macs(network: BoxSegmenter) -> dict[tuple[str, str], int]:
    """Multiply-adds of one 256x256 image and one box: {(part, kind): number}, counted by PyTorch during one call.

    part: "encoder" or "decoder".   kind: "convolution", "linear", or "product" of two activations, as in attention.
    """
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        network(torch.zeros(1, 3, GRID, GRID), torch.tensor([BOX]))
    kinds, counts = {"convolution": "convolution", "addmm": "linear"}, defaultdict(int)
    for part, module in (("encoder", "image_encoder"), ("decoder", "mask_decoder")):
        for operation, flops in counter.get_flop_counts()[f"{type(network).__name__}.{module}"].items():
            counts[part, kinds.get(str(operation).split(".")[-1], "product")] += flops // 2  # two flops: * and +
    return dict(counts)


PARTS = {  # boxes of Figure 1: title -> module of the proposed network, in the order in which data flow
    "stem": "image_encoder.backbone.stages.0",
    "stage 1, FusedMBConv": "image_encoder.backbone.stages.1",
    "stage 2, FusedMBConv": "image_encoder.backbone.stages.2",
    "stage 3, MBConv": "image_encoder.backbone.stages.3",
    "stage 4, EfficientViT": "image_encoder.backbone.stages.4",
    "neck": "image_encoder.neck",
    "norm": "image_encoder.norm",
    "prompt encoder": "prompt_encoder",
    "two-way transformer": "mask_decoder.transformer",
    "upscaling": "mask_decoder.output_upscaling",
    "whole mask decoder": "mask_decoder",
}
SKIPS = (("stage 2, FusedMBConv", "neck"), ("stage 3, MBConv", "neck"))  # the neck takes three maps


def trace_parts(network: BoxSegmenter, parts: dict[str, str] = PARTS) -> list[dict]:
    """What Figure 1 shows, seen by hooks during one call with one 256x256 image and one box, in the order of `parts`.

    parts: {title: a module's name}. Each row: name, side (the network's module that it is in), parameters, output (shape of the first tensor that comes out,
    without its batch axis) and multiply_adds; both count the modules inside too. A part inside another counts in both.
    """
    found, handles = {}, []

    def note(title: str) -> Callable:
        def hook(_, __, output) -> None:
            first = output[0] if isinstance(output, tuple) else output
            found[title]["output"] = tuple(first.shape[1:])

        return hook

    for title, name in parts.items():
        module = network.get_submodule(name)
        count = sum(p.numel() for p in module.parameters())
        found[title] = {"name": title, "side": name.split(".")[0], "parameters": count}
        handles.append(module.register_forward_hook(note(title)))
    try:
        with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            network(torch.zeros(1, 3, GRID, GRID), torch.tensor([BOX]))
    finally:
        for handle in handles:
            handle.remove()
    flops = counter.get_flop_counts()
    for title, name in parts.items():  # two flops: * and +
        found[title]["multiply_adds"] = sum(flops.get(f"{type(network).__name__}.{name}", {}).values()) // 2
    return list(found.values())


def int8_reach(network: BoxSegmenter) -> dict:
    """What int8 reaches in a float network: counts and shares of weights and of multiply-adds, by part."""
    weights, macs = weight_counts(network), count_macs(network)
    parts = {part: sum(n for (p, _), n in macs.items() if p == part) for part in ("encoder", "decoder")}
    linear = {part: macs.get((part, "linear"), 0) for part in parts}
    return {
        "weights": weights | {"share": weights["linear"] / weights["total"]},
        "macs": {f"{part} {kind}": n for (part, kind), n in macs.items()} | {"total": sum(parts.values())},
        "mac_share": {part: linear[part] / parts[part] for part in parts}
        | {"total": sum(linear.values()) / sum(parts.values())},
    }


def compare_speed(engines: dict, repeats: int, boxes: tuple[int, ...]) -> dict:
    """Median seconds of encoder and decoder for each engine, and their ratio float / int8.

    engines: name -> engine, two of them "float" and "int8".   boxes: numbers of boxes to decode.
    The engines take turns, so that whatever else the machine does slows all of them down.
    """
    image = np.random.default_rng(0).random((3, GRID, GRID), np.float32)
    embedding = {name: engine.encode(image) for name, engine in engines.items()}
    work = {"encoder, 1 image": lambda name: engines[name].encode(image)}
    for n in boxes:
        asked = np.tile(np.float32(BOX), (n, 1))
        work[f"decoder, {n} box{'es' * (n > 1)}"] = lambda name, asked=asked: engines[name].decode(
            embedding[name], asked
        )
    found = {"threads": torch.get_num_threads(), "repeats": repeats}
    for title, task in work.items():
        seconds = {name: [] for name in engines}
        for turn in range(repeats + 1):  # the first warms up
            for name in engines:
                start = time.perf_counter()
                task(name)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        found[title] = medians | {"ratio": medians["float"] / medians["int8"]}
    return found
