"""Dynamic int8 linear layers, from scratch. [P 2.3]

A linear layer computes y = W x + b. Here W is stored as int8, and x becomes int8 when it arrives.
The sums are then of products of small integers, exact in int32:

    weights, once:       W ~ s_w Q_w           Q_w in -128..127; 0 stays 0
    activations, a call: x ~ s_x (Q_x - z)     Q_x int8, from the least and the largest value of this x
    y[n, o] = s_x s_w[o] (sum_k Q_x[n, k] Q_w[o, k]  -  z sum_k Q_w[o, k]) + b[o]

The zero point z is the integer that stands for x = 0. It lets the levels cover any range: behind a
ReLU no value is negative, and without z half of the levels would be unused. Its price is the second
sum, over each row of the weights. That sum does not depend on x, so it is computed once.

The field `weight_int8` of a preset chooses one of two forms:
    "tensor"   one s_w per layer, activations of 7 bits, Q_x in 0..127: bit for bit PyTorch's
               `quantize_dynamic` on x86
    "channel"  one s_w per output, so that a channel of small weights gets small steps, and
               activations of 8 bits, Q_x in -128..127: the error is smaller

"Dynamic" means that s_x and z are measured anew at every call, so nothing needs calibration. All boxes
that are decoded together share one s_x, so a mask can change by a few pixels with the boxes beside it.
Only `nn.Linear` is replaced. That is most of the mask decoder, but nothing of the proposed image
encoder, which is all convolutions (#39): `int8_reach` counts it.

Letters: N rows (tokens or boxes), K inputs, O outputs of a layer.
"""

import math
import statistics
import time
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from formats import InputError
from formats.checkpoints import INT8_KEY, save_checkpoint
from grid import GRID
from model import BoxSegmenter, TorchEngine

BITS = {"channel": 8, "tensor": 7}  # kind of weight scale -> bits of the activations
LEAST, MOST = -128, 127  # int8
# The bracket of the module header is sum_k (Q_x - z) Q_w, where Q_x - z is at most 255 and Q_w at most 128 from 0.
# So for this many inputs no sum leaves int32, whatever they are: 255 * 128 * K < 2^31. Ours have 2,048 at most
MOST_K = (2**31 - 1) // (255 * 128)
EXACT_K = 1024  # products up to 128 * 128 = 2^14: this many of them sum to at most 2^24, exact in float32


# ---------------------------------------------------------------- numbers to integers


def quantize_weight(weight: Tensor, per: str = "channel") -> tuple[Tensor, Tensor]:
    """(O, K) float -> Q_w (O, K) int8 and s_w, (O,) per channel or (1,) per tensor, float32: weight ~ s_w Q_w.

    s_w = max(max|w| / 127.5, 2^-23) and Q_w = round(w * (1 / s_w)), cut to -128..127. All of it in float32, the
    reciprocal first, halves to even, as in PyTorch. So +max is cut from 128 to 127, and -max becomes -128 or -127, as
    the reciprocal happened to be rounded. Weights far below 2^-23 * 127 get fewer levels, all-zero ones 0.
    Raises InputError for an unknown `per`, ValueError for NaN or infinity.
    >>> quantize_weight(torch.tensor([[-1.0, 0.5], [0.02, 0.01]]), "tensor")[0].tolist()
    [[-127, 64], [3, 1]]
    """
    if per not in BITS:
        raise InputError(f"int8 weights per {per!r}: unknown; choose one of {', '.join(BITS)}")
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError("weights hold NaN or infinity, which no integer stands for")
    largest = weight.abs().amax(dim=1) if per == "channel" else weight.abs().amax().reshape(1)
    scale = (largest / ((MOST - LEAST) / 2)).clamp(min=torch.finfo(torch.float32).eps)
    steps = weight * (1 / scale)[:, None]  # (O, K)
    return steps.round().clamp(LEAST, MOST).to(torch.int8), scale


