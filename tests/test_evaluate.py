"""05_evaluate.py: scores by hand through to the tables, the reference rows, and one sentence for every bad input."""

import csv
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from metric_rows import PAPER, TABLES, use

from demo_data import tiny_case
from figures import figure2, figure3, figure3_row
from formats.case import Case
from formats.npz import write_case
from formats.writing import save_figure, save_npz
from grid import boxes_from_labels, case_rng, loosen_boxes
from metrics import METRICS, Metric, filled_box
from tables import AVERAGE, bootstrap_interval, read_rows

evaluate = importlib.import_module("05_evaluate")  # `import 05_evaluate` is a syntax error
ROOT = Path(__file__).parent.parent

# 5 x 5 pixels predicted in the middle of 9 x 9, see test_metrics.py for the count
SQUARE_DSC = 50 / 106
SQUARE_NSD = 1 - (8 + 4 * math.sqrt(0.5)) / (48 + 8 * math.sqrt(0.5))


@pytest.fixture(autouse=True)
def only_the_papers_metrics(monkeypatch):
    """The numbers below are of DSC and NSD, whatever rows a fork adds or deletes."""
    use(monkeypatch, PAPER)


def squares(label=1):
    gts, segs = np.zeros((2, 11, 11), np.uint8)
    gts[1:10, 1:10] = label
    segs[3:8, 3:8] = label
    return gts, segs


def save(folder, name, **arrays):
    folder.mkdir(exist_ok=True, parents=True)
    np.savez_compressed(folder / f"{name}.npz", **arrays)


@pytest.fixture
def folders(tmp_path):
    """Two CT images, predicted exactly and too small, and one ultrasound image, predicted exactly, plus times."""
    gts, segs = squares()
    for name, prediction in (("2DBox_CT_a", gts), ("2DBox_CT_b", segs), ("2DBox_US_c", gts)):
        save(tmp_path / "gts", name, gts=gts)
        save(tmp_path / "segs", name, segs=prediction)
    lines = ["case,modality,shape,objects,encode_s,decode_s,total_s"]
    lines += [f"{name}.npz,CT,11x11,1,0,0,{total}" for name, total in (("2DBox_CT_a", 1.0), ("2DBox_CT_b", 2.0))]
    (tmp_path / "segs" / "efficiency.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(folder, *more, segs="ours=segs"):
    """main() on the folder's segs and gts, in this process; tables go to folder/eval."""
    name, _, sub = segs.partition("=")
    args = ["--segs", f"{name}={folder / sub}", "--gts", str(folder / "gts"), "--out", str(folder / "eval")]
    return evaluate.main([*args, "--jobs", "1", *more])


def table_of(folder):
    return (folder / "eval" / "table.md").read_text()


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_scores_by_hand_reach_every_table(folders, capsys):
    found = run(folders)
    assert found["ours", "CT"]["dsc_strict"] == pytest.approx((1 + SQUARE_DSC) / 2)
    assert found["ours", "CT"]["nsd_strict"] == pytest.approx((1 + SQUARE_NSD) / 2)
    assert found["ours", "US"]["nsd_strict"] == 1
    # the average is over modalities, not over cases: CT counts once though it has two
    average = found["ours", "Average"]
    assert average["dsc_strict"] == pytest.approx(((1 + SQUARE_DSC) / 2 + 1) / 2)
    assert (average["cases"], average["objects"]) == (3, 3)
    assert found["ours", "CT"]["seconds"] == pytest.approx(1.5)
    assert found["filled box", "Average"]["dsc_strict"] == 1  # the truth is a square

    cases = rows_of(folders / "eval" / "cases.csv")
    assert [row["system"] for row in cases] == ["ours"] * 3 + ["filled box"] * 3 + ["inscribed ellipse"] * 3
    assert (cases[1]["case"], cases[1]["modality"], cases[1]["objects"]) == ("2DBox_CT_b.npz", "CT", "1")
    assert float(cases[1]["dsc_strict"]) == pytest.approx(SQUARE_DSC, abs=1e-6)
    assert float(cases[1]["nsd_strict"]) == pytest.approx(SQUARE_NSD, abs=1e-6)
    assert float(cases[1]["nsd_challenge"]) > float(cases[1]["nsd_strict"])
    assert [row["seconds"] for row in cases[:4]] == ["1.000000", "2.000000", "", ""]  # no time: blank, not 0
    labels = rows_of(folders / "eval" / "labels.csv")
    assert (labels[1]["label"], labels[1]["dsc_strict"]) == ("1", cases[1]["dsc_strict"])
    modalities = rows_of(folders / "eval" / "modalities.csv")
    assert [row["modality"] for row in modalities[:3]] == ["CT", "US", "Average"]

    table = table_of(folders)
    header, _, ct, us, mean = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[:5])
    at = header.index("ours: NSD strict")
    assert (ct[0], us[0], mean[0]) == ("CT", "US", "Average")
    assert (ct[at], us[at]) == (f"{50 * (1 + SQUARE_NSD):.2f}", "100.00")
    assert (ct[header.index("ours: s")], us[header.index("ours: s")]) == ("1.50", "-")
    assert "ours: NSD challenge" in header and "inscribed ellipse: DSC strict" in header
    out = capsys.readouterr().out
    printed = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("CT", "US"))}
    assert printed["CT"][2:5] == [f"{50 * (1 + SQUARE_DSC):.1f}", f"{50 * (1 + SQUARE_NSD):.1f}", "1.5"]
    assert printed["US"][2:5] == ["100.0", "100.0", "-"]
    assert out.splitlines()[-1].startswith("05_evaluate.py: 3 cases, problems: 0; wrote")
    saved = json.loads((folders / "eval" / "arguments.json").read_text())
    assert (saved["protocol"], saved["jobs"]) == ("both", 1)
    assert not list((folders / "eval").glob("*.tmp"))


