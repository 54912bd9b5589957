"""04_infer.py and segment.load: every file that a run writes, and one sentence for everything that stops it.

Most runs use the stand-in of fake_model.py, which needs no weights; the last test is the real thing.
"""

import csv
import errno
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_model import BrightModel

import segment
from demo_data import tiny_case
from formats import InputError
from formats.case import Case
from formats.npz import load_npz, write_case, write_training_case
from formats.pictures import read_image, read_mask
from formats.writing import save_image, save_npz
from grid import boxes_from_labels, case_rng, loosen_boxes
from metrics import dsc
from model import BoxSegmenter
from presets import PRESETS, override
from segment import Segmenter, load
from tables import with_times

infer = importlib.import_module("04_infer")  # `import 04_infer` is a syntax error
ROOT = Path(__file__).parent.parent


@pytest.fixture
def fake(monkeypatch):
    """04_infer.py with the stand-in for a model."""

    def fake_load(model, weights, preset, engine, force, settings, **options):
        return Segmenter(BrightModel(), override(PRESETS[preset or "fixed"], settings), enhanced=False)

    monkeypatch.setattr("segment.load", fake_load)


def crowd():
    """300 bright squares of 12 x 14 pixels, 20 a row: more objects than 8 bits can number."""
    labels = np.zeros((400, 600), np.uint16)
    for i in range(300):
        y, x = divmod(i, 20)
        labels[5 + 26 * y : 17 + 26 * y, 5 + 29 * x : 19 + 29 * x] = i + 1
    return Case("2DBox_Microscope_crowd", np.where(labels > 0, 220, 20).astype(np.uint8), None, labels, None, False)


def color(case):
    return Case("2DBox_Fundus_color", np.stack([case.image] * 3, -1), None, case.labels, None, False)


@pytest.fixture
def folder(tmp_path):
    """Two good cases in tmp_path/imgs, gray 2D and 3D, their truth in tmp_path/gts."""
    for dims in (2, 3):
        write_case(tmp_path, tiny_case(dims=dims))
    return tmp_path


def run(folder, *more):
    return infer.main(["-i", str(folder / "imgs"), "-o", str(folder / "segs"), *map(str, more)])


def sentence(*args):
    """What main(args) stops with: one line that names the script."""
    with pytest.raises(SystemExit) as stop:
        infer.main([str(arg) for arg in args])
    text = stop.value.code
    assert isinstance(text, str) and text.startswith("04_infer.py: ")
    assert "\n" not in text and "Traceback" not in text and len(text) > 30
    return text


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_of_all_kinds_gets_label_maps_times_and_arguments(fake, folder, capsys):
    cases = [tiny_case(dims=2), tiny_case(dims=3), color(tiny_case(dims=2)), crowd()]
    for case in cases[2:]:
        write_case(folder, case)
    found = run(folder)

    for case in cases:
        stored = load_npz(folder / "segs" / f"{case.name}.npz")
        assert list(stored) == ["segs"]
        segs, objects = stored["segs"], int(case.labels.max())
        assert segs.shape == case.labels.shape
        assert segs.dtype == (np.uint16 if objects == 300 else np.uint8)
        assert np.unique(segs).tolist() == list(range(objects + 1))
        assert np.mean([dsc(segs == i, case.labels == i) for i in range(1, objects + 1)]) > 0.85
    names = [f"{case.name}.npz" for case in cases]
    assert written(folder / "segs") == sorted([*names, "arguments.json", "efficiency.csv", "objects.csv"]), (
        "the challenge asks for no pictures, and its clock is running"
    )

    rows = rows_of(folder / "segs" / "efficiency.csv")
    assert [row["case"] for row in rows] == [row["case"] for row in found] == sorted(names)
    told = {row["case"]: (row["modality"], row["shape"], row["objects"]) for row in rows}
    assert told["2DBox_US_tiny0.npz"] == ("US", "64x80", "2")
    assert told["2DBox_Fundus_color.npz"] == ("Fundus", "64x80x3", "2")
    assert told["3DBox_CT_tiny0.npz"] == ("CT", "6x48x40", "2")
    assert told["2DBox_Microscope_crowd.npz"] == ("Microscopy", "400x600", "300")
    for row, one in zip(rows, found, strict=True):
        parts = [one[f"{stage}_s"] for stage in ("read", "enhance", "encode", "decode", "upsample", "write")]
        assert min(parts) >= 0 and 0 < sum(parts) <= one["total_s"]  # stages are of this case alone, not summed up
        assert one["encode_s"] > 0 and one["decode_s"] > 0
        assert float(row["total_s"]) == pytest.approx(one["total_s"], abs=1e-4)

    saved = json.loads((folder / "segs" / "arguments.json").read_text())
    assert (saved["input"], saved["model"]) == (str(folder / "imgs"), "proposed")
    assert saved["preset_fields"]["name"] == "fixed"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("04_infer.py: 4 cases, 306 objects in ") and "Next: python 05_evaluate.py" in last


