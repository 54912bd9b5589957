"""fast/openvino_engine.py, fast/static_int8.py, 03_quantize.py --method static: the same masks as PyTorch's, graphs that
are made once for each code, and one sentence for all that is missing or edited.

The packages are optional; without them only a few tests run.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import efficientvit
import model
import segment
from data import CacheEntry
from fast import engines, openvino_engine
from fast.counts import count_macs
from fast.openvino_engine import OpenVINOEncoder, last_norm, load_static, rest_file, save_static
from fast.static_int8 import COUNTED, calibration_entries, graph_macs
from files import InputError
from files.checkpoints import OUR_CHECKPOINT, lite_medsam_path, read_checkpoint, save_checkpoint
from files.npz import write_case, write_training_case
from grid import boxes_from_labels
from phantoms import tiny_case
from presets import PRESETS

script = importlib.import_module("03_quantize")
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is optional: pip install -r requirements-fast.txt"
)
needs_both = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("openvino", "nncf")),
    reason="optional packages: pip install -r requirements-fast.txt",
)
needs_weights = pytest.mark.skipif(not OUR_CHECKPOINT.is_file(), reason=f"needs {OUR_CHECKPOINT.name}")


class TinyEncoder(nn.Module):
    """A network that is quick to convert."""

    def __init__(self):
        super().__init__()
        self.patch = efficientvit.ConvNorm(3, 256, 5, stride=4)
        self.norm = efficientvit.LayerNorm2d(256)

    def forward(self, image):
        return self.norm(self.patch(image))


plain_tiny, plain_decoder = TinyEncoder.forward, model.MaskDecoder.forward


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The model "tiny" in segment.MODELS, with random weights in a checkpoint. -> its path"""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(segment.MODELS, "tiny", segment.Architecture(__name__, "TinyEncoder", lambda: path, True))
        torch.manual_seed(0)
        save_checkpoint(path, {"model": segment.build("tiny").state_dict(), "preset": "paper"})
        yield path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("engine_cache")


@pytest.fixture(scope="module")
def static(tiny, tmp_path_factory):
    """A file in the form of a static network, its layers float. What is in it does not matter to the reader."""
    path = tmp_path_factory.mktemp("static") / "ours.static.xml"
    network = segment.load("tiny").engine.network
    info = {"architecture": "tiny", "preset": "paper"} | engines.code_info("tiny")
    save_static(path, engines.folded_graph(network.image_encoder), network, info)
    return path


def eight_boxes():
    """An image and eight boxes: one chunk and a rest."""
    case = tiny_case()
    box = boxes_from_labels(case.labels)[1][:1]
    return case.image, box + np.arange(8)[:, None] * np.array([1, 0, 1, 0])


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for engine in ("openvino", "openvino-int8"):
        with pytest.raises(InputError, match=r"^OpenVINO is not installed.*requirements-fast\.txt$"):
            engines.load("tiny", Path("ours.static.xml") if "int8" in engine else None, engine=engine)


# ---------------------------------------------------------------- openvino


@needs_openvino
@needs_weights
def test_masks_are_pytorchs_and_the_graph_is_made_once(cache, monkeypatch):
    image, boxes = eight_boxes()
    want = segment.load("proposed").segment_image(image, boxes)
    found = engines.load("proposed", engine="openvino", cache=cache)
    assert want.any() and (found.segment_image(image, boxes) != want).mean() < 1e-4
    monkeypatch.setattr(engines, "encoder_graph", lambda encoder: pytest.fail("converted again"))
    again = engines.load("proposed", engine="openvino", cache=cache)
    assert np.array_equal(again.segment_image(image, boxes), found.segment_image(image, boxes))
    assert again.preset == found.preset


