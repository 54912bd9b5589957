"""fused.py: the same masks with the batch norms folded away, on real images."""

import copy

import pytest
import torch
from torch import nn

from fused import fused
from phantoms import real_cases
from readers import boxes_from_labels
from segment import load_segmenter
from weights import OUR_CHECKPOINT

MODELS = [
    "baseline",
    pytest.param("proposed", marks=pytest.mark.skipif(not OUR_CHECKPOINT.is_file(), reason="no weights")),
]


@pytest.mark.parametrize("name", MODELS)
def test_masks_on_real_images_are_the_plain_networks(name):
    plain = load_segmenter(name, plain=True)
    quick = load_segmenter(name)
    cases = [case for case in real_cases() if case.labels.ndim == 2][:4]
    pixels = differ = 0
    for case in cases:
        boxes = boxes_from_labels(case.labels)[1][:5]
        want = plain.segment_image(case.image, boxes)
        assert want.any()
        differ += int((quick.segment_image(case.image, boxes) != want).sum())
        pixels += want.size
    assert differ / pixels < 1e-4


@pytest.mark.parametrize("engine", ["torch", "torch-int8"])
def test_every_engine_of_pytorch_is_folded_unless_the_plain_network_is_asked_for(engine):
    for plain in (False, True):
        encoder = load_segmenter("baseline", engine=engine, plain=plain).model.image_encoder
        layers = encoder.modules()
        assert any(isinstance(layer, nn.BatchNorm2d) for layer in layers) == plain


def test_no_batch_norm_is_left_and_a_network_without_any_is_as_it_was():
    from baseline import build_baseline

    network = fused(build_baseline())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    linear = nn.Linear(3, 4)
    x = torch.randn(2, 3)
    assert torch.equal(fused(copy.deepcopy(linear))(x), linear(x))