def test_times_are_read_by_the_next_step_also_with_a_comma_in_a_name(fake, tmp_path):
    case = tiny_case(dims=2)
    write_case(tmp_path, replace(case, name="US_a, b"))
    (one,) = run(tmp_path)
    (row,) = with_times([{"system": "ours", "case": "US_a, b.npz"}], {"ours": tmp_path / "segs"})
    assert row["seconds"] == pytest.approx(one["total_s"], abs=1e-4) and row["boxes_are"] == "exact"


def test_a_folder_of_pictures_gets_pictures_with_masks_and_boxes_and_so_does_one_case_of_any_kind(fake, folder):
    two_squares(folder / "scans" / "a.png")
    (folder / "scans" / "boxes.csv").write_text("file,x0,y0,x1,y1\na.png,12,10,31,29\n")
    infer.main(["-i", str(folder / "scans"), "-o", str(folder / "one")])
    case = folder / "imgs" / "3DBox_CT_tiny0.npz"
    infer.main(["-i", str(case), "-o", str(folder / "two")])
    for place in (folder / "one" / "overlays" / "a.png", folder / "two" / "3DBox_CT_tiny0_overlay.png"):
        picture = read_image(place)
        assert picture.ndim == 3 and max(picture.shape[:2]) >= 400, "small ones are enlarged"
        assert (picture == (255, 221, 0)).all(axis=-1).any(), "boxes are yellow"


def test_bad_cases_are_told_and_the_others_are_done(fake, folder, capsys):
    image = np.full((20, 30), 9, np.uint8)
    (folder / "imgs" / "2DBox_CT_cut.npz").write_bytes((folder / "imgs" / "2DBox_US_tiny0.npz").read_bytes()[:300])
    save_npz(folder / "imgs" / "2DBox_CT_outside.npz", imgs=image, boxes=np.array([[5, 5, 40, 10]]))
    save_npz(folder / "imgs" / "2DBox_US_train.npz", imgs=image, gts=image)
    text = sentence("-i", folder / "imgs", "-o", folder / "segs")
    assert text == "04_infer.py: 2 of 5 cases done, 3 left out as told above."
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    words = ("truncated", "outside the image", "has no boxes (in .npz the key 'boxes'); give --box X0 Y0 X1 Y1,")
    for line, name, word in zip(told, ("2DBox_CT_cut", "2DBox_CT_outside", "2DBox_US_train"), words, strict=True):
        assert line.startswith("04_infer.py: left out: ") and f"{name}.npz: " in line and word in line
    good = ["2DBox_US_tiny0.npz", "3DBox_CT_tiny0.npz"]
    assert written(folder / "segs") == [*good, "arguments.json", "efficiency.csv", "objects.csv"]
    assert [row["case"] for row in rows_of(folder / "segs" / "efficiency.csv")] == good