def test_a_volume_uses_its_stored_spacing_turned_to_array_order(tmp_path):
    gts = np.zeros((7, 5, 5), np.uint8)
    gts[1:4, 2, 2] = 1
    save(tmp_path / "gts", "3DBox_MR_a", gts=gts, spacing=np.array([1.0, 1.0, 5.0]))  # x, y, z
    save(tmp_path / "segs", "3DBox_MR_a", segs=np.roll(gts, 1, axis=0))
    found = run(tmp_path)["ours", "MR"]
    assert found["nsd_challenge"] == 1  # takes the slices to be 1 mm apart
    corner, strip = 0.125 * math.sqrt(51), 5 * math.sqrt(0.5)  # see test_metrics.py
    assert found["nsd_strict"] == pytest.approx(1 - 4 * corner / (8 * corner + 8 * strip))


def test_two_systems_two_processes_and_short_options(folders):
    gts, segs = squares()
    for name in ("2DBox_CT_a", "2DBox_CT_b", "2DBox_US_c"):
        save(folders / "other", name, segs=segs)
    args = ["-s", f"ours={folders / 'segs'}", str(folders / "other"), "-g", str(folders / "gts")]
    many = evaluate.main([*args, "-o", str(folders / "many"), "--jobs", "2"])
    one = evaluate.main([*args, "-o", str(folders / "one"), "--jobs", "1"])
    assert many["other", "Average"]["dsc_strict"] == pytest.approx(SQUARE_DSC)  # a bare folder lends its name
    assert list(many) == list(one)
    for name in ("cases.csv", "labels.csv", "modalities.csv", "table.md"):
        assert (folders / "many" / name).read_text() == (folders / "one" / name).read_text()


def iou(pred, gt, spacing_mm):
    """Intersection over union, as a fork would add it."""
    return float((pred & gt).sum() / (pred | gt).sum())


