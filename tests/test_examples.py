"""The two finished forks of examples/, each on a phantom, with a stand-in for the network."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from fake_model import BrightModel

import segment
from demo_data import tiny_case
from examples.instances.__main__ import main as instances
from examples.instances.__main__ import mean_precision, read_polygons, write_polygons
from examples.interactive.__main__ import box_of, click_on, read_request, segment_request
from examples.interactive.__main__ import main as interactive
from figures import layer, outlines
from formats import InputError
from formats.annotations import LAYOUTS
from formats.npz import write_training_case
from formats.readers import read_case
from formats.writing import save_image, save_json, save_npz
from metrics import METRICS, dsc
from presets import PRESETS
from tables import read_rows


@pytest.fixture
def own_rows():
    """The house's tables as they were before, whatever rows an example adds."""
    kept = [(table, dict(table)) for table in (LAYOUTS, METRICS)]
    yield
    for table, rows in kept:
        table.clear()
        table.update(rows)


@pytest.fixture
def bright(monkeypatch, own_rows):
    """Bright pixels inside a box are its object."""
    monkeypatch.setattr(segment, "load", lambda *_, **__: segment.Segmenter(BrightModel(), PRESETS["fixed"], False))


def test_a_mask_becomes_an_outline_and_a_picture_layer_in_one_call():
    mask = np.zeros((9, 12), bool)
    mask[2:7, 1:6] = mask[4, 8:11] = True
    big, small = outlines(mask)
    assert len(big) == 2 * 5 + 2 * 3 and big.min(axis=0).tolist() == [1, 2] and big.max(axis=0).tolist() == [5, 6]
    again = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [big, small], 1) > 0
    assert np.array_equal(again, mask)
    above = layer(mask * np.uint16(7), opacity=0.5)
    assert above.shape == (9, 12, 4) and np.array_equal(above[..., 3], mask * np.uint8(128))


# ---------------------------------------------------------------- instances


def squares(*columns: int) -> np.ndarray:
    """(10, 60) labels: square i, 10 pixels wide, begins at columns[i]; None leaves a number out."""
    labels = np.zeros((10, 60), np.uint16)
    for i, x in enumerate(columns, start=1):
        labels[:, x : x + 10] = i
    return labels


def test_mean_precision_by_hand():
    truth = squares(0, 20)
    assert mean_precision(truth, truth) == 1 and mean_precision(truth * 0, truth) == 0
    # moved by 2 of 10: IoU 8 / 12, above 0.5, 0.55, 0.6 and 0.65, four of ten thresholds; there TP 2, else FP 2, FN 2
    assert mean_precision(squares(2, 22), truth) == pytest.approx(4 / 10)
    # the first is right, the second moved by 2: two pairs at four thresholds, one pair of three objects at six
    assert mean_precision(squares(0, 22), truth) == pytest.approx((4 * 1 + 6 / 3) / 10)
    assert mean_precision(squares(0, 20, 40), truth) == pytest.approx(2 / 3)  # one too many
    assert mean_precision(squares(20, 0), truth) == 1  # numbers need not agree


def test_polygons_come_back_and_lie_beside_their_picture(tmp_path, own_rows):
    case = tiny_case()
    for folder in ("before", "after"):
        save_image(tmp_path / folder / "US_a.png", case.image)
        write_polygons(tmp_path / folder / "US_a.json", case.labels, {1: "one", 2: "two"})
    with pytest.raises(InputError, match="no masks to take boxes from"):
        read_case(tmp_path / "before" / "US_a.png", boxes_from_masks=True)  # a layout that nobody knows is no label
    LAYOUTS["polygons"] = read_polygons
    found = read_case(tmp_path / "after" / "US_a.png", boxes_from_masks=True)
    assert np.array_equal(found.labels, case.labels) and found.label_names == ("one", "two") and len(found.boxes) == 2


@pytest.mark.parametrize(
    "content, told",
    [
        ({"polygons": [{"points": [[1, 1], [5, 1], [5, 5]]}, {"points": "abc"}]}, "polygon 2 is not understood"),
        ({"polygons": [{"points": [[100, 100], [120, 100], [120, 120]]}]}, "polygon 1 lies outside the picture"),
        ({"polygons": []}, "holds 0 polygons"),
        ([], "polygon 1 is not understood"),
    ],
)
def test_bad_polygons_are_one_sentence(tmp_path, content, told):
    save_json(tmp_path / "a.json", content)
    with pytest.raises(InputError, match=told):
        read_polygons(tmp_path / "a.json", (20, 30))