def test_if_every_case_is_bad_nothing_is_written(fake, tmp_path):
    save_npz(tmp_path / "imgs" / "a.npz", boxes=np.zeros((1, 4)))
    assert "0 of 1 cases done, 1 left out" in sentence("-i", tmp_path / "imgs", "-o", tmp_path / "segs")
    assert written(tmp_path) == ["imgs/a.npz"]


def test_a_folder_without_boxes_is_done_with_boxes_from_masks(fake, tmp_path):
    case = tiny_case(dims=3)
    save_npz(tmp_path / "imgs" / "CT_AMOS_a.npz", imgs=case.image, gts=case.labels, spacing=np.array([1.0, 1.0, 3.0]))
    assert "0 of 1 cases done" in sentence("-i", tmp_path / "imgs", "-o", tmp_path / "segs")
    run(tmp_path, "--boxes-from-masks")
    exact = load_npz(tmp_path / "segs" / "CT_AMOS_a.npz")["segs"]
    write_case(tmp_path / "other", case)  # the same boxes, stored
    run(tmp_path / "other")
    assert np.array_equal(exact, load_npz(tmp_path / "other" / "segs" / f"{case.name}.npz")["segs"])
    save_npz(tmp_path / "imgs" / "b.npz", imgs=case.image[0], boxes=np.array([[1, 1, 9, 9]]))
    text = sentence("-i", tmp_path / "imgs", "-o", tmp_path / "segs", "--boxes-from-masks")
    assert "1 of 2 cases done" in text


def test_loose_boxes_are_those_that_the_reference_of_step_5_gets(fake, tmp_path):
    case = tiny_case()
    save_npz(tmp_path / "imgs" / "US_a.npz", imgs=case.image, gts=case.labels)
    run(tmp_path, "--boxes-from-masks", "0.3")
    loose = load_npz(tmp_path / "segs" / "US_a.npz")["segs"]
    boxes = loosen_boxes(boxes_from_labels(case.labels)[1], 0.3, case_rng("US_a"), *case.labels.shape)
    save_npz(tmp_path / "other" / "imgs" / "US_a.npz", imgs=case.image, boxes=boxes)
    run(tmp_path / "other")
    assert np.array_equal(loose, load_npz(tmp_path / "other" / "segs" / "US_a.npz")["segs"])


def test_boxes_from_masks_keep_labels_that_are_not_counted_from_one(fake, tmp_path):
    case = tiny_case()
    save_npz(tmp_path / "imgs" / "US_a.npz", imgs=case.image, gts=np.array([0, 7, 300], np.uint16)[case.labels])
    run(tmp_path, "--boxes-from-masks")
    assert np.unique(load_npz(tmp_path / "segs" / "US_a.npz")["segs"]).tolist() == [0, 7, 300]


def two_squares(path):
    """A color image of 60 x 90 pixels with two bright squares."""
    image = np.full((60, 90, 3), 30, np.uint8)
    image[10:30, 12:32], image[35:55, 50:70] = (230, 200, 210), (250, 220, 230)
    save_image(path, image)


BOXES = ["--box", 12, 10, 31, 29, "--box", 50, 35, 69, 54]


def test_one_image_with_two_boxes_gives_mask_overlay_and_label_map(fake, tmp_path, capsys):
    two_squares(tmp_path / "scan é.png")
    (row,) = infer.main([str(a) for a in ["-i", tmp_path / "scan é.png", "-o", tmp_path / "out" / "new", *BOXES]])
    assert row["objects"] == 2 and row["encode_s"] > 0
    out = tmp_path / "out" / "new"
    assert written(out) == [
        "arguments.json", "efficiency.csv", "objects.csv", "scan é.npz", "scan é_mask.png", "scan é_overlay.png",
    ]  # fmt: skip
    segs, mask = load_npz(out / "scan é.npz")["segs"], read_mask(out / "scan é_mask.png")
    truth = np.zeros((60, 90), int)
    truth[10:30, 12:32], truth[35:55, 50:70] = 1, 2
    assert segs.shape == (60, 90) and dsc(segs == 1, truth == 1) > 0.9 and dsc(segs == 2, truth == 2) > 0.9
    assert mask.shape == (60, 90) and np.array_equal(mask, segs)  # objects stay apart
    assert read_image(out / "scan é_overlay.png").shape == (360, 540, 3)  # 6 times as large
    assert json.loads((out / "arguments.json").read_text())["box"] == [[12, 10, 31, 29], [50, 35, 69, 54]]
    told, rows = capsys.readouterr().out, rows_of(out / "objects.csv")
    for number, row in enumerate(rows, start=1):
        pixels = np.count_nonzero(segs == number)
        assert f"object {number}: {pixels} pixels, predicted IoU {row['predicted_iou']}" in told
        assert (row["case"], row["label"], row["pixels"], row["note"]) == ("scan é.npz", str(number), str(pixels), "")
    assert [row["box"] for row in rows] == ["12 10 31 29", "50 35 69 54"]