def test_a_row_added_to_the_table_of_metrics_shows_in_every_table(folders, monkeypatch, capsys):
    monkeypatch.setitem(METRICS, "iou", Metric(iou))
    found = run(folders)
    mean = (1 + 25 / 81) / 2  # of both CT images
    assert found["ours", "CT"]["iou_strict"] == pytest.approx(mean)
    for name in ("cases.csv", "labels.csv"):
        row = rows_of(folders / "eval" / name)[1]
        assert float(row["iou_strict"]) == float(row["iou_challenge"]) == pytest.approx(25 / 81, abs=1e-6)
    assert float(rows_of(folders / "eval" / "modalities.csv")[0]["iou_strict"]) == pytest.approx(mean, abs=1e-6)
    header, _, ct = ([cell.strip() for cell in line.split("|")] for line in table_of(folders).splitlines()[:3])
    assert ct[header.index("ours: IOU strict")] == f"{100 * mean:.2f}" and "filled box: IOU strict" in header
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][2:6] == ["DSC", "NSD", "IOU", "s"]
    assert lines[2][4] == f"{100 * mean:.1f}"


@pytest.mark.parametrize("metrics", TABLES.values(), ids=TABLES)
def test_step_5_runs_with_whatever_rows_metrics_has(folders, monkeypatch, capsys, metrics):
    """A distance in mm, a score of the case, no DSC, no NSD: every table, the figures, and the page."""
    use(monkeypatch, metrics)
    gts, _ = squares()
    for name in ("2DBox_CT_a", "2DBox_CT_b", "2DBox_US_c"):
        save(folders / "imgs", name, imgs=100 * gts, boxes=np.array([[1, 1, 9, 9]]))
    save(folders / "segs", "2DBox_US_c", segs=0 * gts)  # one object, missed
    objects = "\n".join(f"{name}.npz,1,0.{n}" for n, name in enumerate(("2DBox_CT_a", "2DBox_CT_b", "2DBox_US_c"), 7))
    (folders / "segs" / "objects.csv").write_text(f"case,label,predicted_iou\n{objects}\n")
    found = run(folders, "--images", str(folders / "imgs"))
    missed = {"dsc": 0, "nsd": 0, "found": 0, "shift": math.hypot(11, 11)}
    of_objects = [name for name, metric in metrics.items() if not metric.of_case]
    for protocol in ("strict", "challenge"):
        for name in metrics:
            want = math.hypot(1, 11, 11) if (name, protocol) == ("shift", "challenge") else missed[name]
            assert found["ours", "US"][f"{name}_{protocol}"] == pytest.approx(want)
    names = [f"{name}_{protocol}" for protocol in ("strict", "challenge") for name in metrics]
    assert list(rows_of(folders / "eval" / "cases.csv")[0])[6:-1] == names
    assert list(rows_of(folders / "eval" / "modalities.csv")[0])[4:-1] == names
    assert [name for name in list(rows_of(folders / "eval" / "labels.csv")[0])[4:] if "strict" in name] == [
        f"{name}_strict" for name in of_objects
    ]
    table, page, out = table_of(folders), (folders / "eval" / "report.html").read_text(), capsys.readouterr().out
    us = next(line for line in table.splitlines() if line.startswith("| US")).split(" | ")
    header = table.splitlines()[0].split(" | ")
    for name, metric in metrics.items():
        title = f"ours: {name.upper()} strict" + ("" if metric.unit == "%" else f", {metric.unit}")
        assert us[header.index(title)] == f"{missed[name]:.2f}" and name.upper() in page and name.upper() in out
    worst = "2DBox_CT_b" if list(metrics) == ["found"] else "2DBox_US_c"
    assert page.index(f"<figcaption>{worst}") == page.index("<figcaption>")
    assert ("per cent" in page) == any(metric.unit == "%" for metric in metrics.values())
    assert (folders / "eval" / "figure2.png").is_file() and (folders / "eval" / "figure3.png").is_file()