def test_instances_from_polygons_to_a_table_and_back_to_polygons(tmp_path, bright, capsys):
    case = tiny_case()
    for name in ("US_a", "US_b"):
        save_image(tmp_path / f"{name}.png", case.image)
    write_polygons(tmp_path / "US_a.json", case.labels, {1: "left", 2: "right"})
    summary = instances(["-i", str(tmp_path), "-o", str(tmp_path / "out")])
    told = capsys.readouterr()
    assert told.err.count("left out") == 1 and "US_b.json" in told.err
    assert summary["ours", "US"]["map_strict"] > 0.8 > summary["filled box", "US"]["map_strict"]
    assert "MAP" in (tmp_path / "out" / "eval" / "table.md").read_text("utf-8")
    written = json.loads((tmp_path / "out" / "polygons" / "US_a.json").read_text("utf-8"))["polygons"]
    assert [one["label"] for one in written] == ["left", "right"]
    again = read_polygons(tmp_path / "out" / "polygons" / "US_a.json", case.image.shape[:2])[0]
    assert mean_precision(again, case.labels) > 0.8


# ---------------------------------------------------------------- interactive


def request_of(tmp_path, boxes, clicks=None, **more):
    """A file as the organisers write it, dictionaries in object arrays."""
    case = tiny_case(dims=3)
    stored = {"imgs": case.image, "spacing": case.spacing_mm[::-1], "boxes": np.array(boxes, object)}
    save_npz(tmp_path / "a.npz", **stored, **({"clicks": np.array(clicks, object)} if clicks else {}), **more)
    return tmp_path / "a.npz", case


def exact_boxes_of(labels: np.ndarray) -> list[dict]:
    return [box_of(labels == i, Still()) for i in range(1, labels.max() + 1)]


class Still:
    """A random number that is 0."""

    def uniform(self, low, high, count):
        return np.zeros(count)


def test_dictionaries_come_out_and_nothing_runs(tmp_path):
    boxes = exact_boxes_of(tiny_case(dims=3).labels)
    clicks = [{"fg": [[np.int64(2), 3, 4.0]], "bg": np.array([[1, 2, 3]])}, {"fg": [], "bg": []}]
    path, case = request_of(tmp_path, boxes, clicks)
    found = read_request(path)
    assert found["boxes"] == boxes and found["spacing"] == case.spacing_mm and found["prev_pred"] is None
    assert found["clicks"] == [{"fg": [[2, 3, 4.0]], "bg": [[1, 2, 3]]}, {"fg": [], "bg": []}]
    assert type(found["clicks"][0]["fg"][0][0]) is int and type(found["boxes"][0]) is dict

    class Hostile:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    path, _ = request_of(tmp_path, [{"z_min": Hostile()}])
    with pytest.raises(InputError, match="which could run code"):
        read_request(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"z_max": 99}, "is no box in"),
        ({"z_mid": 6}, "is no box in"),
        ({"z_mid": "two"}, "is no box in"),
        ({"z_mid": float("nan")}, "is no box in"),
    ],
)
def test_bad_requests_are_one_sentence(tmp_path, change, told):
    box = exact_boxes_of(tiny_case(dims=3).labels)[0]
    path, _ = request_of(tmp_path, [box | change])
    with pytest.raises(InputError, match=told):
        read_request(path)
    path, _ = request_of(tmp_path, [box], [{"fg": [[9, 0, 0]]}])
    with pytest.raises(InputError, match="clicks outside"):
        read_request(path)
    path, _ = request_of(tmp_path, [box], [{"fg": []}, {"fg": []}])
    with pytest.raises(InputError, match="1 boxes, and clicks for 2 objects"):
        read_request(path)


def test_a_click_is_the_middle_of_the_largest_wrong_part():
    gt = np.zeros((9, 20, 30), bool)
    gt[1:6, 4:9, 5:10] = True
    assert click_on(gt, gt) is None
    assert click_on(np.zeros_like(gt), gt) == ("fg", [3, 6, 7])
    pred = gt.copy()
    pred[1:8, 5:12, 20:27], pred[2, 8, 9] = True, False  # a part that is too much, and one missing voxel
    assert click_on(pred, gt) == ("bg", [4, 8, 23])