def test_where_boxes_come_from_says_how_they_were_made_and_a_flag_overrides(fake, tmp_path, capsys):
    two_squares(tmp_path / "a.png")
    write_case(tmp_path, tiny_case())
    one, folder, out, labelled = tmp_path / "a.png", tmp_path / "imgs", tmp_path / "out", tmp_path / "labelled"
    write_training_case(labelled, tiny_case())

    def kinds_of(*arguments):
        infer.main([str(a) for a in ("-o", out, *arguments)])
        told = capsys.readouterr().out
        (kind,) = {row["boxes_are"] for row in rows_of(out / "objects.csv")}
        assert f" boxes {kind}" in told and (" (asked as exact)" in told) == (kind == "drawn")  # the fake has one
        return kind

    assert kinds_of("-i", one, *BOXES) == "drawn"
    assert kinds_of("-i", folder) == "exact", "the challenge's files"
    assert kinds_of("-i", labelled, "--boxes-from-masks") == "exact"
    assert kinds_of("-i", labelled, "--boxes-from-masks", 0.2) == "drawn"
    assert kinds_of("-i", one, *BOXES, "--boxes", "exact") == "exact"
    assert kinds_of("-i", folder, "--boxes", "drawn") == "drawn"
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\na.png,12,10,31,29\n")
    assert kinds_of("-i", one) == "drawn", "boxes.csv"
    assert "boxes 'loose': no such kind; choose one of exact, drawn" in sentence("-i", one, "--boxes", "loose")


def test_an_image_that_cannot_be_used_writes_nothing(fake, tmp_path):
    two_squares(tmp_path / "scan.png")
    (tmp_path / "text.png").write_text("no image")
    save_image(tmp_path / "deep.png", np.full((60, 90), 40_000, np.uint16))
    before = written(tmp_path)
    for name, box, words in (
        ("scan.png", [12, 10, 91, 29], "outside the image of size [90 60]"),
        ("scan.png", [31, 10, 12, 29], "swapped"),
        ("scan.png", ["nan", 10, 12, 29], "finite numbers"),
        ("text.png", [1, 1, 9, 9], "not an image that OpenCV can read"),
        ("deep.png", [1, 1, 9, 9], "every value is 40000, so there is nothing to see"),
        ("scan.png", [1, 1, 0, 9, 9, 0], "shape (1, 6), expected (N, 4)"),
        ("missing.png", [1, 1, 9, 9], "no such file"),
    ):
        assert words in sentence("-i", tmp_path / name, "-o", tmp_path / "out", "--box", *box)
    assert "has no boxes" in sentence("-i", tmp_path / "scan.png", "-o", tmp_path / "out")
    assert "the same folder" in sentence("-i", tmp_path / "scan.png", "-o", tmp_path, *BOXES)
    assert written(tmp_path) == before


def test_input_and_output_must_differ_also_by_another_name(fake, folder):
    before = (folder / "imgs" / "2DBox_US_tiny0.npz").read_bytes()
    for output in (folder / "imgs", folder / "gts" / ".." / "imgs"):
        assert "same folder" in sentence("-i", folder / "imgs", "-o", output)
    assert (folder / "imgs" / "2DBox_US_tiny0.npz").read_bytes() == before
    assert written(folder / "imgs") == ["2DBox_US_tiny0.npz", "3DBox_CT_tiny0.npz"]


