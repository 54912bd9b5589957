"""model.py, efficientvit.py, baseline.py, formats/checkpoints.py: equal to the originals, strict about names, right in batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from filled_weights import filled

from formats import InputError
from formats.checkpoints import lite_medsam_path, load_weights
from model import TorchEngine
from presets import PRESETS
from segment import Segmenter, build

GOLDEN = Path(__file__).parent / "golden"
EVS = np.load(GOLDEN / "efficientvit_sam_l0_golden.npz")
LITE = np.load(GOLDEN / "lite_medsam_golden.npz")


def relative_error(got: torch.Tensor, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.numpy() - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def model():
    layout = json.loads((GOLDEN / "efficientvit_sam_l0_layout.json").read_text())
    net = build("proposed").eval()
    net.load_state_dict({name: filled(name, tuple(shape)) for name, shape in layout}, strict=True)
    return net


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(7).random((2, 3, 256, 256), dtype=np.float32))


@pytest.fixture(scope="module")
def stages_and_embedding(model, images):
    """What the encoder's stages and the encoder give for two images: the stages' (shape, mean of absolute values)."""
    seen = []
    hooks = [
        stage.register_forward_hook(lambda _, __, out: seen.append((tuple(out.shape), float(out.abs().mean()))))
        for stage in model.image_encoder.backbone.stages
    ]
    with torch.inference_mode():
        embedding = model.image_encoder(images)
    for hook in hooks:
        hook.remove()
    return seen, embedding


@pytest.fixture(scope="module")
def embedding(stages_and_embedding):
    return stages_and_embedding[1]


@pytest.fixture(scope="module")
def baseline():
    net = build("baseline").eval()
    load_weights(lite_medsam_path(), net)
    return net


def test_parameter_counts_are_the_papers(model):
    parts = (model, model.image_encoder, model.mask_decoder, model.prompt_encoder)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [34_792_784, 30_728_224, 4_058_340, 6_220]


@pytest.mark.parametrize("name, file", [("proposed", "efficientvit_sam_l0"), ("baseline", "lite_medsam")])
def test_names_and_shapes_are_those_of_the_published_checkpoint(name, file):
    layout = json.loads((GOLDEN / f"{file}_layout.json").read_text())
    state = build(name).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == {name: shape for name, shape in layout}


def test_every_stage_equals_the_original(model, stages_and_embedding):
    stages, _ = stages_and_embedding
    assert len(stages) == len(model.image_encoder.backbone.stages)
    for i, (shape, mean) in enumerate(stages):
        assert shape == tuple(EVS[f"stage{i}_shape"])
        assert mean == pytest.approx(float(EVS[f"stage{i}_abs_mean"]), rel=1e-5)


def test_embedding_equals_the_original(embedding):
    assert relative_error(embedding[:, ::16, ::4, ::4], EVS["embedding_16_4_4"]) < 1e-5


@torch.inference_mode()
def test_box_prompts_equal_the_original(model, embedding):
    logits, iou = model.decode(embedding, torch.from_numpy(EVS["boxes"][:, 0]))  # one box for each image of a batch
    assert relative_error(logits[..., ::8, ::8], EVS["logits_8_8"]) < 1e-5
    assert relative_error(iou, EVS["iou"]) < 1e-5
    logits, iou = model.decode(embedding[:1], torch.from_numpy(EVS["three_boxes"][:, 0]))  # three for one image
    assert relative_error(logits[..., ::8, ::8], EVS["three_box_logits_8_8"]) < 1e-5
    assert relative_error(iou, EVS["three_box_iou"]) < 1e-5


@torch.inference_mode()
def test_position_codes_equal_the_original(model):
    positions = model.prompt_encoder.dense_positions()
    assert relative_error(positions[:, ::8, ::8, ::8], EVS["dense_pe_8_8"]) < 1e-5


@torch.inference_mode()
def test_boxes_of_several_images_in_one_batch_equal_one_by_one(model, embedding):
    boxes = torch.tensor([[10.0, 20, 100, 90], [5, 5, 250, 250], [60.5, 70.25, 90, 200]])
    belongs_to = torch.tensor([1, 0, 1])
    together, iou = model.decode(embedding, boxes, belongs_to)
    for i in range(3):
        alone, iou_alone = model.decode(embedding[belongs_to[i] : belongs_to[i] + 1], boxes[i : i + 1])
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        assert torch.allclose(iou[i : i + 1], iou_alone, atol=1e-5)


def test_one_image_for_all_boxes_equals_one_copy_a_box_and_so_do_its_gradients(model, embedding):
    boxes = torch.tensor([[10.0, 20, 100, 90], [60.5, 70.25, 90, 200]])
    found = {}
    for shared, image_of_box in ((True, None), (False, torch.zeros(2, dtype=torch.int64))):
        one = embedding[:1].clone().requires_grad_()
        logits, iou = model.decode(one, boxes, image_of_box)
        logits.square().mean().backward()
        projection = model.mask_decoder.transformer.layers[0].cross_attn_token_to_image.k_proj.weight
        found[shared] = logits, iou, one.grad, projection.grad.clone()
        model.zero_grad()
    for a, b in zip(found[True], found[False], strict=True):
        assert float(((a - b).norm() / b.norm()).detach()) < 1e-5


@torch.inference_mode()
def test_the_image_is_projected_once_for_all_boxes(model, embedding):
    seen, first = [], model.mask_decoder.transformer.layers[0]
    layers = first.cross_attn_token_to_image.k_proj, first.cross_attn_image_to_token.q_proj
    hooks = [layer.register_forward_hook(lambda _, x, __: seen.append(tuple(x[0].shape))) for layer in layers]
    model.decode(embedding[:1], torch.tensor([[10.0, 20, 100, 90]]).repeat(5, 1))
    for hook in hooks:
        hook.remove()
    assert seen == [(1, 4096, 256)] * 2


@torch.inference_mode()
def test_no_boxes_give_no_masks(model, embedding):
    logits, iou = model.decode(embedding[:1], torch.zeros(0, 4))
    assert logits.shape == (0, 1, 256, 256) and iou.shape == (0, 1)


@torch.inference_mode()
def test_two_images_equal_one_by_one(model, images, embedding):
    for i in range(2):
        assert torch.allclose(model.image_encoder(images[i : i + 1]), embedding[i : i + 1], rtol=1e-4, atol=1e-4)


def test_boxes_that_fit_no_image_are_refused(model, embedding):
    with pytest.raises(ValueError, match="image_of_box"):
        model.decode(embedding, torch.zeros(3, 4))


@torch.inference_mode()
def test_linear_attention_equals_the_quadratic_form():
    from efficientvit import LinearAttention

    torch.manual_seed(0)
    layer = LinearAttention(64).eval()
    x = torch.randn(1, 64, 6, 7)
    qkv = layer.qkv(x)
    qkv = torch.cat([qkv, layer.aggreg[0](qkv)], dim=1).reshape(1, -1, 96, 42)
    q, k, v = qkv.chunk(3, dim=2)
    similarity = k.relu().mT @ q.relu()  # (1, heads, keys, queries): every pair, written out
    slow = v @ (similarity / (similarity.sum(dim=2, keepdim=True) + 1e-15))
    assert torch.allclose(layer(x), layer.proj(slow.reshape(1, -1, 6, 7)), rtol=1e-4, atol=1e-5)


IMAGES = {
    "retina": skimage.data.retina,
    "ihc": skimage.data.immunohistochemistry,
    "cell": skimage.data.cell,
    "camera_wide": lambda: skimage.data.camera()[100:400],
}


@pytest.mark.parametrize("name", IMAGES)
def test_baseline_equals_lite_medsam_on_real_images(baseline, name):
    image, boxes = IMAGES[name](), LITE[f"{name}_boxes"]
    segmenter = Segmenter(TorchEngine(baseline), PRESETS["released"], enhanced=False)
    embedding = segmenter.embed(image)
    assert relative_error(embedding[:, ::16, ::8, ::8], LITE[f"{name}_embedding_16_8_8"]) < 1e-5
    found = segmenter.masks(embedding, boxes, image.shape[:2])
    assert found.iou == pytest.approx(LITE[f"{name}_iou"], abs=1e-4)
    assert (found.labels != LITE[f"{name}_segs"]).mean() <= 0.001


def test_loader_unwraps_the_customary_forms(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    wanted = net.state_dict()
    rest = {"preset": "paper", "step": 3}
    forms = {
        "bare": (wanted, {}),
        "model": ({"model": wanted} | rest, rest),
        "state_dict": ({"state_dict": wanted} | rest, rest),
        "ddp": ({"model": {f"module.{name}": value for name, value in wanted.items()}}, {}),
        "half": ({k: v.half() if v.is_floating_point() else v for k, v in wanted.items()}, {}),
    }
    for form, (stored, extra) in forms.items():
        torch.save(stored, tmp_path / f"{form}.pt")
        fresh = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        assert load_weights(tmp_path / f"{form}.pt", fresh) == extra
        assert torch.allclose(fresh[0].weight, net[0].weight, atol=1e-2 if form == "half" else 0)


def test_loader_refuses_odd_entries_in_a_sentence(tmp_path):
    odd = {"numbered": {0: torch.ones(1)}, "sparse": {"0.weight": torch.eye(3).to_sparse()}, "list": [torch.ones(1)]}
    for name, stored in odd.items():
        torch.save(stored, tmp_path / f"{name}.pt")
        with pytest.raises(InputError, match="state dict"):
            load_weights(tmp_path / f"{name}.pt", torch.nn.Linear(3, 3, bias=False))


def test_loader_refuses_another_architecture_and_says_which_names():
    with pytest.raises(InputError, match=r"another architecture.*missing \(first: image_encoder.*unexpected"):
        load_weights(lite_medsam_path(), build("proposed"))


def test_loader_refuses_damaged_unsafe_and_nan_files(tmp_path):
    good, net = tmp_path / "good.pt", torch.nn.Linear(64, 64)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    torch.save(state, good)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model": Path("x")}, tmp_path / "object.pt")
    state["weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    for name, message in {
        "cut": "cut short", "empty": "cut short|damaged", "object": "plain tensors", "nan": "NaN", "none": "no such",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_weights(tmp_path / f"{name}.pt", net)
    assert load_weights(good, net) == {}
