"""benchmarks/table4.py: the same boxes for everyone, a run that goes on where it stopped, and what it writes.

Most runs use the stand-in of fake_model.py, which needs no weights; the last test is the real thing.
"""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import table4
from fake_model import BrightModel

from files.checkpoints import save_checkpoint
from files.npz import load_npz, write_training_case
from files.writing import save_npz
from grid import case_rng, loosen_boxes
from phantoms import tiny_case
from presets import PRESETS
from segment import Segmenter, build
from tables import score_names


def crowd(count, height, width):
    """Exact boxes (count, 4) anywhere on an image, many of them small or at its border."""
    rng = np.random.default_rng(0)
    low = rng.integers(0, [width - 1, height - 1], size=(count, 2))
    high = np.minimum(low + rng.geometric(0.1, size=(count, 2)), [width - 1, height - 1])
    return np.hstack([low, high]).astype(float)


@pytest.mark.parametrize("height, width", [(256, 256), (120, 90), (700, 1024)])
def test_each_side_moves_at_most_n_pixels_of_the_grid_and_no_box_degenerates(height, width):
    boxes, step = crowd(2000, height, width), max(height, width) / 256
    moved = table4.moved_boxes(boxes, (height, width), 5, np.random.default_rng(1))
    moves = (moved - boxes) / step
    assert np.abs(moves).max() <= 5 + 1e-9
    inside = (moved > 0) & (moved < [width - 1, height - 1] * 2)  # not stopped by the border
    assert np.allclose(moves[inside], np.rint(moves[inside]))
    assert set(np.rint(moves[inside]).astype(int)) == set(range(-5, 6))
    assert (moved >= 0).all() and (moved <= [width - 1, height - 1] * 2).all()
    sides, before = moved[:, 2:] - moved[:, :2], boxes[:, 2:] - boxes[:, :2]
    assert ((sides >= step) | (sides == before)).all() and (sides > 0).all()


def test_in_3d_only_x_and_y_sides_move():
    boxes = np.array([[20.0, 30, 3, 60, 80, 9], [10, 10, 0, 90, 90, 11]])
    moved = table4.moved_boxes(boxes, (12, 100, 128), 5, np.random.default_rng(2))
    assert np.array_equal(moved[:, [2, 5]], boxes[:, [2, 5]])
    assert (moved[:, [0, 1, 3, 4]] != boxes[:, [0, 1, 3, 4]]).any() and np.abs(moved - boxes).max() <= 2.5