def test_missing_and_empty_folders_say_what_to_run(fake, tmp_path):
    text = sentence("-i", tmp_path / "missing", "-o", tmp_path / "out")
    assert "no such folder" in text and "python -m demo_data" in text
    text = sentence("-i", tmp_path, "-o", tmp_path / "out")
    assert "holds no case (.bmp, " in text and "python -m demo_data" in text
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name_are_told_because_one_result_would_replace_the_other(fake, tmp_path):
    for name in ("a.png", "a.bmp"):
        two_squares(tmp_path / "in" / "picture.png")
        (tmp_path / "in" / "picture.png").rename(tmp_path / "in" / name)
    (tmp_path / "in" / "boxes.csv").write_text("file,x0,y0,x1,y1\na.png,12,10,31,29\na.bmp,12,10,31,29\n")
    text = sentence("-i", tmp_path / "in", "-o", tmp_path / "out")
    assert "holds a in 2 formats, and each would give a.npz" in text and not (tmp_path / "out").exists()


def test_box_is_refused_with_a_folder(fake, folder):
    text = sentence("-i", folder / "imgs", "-o", folder / "segs", "--box", 1, 1, 9, 9)
    assert "--box takes one image or volume; 2 are here: name one" in text and not (folder / "segs").exists()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_output_folder_should_be_is_told(fake, folder, below):
    two_squares(folder / "scan.png")
    (folder / "segs").write_text("in the way")
    for args in (["-i", folder / "imgs"], ["-i", folder / "scan.png", *BOXES]):
        assert str(folder / "segs") in sentence(*args, "-o", folder / "segs" / below)
    assert (folder / "segs").read_text() == "in the way"


def test_a_write_that_fails_leaves_no_half_file(fake, folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("formats.writing.os.replace", fail)
    assert "No space left" in sentence("-i", folder / "imgs", "-o", folder / "segs")
    assert written(folder / "segs") == []


def test_the_released_loop_visits_no_slice_of_a_box_of_one_and_no_stage_took_time(fake, tmp_path):
    case = tiny_case(dims=3)
    boxes, path = np.array([[10, 10, 2, 40, 40, 2]]), tmp_path / "imgs" / f"{case.name}.npz"
    save_npz(path, imgs=case.image, boxes=boxes, spacing=np.ones(3))
    (row,) = run(tmp_path, "--preset", "released")
    assert [row[f"{stage}_s"] for stage in ("enhance", "encode", "decode", "upsample")] == [0, 0, 0, 0]
    assert not load_npz(tmp_path / "segs" / path.name)["segs"].any()


def test_fields_override_the_preset_and_are_recorded(fake, folder):
    run(folder, "--preset", "propagation=mended", "iterations=3")
    saved = json.loads((folder / "segs" / "arguments.json").read_text())
    assert (saved["preset_fields"]["propagation"], saved["preset_fields"]["iterations"]) == ("mended", 3)
    assert saved["preset"] == ["propagation=mended", "iterations=3"] and saved["preset_fields"]["name"] == "fixed"
    run(folder, "--preset", "released", "kappa=3")
    saved = json.loads((folder / "segs" / "arguments.json").read_text())
    assert (saved["preset_fields"]["name"], saved["preset_fields"]["kappa"]) == ("released", 3)


@pytest.mark.parametrize(
    "setting, words",
    [
        ("nonsense=1", "no such field; the fields are conductance"),
        ("name=paper", "no such field"),
        ("overlap=first", "overlap is one of logit, last"),
        ("iterations=ten", "iterations takes a number"),
        ("kappa", "--preset kappa: give one of fixed, paper, released, FIELD=VALUE, or both"),
    ],
)
def test_a_bad_setting_is_refused(fake, folder, setting, words):
    assert words in sentence("-i", folder / "imgs", "-o", folder / "segs", "--preset", setting)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--preset", "best"], "--preset best: give one of fixed, paper, released"),
        (["--preset", "fixed", "paper"], "give one of fixed, paper, released"),
        (["--model", "sam"], "sam"),
        (["--engine", "abacus"], "engine 'abacus': unknown; choose one of torch"),
        (["--read", "window=liver"], "window 'liver' is not known; give soft, lung, brain, bone, percentile, or WIDTH"),
        (["--read", "smallest=20"], "--read smallest=20: give KEY=VALUE; the keys are window"),
        (["--boxes-from-masks", "-0.1"], "a looseness is 0 or more"),
    ],
)
def test_wrong_values_are_told_in_one_sentence(folder, args, words):
    assert words in sentence("-i", folder / "imgs", "-o", folder / "segs", *args)
    assert not (folder / "segs").exists()


