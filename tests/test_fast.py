"""fast/: the decoder and the folded norms give model.py's results to rounding; edited code is followed or refused."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import efficientvit
import model
import segment
from fast import engines
from fast.cells import CELL, CELLS, OUTSIDE, cell_range
from fast.compare import probe, probes_differ
from fast.decoder import FastDecoder
from fast.engines import code_hash
from fast.torch_engine import FastEngine, fast_engine, fold_batch_norms
from files import InputError
from files.case import Case
from files.checkpoints import OUR_CHECKPOINT
from grid import NO_MASK, boxes_from_labels, crop_to_box, grid_pixels_for, logits_to_original, reach_of
from model import TorchEngine
from phantoms import real_cases, tiny_case
from presets import PRESETS
from segment import Segmenter
from volumes import segment_case

BOXES = torch.tensor(
    [[20.0, 30, 120, 140], [0, 0, 255, 255], [7, 9, 7, 9], [100.5, 20.25, 180, 90.75], [-3, 200, 60, 259]]
)
needs_weights = pytest.mark.skipif(not OUR_CHECKPOINT.is_file(), reason=f"needs {OUR_CHECKPOINT.name}")
MODELS = ["baseline", pytest.param("proposed", marks=needs_weights)]


@pytest.fixture(scope="module")
def both():
    """name of a model -> its segmenters by the engines torch and fast, loaded once"""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = [engines.load(name, engine=engine) for engine in ("torch", "fast")]
        return loaded[name]

    return get


@pytest.fixture(scope="module", params=["baseline", "random"])
def network(request, both):
    if request.param == "baseline":
        return both("baseline")[0].engine.network
    torch.manual_seed(0)
    return segment.build("proposed").eval()


@pytest.fixture(scope="module")
def embeddings():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 256, 64, 64, generator=generator) for _ in range(2)]


def plain(network, embedding, boxes):
    with torch.inference_mode():
        return network.decode(embedding, boxes)


# ---------------------------------------------------------------- the decoder


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
    wanted = {id(embedding): plain(network, embedding, BOXES[:2])[0] for embedding in embeddings}
    channels_last = one.contiguous(memory_format=torch.channels_last)
    wanted[id(channels_last)] = wanted[id(one)]
    for embedding in (one, two, one, channels_last):
        for number in (1, 2):
            found = decoder.decode(embedding, BOXES[:number])[0]
            off = (found - wanted[id(embedding)][:number]).abs().max()
            assert off < 1e-5 * wanted[id(embedding)].abs().max() + 1e-5
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


def test_nothing_of_it_can_be_trained():
    logits, iou = FastDecoder(segment.build("proposed")).decode(torch.zeros(1, 256, 64, 64), BOXES)
    assert logits.is_inference() and not logits.requires_grad and not iou.requires_grad


# ---------------------------------------------------------------- folded batch norms


@pytest.mark.parametrize("name", MODELS)
def test_masks_on_real_images_are_the_plain_networks(name, both):
    torch_engine, fast = both(name)
    cases = [case for case in real_cases() if case.labels.ndim == 2][: 3 if name == "proposed" else 1]
    pixels = differ = 0
    for case in cases:
        boxes = boxes_from_labels(case.labels)[1][:5]
        want = torch_engine.segment_image(case.image, boxes)
        assert want.any()
        differ += int((fast.segment_image(case.image, boxes) != want).sum())
        pixels += want.size
    assert differ / pixels < 1e-4


def test_only_the_engine_fast_is_folded_the_others_run_the_network_as_written(both):
    as_written, fast = both("baseline")
    int8 = engines.load("baseline", engine="torch-int8")
    assert isinstance(fast.engine, FastEngine) and isinstance(as_written.engine, TorchEngine)
    assert isinstance(int8.engine, TorchEngine)
    folded = [
        not any(isinstance(layer, nn.BatchNorm2d) for layer in one.engine.network.modules())
        for one in (as_written, int8, fast)
    ]
    assert folded == [False, False, True]


def test_no_batch_norm_is_left_and_a_network_without_any_is_as_it_was():
    network = fold_batch_norms(segment.build("baseline"))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    linear = nn.Linear(3, 4)
    x = torch.randn(2, 3)
    assert torch.equal(fold_batch_norms(copy.deepcopy(linear))(x), linear(x))


# ---------------------------------------------------------------- through the segmenter


@pytest.mark.parametrize("name, preset, dims", [
    ("baseline", "fixed", 2),
    *(pytest.param("proposed", preset, dims, marks=needs_weights) for preset in ("fixed", "paper") for dims in (2, 3)),
])  # fmt: skip
def test_masks_are_those_of_the_plain_loop(name, preset, dims, both):
    labels = tiny_case(dims=dims)
    boxes = boxes_from_labels(labels.labels)[1].astype(float)
    image = labels.image
    if dims == 3:  # three slices of six: the middle and one each way
        image, boxes[:, 2], boxes[:, 5] = image[1:4], 0, 2
    case = Case("case", image, np.concatenate([boxes, boxes]), None, labels.spacing_mm, dims == 3)
    wanted, found = (segment_case(Segmenter(one.engine, PRESETS[preset], one.enhanced), case) for one in both(name))
    assert wanted.any() and (wanted != found).mean() < 1e-4


class Everything:
    """An engine that answers that the whole grid is the object."""

    def encode(self, image):
        return None

    def decode(self, embedding, boxes, within=None):
        return np.full((len(boxes), 256, 256), 8, np.float32), np.ones(len(boxes), np.float32)


def test_a_mask_ends_at_the_reach_of_its_box_where_the_preset_says_so():
    image, boxes = np.zeros((512, 400, 3), np.uint8), np.array([[100.0, 200, 180, 240]])
    assert reach_of(boxes, 512, 400).tolist() == [[100 - 20 - 16, 200 - 10 - 16, 180 + 20 + 16, 240 + 10 + 16]]
    for preset, wanted in (("fixed", (174, 266, 64, 216)), ("paper", (0, 511, 0, 399)), ("released", (0, 511, 0, 399))):
        y, x = np.nonzero(Segmenter(Everything(), PRESETS[preset], enhanced=False).segment_image(image, boxes))
        assert (y.min(), y.max(), x.min(), x.max()) == wanted, preset


def test_an_unknown_engine_is_told_with_the_known_ones():
    with pytest.raises(InputError, match="'tensorrt': unknown; choose one of torch, torch-int8, fast, openvino"):
        engines.load("baseline", engine="tensorrt")
    with pytest.raises(InputError, match="unknown; choose one of baseline, proposed"):
        engines.load("third", engine="fast")


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
    return model.build_model(TinyEncoder).eval()


IMAGE = np.random.default_rng(0).random((3, 256, 256), np.float32)
plain_decoder, plain_conv, plain_tiny = (c.forward for c in (model.MaskDecoder, efficientvit.ConvNorm, TinyEncoder))


def test_after_an_edit_of_the_decoder_torch_follows_and_fast_refuses(monkeypatch):
    embedding, before = run(TorchEngine(tiny_network()))

    def louder(self, *prompt, **options):
        logits, iou = plain_decoder(self, *prompt, **options)
        return logits * 1.1, iou

    monkeypatch.setattr(model.MaskDecoder, "forward", louder)
    network = tiny_network()
    assert np.allclose(run(TorchEngine(network))[1], 1.1 * before, atol=1e-6)
    with pytest.raises(InputError, match="^engine fast: its mask decoder .* use --engine torch$"):
        fast_engine(network)


@pytest.mark.parametrize("edit", ["one layer less", "another layer", "another activation", "iou"])
def test_edits_inside_the_decoder_are_found_too(edit, monkeypatch):
    network = tiny_network()
    if edit == "one layer less":
        del network.mask_decoder.transformer.layers[1]
    elif edit == "another layer":
        network.mask_decoder.transformer.layers.append(model.TwoWayLayer(first=False))
    elif edit == "another activation":
        network.mask_decoder.output_upscaling[4] = nn.ReLU()
    else:
        monkeypatch.setattr(
            model.MaskDecoder,
            "forward",
            lambda self, *p: (plain_decoder(self, *p)[0], plain_decoder(self, *p)[1] + 0.01),
        )
    with pytest.raises(InputError, match="^engine fast: its mask decoder"):
        fast_engine(network)


@pytest.mark.parametrize(
    "part, edited, refused",
    [
        (efficientvit.ConvNorm, lambda self, x: self.act(self.norm(self.conv(x)) + 1), False),
        (efficientvit.ConvNorm, lambda self, x: self.norm(self.act(self.conv(x))), True),
        (TinyEncoder, lambda self, image: 1.1 * plain_tiny(self, image), False),
    ],
    ids=["a shift before the activation", "the norm after the activation", "a louder embedding"],
)
def test_after_an_edit_of_the_encoder_torch_follows_and_fast_follows_or_refuses(part, edited, refused, monkeypatch):
    before = run(TorchEngine(tiny_network()))[0]
    monkeypatch.setattr(part, "forward", edited)
    network = tiny_network()
    after = run(TorchEngine(network))[0]
    assert (after - before).norm() > 0.01 * before.norm()
    if refused:
        with pytest.raises(InputError, match="^engine fast: its image encoder .* use --engine torch$"):
            fast_engine(network)
    else:
        found = run(fast_engine(network))[0]
        assert torch.allclose(found, after, atol=1e-4)


def test_the_paper_encoder_edited_is_followed(monkeypatch):
    forward = efficientvit.ImageEncoder.forward
    monkeypatch.setattr(efficientvit.ImageEncoder, "forward", lambda self, image: forward(self, image) + 1)
    network = segment.build("proposed").eval()
    wanted = TorchEngine(network).encode(IMAGE)
    assert abs(float(wanted.mean()) - 1) < 0.1  # a layer norm's mean is 0
    assert torch.allclose(fast_engine(network).encode(IMAGE), wanted, atol=1e-3)


def run(engine):
    """embedding and logits of one image and box"""
    embedding = engine.encode(IMAGE)
    return embedding, engine.decode(embedding, np.float32([[20, 30, 120, 140]]))[0]


def test_only_what_is_computed_changes_the_hash_of_the_code():
    source = Path(efficientvit.__file__).read_text(encoding="utf-8")
    same = source.replace("  # the sums over keys overflow float16", "  # why not").replace(
        '"""Two 3x3 convolutions. [EVS, stem]"""', '"""Two of them."""\n'
    )
    same = '"""Another header."""' + same[same.index('"""', 3) + 3 :].replace("import torch\n", "import torch\n\n", 1)
    other = source.replace("return x + self.main(x) if", "return x - self.main(x) if")
    assert same != source and other != source
    hashes = [code_hash([text, "b = 1"]) for text in (source, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert code_hash(["a = 1\n", "b = 1"]) != code_hash(["a = 1\n", "b = 2"])


def test_the_code_of_a_model_is_that_of_its_encoder_too(monkeypatch):
    before = engines.network_sources("proposed")
    monkeypatch.setitem(segment.MODELS, "tiny", segment.Architecture(__name__, "TinyEncoder", Path, False))
    assert set(engines.network_sources("tiny")) - set(before) == {Path(__file__).read_text(encoding="utf-8")}


def test_a_probe_is_the_same_each_time_and_sees_edits_of_encoder_and_decoder(monkeypatch):
    monkeypatch.setitem(segment.MODELS, "tiny", segment.Architecture(__name__, "TinyEncoder", Path, False))
    state = torch.random.get_rng_state()
    first, second = probe("tiny"), probe("tiny")
    assert first == second and not probes_differ(first, second)
    assert {part: len(values) for part, values in first.items()} == {"embedding": 1024, "logits": 2048, "iou": 2}
    assert all(np.std(values) > 1e-3 for values in first.values()), "values that say something"
    assert torch.equal(torch.random.get_rng_state(), state)
    for part, edited in (
        (TinyEncoder, lambda self, image: 1.1 * plain_tiny(self, image)),
        (model.MaskDecoder, lambda self, *p: (1.01 * plain_decoder(self, *p)[0], plain_decoder(self, *p)[1])),
        (model.MaskDecoder, lambda self, *p: (plain_decoder(self, *p)[0], plain_decoder(self, *p)[1] + 0.01)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(part, "forward", edited)
            assert probes_differ(probe("tiny"), first)
    assert probes_differ(first, {}) and probes_differ(first, {part: first[part] for part in ("embedding", "logits")})