def test_loose_boxes_are_a_kind_for_each_share():
    kinds = table4.box_kinds(5, [0.15, 0.3], 2)
    assert list(kinds) == ["exact", "moved-5px-seed2", "loose-15pct-seed2", "loose-30pct-seed2"]
    boxes = np.array([[20.0, 30, 60, 80]])
    found = {kind: changed(boxes, (100, 128), "a") for kind, changed in kinds.items()}
    assert (found["exact"] == boxes).all()
    assert (found["loose-30pct-seed2"] == loosen_boxes(boxes, 0.3, case_rng("a", 2), 100, 128)).all()
    assert found["loose-15pct-seed2"] == pytest.approx((boxes + found["loose-30pct-seed2"]) / 2)  # the same draw


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three cases in tmp_path/val, and the stand-in for all models; `loaded` counts them."""
    for case in (tiny_case(0, 2), tiny_case(1, 2), tiny_case(0, 3)):
        write_training_case(tmp_path / "val", case)
    (tmp_path / "ours.pt").write_bytes(b"weights")
    loaded = []

    def load(model, weights, preset, engine):
        loaded.append((model, weights.name, preset, engine, BrightModel(0.4 if engine == "fast" else 0.41)))
        return Segmenter(loaded[-1][-1], PRESETS[preset], enhanced=False)

    monkeypatch.setattr(table4.engines, "load", load)
    row = table4.segment.MODELS["baseline"]._replace(weights=lambda: tmp_path / "ours.pt")
    monkeypatch.setitem(table4.segment.MODELS, "baseline", row)
    monkeypatch.chdir(tmp_path)
    return tmp_path, loaded


def run(*more):
    return table4.main(["--cases", "val", "--weights", "ours.pt", "-o", "results", *map(str, more)])


def sentence(*more):
    with pytest.raises(SystemExit) as stop:
        run(*more)
    assert str(stop.value.code).startswith("table4.py: ")
    return stop.value.code


def test_all_systems_get_the_same_boxes_and_every_table_is_written(place):
    folder, loaded = place
    rows = run()
    assert [one[:4] for one in loaded] == [
        (model, "ours.pt", "fixed", engine) for model in ("baseline", "proposed") for engine in ("fast", "torch-int8")
    ]
    assert len(rows) == 3 * 6 * 2  # cases, systems and references, kinds of boxes
    # 2D images 1 each, the volume its slices with objects; both kinds of boxes share them
    slices = len(np.unique(np.nonzero(load_npz(folder / "val" / "3D_CT_tiny0.npz")["gts"])[0]))
    assert {one[-1].encoded for one in loaded} == {2 + slices}

    kinds = ("exact", "moved-5px-seed0")
    inputs = [load_npz(folder / "out/table4" / kind / "imgs" / "2D_US_tiny0.npz") for kind in kinds]
    truth = [load_npz(folder / "out/table4" / kind / "gts" / "2D_US_tiny0.npz") for kind in kinds]
    assert not np.array_equal(inputs[0]["boxes"], inputs[1]["boxes"])
    for given, wanted in zip(inputs, truth, strict=True):  # the references are drawn from the boxes of the truth
        assert np.array_equal(given["boxes"], wanted["boxes"])

    with (folder / "results" / "cases.csv").open(newline="") as file:
        cases = list(csv.DictReader(file))
    assert len(cases) == len(rows) and {row["boxes"] for row in cases} == set(kinds)
    filled = [float(row["dsc_strict"]) for row in cases if row["system"] == "filled box" and "2D" in row["case"]]
    assert filled[:2] != filled[2:]
    assert all(row["dsc_strict"] == row["dsc_challenge"] for row in cases)  # as table.md says
    table = (folder / "results" / "table.md").read_text().splitlines()
    header = [cell.strip() for cell in table[4].split("|")[1:-1]]
    assert header[:9] == ["modality", "cases", "objects", *table4.SYSTEMS, "filled box", "inscribed ellipse"]
    assert header[9:] == [f"paper's {name} on its own split" for name in
                          ("Baseline", "Quantized Baseline", "Proposed", "Quantized Proposed")]  # fmt: skip
    assert [line.split("|")[1].strip() for line in table[6:9]] == ["CT", "US", "Average"]
    assert table[7].split("|")[2:4] == [" 2 ", " 4 "] and table[6].endswith("| 72.47 | 72.71 | 84.46 | 84.80 |")
    for name in ("table.md", "differences.md"):  # a line right below a table would become a row of it
        assert not re.search(r"^\|.*\n[^|\n]", (folder / "results" / name).read_text(), re.MULTILINE)
    assert sum(line.startswith("## ") for line in table) == 6 and "not comparable" in table[-1]
    differences = (folder / "results" / "differences.md").read_text()
    assert "## proposed-int8 - proposed, boxes moved-5px-seed0" in differences
    with (folder / "results" / "differences.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 4 * 3 * len(score_names())  # kinds of boxes, pairs, two modalities and the average
    assert all(
        not line["low"] or float(line["low"]) <= float(line["difference"]) <= float(line["high"]) for line in lines
    )
    settings = json.loads((folder / "results" / "settings.json").read_text())
    assert (settings["jitter"], settings["seed"], settings["cases"], settings["preset"]) == (5, 0, 3, "fixed")


def test_a_second_run_computes_nothing_and_writes_the_same(place):
    folder, loaded = place
    run()
    before = {path: path.read_bytes() for path in (folder / "results").iterdir()}
    loaded.clear()
    run()
    assert loaded == []
    assert {path: path.read_bytes() for path in (folder / "results").iterdir()} == before


def test_a_run_goes_on_where_it_was_stopped(place):
    folder, loaded = place
    rows = run("--systems", "baseline")
    next(folder.glob("out/table4/segs/baseline-*/exact/2D_US_tiny1.npz")).unlink()
    next(folder.glob("out/table4/segs/baseline-*/moved*/2D_US_tiny0.npz")).unlink()
    loaded.clear()
    assert run("--systems", "baseline") == rows
    assert [one[-1].encoded for one in loaded] == [2]


def test_other_weights_images_or_boxes_are_computed_anew(place):
    folder, loaded = place
    systems = ["--systems", "proposed"]
    run(*systems)
    loaded.clear()
    (folder / "ours.pt").write_bytes(b"other weights")
    run(*systems)
    assert loaded and len(list(folder.glob("out/table4/segs/proposed-*"))) == 2
    loaded.clear()
    run(*systems, "--seed", 1)
    run(*systems, "--jitter", 2)
    assert len(loaded) == 2
    loaded.clear()
    case = tiny_case(0, 2)
    write_training_case(folder / "val", replace(case, image=255 - case.image))
    run(*systems)
    assert [one[-1].encoded for one in loaded] == [1]


def test_boxes_depend_on_seed_and_name_alone_not_on_the_other_cases(place):
    folder, _ = place

    def boxes(*more):
        run("--systems", "baseline", *more)
        return {path.name: load_npz(path)["boxes"].tolist() for path in folder.glob("out/table4/moved-5px-*/imgs/*")}

    everything = boxes()
    for path in folder.glob("out/table4/*/imgs/*"):
        path.unlink()
    some = boxes("--modalities", "US")
    assert sorted(some) == ["2D_US_tiny0.npz", "2D_US_tiny1.npz"]
    assert all(everything[name] == some[name] for name in some)


def test_the_2d_option_and_modalities_leave_cases_out(place):
    assert {row["case"] for row in run("--systems", "baseline", "--2d-only")} == {"2D_US_tiny0.npz", "2D_US_tiny1.npz"}
    assert {row["case"] for row in run("--systems", "baseline", "--modalities", "CT")} == {"3D_CT_tiny0.npz"}


def test_bad_cases_are_told_and_the_others_are_done(place, capsys):
    folder, _ = place
    image = np.full((20, 30), 9, np.uint8)
    line = np.zeros((20, 30), np.uint8)
    line[5:15, 7] = 1
    save_npz(folder / "val" / "2D_US_line.npz", imgs=image, gts=line)
    save_npz(folder / "val" / "2D_US_none.npz", imgs=image)
    save_npz(folder / "val" / "3D_MR_nospacing.npz", imgs=image[None], gts=(image > 0)[None].astype(np.uint8))
    with pytest.raises(SystemExit) as stop:
        run("--systems", "baseline")
    assert stop.value.code == 1
    told = [one for one in capsys.readouterr().err.splitlines() if "left out" in one]
    for text, words in zip(
        told, ("1 pixel wide or high", "neither 'boxes' nor 'gts'", "no key 'spacing'"), strict=True
    ):
        assert text.startswith("table4.py: left out: val/") and words in text
    with (folder / "results" / "cases.csv").open(newline="") as file:
        assert len({row["case"] for row in csv.DictReader(file)}) == 3


def test_what_is_missing_is_told_in_one_sentence(place, capsys):
    folder, loaded = place
    (folder / "ours.pt").rename(folder / "base.pt")
    assert "ours.pt: no such checkpoint; name one with --weights" in sentence()
    (folder / "base.pt").rename(folder / "ours.pt")
    assert "holds no case that can be used" in sentence("--modalities", "Fundus")
    with pytest.raises(SystemExit, match="no such folder"):
        table4.main(["--cases", "nowhere", "--weights", "ours.pt"])
    assert loaded == []
    for more in (["--jitter", "0"], ["--seed", "-1"], ["--systems", "sam"], ["--modalities", "X"]):
        with pytest.raises(SystemExit):
            run(*more)
    with pytest.raises(SystemExit):
        table4.main([])
    assert "required: --cases" in capsys.readouterr().err


@pytest.mark.long
def test_the_real_models_make_a_table_of_an_image_and_a_volume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for dims in (2, 3):
        write_training_case(tmp_path / "val", tiny_case(dims=dims))
    save_checkpoint(tmp_path / "ours.pt", {"model": build("proposed").state_dict()})
    rows = run()
    assert len(rows) == 2 * 6 * 2 and all(0 <= row["dsc_strict"] <= 1 for row in rows)
    found = capsys.readouterr()
    lines = found.out.splitlines()
    assert lines[0].startswith("| modality | cases | objects | baseline | baseline-int8 | proposed | proposed-int8 |")
    assert lines[-1] == "table4.py: 2 cases, 0 left out; wrote results" and found.err == ""
