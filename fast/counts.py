"""Multiply-adds and seconds of a network's parts, and the shares that int8 linear layers reach. (#39)

A multiply-add is one product and its addition to a sum. Norms, activations and additions are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn

from baseline import WindowAttention
from efficientvit import LinearAttention
from grid import GRID
from model import Attention, BoxSegmenter
from quantize import Int8Linear

BOX = (50.0, 60.0, 180.0, 200.0)  # the box that is counted and timed: x0 y0 x1 y1 on the grid


def weight_counts(network: nn.Module) -> dict[str, int]:
    """Of a float network: numbers in all its parameters, and those in the weights and biases of `nn.Linear`."""
    linear = [layer for layer in network.modules() if type(layer) is nn.Linear]
    return {
        "total": sum(p.numel() for p in network.parameters()),
        "linear": sum(layer.weight.numel() for layer in linear),
        "linear_bias": sum(layer.bias.numel() for layer in linear if layer.bias is not None),
    }


def _macs(layer: nn.Module, inputs: tuple, out: Tensor) -> tuple[str, int] | None:
    """Kind and number of multiply-adds of one call of a layer; None for what we do not count."""
    if isinstance(layer, nn.Linear | Int8Linear):
        return "linear", out.numel() * layer.weight.shape[1]
    if isinstance(layer, nn.ConvTranspose2d):  # each input value goes to all cells of the kernel
        return "transposed convolution", inputs[0].numel() * layer.weight[0].numel()
    if isinstance(layer, nn.Conv2d):  # each output value comes from all cells of the kernel
        return "convolution", out.numel() * layer.weight[0].numel()
    if isinstance(layer, Attention):  # q k^T and its product with v: queries x keys x inner width, twice
        q, k = inputs[:2]
        return "attention", 2 * len(q) * q.shape[1] * k.shape[1] * layer.out_proj.weight.shape[1]
    if isinstance(layer, WindowAttention):  # the same within each window; x (windows, N, C)
        return "attention", 2 * inputs[0].numel() * inputs[0].shape[1]
    if isinstance(layer, LinearAttention):  # v k^T and its product with q; norm. 2 C channels: two scales
        pixels = 2 * inputs[0].numel()
        return "attention", pixels * (2 * layer.head_dim + 1)
    return None


def count_macs(network: BoxSegmenter) -> dict[tuple[str, str], int]:
    """Multiply-adds of one 256x256 image and one box: {(part, kind): number}, counted by hooks during one call.

    part: "encoder" or "decoder" (all that a box needs).   kind: "convolution", "transposed convolution", "linear",
    "attention" (its two matrix products), "mask product" (the last, of mask weights and feature maps).
    """
    counts: dict[tuple[str, str], int] = defaultdict(int)

    def hook(part: str):
        def count(layer: nn.Module, inputs: tuple, out: Tensor) -> None:
            found = _macs(layer, inputs, out)
            if found:
                counts[part, found[0]] += found[1]

        return count

    hooks = [
        layer.register_forward_hook(hook("encoder" if name.startswith("image_encoder") else "decoder"))
        for name, layer in network.named_modules()
    ]
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, GRID, GRID), torch.tensor([BOX]))
    finally:
        for handle in hooks:
            handle.remove()
    maps = network.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.shape[0]  # 32
    counts["decoder", "mask product"] = maps * GRID * GRID
    return dict(counts)


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