def test_boxes_of_another_length_are_told(fake, tmp_path):
    two_squares(tmp_path / "scan.png")
    start = ["-i", tmp_path / "scan.png", "-o", tmp_path / "out", "--box", 1, 2, 3]
    assert "'boxes' has shape (1, 3), expected (N, 4) for this image" in sentence(*start)
    assert "--box: give 4 numbers for each" in sentence(*start, 4, "--box", 1, 2, 0, 3, 4, 0)


def test_boxes_are_said_in_one_way_and_an_input_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        infer.main(["-i", "x", "--box", "1", "2", "3", "4", "--page"])
    assert stop.value.code == 2 and "not allowed with argument --box" in capsys.readouterr().err
    for other in (["--box", 1, 2, 3, 4], ["--page"]):
        assert f"not allowed with argument {other[0]}" in sentence("-i", "x", *other, "--boxes-from-masks")
    assert "name the input: -i FOLDER" in sentence()


def test_a_broken_boxes_csv_stops_only_who_needs_it(fake, tmp_path):
    two_squares(tmp_path / "scan.png")
    save_image(tmp_path / "scan_mask.png", np.kron([[0, 1, 0], [0, 2, 0]], np.ones((30, 30))).astype(np.uint8))
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1\n")
    assert "has no column y1" in sentence("-i", tmp_path / "scan.png", "-o", tmp_path / "out")
    assert "has no column y1" in sentence("-i", tmp_path, "-o", tmp_path / "out")
    infer.main([str(arg) for arg in ["-i", tmp_path / "scan.png", "-o", tmp_path / "out", *BOXES]])
    for source in (tmp_path / "scan.png", tmp_path):
        infer.main(["-i", str(source), "-o", str(tmp_path / "out" / "masks"), "--boxes-from-masks"])
    assert (tmp_path / "out" / "masks" / "overlays" / "scan.png").is_file()


# --- segment.load ---


@pytest.fixture
def small(monkeypatch, tmp_path):
    """In place of the proposed model its decoder alone, and its checkpoint, trained with preset `released`."""
    build = segment.build
    monkeypatch.setattr(
        segment,
        "build",
        lambda name, kinds: BoxSegmenter(torch.nn.Identity(), kinds) if name == "proposed" else build(name),
    )
    torch.save({"model": segment.build("proposed", ()).state_dict(), "preset": "released"}, tmp_path / "small.pt")
    return tmp_path / "small.pt"


def test_the_proposed_model_comes_with_its_weights_and_the_preset_it_was_trained_with(tmp_path):
    network = segment.build("proposed")
    torch.save({"model": network.state_dict(), "preset": "released", "step": 7}, tmp_path / "last.pt")
    found = load("proposed", tmp_path / "last.pt")
    assert found.preset == PRESETS["released"] and found.enhanced and not found.engine.network.training
    name, value = next(iter(network.state_dict().items()))
    assert torch.equal(found.engine.network.state_dict()[name], value)
    with pytest.raises(InputError, match="weights of another architecture"):
        load("baseline", tmp_path / "last.pt")
    (tmp_path / "last.pt").unlink()  # 140 MB


