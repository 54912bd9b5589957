"""grid.py: the 256 grid and back, for every shape, without losing a pixel; the exact boxes of label maps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as any_

from grid import (
    NO_MASK,
    boxes_from_labels,
    boxes_to_grid,
    case_rng,
    crop_to_box,
    grid_size,
    logits_to_original,
    loosen_boxes,
    mask_box,
    pad_to_square,
    resize_to_grid,
)

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
    assert there * (max(shape) / 256) == pytest.approx(boxes, rel=1e-6)


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
    assert logits_to_original(logits, 100, 50) is NO_MASK
    logits[:, 200:] = 5  # a 100 x 50 image ends at column 128 of the grid
    assert logits_to_original(logits, 100, 50) is NO_MASK


def test_a_mask_comes_back_where_it_was():
    mask = np.zeros((300, 200), np.uint8)
    mask[100:150, 40:90] = 255
    grid = pad_to_square(resize_to_grid(mask), 256).astype(np.float32) - 127.5
    values, rows, columns = logits_to_original(grid, 300, 200)
    back = np.zeros((300, 200), bool)
    back[rows, columns] = values > 0
    assert 2 * (back & (mask > 0)).sum() / (back.sum() + (mask > 0).sum()) > 0.99


def test_no_mask_stays_none_and_paints_no_pixel():
    values, rows, columns = NO_MASK
    assert values.size == np.zeros((9, 7))[rows, columns].size == 0
    assert crop_to_box(NO_MASK, np.array([0, 0, 7, 9])) is NO_MASK and mask_box(NO_MASK) is None


# Boxes of label maps


def boxes_by_looking(labels):
    """Every label's box, pixel by pixel."""
    found = {}
    for index in np.ndindex(labels.shape):
        if labels[index]:
            found.setdefault(int(labels[index]), []).append(index[::-1])
    return {label: [*np.min(points, axis=0), *np.max(points, axis=0)] for label, points in sorted(found.items())}


@pytest.mark.parametrize("shape", [(17, 23), (1, 9), (5, 7, 11), (1, 6, 6)])
@pytest.mark.parametrize("dtype, highest", [(np.uint8, 12), (np.uint16, 65_535), (np.int64, 300)])
def test_boxes_equal_those_found_pixel_by_pixel(shape, dtype, highest):
    rng = np.random.default_rng(len(shape))
    labels = (rng.integers(1, highest, shape, endpoint=True) * (rng.random(shape) < 0.5)).astype(dtype)
    ids, boxes = boxes_from_labels(labels)
    wanted = boxes_by_looking(labels)
    assert ids.tolist() == list(wanted) and boxes.tolist() == list(wanted.values())
    assert boxes.dtype == np.float64 and ids.dtype == dtype


def test_a_box_by_hand_is_inclusive_and_one_pixel_is_a_box():
    labels = np.zeros((6, 9), np.uint16)
    labels[1:4, 2:8], labels[5, 0] = 300, 7
    ids, boxes = boxes_from_labels(labels)
    assert (ids.tolist(), boxes.tolist()) == ([7, 300], [[0, 5, 0, 5], [2, 1, 7, 3]])
    ids, boxes = boxes_from_labels(np.pad(labels[None], ((2, 1), (0, 0), (0, 0))))
    assert boxes.tolist() == [[0, 5, 2, 0, 5, 2], [2, 1, 2, 7, 3, 2]]


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_an_empty_map_has_no_box(shape):
    ids, boxes = boxes_from_labels(np.zeros(shape, np.uint8))
    assert ids.shape == (0,) and boxes.shape == (0, 2 * len(shape))


# ---------------------------------------------------------------- boxes as people draw them


@pytest.mark.parametrize("box", [[100.0, 80, 140, 180], [100.0, 80, 3, 140, 180, 9]])
def test_each_side_is_loosened_by_half_to_one_and_a_half_times_the_share_and_z_stays(box):
    boxes = np.tile(box, (4000, 1))
    loose = loosen_boxes(boxes, 0.2, case_rng("a"), 400, 500)
    outward = (loose - boxes) * np.repeat([-1, 1], len(box) // 2)
    x, y = outward[:, [0, len(box) // 2]] / 40, outward[:, [1, 1 + len(box) // 2]] / 100
    for moves in (x, y):
        assert 0.1 <= moves.min() < 0.101 and 0.299 < moves.max() <= 0.3
        assert moves.mean() == pytest.approx(0.2, abs=0.003)
    assert len(box) == 4 or (loose[:, [2, 5]] == [3, 9]).all()
    assert (loosen_boxes(boxes, 0, case_rng("a"), 400, 500) == boxes).all()


def test_loose_boxes_stay_on_the_image_and_belong_to_the_case_by_its_name():
    boxes = np.array([[0.0, 2, 90, 49], [10, 10, 20, 20]])
    loose = loosen_boxes(boxes, 1.0, case_rng("a", 3), 50, 100)
    assert (loose[0] == [0, 0, 99, 49]).all() and (loose >= 0).all()
    assert (loose == loosen_boxes(boxes, 1.0, case_rng("a", 3), 50, 100)).all()
    assert (loose[1] != loosen_boxes(boxes, 1.0, case_rng("b", 3), 50, 100)[1]).any()
    assert (loose[1] != loosen_boxes(boxes, 1.0, case_rng("a", 4), 50, 100)[1]).any()


# ---------------------------------------------------------------- any shape, any box

sides = any_.integers(1, 5000)
shares = any_.floats(0, 1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=sides, width=sides, corners=any_.tuples(shares, shares, shares, shares))
def test_any_box_of_any_image_lies_on_the_grid_and_comes_back(height, width, corners):
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    box = np.array([[x0 * width, y0 * height, x1 * width, y1 * height]])
    there = boxes_to_grid(box, height, width)
    assert there.min() >= 0 and there.max() <= 256
    assert there * (max(height, width) / 256) == pytest.approx(box, rel=1e-6, abs=1e-3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=sides, width=sides)
def test_the_grid_of_any_image_has_256_pixels_on_its_long_side_and_one_at_least_on_the_other(height, width):
    h, w = grid_size(height, width)
    assert max(h, w) == 256 and min(h, w) >= 1 and (h == 256 if height >= width else w == 256)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=any_.lists(any_.integers(1, 6), min_size=2, max_size=3), seed=any_.integers(0, 999), most=any_.integers(0, 5)
)
def test_the_boxes_of_any_label_map_are_those_of_each_label_by_itself(shape, seed, most):
    labels = np.random.default_rng(seed).integers(0, most + 1, shape).astype(np.uint16)
    ids, boxes = boxes_from_labels(labels)
    assert ids.tolist() == [i for i in range(1, most + 1) if (labels == i).any()]
    for i, box in zip(ids, boxes, strict=True):
        at = np.argwhere(labels == i)[:, ::-1]
        assert box.tolist() == [*at.min(axis=0), *at.max(axis=0)]