@needs_openvino
def test_the_proposed_encoder_as_a_graph_answers_as_pytorchs_and_has_the_multiply_adds_that_hooks_count():
    network = segment.build("proposed").eval()
    images = torch.rand(2, 1, 3, 256, 256)
    graph = engines.folded_graph(network.image_encoder)
    found = sum(graph_macs(node) for node in graph.get_ops() if node.get_type_name() in COUNTED)
    wanted = sum(n for (part, _), n in count_macs(network).items() if part == "encoder")
    assert found == pytest.approx(wanted, rel=1e-3)

    encoder = OpenVINOEncoder(graph, last_norm(network.image_encoder)[1])
    threads = torch.get_num_threads()
    first = encoder(images[0])
    kept = first.clone()
    second = encoder(images[1])
    assert torch.equal(first, kept), "the next image must not overwrite an embedding"
    with torch.inference_mode():
        for image, embedding in zip(images, (first, second), strict=True):
            assert torch.allclose(embedding, network.image_encoder(image), atol=1e-3, rtol=1e-3)
    assert first.shape == (1, 256, 64, 64) and torch.get_num_threads() == threads


@needs_openvino
def test_a_graph_is_made_anew_for_edited_code_and_not_for_an_edited_comment(tiny, tmp_path, monkeypatch):
    def folders():
        engines.load("tiny", engine="openvino", cache=tmp_path)
        return {path.name for path in tmp_path.glob("tiny-*")}

    sources, first = engines.network_sources("tiny"), folders()
    monkeypatch.setattr(engines, "network_sources", lambda name: [*sources[:-1], sources[-1] + "\n# a comment"])
    assert folders() == first and len(first) == 1
    monkeypatch.setattr(engines, "network_sources", lambda name: [*sources[:-1], sources[-1] + "\nNEW = 1"])
    assert len(folders()) == 2
    next(tmp_path.glob("tiny-*/encoder.xml")).write_text("<?xml version")
    with pytest.raises(InputError, match="damaged; delete the folder"):
        for _ in range(2):  # one of the two folders is damaged
            engines.load("tiny", engine="openvino", cache=tmp_path)
            monkeypatch.setattr(engines, "network_sources", lambda name: sources)


@needs_openvino
def test_openvino_follows_an_edit_of_the_encoder_or_refuses_and_keeps_nothing(tiny, tmp_path, monkeypatch):
    image = np.random.default_rng(0).random((3, 256, 256), np.float32)
    before = segment.load("tiny").engine.encode(image)
    edited = lambda self, x: self.act(self.norm(self.conv(x)) + 1)  # noqa: E731
    monkeypatch.setattr(efficientvit.ConvNorm, "forward", edited)
    wanted = segment.load("tiny").engine.encode(image)
    found = engines.load("tiny", engine="openvino", cache=tmp_path / "a").engine.encode(image)
    assert torch.allclose(found, wanted, atol=1e-3) and (wanted - before).norm() > 0.01 * before.norm()

    def unnormed(self, image):
        return self.patch(image) + self.norm.weight[0]  # the norm is not there when the graph is made

    for edited, message in (
        (lambda self, image: 1.1 * plain_tiny(self, image), "its image encoder does not compute what"),
        (lambda self, image: self.norm(torch.linalg.qr(self.patch(image))[0]), "can't convert"),
        (unnormed, "can't convert"),
    ):
        monkeypatch.setattr(TinyEncoder, "forward", edited)
        with pytest.raises(InputError, match=f"^engine openvino: .*{message}.* use --engine torch$") as error:
            engines.load("tiny", engine="openvino", cache=tmp_path / "b")
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("b/*"))


@needs_openvino
@pytest.mark.parametrize("engine", ["openvino", "openvino-int8"])
def test_both_refuse_an_edited_decoder(engine, tiny, static, cache, monkeypatch):
    def louder(self, *prompt, **options):
        logits, iou = plain_decoder(self, *prompt, **options)
        return logits * 1.1, iou

    monkeypatch.setattr(model.MaskDecoder, "forward", louder)
    with pytest.raises(InputError, match=f"^engine {engine}: its mask decoder .* use --engine torch$"):
        engines.load("tiny", static if engine == "openvino-int8" else tiny, engine=engine, cache=cache)


# ---------------------------------------------------------------- static int8 files