def test_the_baseline_is_raw_and_fixed_by_default():
    found = load("baseline")
    assert (found.preset.name, found.enhanced, found.engine.network.training) == ("fixed", False, False)


def test_another_preset_than_the_checkpoints_needs_force(small, folder):
    start = ["-i", folder / "imgs", "-o", folder / "segs", "--model", small, "--preset", "fixed"]
    assert "trained with preset released, not fixed; leave out --preset, or add " in sentence(*start)
    assert load("proposed", small, "released").preset.name == "released"
    assert load("proposed", small, "fixed", force=True).preset.name == "fixed"


def test_a_bare_state_dict_takes_the_preset_asked_for(small):
    torch.save(segment.build("proposed", ()).state_dict(), small)
    assert load("proposed", small).preset.name == "fixed"
    assert load("proposed", small, "paper").preset.name == "paper"


def test_without_weights_the_proposed_model_takes_the_checkpoint_beside_the_code(small, monkeypatch):
    monkeypatch.setattr("formats.checkpoints.OUR_CHECKPOINT", small)
    assert load("proposed").preset.name == "released"
    with pytest.raises(InputError, match=r"small\.pt: trained with preset released, not fixed"):
        load("proposed", None, "fixed")


def test_weights_that_cannot_be_used_are_told(small, folder, monkeypatch):
    monkeypatch.setattr("formats.checkpoints.OUR_CHECKPOINT", folder / "none.pt")
    start = ["-i", folder / "imgs", "-o", folder / "segs"]
    text = sentence(*start)
    assert "has no weights yet" in text and "none.pt" in text, "proposed is the default, and nothing takes its place"
    assert "no such checkpoint" in sentence(*start, "--model", folder / "missing.pt")
    small.write_bytes(small.read_bytes()[:200])
    assert str(small) in sentence(*start, "--model", small)
    assert not (folder / "segs").exists()


def test_an_unknown_engine_is_refused():
    with pytest.raises(InputError, match="engine 'abacus': unknown; choose one of torch"):
        load("baseline", engine="abacus")


def test_what_the_flags_say_reaches_the_loader(folder, monkeypatch, capsys):
    seen = []

    def fake_load(*args, **options):
        seen.append((args, options))
        return Segmenter(BrightModel(), PRESETS["released"], enhanced=False)

    monkeypatch.setattr("segment.load", fake_load)
    run(
        folder,
        "--model",
        "a.pt",
        "--preset",
        "released",
        "kappa=3",
        "force=yes",
        "--engine",
        "openvino",
        "precision=f32",
    )
    assert seen == [(("a.pt", None, "released", "openvino", True, ["kappa=3"]), {"precision": "f32"})], "loaded once"
    assert capsys.readouterr().out.startswith("04_infer.py: a.pt, preset released, engine openvino\n")


def test_without_pytorch_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for module in ("model", "efficientvit", "quantize"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    text = sentence("-i", folder / "imgs", "-o", folder / "segs")
    assert "PyTorch is not installed; run: pip install -r requirements.txt" in text


def test_smoke_runs_the_real_model_and_leaves_nothing_behind(tmp_path):
    command = [sys.executable, str(ROOT / "04_infer.py"), "--smoke", "--model", "baseline"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, last = done.stdout.splitlines()
    assert first == "04_infer.py: baseline, preset fixed, engine torch"
    assert last.startswith("04_infer.py: 2 cases, 4 objects in ")
    assert last.endswith("results removed again. Next: python 05_evaluate.py --smoke")
    assert not list(tmp_path.iterdir())


def test_starting_up_loads_nothing_that_a_case_does_not_need():
    code = "import importlib, sys; importlib.import_module('04_infer'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {
        "matplotlib",
        "skimage",
        "scipy",
        "pydicom",
        "demo_data",
        "openvino",
        "nncf",
        "torch",
        "engines",
    } & set(loaded.split())