def quantize_activation(x: Tensor, bits: int = 8) -> tuple[Tensor, float, int]:
    """Any float tensor -> Q_x int8 of its shape, scale s_x, zero point z: x ~ s_x (Q_x - z).

    lo = min(x, 0), hi = max(x, 0)    the range holds 0, so that a zero (padding, ReLU) stays exactly zero
    s_x = (hi - lo) / (2^bits - 1)    in float64; 1 if all x are 0
    z = round(q - lo / s_x)           q: the least integer, -128 or 0
    Q_x = round(x * (1 / float32(s_x)) + z), cut to q and above. z is inside the rounding, which decides halves;
                                      product and sum are rounded once, to float32, as by a fused multiply-add
    bits: 8 (-128..127), or 7 (0..127) as PyTorch on x86. There, processors without VNNI instructions add pairs of
    products in 16 bits, which 2 * 255 * 128 would overflow. `torch._int_mm` has no such limit.
    Raises ValueError for NaN or infinity."""
    least, steps = (LEAST if bits == 8 else 0), 2**bits - 1
    low, high = (float(bound) for bound in x.aminmax()) if x.numel() else (0.0, 0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    if not math.isfinite(high - low):
        raise ValueError("activations hold NaN or infinity, which no integer stands for")
    scale = (high - low) / steps or 1.0  # all zeros: any scale will do
    zero_point = round(-low / scale) + least
    inverse = 1 / float(torch.tensor(scale, dtype=torch.float32))
    whole = torch.add(torch.tensor(float(zero_point), device=x.device), x, alpha=inverse)  # z + x / s_x, rounded once
    return whole.round_().clamp_(least, least + steps).to(torch.int8), scale, zero_point


# ---------------------------------------------------------------- the product of integers


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """(N, K) int8 times (O, K) int8, transposed -> (N, O) int32, exact for K up to MOST_K.

    `torch._int_mm` is a private name of PyTorch, which may vanish, and a GPU refuses some shapes. On a
    CPU without VNNI, an instruction that adds up products of int8, it is eight times slower than
    float32. There float32 does the sums, in pieces of EXACT_K: it holds every integer up to 2^24, so
    they are exact too."""
    fast = a.device.type == "cpu" and getattr(torch.cpu, "_is_vnni_supported", lambda: True)()
    if fast and hasattr(torch, "_int_mm"):
        return torch._int_mm(a, b.mT)
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for rows, weights in zip(a.split(EXACT_K, dim=1), b.split(EXACT_K, dim=1), strict=True):
        total += (rows.float() @ weights.float().mT).to(torch.int32)
    return total


# ---------------------------------------------------------------- the layer


class Int8Linear(nn.Module):
    """An `nn.Linear` with int8 weights and activations. [P 2.3]   x (..., K) float -> (..., O) float32

    Its state: `weight` (O, K) int8, `scale` (O,) or (1,) float32, `bias` (O,) float32 if the layer had one."""

    def __init__(self, linear: nn.Linear, per: str = "channel") -> None:
        super().__init__()
        if linear.in_features > MOST_K:
            raise InputError(
                f"a layer of {linear.in_features} inputs: the sums of more than {MOST_K} may overflow int32"
            )
        weight, scale = quantize_weight(linear.weight, per)
        self.bits = BITS[per]
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float().clone())
        self.register_buffer("row_sums", torch.empty(0), persistent=False)  # (O,) int32, follows from `weight`
        self.register_load_state_dict_post_hook(Int8Linear.sum_rows)
        self.sum_rows()

    def sum_rows(self, _=None) -> None:
        """sum_k Q_w[o, k], which the zero point is multiplied with. Again whenever weights were loaded."""
        self.row_sums = self.weight.sum(dim=1, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """The equation of the module header, in this order:
            s = float32(s_x) * s_w;   y = s * (the bracket, an integer) + b, product and sum rounded once, as in PyTorch.
        Why that matters: a value on the other side of one rounding moves by a whole level, and the next layers spread
        it, until the masks differ as much as int8 differs from float."""
        rows = x.reshape(-1, x.shape[-1])  # (N, K)
        whole, scale, zero_point = quantize_activation(rows, self.bits)
        total = int_matmul(whole, self.weight)  # (N, O) int32
        total -= zero_point * self.row_sums
        bias = self.scale.new_zeros(()) if self.bias is None else self.bias
        if len(self.scale) == 1:
            y = torch.add(bias, total.float(), alpha=float(self.scale * scale))
        else:
            y = torch.addcmul(bias, total.float(), self.scale * scale)
        return y.reshape(*x.shape[:-1], len(self.weight))  # (..., O)


def quantize_linear_layers(model: nn.Module, per: str = "channel") -> list[str]:
    """Replace every `nn.Linear` inside a model, in place; no float copy is kept. Returns their names, in order.

    Raises InputError, with the layer's name, if weights are NaN or infinite; the model is then unchanged."""
    replacements = {}
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear:
            try:
                replacements[name] = Int8Linear(layer, per)
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"{name}: {error}; use an earlier checkpoint") from error
    for name, layer in replacements.items():
        model.set_submodule(name, layer)
    return list(replacements)


