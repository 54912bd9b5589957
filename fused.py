"""The same network with less to do, for inference on a CPU: batch normalization folded into the convolutions.

In inference a batch norm is y = g (x - m) / sqrt(v + eps) + b, one scale and one shift a channel. A convolution before it
can do both: its weights take the scale, its bias the shift. Then one pass over the map less is made for each of them.
On 2 cores the baseline's encoder becomes 1.4 times as fast (its wide depthwise convolutions gain most by the layout),
the proposed one, whose work is dense convolutions, no faster. A fused network can't be trained, and its
weights have other names than the checkpoint's: save the plain one.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from baseline import ConvBN
from efficientvit import ConvNorm


def fused(model: nn.Module) -> nn.Module:
    """Fold every batch norm of a model into the convolution before it, in place, and lay the maps out channel by
    channel of each pixel (channels last), which this kind of convolution reads fastest. Returns the model."""
    model.eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, ConvNorm) and isinstance(layer.norm, nn.BatchNorm2d):
                layer.conv, layer.norm = fuse_conv_bn_eval(layer.conv, layer.norm), nn.Identity()
            elif isinstance(layer, ConvBN) and isinstance(layer.bn, nn.BatchNorm2d):
                layer.c, layer.bn = fuse_conv_bn_eval(layer.c, layer.bn), nn.Identity()
    return model.requires_grad_(False).to(memory_format=torch.channels_last)
