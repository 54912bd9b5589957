"""data.py: the 256 grid and back, for every shape, without losing a pixel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import boxes_to_grid, boxes_to_original, grid_size, logits_to_original, pad_to_square, resize_to_grid

SHAPES = [(300, 200), (50, 38), (256, 256), (3, 900), (120, 119), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_long_side_becomes_256_and_the_aspect_stays(shape):
    h, w = grid_size(*shape)
    assert max(h, w) == 256 and min(h, w) >= 1
    assert h / w == pytest.approx(shape[0] / shape[1], rel=0.02) or min(h, w) == 1
    resized = resize_to_grid(np.zeros((*shape, 3), np.uint8))
    assert resized.shape == (h, w, 3) and pad_to_square(resized, 256).shape == (256, 256, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_come_back(shape):
    boxes = np.array([[0, 0, shape[1], shape[0]], [0.25, 0.5, shape[1] / 3, shape[0] / 2]])
    there = boxes_to_grid(boxes, *shape)
    assert there.max() <= 256
    assert boxes_to_original(there, *shape) == pytest.approx(boxes, rel=1e-6)


def test_released_boxes_are_truncated_and_fixed_ones_are_not():
    box = np.array([[10, 20, 101, 90]])
    assert boxes_to_grid(box, 300, 200, "int").tolist() == [[8, 17, 86, 76]]  # x 256 / 300
    assert boxes_to_grid(box, 300, 200)[0] == pytest.approx(np.array([10, 20, 101, 90]) * 256 / 300)


@pytest.mark.parametrize("shape", [(1000, 700), (50, 38), (256, 256), (7, 900), (255, 254), (120, 108)])
def test_upsampling_where_the_mask_is_equals_upsampling_everywhere(shape):
    height, width = shape
    h, w = grid_size(height, width)
    torch.manual_seed(0)
    for _ in range(5):
        coarse = torch.randn(1, 1, 8, 8) * 5 - 2
        logits = F.interpolate(coarse, size=(256, 256), mode="bicubic")
        slow = F.interpolate(logits[..., :h, :w], size=shape, mode="bilinear", align_corners=False)[0, 0].numpy()
        values, rows, columns = logits_to_original(logits[0, 0].numpy(), height, width)
        fast = np.full(shape, -1.0)
        fast[rows, columns] = values
        assert ((fast > 0) != (slow > 0)).mean() < 1e-5
        assert np.abs(fast - slow)[slow > 0].max() < 1e-4


def test_no_positive_logit_is_no_mask_also_when_only_the_padding_has_one():
    logits = np.full((256, 256), -1.0, np.float32)
    assert logits_to_original(logits, 100, 50) is None
    logits[:, 200:] = 5  # a 100 x 50 image ends at column 128 of the grid
    assert logits_to_original(logits, 100, 50) is None


def test_a_mask_comes_back_where_it_was():
    mask = np.zeros((300, 200), np.uint8)
    mask[100:150, 40:90] = 255
    grid = pad_to_square(resize_to_grid(mask), 256).astype(np.float32) - 127.5
    values, rows, columns = logits_to_original(grid, 300, 200)
    back = np.zeros((300, 200), bool)
    back[rows, columns] = values > 0
    assert 2 * (back & (mask > 0)).sum() / (back.sum() + (mask > 0).sum()) > 0.99
