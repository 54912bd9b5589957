"""engines/: the decoder and the folded norms give model.py's results to rounding; edited code changes its hash."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import efficientvit
import engines
import model
import segment
from engines.decoder import ReorderedDecoder
from engines.graphs import ROUNDING, differing, fold_batch_norms
from engines.openvino_engine import CELL, CELLS, OUTSIDE, cell_range
from grid import NO_MASK, crop_to_box, grid_pixels_for, logits_to_original, reach_of
from model import TorchEngine
from presets import PRESETS
from segment import Segmenter

BOXES = torch.tensor(
    [[20.0, 30, 120, 140], [0, 0, 255, 255], [7, 9, 7, 9], [100.5, 20.25, 180, 90.75], [-3, 200, 60, 259]]
)
ALL_CELLS = torch.tensor([0, 64, 0, 64])


@pytest.fixture(scope="module", params=["baseline", "random"])
def network(request):
    if request.param == "baseline":
        return segment.load("baseline").engine.network
    torch.manual_seed(0)
    return segment.build("proposed").eval()


@pytest.fixture(scope="module")
def embedding():
    return torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(1))


def reordered(network, embedding, boxes, corners=ALL_CELLS):
    """Logits of boxes (N, 4) and their IoU, each box by itself, as the graphs decode them."""
    decoder = ReorderedDecoder(network)
    with torch.inference_mode():
        image_side = decoder.of_image(embedding.flatten(2)[0].T)
        prompts = decoder.of_boxes(boxes)
        found = [decoder.of_box(prompt[None], corners, *image_side) for prompt in prompts]
    return torch.stack([logits for logits, _ in found]), torch.cat([iou for _, iou in found])


# ---------------------------------------------------------------- the decoder


def test_logits_and_iou_are_the_plain_networks(network, embedding):
    with torch.inference_mode():
        wanted, wanted_iou = network.decode(embedding, BOXES)
    found, iou = reordered(network, embedding, BOXES)
    assert found.shape == (5, 256, 256) and iou.shape == wanted_iou.shape == (5, 1)
    assert (found - wanted[:, 0]).abs().max() < 1e-5 * wanted.abs().max() + 1e-5
    assert torch.allclose(iou, wanted_iou, atol=1e-5)
    assert wanted.std() > 1e-4, "logits that say something"


def test_a_rectangle_of_cells_has_the_logits_that_it_has_in_the_whole(network, embedding):
    whole = reordered(network, embedding, BOXES[:1])[0][0]
    for top, bottom, left, right in ((3, 51, 2, 8), (0, 1, 63, 64)):
        part = reordered(network, embedding, BOXES[:1], torch.tensor([top, bottom, left, right]))[0][0]
        assert torch.allclose(part, whole[4 * top : 4 * bottom, 4 * left : 4 * right], atol=1e-4)


def test_cell_range_by_hand():
    assert (CELL, CELLS) == (256 // efficientvit.EMBED_GRID, efficientvit.EMBED_GRID)
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
    if found is not NO_MASK:
        values, rows, columns = found
        mask[rows, columns] = values > 0
    return mask


# ---------------------------------------------------------------- folded batch norms


@torch.inference_mode()
def test_folded_no_batch_norm_is_left_and_the_results_are_the_same():
    network = segment.load("baseline").engine.network
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    wanted = network.image_encoder(image)
    folded = fold_batch_norms(copy.deepcopy(network.image_encoder))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert (folded(image) - wanted).norm() < 1e-4 * wanted.norm()
    linear, x = nn.Linear(3, 4), torch.randn(2, 3)
    assert torch.equal(fold_batch_norms(copy.deepcopy(linear))(x), linear(x)), "a network without any is as it was"


# ---------------------------------------------------------------- where a mask ends


class Everything:
    """An engine that answers that the whole grid is the object."""

    kinds = ("exact",)

    def encode(self, image):
        return None

    def decode(self, embedding, boxes, within=None, boxes_are="exact"):
        return np.full((len(boxes), 256, 256), 8, np.float32), np.ones(len(boxes), np.float32)


def test_a_mask_ends_at_the_reach_of_its_box_where_the_preset_says_so():
    image, boxes = np.zeros((512, 400, 3), np.uint8), np.array([[100.0, 200, 180, 240]])
    assert reach_of(boxes, 512, 400).tolist() == [[100 - 20 - 16, 200 - 10 - 16, 180 + 20 + 16, 240 + 10 + 16]]
    for preset, wanted in (("fixed", (174, 266, 64, 216)), ("paper", (0, 511, 0, 399)), ("released", (0, 511, 0, 399))):
        y, x = np.nonzero(Segmenter(Everything(), PRESETS[preset], enhanced=False).segment_image(image, boxes))
        assert (y.min(), y.max(), x.min(), x.max()) == wanted, preset


# ---------------------------------------------------------------- edits of the network's code


class TinyEncoder(nn.Module):
    """One convolution with a batch norm whose numbers matter: a network that is quick to run."""

    def __init__(self):
        super().__init__()
        self.patch = efficientvit.ConvNorm(3, 256, 5, stride=4)
        self.norm = efficientvit.LayerNorm2d(256)
        self.patch.norm.running_mean += 0.1 * torch.randn(256)
        self.patch.norm.running_var += torch.rand(256)

    def forward(self, image):
        return self.norm(self.patch(image))


def tiny_network():
    torch.manual_seed(0)
    return model.BoxSegmenter(TinyEncoder()).eval()


IMAGE = np.random.default_rng(0).random((3, 256, 256), np.float32)
plain_decoder, plain_tiny = model.MaskDecoder.forward, TinyEncoder.forward


def run(engine):
    """embedding and logits of one image and box"""
    embedding = engine.encode(IMAGE)
    return embedding, engine.decode(embedding, np.float32([[20, 30, 120, 140]]))[0]


def test_the_engine_torch_follows_an_edit(monkeypatch):
    embedding, before = run(TorchEngine(tiny_network()))

    def louder(self, *prompt, **options):
        logits, iou = plain_decoder(self, *prompt, **options)
        return logits * 1.1, iou

    with monkeypatch.context() as patch:
        patch.setattr(model.MaskDecoder, "forward", louder)
        assert np.allclose(run(TorchEngine(tiny_network()))[1], 1.1 * before, atol=1e-6)
    monkeypatch.setattr(TinyEncoder, "forward", lambda self, image: 1.1 * plain_tiny(self, image))
    assert torch.allclose(run(TorchEngine(tiny_network()))[0], 1.1 * embedding, atol=1e-5)


def test_the_hash_is_of_what_the_code_of_network_and_encoder_computes(monkeypatch, tmp_path):
    """Comments, docstrings and blank lines do not change it; statements and the layout that Python reads do."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(segment.MODELS, "tiny", segment.Architecture("edited_code", "TinyEncoder", Path, False))

    def hash_of(text):
        (tmp_path / "edited_code.py").write_text(text)
        return engines.code_hash("tiny")

    first = hash_of('"""A."""\nif a:\n    b = 1\n    c = 2  # two\n')
    assert first == hash_of('"""B."""\n\n\n# Again\nif a:\n    b = 1\n\n    c = 2\n')
    assert first != hash_of('"""A."""\nif a:\n    b = 1\nc = 2\n') != hash_of('"""A."""\nif a:\n    b = 1\n    c = 3\n')
    assert len({engines.code_hash("proposed"), engines.code_hash("proposed", "engines.decoder"), first}) == 3


def test_results_that_differ_by_more_than_rounding_or_in_shape_are_named():
    wanted = {"image encoder": np.ones(1000), "mask decoder": np.ones((2, 3)), "prediction of IoU": np.ones(2)}
    assert differing(wanted, wanted) == []
    found = wanted | {"image encoder": wanted["image encoder"] + ROUNDING / 2, "prediction of IoU": np.ones(3)}
    assert differing(found | {"mask decoder": np.full((2, 3), np.nan)}, wanted) == ["mask decoder", "prediction of IoU"]
    assert differing(wanted | {"image encoder": np.ones(1000) + 2 * ROUNDING}, wanted) == ["image encoder"]