def test_each_system_is_subtracted_from_the_others_with_intervals(folders):
    gts, segs = squares()
    for name in ("2DBox_CT_a", "2DBox_CT_b", "2DBox_US_c"):
        save(folders / "other", name, segs=segs)
    run(folders, "--segs", f"ours={folders / 'segs'}", f"other={folders / 'other'}")
    lines = rows_of(folders / "eval" / "differences.csv")
    pairs = list(dict.fromkeys((line["system"], line["minus"]) for line in lines))
    assert pairs == [
        ("other", "ours"),
        ("ours", "filled box"),
        ("ours", "inscribed ellipse"),
        ("other", "filled box"),
        ("other", "inscribed ellipse"),
    ]
    found = {line["modality"]: line for line in lines if line["minus"] == "ours" and line["score"] == "dsc_strict"}
    ct, us = np.array([SQUARE_DSC - 1, 0]), np.array([SQUARE_DSC - 1])
    assert float(found["CT"]["difference"]) == pytest.approx(ct.mean(), abs=1e-6)
    assert [float(found["CT"][end]) for end in ("low", "high")] == pytest.approx(bootstrap_interval([ct]), abs=1e-6)
    assert (found["US"]["cases"], found["US"]["low"]) == ("1", "")  # one case: no interval
    assert float(found[AVERAGE]["difference"]) == pytest.approx((ct.mean() + us.mean()) / 2, abs=1e-6)
    (line,) = (line for line in table_of(folders).splitlines() if line.startswith("| other - ours |"))
    low, high = (100 * end for end in bootstrap_interval([ct, us]))
    assert f"| 3 | {50 * (ct.mean() + us.mean()):+.2f} [{low:+.2f}, {high:+.2f}] |" in line


def test_drawn_cases_are_marked_and_stay_outside_every_average(folders, capsys):
    real = run(folders)
    gts, segs = squares()
    for name in ("2DBox_CT_synthetic0", "2DBox_OCT_synthetic12"):
        save(folders / "gts", name, gts=gts)
        save(folders / "segs", name, segs=segs)
    capsys.readouterr()
    found = run(folders)
    for key, line in real.items():
        assert found[key] == pytest.approx(line, nan_ok=True)
    assert [name for system, name in found if system == "ours"] == ["CT", "US", AVERAGE, "CT (drawn)", "OCT (drawn)"]
    assert found["ours", "CT (drawn)"]["dsc_strict"] == pytest.approx(SQUARE_DSC)
    marks = {row["case"]: row["drawn"] for row in rows_of(folders / "eval" / "cases.csv")}
    assert [name for name, mark in marks.items() if mark] == ["2DBox_CT_synthetic0.npz", "2DBox_OCT_synthetic12.npz"]
    out, page = capsys.readouterr().out, (folders / "eval" / "report.html").read_text()
    for text in (out, table_of(folders), page):
        assert "OCT (drawn)" in text and "more kinds of images run: 2 cases, outside the average." in text
    lines = [line for line in rows_of(folders / "eval" / "differences.csv") if line["modality"] == AVERAGE]
    assert {line["cases"] for line in lines} == {"3"}


@pytest.mark.parametrize("protocol", ["strict", "challenge"])
def test_one_protocol_computes_only_that(folders, protocol):
    found = run(folders, "--protocol", protocol)
    other = "challenge" if protocol == "strict" else "strict"
    assert f"nsd_{protocol}" in found["ours", "CT"] and f"nsd_{other}" not in found["ours", "CT"]
    header = table_of(folders).splitlines()[0]
    assert f"ours: DSC {protocol}" in header and f"NSD {other}" not in header
    assert {row[f"nsd_{other}"] for row in rows_of(folders / "eval" / "cases.csv")} == {""}


def test_references_keep_the_labels_of_the_truth(tmp_path):
    gts = np.zeros((20, 20), np.uint8)
    gts[1:6, 1:6], gts[10:18, 10:15] = 3, 7  # two boxes, labels 3 and 7: painted 1 and 2
    save(tmp_path / "gts", "2D_OCT_a", gts=gts)
    save(tmp_path / "segs", "2D_OCT_a", segs=gts)
    found = run(tmp_path)
    assert found["filled box", "OCT"]["dsc_strict"] == 1
    assert found["filled box", "OCT"]["objects"] == 2
    labels = [row for row in rows_of(tmp_path / "eval" / "labels.csv") if row["system"] == "filled box"]
    assert [row["label"] for row in labels] == ["3", "7"]
    # the challenge also asks for 1, 2, 4, 5, 6, which nobody has: no DSC, so no mean, and no NSD
    assert math.isnan(found["ours", "OCT"]["dsc_challenge"]) and found["ours", "OCT"]["nsd_challenge"] == 0
    assert rows_of(tmp_path / "eval" / "cases.csv")[0]["dsc_challenge"] == ""


