"""page/report.py and the page that 05_evaluate.py writes: what it shows is what was scored, and it needs no network."""

import csv
import importlib
import math
import re

import cv2
import numpy as np
import pytest
from metric_rows import DISTANCE, PAPER, use

from demo_data import tiny_case
from figures import YELLOW, figure3_row
from formats import InputError
from formats.npz import load_npz, write_case
from formats.writing import save_npz, save_text
from grid import boxes_from_labels
from page.report import agreement, predicted_and_true, three_pictures, worst_cases

evaluate = importlib.import_module("05_evaluate")


@pytest.fixture(autouse=True)
def only_the_papers_metrics(monkeypatch):
    """The numbers below are of DSC and NSD, whatever rows a fork adds or deletes."""
    use(monkeypatch, PAPER)


def row(system, case, modality, dsc, labels=None):
    return {
        "system": system,
        "case": case,
        "modality": modality,
        "objects": 1,
        "dsc_strict": dsc,
        "labels": labels or {},
    }


ROWS = [row("ours", f"US_{i}.npz", "US", value) for i, value in enumerate((0.9, 0.5, 0.7))]
ROWS += [row("ours", "CT_0.npz", "CT", 0.6), row("ours", "CT_1.npz", "CT", math.nan)]


def test_the_worst_cases_are_the_worst_that_have_a_score():
    assert [r["case"] for r in worst_cases(ROWS, "dsc_strict")] == ["US_1.npz", "CT_0.npz", "US_2.npz", "US_0.npz"]


def test_the_worst_cases_of_a_distance_are_the_largest(monkeypatch):
    use(monkeypatch, DISTANCE)
    rows = [row("ours", f"US_{i}.npz", "US", 0.0) | {"shift_strict": value} for i, value in enumerate((3.0, 9.0, 4.0))]
    assert [r["case"] for r in worst_cases(rows, "shift_strict")][:2] == ["US_1.npz", "US_2.npz"]


def test_predicted_and_true_are_joined_by_case_and_label(tmp_path):
    rows = [
        row(
            "ours",
            "US_0.npz",
            "US",
            0.5,
            {1: {"dsc_strict": 0.4}, 7: {"dsc_strict": 0.6}, 9: {"dsc_strict": math.nan}, 3: {}},
        )
    ]
    save_text(
        tmp_path / "objects.csv",
        "case,label,predicted_iou\nUS_0.npz,7,0.8\nUS_0.npz,9,0.1\nUS_1.npz,1,0.2\nUS_0.npz,1,\nUS_0.npz,3,0.5\n",
    )
    assert predicted_and_true(rows, tmp_path / "objects.csv", "dsc_strict") == [(0.8, 0.6)]
    save_text(tmp_path / "short.csv", "case,label,predicted_iou\nUS_0.npz\n")
    with pytest.raises(InputError, match="needs columns case, label and predicted_iou"):
        predicted_and_true(rows, tmp_path / "short.csv", "dsc_strict")
    save_text(tmp_path / "bad.csv", "case,label\nUS_0.npz,7\n")
    with pytest.raises(InputError, match="needs columns case, label and predicted_iou"):
        predicted_and_true(rows, tmp_path / "bad.csv", "dsc_strict")


