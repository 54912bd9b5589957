"""Stand-ins that need no weights and no second: for an engine, and for a network that is trained."""

import numpy as np
import torch


class BrightModel:
    """An engine whose "embedding" is the image itself.

    Inside a prompt's box, bright pixels are the object (logit +8), all else is not (-8).

    Like a trained network it predicts a low IoU for a box that cuts the object: the share of the bright pixels in
    the box grown by a quarter that lie in the box itself.
    """

    kinds = ("exact",)

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self.encoded = self.decoded = 0  # how many images and boxes were asked for

    def encode(self, image: np.ndarray) -> np.ndarray:
        self.encoded += 1
        return image

    def decode(self, embedding, boxes, within=None, boxes_are="exact") -> tuple[np.ndarray, np.ndarray]:
        self.decoded += len(boxes)
        bright = embedding[0] > self.threshold
        mask = bright & self._inside(boxes, 0)
        beyond = (bright & self._inside(boxes, 0.125)).sum(axis=(1, 2))
        iou = mask.sum(axis=(1, 2)) / np.maximum(beyond, 1)
        return np.where(mask, np.float32(8), np.float32(-8)), iou.astype(np.float32)

    @staticmethod
    def _inside(boxes: np.ndarray, grow: float) -> np.ndarray:
        """(N, 4) -> (N, 256, 256) bool; two pixels of room on top, as networks take it"""
        cell = np.arange(256, dtype=np.float32) + 0.5
        x0, y0, x1, y1 = np.asarray(boxes, np.float32).T[:, :, None]
        width, height = grow * (x1 - x0) + 1, grow * (y1 - y0) + 1
        rows = (cell > y0 - height) & (cell < y1 + 1 + height)
        columns = (cell > x0 - width) & (cell < x1 + 1 + width)
        return rows[:, :, None] & columns[:, None, :]


class TinyNetwork(torch.nn.Module):
    """A network of the same interface and no size, so that a training run takes a second."""

    def __init__(self):
        super().__init__()
        self.image_encoder = torch.nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.bn = torch.nn.BatchNorm2d(8)
        self.prompt_encoder, self.mask_decoder = torch.nn.Linear(4, 8), torch.nn.Conv2d(8, 1, 3, padding=1)

    def decode(self, embedding, boxes, image_of_box=None, boxes_are="exact"):
        x = self.bn(embedding)
        x = (x if image_of_box is None else x[image_of_box]) + self.prompt_encoder(boxes / 256)[:, :, None, None]
        logits = torch.nn.functional.interpolate(self.mask_decoder(x), size=(256, 256), mode="bilinear")
        return logits, logits.mean(dim=(2, 3)).sigmoid()