def test_a_box_is_followed_and_clicks_mend_what_is_wrong(tmp_path, bright):
    boxes = exact_boxes_of(tiny_case(dims=3).labels)
    path, case = request_of(tmp_path, boxes)
    truth, segmenter = case.labels == 1, segment.load("any")
    whole = segment_request(segmenter, read_request(path))
    assert dsc(whole == 1, truth) > 0.9 and dsc(whole == 2, case.labels == 2) > 0.9
    # a box of the upper half of object 1; one click on the lower half
    middle = (boxes[0]["z_mid_y_min"] + boxes[0]["z_mid_y_max"]) // 2
    path, _ = request_of(
        tmp_path, [boxes[0] | {"z_mid_y_max": middle, "z_max": boxes[0]["z_mid"], "z_min": boxes[0]["z_mid"]}]
    )
    half = segment_request(segmenter, read_request(path))
    kind, click = click_on(half == 1, truth)
    assert kind == "fg" and dsc(half == 1, truth) < 0.5
    path, _ = request_of(tmp_path, [boxes[0]], [{kind: [click], "bg": []}], prev_pred=half)
    mended = segment_request(segmenter, read_request(path))
    assert dsc(mended == 1, truth) > dsc(half == 1, truth) + 0.3
    # object 2 was taken too; one click on it
    both = (case.labels > 0).astype(np.uint16)
    kind, click = click_on(both == 1, truth)
    assert kind == "bg"
    path, _ = request_of(tmp_path, [boxes[0]], [{"fg": [], kind: [click]}], prev_pred=both)
    assert dsc(segment_request(segmenter, read_request(path)) == 1, truth) > dsc(both == 1, truth) + 0.15


def test_six_runs_of_a_case(tmp_path, bright, capsys, monkeypatch):
    (end,) = interactive(["--smoke", "-o", str(tmp_path / "unused")])
    assert "DSC AUC" in capsys.readouterr().out and 3.6 < end["dsc_auc"] <= 4 and end["dsc_final"] > 0.9
    case = tiny_case(dims=3)
    write_training_case(tmp_path / "cases", case)
    name = next((tmp_path / "cases").glob("*.npz")).name
    interactive(["-i", str(tmp_path / "cases"), "-o", str(tmp_path / "out")])
    rows = read_rows(tmp_path / "out" / "scores.csv")
    assert [row["run"] for row in rows] == list("012345")
    asked = read_request(tmp_path / "out" / "inputs" / name)
    assert all(1 <= len(one["fg"]) + len(one["bg"]) <= 5 for one in asked["clicks"]) and asked["prev_pred"].any()
    # the area under the five clicks, by hand
    dsc_of = [float(row["dsc"]) for row in rows[1:]]
    assert end["dsc_auc"] == pytest.approx(sum(dsc_of) - (dsc_of[0] + dsc_of[-1]) / 2, abs=1e-4)
    monkeypatch.setattr("examples.interactive.__main__.SECONDS", -1)  # too slow for the challenge
    assert interactive(["-i", str(tmp_path / "cases"), "-o", str(tmp_path / "out")])[0]["dsc_final"] == 0


# ---------------------------------------------------------------- the page of the fork kit


def test_the_page_names_tables_and_tests_that_exist():
    root = Path(__file__).parent.parent
    text = (root / "docs" / "fork.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*`(tests/\w+\.py)::(\w+)` \|$", text, re.MULTILINE)
    assert len(rows) == 9
    for file, name in rows:
        assert f"def {name}(" in (root / file).read_text(encoding="utf-8"), f"{file} has no {name}"
    for table, file in (("READERS", "formats/readers.py"), ("LAYOUTS", "formats/annotations.py"), ("METRICS", "metrics.py"),
                        ("DATA_SETS", "formats/sources.py"), ("MODALITIES", "formats/__init__.py"), ("MODELS", "segment.py")):  # fmt: skip
        assert f"`{table}`" in text and re.search(
            rf"^{table}\b.* = ", (root / file).read_text("utf-8"), re.MULTILINE
        ), table


@pytest.mark.parametrize("example", ["instances", "interactive"])
def test_its_command_runs(example):
    command = [sys.executable, "-m", f"examples.{example}", "--smoke"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"examples.{example}: " in done.stdout, done.stdout + done.stderr
    assert f"python -m examples.{example} --smoke" in (Path(__file__).parent.parent / "docs" / "fork.md").read_text(
        "utf-8"
    )