def test_a_label_that_only_one_protocol_scores_stays_blank_for_the_other(tmp_path):
    gts, segs = squares(label=3)
    segs[0, 0] = 1  # an object that is not there: counted by the challenge, since 1 < 3
    save(tmp_path / "gts", "2D_US_a", gts=gts)
    save(tmp_path / "segs", "2D_US_a", segs=segs)
    run(tmp_path)
    one, three = rows_of(tmp_path / "eval" / "labels.csv")[:2]
    assert (one["label"], one["dsc_strict"], one["dsc_challenge"]) == ("1", "", "0.000000")
    assert three["dsc_strict"] == three["dsc_challenge"] == f"{SQUARE_DSC:.6f}"


def test_references_take_the_boxes_of_the_file_if_it_has_them(tmp_path):
    gts, _ = squares()
    save(tmp_path / "gts", "2D_US_a", gts=gts, boxes=np.array([[3, 3, 7, 7]]))  # not the exact box
    save(tmp_path / "segs", "2D_US_a", segs=gts)
    assert run(tmp_path)["filled box", "US"]["dsc_strict"] == pytest.approx(SQUARE_DSC)


def test_references_get_boxes_as_loose_as_those_of_step_4(tmp_path):
    gts, _ = squares()
    save(tmp_path / "gts", "2D_US_a", gts=gts)
    save(tmp_path / "segs", "2D_US_a", segs=gts)
    boxes = loosen_boxes(boxes_from_labels(gts)[1], 0.5, case_rng("2D_US_a"), *gts.shape)
    found, expected = run(tmp_path, "--looseness", "0.5"), filled_box(boxes, gts.shape)
    overlap = 2 * np.count_nonzero(expected * gts) / (np.count_nonzero(expected) + np.count_nonzero(gts))
    assert found["ours", "US"]["dsc_strict"] == 1 and found["filled box", "US"]["dsc_strict"] < 1
    assert found["filled box", "US"]["dsc_strict"] == pytest.approx(overlap)


def spoil_truncated(folder):
    path = folder / "segs" / "2DBox_CT_b.npz"
    path.write_bytes(path.read_bytes()[:100])


BAD_CASES = {  # how to spoil case b, and what the sentence says
    "no prediction": (lambda f: (f / "segs" / "2DBox_CT_b.npz").unlink(), "no prediction for this case"),
    "no truth": (lambda f: (f / "gts" / "2DBox_CT_b.npz").unlink(), "has no ground truth"),
    "truncated": (spoil_truncated, "truncated"),
    "wrong key": (lambda f: save(f / "segs", "2DBox_CT_b", masks=squares()[0]), "has no key 'segs' (found ['masks'])"),
    "shape": (lambda f: save(f / "segs", "2DBox_CT_b", segs=squares()[0][1:]), "(10, 11)"),
    "dtype": (lambda f: save(f / "segs", "2DBox_CT_b", segs=squares()[0] / 2), "float64"),
    "objects": (lambda f: save(f / "segs", "2DBox_CT_b", segs=np.array([{}], dtype=object)), "object array"),
    "no gts": (lambda f: save(f / "gts", "2DBox_CT_b", imgs=squares()[0]), "has no key 'gts'"),
    "no object": (lambda f: save(f / "gts", "2DBox_CT_b", gts=0 * squares()[0]), "with an object"),
    "no spacing": (lambda f: save(f / "gts", "2DBox_CT_b", gts=squares()[0][None]), "has no key 'spacing'"),
    "bad spacing": (
        lambda f: save(f / "gts", "2DBox_CT_b", gts=squares()[0][None], spacing=np.zeros(3)),
        "three positive numbers",
    ),
    "bad boxes": (lambda f: save(f / "gts", "2DBox_CT_b", gts=squares()[0], boxes=np.zeros((1, 6))), "expected (N, 4)"),
}