@pytest.mark.parametrize("dims", [2, 3])
def test_three_pictures_show_image_prediction_and_reference(dims):
    case = tiny_case(dims=dims)
    boxes = boxes_from_labels(case.labels)[1]
    title, *shown = figure3_row(case.name, case.image, boxes, np.zeros_like(case.labels), case.labels)
    picture = cv2.imdecode(np.frombuffer(three_pictures(*shown), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert title.startswith(case.name) and ("slice" in title) == (dims == 3)
    width = picture.shape[1] // 3
    left, middle, right = (picture[:, start : start + width - 8].astype(int) for start in (0, width + 3, 2 * width + 6))
    yellow = [np.abs(part - YELLOW).sum(axis=-1).min() < 60 for part in (left, middle, right)]
    assert yellow == [True, False, False], "the box does not hide the masks"
    assert np.abs(left - middle).mean() < np.abs(middle - right).mean(), "only the reference has masks here"


def test_a_page_without_any_score_says_so(tmp_path):
    """Labels with a gap have no score under the challenge's protocol where a missing one is nowhere predicted."""
    labels = tiny_case().labels
    save_npz(tmp_path / "gts" / "2D_US_a.npz", gts=np.where(labels == 1, 3, 0).astype(np.uint8))
    save_npz(tmp_path / "segs" / "2D_US_a.npz", segs=np.where(labels == 1, 3, 0).astype(np.uint8))
    evaluate.main(["-s", str(tmp_path / "segs"), "-g", str(tmp_path / "gts"), "-o", str(tmp_path / "eval"), "--jobs", "1",
                   "--protocol", "challenge"])  # fmt: skip
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "<td>segs: DSC challenge<td>segs: NSD challenge" in page and "<td>US<td>1<td>-<td>" in page


@pytest.fixture
def folder(tmp_path):
    """Two cases with their truth, and predictions: one right, one shifted by four pixels."""
    for seed in (0, 1):
        write_case(tmp_path, tiny_case(seed))
    for i, path in enumerate(sorted((tmp_path / "gts").iterdir())):
        save_npz(tmp_path / "segs <1>" / path.name, segs=np.roll(load_npz(path)["gts"], 4 * i, axis=1))
    lines = [
        f"{path.name},{label},{0.9 - label / 10}" for path in sorted((tmp_path / "gts").iterdir()) for label in (1, 2)
    ]
    save_text(tmp_path / "segs <1>" / "objects.csv", "\n".join(["case,label,predicted_iou", *lines, ""]))
    return tmp_path


def page_of(folder, *more):
    out = folder / "eval"
    evaluate.main(
        ["-s", str(folder / "segs <1>"), "-g", str(folder / "gts"), "-o", str(out), "--jobs", "1", *map(str, more)]
    )
    return (out / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_no_network_and_describes_every_picture(folder):
    page = page_of(folder, "--images", folder / "imgs")
    assert "http" not in page and "<script" not in page
    pictures = re.findall(r"<img [^>]*>", page)
    assert len(pictures) == 2, "the worst cases"
    for picture in pictures:
        assert (
            re.search(r'src="data:image/(png|jpeg);base64,', picture)
            and len(re.search(r'alt="([^"]*)"', picture)[1]) > 30
        )
    assert "segs &lt;1&gt;" in page and "segs <1>" not in page
    worst = re.findall(r"<figcaption>(2DBox_US_tiny\d)", page)
    assert worst == ["2DBox_US_tiny1", "2DBox_US_tiny0"]
    scores = [
        float(value)
        for value in re.findall(r"\): DSC strict: ([\d.]+)", "".join(re.findall(r"<figcaption>.*?<", page)))
    ]
    assert scores[0] < scores[1] == 100
    assert re.search(r"Correlation -?[01]\.\d\d", page)


def test_without_images_or_objects_the_page_says_what_to_do(folder):
    (folder / "segs <1>" / "objects.csv").unlink()
    page = page_of(folder)
    assert "name their folder with <code>--images</code>" in page and "step 4 writes it" in page
    assert "<img" not in page


def test_the_page_has_the_means_of_the_table(folder):
    page = page_of(folder, "--images", folder / "imgs")
    with (folder / "eval" / "modalities.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["system"] == "segs <1>"]
    for line in lines:
        dsc, nsd = (f"{100 * float(line[score]):.1f}" for score in ("dsc_strict", "nsd_strict"))
        assert f"<tr><td>{line['modality']}<td>{line['cases']}<td>{dsc}<td>{nsd}<td>" in page


def test_predicted_iou_and_score_are_compared_where_they_can_be(tmp_path):
    found = [row("ours", f"US_{i}.npz", "US", 0.5, {1: {"dsc_strict": i / 10}}) for i in range(4)]
    lines = [f"US_{i}.npz,1,{1 - i / 5}" for i in range(4)]
    save_text(tmp_path / "objects.csv", "\n".join(["case,label,predicted_iou", *lines, ""]))
    assert agreement(found, tmp_path / "objects.csv", "strict").startswith(
        "Correlation -1.00 of the predicted IoU and DSC, 4"
    )
    assert agreement(found[:2], tmp_path / "objects.csv", "strict").startswith("2 objects have a score")