@needs_openvino
def test_a_static_file_brings_its_preset_and_says_whose_it_is(static, cache):
    segmenter = engines.load("tiny", static, engine="openvino-int8", cache=cache)
    assert segmenter.preset == PRESETS["paper"] and segmenter.enhanced
    image, boxes = eight_boxes()
    assert segmenter.segment_image(image, boxes).shape == image.shape[:2]
    with pytest.raises(InputError, match="trained with preset paper, not fixed"):
        engines.load("tiny", static, "fixed", "openvino-int8", cache=cache)


@needs_openvino
def test_a_static_file_is_refused_after_an_edit_that_changes_what_the_code_computes(static, cache, monkeypatch):
    def load():
        return engines.load("tiny", static, engine="openvino-int8", cache=cache)

    sources, probe = engines.network_sources("tiny"), engines.probe
    monkeypatch.setattr(engines, "probe", lambda name: pytest.fail("the code is the same: nothing to compare"))
    load()
    monkeypatch.setattr(engines, "network_sources", lambda name: [*sources[:-1], sources[-1] + "\n# a comment"])
    load()
    monkeypatch.setattr(engines, "network_sources", lambda name: [*sources[:-1], sources[-1] + "\nNEW = 1"])
    monkeypatch.setattr(engines, "probe", probe)
    load()  # edited, and yet it computes the same
    swapped = lambda self, x: self.norm(self.act(self.conv(x)))  # noqa: E731
    monkeypatch.setattr(efficientvit.ConvNorm, "forward", swapped)
    with pytest.raises(
        InputError, match="was made before .* was edited.* make it again .* use --engine torch"
    ) as error:
        load()
    assert "\n" not in str(error.value)