@pytest.mark.parametrize("spoil, words", BAD_CASES.values(), ids=BAD_CASES)
def test_a_bad_case_is_told_in_a_sentence_and_the_others_are_done(folders, capsys, spoil, words):
    spoil(folders)
    with pytest.raises(SystemExit) as stop:
        run(folders)
    assert stop.value.code == 1
    streams = capsys.readouterr()
    (sentence,) = streams.err.splitlines()
    assert "2DBox_CT_b.npz" in sentence and words in sentence
    assert "problems: 1" in streams.out.splitlines()[-1]
    done = {row["case"] for row in rows_of(folders / "eval" / "cases.csv") if row["system"] == "ours"}
    assert done == {"2DBox_CT_a.npz", "2DBox_US_c.npz"}


def test_from_the_command_line_a_bad_case_gives_exit_code_1_and_no_traceback(folders):
    spoil_truncated(folders)
    command = [sys.executable, str(ROOT / "05_evaluate.py"), "--segs", str(folders / "segs"), "--jobs", "2"]
    command += ["--gts", str(folders / "gts"), "--out", str(folders / "eval")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folders)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "truncated" in done.stderr  # one sentence; no bar when not a terminal
    assert (folders / "eval" / "table.md").is_file()


def test_if_nothing_can_be_scored_no_table_is_written(tmp_path, capsys):
    save(tmp_path / "gts", "2D_US_a", imgs=np.zeros((4, 4)))
    save(tmp_path / "segs", "2D_US_a", segs=np.zeros((4, 4), int))
    with pytest.raises(SystemExit, match="no case could be scored"):
        run(tmp_path)
    assert "has no key 'gts'" in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def test_missing_folders_say_what_to_run_first(folders):
    with pytest.raises(SystemExit, match=r"python 04_infer\.py -i CASES -o"):
        run(folders, segs="ours=nowhere")
    for path in (folders / "gts").iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match=r"python 01_preprocess\.py"):
        run(folders)


