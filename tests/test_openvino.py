"""openvino_engine.py: the same masks as PyTorch's, graphs that are made once, and one sentence for all that is missing.

The package is optional; without it only the first test runs.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import openvino_engine
from model import build_model
from openvino_engine import encoder_graph, load_static, rest_file, save_static
from phantoms import tiny_case
from presets import PRESETS
from readers import InputError, boxes_from_labels
from segment import load_segmenter
from weights import OUR_CHECKPOINT, lite_medsam_path, read_checkpoint, save_checkpoint

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is optional: pip install -r requirements-fast.txt"
)
needs_weights = pytest.mark.skipif(not OUR_CHECKPOINT.is_file(), reason=f"needs {OUR_CHECKPOINT.name}")


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for engine in ("openvino", "openvino-int8"):
        with pytest.raises(InputError, match=r"^OpenVINO is not installed.*requirements-fast\.txt$"):
            load_segmenter("baseline", engine=engine)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("engine_cache")


def eight_boxes():
    """An image and eight boxes: one chunk and a rest."""
    case = tiny_case()
    box = boxes_from_labels(case.labels)[1][:1]
    return case.image, box + np.arange(8)[:, None] * np.array([1, 0, 1, 0])


@needs_openvino
@pytest.mark.parametrize("model", ["baseline", pytest.param("proposed", marks=needs_weights)])
def test_masks_are_pytorchs_and_the_graph_is_made_once(model, cache, monkeypatch):
    image, boxes = eight_boxes()
    want = load_segmenter(model).segment_image(image, boxes)
    found = load_segmenter(model, engine="openvino", engine_cache=cache)
    assert want.any() and (found.segment_image(image, boxes) != want).mean() < 1e-4
    monkeypatch.setattr(openvino_engine, "encoder_graph", lambda encoder: pytest.fail("converted again"))
    again = load_segmenter(model, engine="openvino", engine_cache=cache)
    assert np.array_equal(again.segment_image(image, boxes), found.segment_image(image, boxes))
    assert again.preset == found.preset


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """A file of random weights in the form of a static network. What is in it does not matter to the reader."""
    path = tmp_path_factory.mktemp("static") / "ours.static.xml"
    network = build_model()
    graph = encoder_graph(network.image_encoder)
    save_static(path, graph, network, {"architecture": "proposed", "preset": "paper"})
    return path


@needs_openvino
def test_a_static_file_brings_its_preset_and_says_whose_it_is(static, cache):
    segmenter = load_segmenter("proposed", static, engine="openvino-int8", engine_cache=cache)
    assert segmenter.preset == PRESETS["paper"] and segmenter.enhanced
    image, boxes = eight_boxes()
    assert segmenter.segment_image(image, boxes).shape == image.shape[:2]
    with pytest.raises(InputError, match="trained with preset paper, not fixed"):
        load_segmenter("proposed", static, "fixed", "openvino-int8", engine_cache=cache)


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
        (static, "baseline", "is the proposed model, not baseline"),
        (Path("best.pt"), "proposed", "is no static int8 network"),
        (tmp_path / "none.static.xml", "proposed", "no such file; make it with"),
        (tmp_path / "alone.static.xml", "proposed", "alone.static.pt: no such file"),
        (tmp_path / "bad.static.xml", "proposed", "bad.static.pt: not a complete checkpoint file"),
        (tmp_path / "whose.static.xml", "proposed", "whose.static.pt: does not say which model it is of"),
        (tmp_path / "cut.static.xml", "proposed", "no complete static network"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_static(path, architecture, cache)
        assert "\n" not in str(error.value)


def test_pytorchs_engines_refuse_a_graph():
    with pytest.raises(InputError, match="add --engine openvino-int8"):
        load_segmenter("proposed", Path("ours.static.xml"))
    with pytest.raises(InputError, match="is no static int8|not installed"):
        load_segmenter("baseline", lite_medsam_path(), engine="openvino-int8")


@needs_openvino
def test_the_encoder_answers_as_pytorchs_for_one_image_and_for_several(cache):
    network = build_model().eval()
    images = torch.rand(2, 3, 256, 256)
    graph = openvino_engine.OpenVINOEncoder
    path = cache / "encoder.xml"
    openvino_engine.import_openvino().save_model(encoder_graph(network.image_encoder), path, compress_to_fp16=False)
    found = graph(path, openvino_engine.last_norm(network.image_encoder)[1], cache)
    with torch.inference_mode():
        wanted = network.image_encoder(images)
    threads = torch.get_num_threads()
    assert torch.allclose(found(images), wanted, atol=1e-3, rtol=1e-3) and found(images[:1]).shape == (1, 256, 64, 64)
    assert torch.get_num_threads() == threads
    first = found(images[:1])
    kept = first.clone()
    found(images[1:])
    assert torch.equal(first, kept), "the next image must not overwrite an embedding"


@needs_openvino
def test_the_rest_of_a_static_network_is_no_checkpoint(static):
    with pytest.raises(InputError, match="weights of another architecture"):
        load_segmenter("proposed", rest_file(static))