@needs_openvino
def test_bad_files_are_told_in_one_sentence(static, cache, tmp_path):
    (tmp_path / "cut.static.xml").write_text("<?xml version")
    (tmp_path / "cut.static.bin").write_bytes(b"")
    (tmp_path / "cut.static.pt").write_bytes(rest_file(static).read_bytes())
    for name in ("alone", "bad", "whose"):
        (tmp_path / f"{name}.static.xml").write_bytes(static.read_bytes())
        (tmp_path / f"{name}.static.bin").write_bytes(b"")
    (tmp_path / "bad.static.pt").write_bytes(rest_file(static).read_bytes()[:5000])
    save_checkpoint(tmp_path / "whose.static.pt", {"model": read_checkpoint(rest_file(static))["model"]})
    for path, architecture, message in (
        (static, "baseline", "is the tiny model, not baseline"),
        (Path("best.pt"), "tiny", "is no static int8 network"),
        (tmp_path / "none.static.xml", "tiny", "no such file; make it with"),
        (tmp_path / "alone.static.xml", "tiny", "alone.static.pt: no such file"),
        (tmp_path / "bad.static.xml", "tiny", "bad.static.pt: not a complete checkpoint file"),
        (tmp_path / "whose.static.xml", "tiny", "whose.static.pt: does not say which model it is of"),
        (tmp_path / "cut.static.xml", "tiny", "no complete static network"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_static(path, architecture, cache)
        assert "\n" not in str(error.value)


@needs_openvino
def test_a_static_file_of_before_says_nothing_of_its_code_and_is_refused(static, cache, tmp_path):
    for ending in (".xml", ".bin"):
        (tmp_path / f"old.static{ending}").write_bytes(static.with_suffix(ending).read_bytes())
    stored = read_checkpoint(rest_file(static))
    save_checkpoint(tmp_path / "old.static.pt", stored | {"static": {"architecture": "tiny"}})
    with pytest.raises(InputError, match="does not say of which code it was made; make it again"):
        engines.load("tiny", tmp_path / "old.static.xml", engine="openvino-int8", cache=cache)


@needs_openvino
def test_the_rest_of_a_static_network_is_no_checkpoint(static):
    with pytest.raises(InputError, match="weights of another architecture"):
        segment.load("tiny", rest_file(static))


def test_other_engines_refuse_a_graph():
    for engine in ("torch", "fast"):
        with pytest.raises(InputError, match="add --engine openvino-int8"):
            engines.load("proposed", Path("ours.static.xml"), engine=engine)
    with pytest.raises(InputError, match="is no static int8|not installed"):
        engines.load("baseline", lite_medsam_path(), engine="openvino-int8")


def test_the_static_file_of_a_model_is_named_after_its_checkpoint(tiny):
    found = [openvino_engine.default_static(name) for name in ("baseline", "proposed", "tiny")]
    assert [path.name for path in found] == [
        "lite_medsam.static.xml",
        "grays_anatomy_sam_l0.static.xml",
        "tiny.static.xml",
    ]
    assert {path.parent for path in found} == {OUR_CHECKPOINT.parent}


# ---------------------------------------------------------------- calibration, and the script


def entry(name, modality, split="train"):
    return CacheEntry(name, modality, modality, name, name, 256, 256, split, 1)


def test_every_modality_calibrates_with_as_many_images_and_no_validation_image_does():
    entries = [entry(f"ct{i}", "CT") for i in range(9)] + [entry(f"us{i}", "US") for i in range(2)]
    entries += [entry("mr0", "MR", "val")]
    chosen = calibration_entries(entries, 8)
    assert [e.modality for e in chosen].count("CT") == 4 == [e.modality for e in chosen].count("US")
    assert len({e.name for e in chosen if e.modality == "CT"}) == 4 and chosen == calibration_entries(entries, 8)
    assert calibration_entries([entry("mr0", "MR", "val")], 8) == []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What the script needs for static int8: flags that name a cache of one image, and one case to score."""
    folder = tmp_path_factory.mktemp("inputs")
    write_training_case(folder / "train", tiny_case())
    write_case(folder, tiny_case())
    importlib.import_module("01_preprocess").main(["-i", str(folder / "train"), "-o", str(folder / "cache")])
    flags = ["--method", "static", "--cache", str(folder / "cache"), "--calibration", "2", "--repeats", "1"]
    return [*flags, "-i", str(folder / "imgs"), "--engine-cache", str(folder / "engine")]


@needs_both
@pytest.mark.long  # NNCF takes half a minute
def test_the_script_writes_files_that_step_4_reads(inputs, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TIMED_BOXES", (1,))
    case, out = tiny_case(), tmp_path / "lite.static.xml"
    report = script.main([*inputs, "-o", str(out)])
    assert 0.4 < report["weights"]["share"] < 0.7 and report["mac_share"]["encoder"] > 0.9
    assert report["mac_share"]["decoder"] == 0
    assert 0.2 < report["bytes"]["int8"] / report["bytes"]["float"] < 0.75 and out.with_suffix(".md").is_file()
    found = engines.load("baseline", out, engine="openvino-int8", cache=cache)
    want = segment.load("baseline")
    boxes = np.repeat(boxes_from_labels(case.labels)[1], 4, axis=0)  # eight: a chunk of six and one of two
    masks = [one.segment_image(case.image, boxes) > 0 for one in (found, want)]
    assert masks[1].any() and (masks[0] != masks[1]).mean() < 0.02


@needs_both
def test_with_named_weights_openvinos_float_graph_is_timed_too(inputs, tiny, monkeypatch):
    monkeypatch.setattr(script, "TIMED_BOXES", (1,))
    report = script.main([*inputs, "--model", "tiny", "--weights", str(tiny)])
    assert set(report["speed"]["encoder, 1 image"]) == {"float", "int8", "openvino", "ratio"}
    assert "float in OpenVINO, ms" in tiny.with_name("tiny.static.md").read_text()
    loaded = engines.load("tiny", tiny.with_name("tiny.static.xml"), engine="openvino-int8")
    assert loaded.preset == PRESETS["paper"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "static"], "name a cache with --cache"),
        (["--method", "static", "-o", "a.pt"], r"ends in \.xml"),
        (["-o", "a.xml"], r"ends in \.pt"),
    ],
)
def test_bad_input_is_told_in_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        script.main(arguments)
