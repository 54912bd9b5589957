"""fast_decoder.py: model.py's logits to rounding, wherever and for however many boxes they are asked for."""

import numpy as np
import pytest
import torch

from data import crop_to_box, grid_pixels_for, logits_to_original, reach_of
from fast_decoder import OUTSIDE, FastDecoder, FastModel, cell_range
from model import build_model
from phantoms import tiny_case
from presets import PRESETS
from readers import Case, boxes_from_labels
from segment import Segmenter, load_segmenter
from weights import OUR_CHECKPOINT

BOXES = torch.tensor(
    [[20.0, 30, 120, 140], [0, 0, 255, 255], [7, 9, 7, 9], [100.5, 20.25, 180, 90.75], [-3, 200, 60, 259]]
)


@pytest.fixture(scope="module", params=["baseline", "random"])
def network(request):
    if request.param == "baseline":
        return load_segmenter("baseline", plain=True).model
    torch.manual_seed(0)
    return build_model().eval()


@pytest.fixture(scope="module")
def embeddings():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 256, 64, 64, generator=generator) for _ in range(2)]


def plain(network, embedding, boxes):
    with torch.inference_mode():
        return network.decode(embedding, boxes)


def test_logits_and_iou_are_the_plain_networks(network, embeddings):
    wanted, wanted_iou = plain(network, embeddings[0], BOXES)
    found, iou = FastDecoder(network).decode(embeddings[0], BOXES)
    assert found.shape == (5, 1, 256, 256) and iou.shape == (5, 1)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-5
    assert torch.allclose(iou, wanted_iou, atol=1e-5)
    assert wanted.std() > 1e-4, "logits that say something"


def test_images_in_turn_and_another_layout_in_memory_change_nothing(network, embeddings):
    decoder = FastDecoder(network)
    one, two = embeddings
    channels_last = one.contiguous(memory_format=torch.channels_last)
    for embedding in (one, two, one, channels_last):
        wanted = plain(network, embedding, BOXES[:2])[0]
        for number in (1, 2):
            found = decoder.decode(embedding, BOXES[:number])[0]
            assert (found - wanted[:number]).abs().max() < 1e-5 * wanted.abs().max() + 1e-5
    assert [x.shape for x in decoder.decode(one, torch.zeros(0, 4))] == [(0, 1, 256, 256), (0, 1)]


def test_within_a_region_the_logits_are_the_same_and_elsewhere_they_are_no_mask(network, embeddings):
    whole = FastDecoder(network).decode(embeddings[0], BOXES)[0]
    within = torch.tensor(
        [[10.0, 12, 31.9, 200], [0, 0, 255, 255], [7, 9, 7, 9], [300, -50, 400, -20], [-9, 190, 66, 280]]
    )
    part = FastDecoder(network).decode(embeddings[0], BOXES, within)[0]
    for i, (rows, columns) in enumerate(
        [(slice(12, 204), slice(8, 32)), (slice(0, 256),) * 2, (slice(8, 12), slice(4, 8)),
         (slice(0, 4), slice(252, 256)), (slice(188, 256), slice(0, 68))]
    ):  # fmt: skip
        outside = torch.ones(256, 256, dtype=torch.bool)
        outside[rows, columns] = False
        assert torch.allclose(part[i, 0, rows, columns], whole[i, 0, rows, columns], atol=1e-4)
        assert (part[i, 0][outside] == OUTSIDE).all()


def test_cell_range_by_hand():
    assert cell_range(None) == (slice(0, 64), slice(0, 64))
    assert cell_range([3.9, 4.0, 8.0, 255.0]) == (slice(1, 64), slice(0, 3))
    assert cell_range([-5.0, 254, -1, 900]) == (slice(63, 64), slice(0, 1))


@pytest.mark.parametrize("size", [(256, 256), (40, 100), (333, 517), (1000, 30)])
def test_the_grid_pixels_asked_for_are_enough_for_the_region(size):
    generator = np.random.default_rng(0)
    height, width = size
    for _ in range(20):
        low = generator.uniform(-5, 0.9, 2) * (width, height)
        region = np.concatenate([low, low + generator.uniform(0, 0.5, 2) * (width, height)])
        logits = generator.normal(size=(256, 256)).astype(np.float32)
        x0, y0, x1, y1 = grid_pixels_for(region[None], height, width)[0]
        y, x = np.mgrid[:256, :256]
        cut = np.where((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1), logits, OUTSIDE).astype(np.float32)
        pair = [painted(one, region, size) for one in (logits, cut)]
        assert np.array_equal(*pair)


def painted(logits, region, size):
    mask = np.zeros(size, bool)
    found = crop_to_box(logits_to_original(logits, *size), region)
    if found is not None:
        values, rows, columns = found
        mask[rows, columns] = values > 0
    return mask


# ---------------------------------------------------------------- through the segmenter


@pytest.mark.parametrize(
    "name",
    ["baseline", pytest.param("proposed", marks=pytest.mark.skipif(not OUR_CHECKPOINT.is_file(), reason="no weights"))],
)
@pytest.mark.parametrize("preset", ["fixed", "paper"])
@pytest.mark.parametrize("dims", [2, 3])
def test_masks_are_those_of_the_plain_loop(name, preset, dims):
    labels = tiny_case(dims=dims)
    boxes = boxes_from_labels(labels.labels)[1].astype(float)
    case = Case("case", labels.image, np.concatenate([boxes, boxes]), None, labels.spacing_mm, dims == 3)
    segmenters = [load_segmenter(name, preset=preset, plain=plain, force=True) for plain in (True, False)]
    assert [isinstance(one.model, FastModel) for one in segmenters] == [False, True]
    wanted, found = (one.segment(case) for one in segmenters)
    assert wanted.any() and (wanted != found).mean() < 1e-4


class Everything(torch.nn.Module):
    """Answers that the whole grid is the object."""

    def image_encoder(self, images):
        return torch.zeros(len(images), 256, 64, 64)

    def decode(self, embedding, boxes):
        return torch.full((len(boxes), 1, 256, 256), 8.0), torch.ones(len(boxes), 1)


def test_a_mask_ends_at_the_reach_of_its_box_where_the_preset_says_so():
    image, boxes = np.zeros((512, 400, 3), np.uint8), np.array([[100.0, 200, 180, 240]])
    assert reach_of(boxes, 512, 400).tolist() == [[100 - 20 - 16, 200 - 10 - 16, 180 + 20 + 16, 240 + 10 + 16]]
    for preset, wanted in (("fixed", (174, 266, 64, 216)), ("paper", (0, 511, 0, 399)), ("released", (0, 511, 0, 399))):
        y, x = np.nonzero(Segmenter(Everything(), PRESETS[preset], enhanced=False).segment_image(image, boxes))
        assert (y.min(), y.max(), x.min(), x.max()) == wanted, preset


def test_nothing_of_it_can_be_trained():
    decoder = FastDecoder(build_model())
    logits, iou = decoder.decode(torch.zeros(1, 256, 64, 64), BOXES)
    assert logits.is_inference() and not logits.requires_grad and not iou.requires_grad
