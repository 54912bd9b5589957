"""Engine `fast`: the network in PyTorch with its batch norms folded away and decoder.py's decoder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fast.compare import decoded, encoded, refusal, refuse_other, refuse_other_decoder
from fast.decoder import FastDecoder
from model import BoxSegmenter

CONVOLUTION_AND_NORM = (("conv", "norm"), ("c", "bn"))  # their names in efficientvit.ConvNorm and baseline.ConvBN


class FastEngine:
    """Some image encoder and `FastDecoder` behind the two calls of model.TorchEngine."""

    def __init__(self, encoder: Callable[[Tensor], Tensor], network: BoxSegmenter) -> None:
        """encoder: image (1, 3, 256, 256) -> embedding (1, 256, 64, 64).   network: its decoder is used."""
        self.encoder, self.network, self.decoder = encoder, network, FastDecoder(network)

    @torch.inference_mode()
    def encode(self, image: np.ndarray) -> Tensor:
        """image (3, 256, 256) float32, see enhance.network_input -> its embedding"""
        return self.encoder(torch.from_numpy(image).unsqueeze(0))

    @torch.inference_mode()
    def decode(
        self, embedding: Tensor, boxes: np.ndarray, within: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """boxes (N, 4) on the grid -> logits (N, 256, 256) on the grid, predicted IoU (N,), float32

        within: (N, 4) x0 y0 x1 y1 on the grid, where each mask is wanted; elsewhere logits are cells.OUTSIDE.
        """
        asked = torch.as_tensor(boxes, dtype=torch.float32)
        logits, iou = self.decoder.decode(embedding, asked, None if within is None else torch.as_tensor(within))
        return logits[:, 0].numpy(), iou[:, 0].numpy()


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold every batch norm of a network into the convolution before it, in place. Returns the network.

    In inference a batch norm is y = g (x - m) / sqrt(v + eps) + b: one scale and one shift a channel. The convolution's
    weights take the scale, its bias the shift, and one pass over the map less is made. Then maps lie in memory channel
    by channel of each pixel (channels last), as these convolutions read them fastest.
    A folded network can't be trained, and its weights have other names than the checkpoint's: save the plain one.
    """
    network.eval()
    with torch.no_grad():
        for layer in network.modules():
            for convolution, norm in CONVOLUTION_AND_NORM:
                pair = getattr(layer, convolution, None), getattr(layer, norm, None)
                if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                    setattr(layer, convolution, fuse_conv_bn_eval(*pair))
                    setattr(layer, norm, nn.Identity())
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def fast_engine(network: BoxSegmenter) -> FastEngine:
    """A network with its batch norms folded away, in place. InputError if the result is not the network as written."""
    network.eval()
    embedding, masks = encoded(network.image_encoder), decoded(network.decode)  # before anything is folded
    fold_batch_norms(network)
    refuse_other("fast", "image encoder", encoded(network.image_encoder), embedding)
    try:
        made = FastEngine(network.image_encoder, network)
    except Exception as error:  # edited code may hold anything, such as a layer more or less
        raise refusal("fast", "mask decoder") from error
    refuse_other_decoder("fast", made.decoder.decode, masks)
    return made
