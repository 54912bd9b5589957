"""A stand-in for the network that needs no weights and no second: its "embedding" is the image itself."""

import torch


class BrightModel(torch.nn.Module):
    """Inside a prompt's box, bright pixels are the object (logit +8), all else is not (-8).

    Like a trained network it predicts a low IoU for a box that cuts the object: the share of the bright pixels in
    the box grown by a quarter that lie in the box itself.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold
        self.encoded = self.decoded = 0  # how many images and boxes were asked for

    def image_encoder(self, images: torch.Tensor) -> torch.Tensor:
        self.encoded += len(images)
        return images

    def decode(self, embedding: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.decoded += len(boxes)
        bright = embedding[:, 0] > self.threshold
        mask = bright & self._inside(boxes, 0)
        beyond = (bright & self._inside(boxes, 0.125)).sum(dim=(1, 2))
        iou = mask.sum(dim=(1, 2)) / beyond.clamp(min=1)
        return torch.where(mask, 8.0, -8.0)[:, None], iou[:, None]

    @staticmethod
    def _inside(boxes: torch.Tensor, grow: float) -> torch.Tensor:
        """(N, 4) -> (N, 256, 256) bool; two pixels of room on top, as networks take it"""
        cell = torch.arange(256) + 0.5
        x0, y0, x1, y1 = boxes.T[:, :, None]
        width, height = grow * (x1 - x0) + 1, grow * (y1 - y0) + 1
        rows = (cell > y0 - height) & (cell < y1 + 1 + height)
        columns = (cell > x0 - width) & (cell < x1 + 1 + width)
        return rows[:, :, None] & columns[:, None, :]
