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
from openvino_engine import decoder_file, graphs_of, load_static, save_static
from phantoms import tiny_case
from presets import PRESETS
from readers import InputError, boxes_from_labels
from segment import load_segmenter
from weights import OUR_CHECKPOINT, lite_medsam_path

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


def five_boxes():
    """An image and five boxes: one chunk and a rest."""
    case = tiny_case()
    box = boxes_from_labels(case.labels)[1][:1]
    return case.image, box + np.arange(5)[:, None] * np.array([1, 0, 1, 0])


@needs_openvino
@pytest.mark.parametrize("model", ["baseline", pytest.param("proposed", marks=needs_weights)])
def test_masks_are_pytorchs_and_the_graphs_are_made_once(model, cache, monkeypatch):
    image, boxes = five_boxes()
    want = load_segmenter(model).segment_image(image, boxes)
    found = load_segmenter(model, engine="openvino", engine_cache=cache)
    assert want.any() and (found.segment_image(image, boxes) != want).mean() < 1e-4
    monkeypatch.setattr(openvino_engine, "graphs_of", lambda network: pytest.fail("converted again"))
    again = load_segmenter(model, engine="openvino", engine_cache=cache)
    assert np.array_equal(again.segment_image(image, boxes), found.segment_image(image, boxes))
    assert again.preset == found.preset


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """A file of random weights in the form of a static network. What is in it does not matter to the reader."""
    path = tmp_path_factory.mktemp("static") / "ours.static.xml"
    graphs = graphs_of(build_model())
    save_static(path, graphs["encoder"], graphs["decoder"], {"architecture": "proposed", "preset": "paper"})
    return path


@needs_openvino
def test_a_static_file_brings_its_preset_and_says_whose_it_is(static, cache):
    segmenter = load_segmenter("proposed", static, engine="openvino-int8", engine_cache=cache)
    assert segmenter.preset == PRESETS["paper"] and segmenter.enhanced
    image, boxes = five_boxes()
    assert segmenter.segment_image(image, boxes).shape == image.shape[:2]
    with pytest.raises(InputError, match="trained with preset paper, not fixed"):
        load_segmenter("proposed", static, "fixed", "openvino-int8", engine_cache=cache)


@needs_openvino
def test_bad_files_are_told_in_one_sentence(static, cache, tmp_path):
    (tmp_path / "cut.static.xml").write_text("<?xml version")
    for name in ("cut.static.bin", "cut.static.decoder.xml", "cut.static.decoder.bin"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "alone.static.xml").write_bytes(static.read_bytes())
    (tmp_path / "alone.static.bin").write_bytes(b"")
    for path, architecture, message in (
        (static, "baseline", "is the proposed model, not baseline"),
        (Path("best.pt"), "proposed", "is no static int8 network"),
        (tmp_path / "none.static.xml", "proposed", "no such file; make it with"),
        (tmp_path / "alone.static.xml", "proposed", "decoder.xml: no such file"),
        (tmp_path / "cut.static.xml", "proposed", "no complete static network"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_static(path, architecture, cache)
        assert "\n" not in str(error.value)
    assert decoder_file(static).is_file()


def test_pytorchs_engines_refuse_a_graph():
    with pytest.raises(InputError, match="add --engine openvino-int8"):
        load_segmenter("proposed", Path("ours.static.xml"))
    with pytest.raises(InputError, match="is no static int8|not installed"):
        load_segmenter("baseline", lite_medsam_path(), engine="openvino-int8")


@needs_openvino
def test_zeros_instead_of_an_answer_stop_the_run(static, cache):
    model, _ = load_static(static, "proposed", cache)
    model.decoder = lambda inputs: [np.zeros((4, 1, 256, 256), np.float32), np.zeros((4, 1), np.float32)]
    with pytest.raises(InputError, match="zeros only for 4 boxes"):
        model.decode(torch.zeros(1, 256, 64, 64), torch.zeros(4, 4))