@pytest.mark.parametrize("args", [[], ["--segs", "x"], ["--gts", "x"], ["--smoke", "--jobs", "0"]])
def test_missing_arguments_are_named(args, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(args)
    assert "--segs NAME=FOLDER and --gts FOLDER, or --smoke" in capsys.readouterr().err


def test_as_many_processes_as_cores_that_may_be_used_but_no_more_than_windows_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for cores, jobs in ((3, 3), (128, 61)):
        monkeypatch.setattr(evaluate, "usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr(evaluate, "run", lambda args: (args.jobs, []))
        assert evaluate.main(["--smoke"]) == jobs


@pytest.mark.parametrize("name", ["", "filled box", "twice"])
def test_names_of_systems_must_be_free(folders, name):
    entries = [f"{name}={folders / 'segs'}"] * 2
    with pytest.raises(SystemExit, match="is empty, taken or not text"):
        evaluate.main(["--segs", *entries, "--gts", str(folders / "gts")])


@pytest.mark.parametrize("text", ["case,seconds\na.npz,1\n", "case,total_s\na.npz,fast\n", "case,total_s\na.npz\n"])
def test_a_bad_efficiency_file_is_told(folders, text):
    (folders / "segs" / "efficiency.csv").write_text(text)
    with pytest.raises(SystemExit, match="needs columns case and total_s"):
        run(folders)


@pytest.fixture
def pictured(tmp_path):
    """An image and a volume with inputs and truth, predicted by two systems: exact, and shifted by 2 pixels."""
    cases = [tiny_case(0, dims=2), tiny_case(0, dims=3)]
    for case in cases:
        write_case(tmp_path, case)
        save(tmp_path / "exact", case.name, segs=case.labels)
        save(tmp_path / "shifted", case.name, segs=np.roll(case.labels, 2, axis=-1))
    args = ["-s", str(tmp_path / "exact"), str(tmp_path / "shifted"), "-g", str(tmp_path / "gts"), "--jobs", "1"]
    return tmp_path, cases, [*args, "-o", str(tmp_path / "eval"), "--images", str(tmp_path / "imgs")]


def drawn(path, draw, size, *shape):
    """The bytes of a figure: draw(axes) on axes of that shape."""
    figure = Figure(figsize=size)
    draw(figure.subplots(*shape, squeeze=False))
    save_figure(path, figure)
    return path.read_bytes()


def test_figures_show_the_images_and_the_masks_of_the_system_that_was_named(pictured):
    folder, (flat, volume), args = pictured
    evaluate.main([*args, "--show", "shifted"])
    with np.load(folder / "imgs" / f"{flat.name}.npz") as stored:
        flat_boxes = stored["boxes"]
    with np.load(folder / "imgs" / f"{volume.name}.npz") as stored:
        volume_boxes = stored["boxes"]
    rows = [
        figure3_row(case.name, case.image, boxes, np.roll(case.labels, 2, axis=-1), case.labels)
        for case, boxes in ((flat, flat_boxes), (volume, volume_boxes))
    ]
    want = drawn(folder / "want.png", lambda axes: figure3(rows, axes), (9, 5.2), 2, 3)
    assert (folder / "eval" / "figure3.png").read_bytes() == want
    want = drawn(folder / "want.png", lambda axes: figure2(flat.image, axes[0]), (9, 3.2), 1, 3)
    assert (folder / "eval" / "figure2.png").read_bytes() == want


def test_figures_take_the_named_cases_and_else_the_first_ones(tmp_path, monkeypatch):
    """Figure 2: the first gray 2D case of those of Figure 3, else of all. Here the last two of six are gray."""
    for number in range(6):
        image = np.zeros((8, 8, 3), np.uint8) + np.array([0, 0, 9], np.uint8) * (number < 4) + np.uint8(number)
        case = Case(f"2DBox_US_{number}", image, None, np.pad(np.ones((4, 4), np.uint16), 2), None, False)
        write_case(tmp_path, case)
        save(tmp_path / "segs", case.name, segs=case.labels)
    drawn = {}
    monkeypatch.setattr("figures.figure2", lambda image, axes: drawn.update(figure2=image[0, 0, 0]))
    monkeypatch.setattr("figures.figure3", lambda rows, axes: drawn.update(figure3=[title for title, *_ in rows]))
    run(tmp_path, "--images", str(tmp_path / "imgs"))
    assert drawn == {"figure2": 4, "figure3": [f"2DBox_US_{number}" for number in range(4)]}
    run(tmp_path, "--images", str(tmp_path / "imgs"), "--figures", "2DBox_US_3", "2DBox_US_5")
    assert drawn == {"figure2": 5, "figure3": ["2DBox_US_3", "2DBox_US_5"]}


@pytest.mark.parametrize(
    "more, words",
    [
        (["--show", "nobody"], "--show nobody: no such system; there are exact, shifted"),
        (["--figures", "2DBox_US_tiny0", "other"], "no case other that was scored; there are 2DBox_US_tiny0, 3DBox"),
        (["--images", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_what_no_figure_can_show_is_told_in_a_sentence(pictured, more, words):
    folder, _, args = pictured
    with pytest.raises(SystemExit, match=words) as stop:
        evaluate.main([*args, *more])
    assert str(stop.value).startswith("05_evaluate.py: ") and "\n" not in str(stop.value)
    assert not list((folder / "eval").glob("*.png"))


def test_images_of_other_cases_and_figures_without_images_are_told(pictured, folders, capsys):
    folder, _, args = pictured
    for path in (folder / "imgs").iterdir():
        path.rename(path.with_stem("2DBox_US_else"))
    with pytest.raises(SystemExit, match="holds no image of the cases that were scored"):
        evaluate.main(args)
    with pytest.raises(SystemExit):
        run(folders, "--figures", "2DBox_CT_a")
    assert "give their folder with --images" in capsys.readouterr().err


def test_smoke_makes_its_own_cases_and_leaves_only_tables_and_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = evaluate.main(["--smoke", "--jobs", "1"])
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        "arguments.json",
        "cases.csv",
        "differences.csv",
        "labels.csv",
        "modalities.csv",
        "report.html",
        "table.md",
    ]
    assert (tmp_path / "eval" / "smoke" / "table.md").is_file()
    labels = tiny_case().labels
    masks = [(labels == label, np.roll(labels, 1, axis=-1) == label) for label in (1, 2)]
    want = np.mean([2 * (true & found).sum() / (true.sum() + found.sum()) for true, found in masks])
    assert found["shifted", "US (drawn)"]["dsc_strict"] == pytest.approx(want) and 0.8 < want < 1
    told = "All 2 cases are drawn by us: scores on them say nothing about real images."
    assert all(told in text for text in (capsys.readouterr().out, (tmp_path / "eval/smoke/table.md").read_text()))
    assert math.isnan(found["shifted", "Average"]["seconds"])


# ---------------------------------------------------------------- hostile names and files


def test_names_of_any_bytes_are_scored_and_drawn_and_nothing_in_them_runs(tmp_path, capsys):
    names = [
        os.fsdecode(b"2DBox_US_\xff\x1b[2J"),
        "=1+1",
        "2DBox_US_$x$_{",
        "2DBox_US_<script>",
        "2DBox_US_" + "a" * 240,
    ]
    case = tiny_case()
    for name in names:
        save_npz(tmp_path / "gts" / f"{name}.npz", gts=case.labels)
        save_npz(tmp_path / "segs" / f"{name}.npz", segs=case.labels)
        save_npz(tmp_path / "imgs" / f"{name}.npz", imgs=case.image, boxes=[[10, 8, 45, 40]])
    folders = ["-g", tmp_path / "gts", "-o", tmp_path / "eval", "--images", tmp_path / "imgs", "--jobs", "1"]
    evaluate.main([*map(str, folders), "-s", f"a$x$_{{<b>|={tmp_path / 'segs'}"])
    assert "\x1b" not in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "eval").glob("*.png")} == {"figure2.png", "figure3.png"}
    rows = read_rows(tmp_path / "eval" / "cases.csv")
    assert {row["case"] for row in rows} >= {f"{name}.npz" for name in names[1:]} and len(rows) == 3 * len(names)
    assert ",=1+1" not in (tmp_path / "eval" / "cases.csv").read_text()
    assert "<script" not in (tmp_path / "eval" / "report.html").read_text().partition("</head>")[2]
    assert "| a$x$_{&lt;b>\\|: DSC" in (tmp_path / "eval" / "table.md").read_text()


def test_a_system_whose_name_is_no_text_is_refused(tmp_path):
    save_npz(tmp_path / "a.npz", segs=np.eye(4, dtype=np.uint8))
    with pytest.raises(SystemExit, match="is empty, taken or not text"):
        evaluate.main(["-s", f"a\x1b[2J={tmp_path}", "-g", str(tmp_path)])


@pytest.mark.parametrize("name", ["cases.csv", "table.md", "report.html", "arguments.json"])
def test_a_folder_in_place_of_a_table_is_told(name, tmp_path):
    case = tiny_case()
    save_npz(tmp_path / "gts" / "2D_US_a.npz", gts=case.labels)
    save_npz(tmp_path / "segs" / "2D_US_a.npz", segs=case.labels)
    (tmp_path / "eval" / name).mkdir(parents=True)
    args = ["-s", tmp_path / "segs", "-g", tmp_path / "gts", "-o", tmp_path / "eval", "--jobs", "1"]
    with pytest.raises(SystemExit, match=f"{name}: a folder stands where this file should be"):
        evaluate.main([*map(str, args)])
    assert not list((tmp_path / "eval").glob("*.tmp"))


@pytest.mark.parametrize("seconds", ["inf", "nan", "-1", "x", ""])
def test_a_time_that_is_no_number_reaches_no_table(seconds, tmp_path):
    case = tiny_case()
    save_npz(tmp_path / "gts" / "2D_US_a.npz", gts=case.labels)
    save_npz(tmp_path / "segs" / "2D_US_a.npz", segs=case.labels)
    (tmp_path / "segs" / "efficiency.csv").write_text(f"case,total_s\n2D_US_a.npz,{seconds}\n")
    args = ["-s", tmp_path / "segs", "-g", tmp_path / "gts", "-o", tmp_path / "eval", "--jobs", "1"]
    with pytest.raises(SystemExit, match="needs columns case and total_s"):
        evaluate.main([*map(str, args)])