def save_int8(path: Path, model: nn.Module, per: str, **says: str | None) -> int:
    """Write NAME.dynamic.pt, a checkpoint whose linear layers are int8. Returns its bytes.

    says: what else it holds, such as the preset that the float model was trained with; None is left out."""
    if not path.name.endswith(".dynamic.pt"):  # so that it never takes the float checkpoint's place
        raise InputError(f"{path}: the int8 file must end in .dynamic.pt; change --out")
    kept = {name: value for name, value in says.items() if value is not None}
    save_checkpoint(path, kept | {"model": model.state_dict(), INT8_KEY: per})
    return path.stat().st_size


# ---------------------------------------------------------------- its reach: weights, multiply-adds, seconds

BOX = (50.0, 60.0, 180.0, 200.0)  # the box that is counted, and timed by step 3: x0 y0 x1 y1 on the grid
CPU_ATTENTION = {  # the decoder's, which PyTorch's counter does not know on a CPU: q k^T, and its product with v
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * math.prod(q) * k[-2]
}


def count_operations(network: BoxSegmenter) -> dict[str, dict[str, int]]:
    """Multiply-adds of one 256x256 image and one box, counted by PyTorch: {module: {operation: number}}.

    A multiply-add is one product and its addition to a sum. Norms and activations are not counted."""
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        network(torch.zeros(1, 3, GRID, GRID), torch.tensor([BOX]))
    return {
        name.partition(".")[2]: {str(operation).split(".")[-1]: flops // 2 for operation, flops in found.items()}
        for name, found in counter.get_flop_counts().items()
    }


def count_macs(network: BoxSegmenter) -> dict[tuple[str, str], int]:
    """Multiply-adds as in `count_operations`, {(part, kind): number}.   part: "encoder" or "decoder".
    kind: "convolution", "linear", or "product" of two activations, as in attention."""
    kinds, macs, found = {"convolution": "convolution", "addmm": "linear"}, defaultdict(int), count_operations(network)
    for part, module in (("encoder", "image_encoder"), ("decoder", "mask_decoder")):
        for operation, number in found[module].items():
            macs[part, kinds.get(operation, "product")] += number
    return dict(macs)


def int8_reach(network: BoxSegmenter) -> dict[str, tuple[int, int]]:
    """What int8 linear layers reach in a float network: {what is counted: (how many in int8, how many in all)}. (#39)"""
    linear = sum(layer.weight.numel() for layer in network.modules() if type(layer) is nn.Linear)
    reach, macs = {"weights": (linear, sum(p.numel() for p in network.parameters()))}, count_macs(network)
    for part, where in (("encoder", ", encoder"), ("decoder", ", decoder"), ("", "")):
        counted = {key: number for key, number in macs.items() if part in key[0]}
        int8 = sum(number for (_, kind), number in counted.items() if kind == "linear")
        reach[f"multiply-adds{where}"] = (int8, sum(counted.values()))
    return reach


def pytorchs_int8(network: BoxSegmenter) -> TorchEngine:
    """A copy of a network with PyTorch's own dynamic int8 layers, to compare ours with."""
    with warnings.catch_warnings(action="ignore"):  # that it will move to another package
        return TorchEngine(torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8))


def compare_speed(engines: dict, repeats: int, boxes: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Median seconds of encoder and decoder, {part: {engine: seconds}}, of engines like model.TorchEngine."""
    image = np.random.default_rng(0).random((3, 256, 256), np.float32)
    embedding, found = {name: engine.encode(image) for name, engine in engines.items()}, {}
    for n in (0, *boxes):  # 0: the encoder
        asked, seconds = np.tile(np.float32(BOX), (n, 1)), {name: [] for name in engines}
        # The engines take turns, so that whatever else the machine does slows all down
        for _ in range(repeats + 1):
            for name, engine in engines.items():
                start = time.perf_counter()
                _ = engine.decode(embedding[name], asked) if n else engine.encode(image)
                seconds[name].append(time.perf_counter() - start)
        title = f"decoder, {n} box{'es' * (n > 1)}" if n else "encoder, 1 image"
        # The first run, which warms up, does not count
        found[title] = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return found
