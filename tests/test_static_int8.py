"""static_int8.py and 03_quantize.py --method static: which images calibrate, what int8 reaches, files that step 4 reads."""

import importlib
import importlib.util

import numpy as np
import pytest

from cache import CacheEntry
from model import build_model
from openvino_engine import encoder_graph
from phantoms import tiny_case, write_case, write_training_case
from quantize import count_macs
from readers import boxes_from_labels
from segment import load_segmenter
from static_int8 import COUNTED, calibration_entries, graph_macs

script = importlib.import_module("03_quantize")
preprocess = importlib.import_module("01_preprocess")
packages = all(importlib.util.find_spec(name) for name in ("openvino", "nncf"))
needs_packages = pytest.mark.skipif(not packages, reason="optional packages: pip install -r requirements-fast.txt")


def entry(name, modality, split="train"):
    return CacheEntry(name, modality, modality, name, name, 256, 256, split, 1)


def test_every_modality_calibrates_with_as_many_images_and_no_validation_image_does():
    entries = [entry(f"ct{i}", "CT") for i in range(9)] + [entry(f"us{i}", "US") for i in range(2)]
    entries += [entry("mr0", "MR", "val")]
    chosen = calibration_entries(entries, 8)
    assert [e.modality for e in chosen].count("CT") == 4 == [e.modality for e in chosen].count("US")
    assert len({e.name for e in chosen if e.modality == "CT"}) == 4 and chosen == calibration_entries(entries, 8)
    assert calibration_entries([entry("mr0", "MR", "val")], 8) == []


@needs_packages
def test_a_graph_has_the_multiply_adds_that_hooks_count():
    network = build_model().eval()
    nodes = encoder_graph(network.image_encoder).get_ops()
    found = sum(graph_macs(node) for node in nodes if node.get_type_name() in COUNTED)
    wanted = sum(n for (part, _), n in count_macs(network).items() if part == "encoder")
    assert found == pytest.approx(wanted, rel=1e-3)


@needs_packages
def test_the_script_writes_files_that_step_4_reads(tmp_path):
    case = tiny_case()
    write_training_case(tmp_path / "train", case)
    write_case(tmp_path, case)
    preprocess.main(["-i", str(tmp_path / "train"), "-o", str(tmp_path / "cache")])
    out = tmp_path / "lite.static.xml"
    arguments = ["--method", "static", "--cache", str(tmp_path / "cache"), "--calibration", "2", "--repeats", "1"]
    arguments += ["-i", str(tmp_path / "imgs"), "-o", str(out), "--engine-cache", str(tmp_path / "engine")]
    report = script.main(arguments)
    assert 0.4 < report["weights"]["share"] < 0.7 and report["mac_share"]["encoder"] > 0.9
    assert report["mac_share"]["decoder"] == 0
    assert 0.2 < report["bytes"]["int8"] / report["bytes"]["float"] < 0.75 and out.with_suffix(".md").is_file()
    found = load_segmenter("baseline", out, engine="openvino-int8", engine_cache=tmp_path / "engine")
    want = load_segmenter("baseline")
    boxes = np.repeat(boxes_from_labels(case.labels)[1], 4, axis=0)  # eight: a chunk of six and one of two
    masks = [one.segment_image(case.image, boxes) > 0 for one in (found, want)]
    assert masks[1].any() and (masks[0] != masks[1]).mean() < 0.02


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
