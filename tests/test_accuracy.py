"""benchmarks/accuracy.py: the same boxes for everyone, every row of TABLES, and what is written.

Most runs use the stand-in of fake_model.py, which needs no weights; the last test is the real thing.
"""

import csv
import importlib
import json
from pathlib import Path

import accuracy
import numpy as np
import pytest
from fake_model import BrightModel

import segment
import volumes
from demo_data import tiny_case
from formats.npz import write_training_case
from formats.readers import read_boxed
from formats.writing import save_npz
from grid import boxes_from_labels, case_rng, loosen_boxes
from presets import PRESETS, override, preset_options
from segment import Segmenter


def test_boxes_depend_on_the_cases_name_alone(place):
    folder, _ = place
    assert list(accuracy.BOXES) == list(accuracy.TABLES["looseness"].boxes)
    found = [read_boxed(folder / "val" / "2D_US_tiny0.npz", None, share).boxes for share in accuracy.BOXES.values()]
    exact = boxes_from_labels(tiny_case().labels)[1]
    assert (found[0] == exact).all()
    assert (found[2] == loosen_boxes(exact, 0.3, case_rng("2D_US_tiny0"), 64, 80)).all()
    assert found[1] == pytest.approx((exact + found[2]) / 2)  # the same draw


def test_every_system_can_be_run_and_is_compared_with_one_of_its_table():
    for table in accuracy.TABLES.values():
        names = [system.name for system in table.systems]
        assert len(set(names)) == len(names) and set(table.boxes) <= set(accuracy.BOXES)
        for system in table.systems:
            assert set(system.minus) <= {*names, accuracy.ELLIPSE} and system.model in (
                "proposed",
                "baseline",
                "static",
            )
            preset_options(system.preset)  # or InputError
            segment.engine_options(system.engine)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three cases in tmp_path/val, and the stand-in for all models; `loaded` lists them."""
    for case in (tiny_case(0, 2), tiny_case(1, 2), tiny_case(0, 3)):
        write_training_case(tmp_path / "val", case)
    (tmp_path / "ours.pt").write_bytes(b"weights")
    loaded = []

    def load(model, weights=None, preset=None, engine="torch", force=False, settings=(), **options):
        constants = tuple(getattr(volumes, name) for name in accuracy.SWEEP)
        loaded.append((str(model), preset, engine, tuple(settings), options, constants))
        model = BrightModel(0.41 if "int8" in engine else 0.4)
        return Segmenter(model, override(PRESETS[preset], list(settings)), enhanced=bool(settings))

    monkeypatch.setattr(segment, "load", load)
    row = segment.MODELS["baseline"]._replace(weights=lambda: tmp_path / "ours.pt")
    monkeypatch.setitem(segment.MODELS, "baseline", row)
    monkeypatch.chdir(tmp_path)
    return tmp_path, loaded


def run(table, *more, cases=("val",)):
    return accuracy.main(
        [table, "--cases", *cases, "--model", "ours.pt", "--static", "ours.pt", "-o", "results", *more]
    )


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_systems_get_the_same_boxes_and_every_table_is_written(place, monkeypatch):
    folder, loaded = place
    steps, asked = {step: importlib.import_module(step).main for step in ("04_infer", "05_evaluate")}, []

    def step_4(argv):
        steps["04_infer"](argv)
        out = Path(argv[argv.index("-o") + 1])
        asked.append((argv[argv.index("--boxes-from-masks") + 1], read(out / "efficiency.csv")[0]["boxes_are"]))

    def step_5(argv):  # the references are drawn from the boxes of the truth
        assert {share for share, _ in asked[-3:]} == {argv[argv.index("--looseness") + 1]}
        steps["05_evaluate"](argv)

    monkeypatch.setattr(importlib.import_module("04_infer"), "main", step_4)
    monkeypatch.setattr(importlib.import_module("05_evaluate"), "main", step_5)
    rows = run("table4_unseen")
    names = ("baseline", "proposed", "proposed-int8")
    assert len(rows) == 3 * 5 * 2  # cases, systems and references, boxes
    # exact and loose boxes, pictures and volumes
    engines = (("baseline", "openvino"), ("ours.pt", "openvino"), ("ours.pt", "torch-int8"))
    assert [one[:3] for one in loaded[:3]] == [(model, "fixed", engine) for model, engine in engines]
    assert len(loaded) == 3 * 2 * 2
    kinds = ("exact", "loose-15pct-seed0")
    assert set(asked) == {("0.0", "exact"), ("0.15", "drawn")} and len(asked) == 3 * 2 * 2

    cases = read(folder / "results/cases.csv")
    assert list(cases[0])[:5] == ["boxes", "system", "case", "modality", "objects"]
    assert len(cases) == len(rows) and {row["boxes"] for row in cases} == set(kinds)
    filled = {(r["boxes"], r["case"]): r["dsc_strict"] for r in cases if r["system"] == "filled box"}
    assert filled["exact", "2D_US_tiny0.npz"] != filled["loose-15pct-seed0", "2D_US_tiny0.npz"]
    table = (folder / "results/table.md").read_text().splitlines()
    header = next(line for line in table if line.startswith("| modality"))
    assert [cell.strip() for cell in header.split("|")[1:-1]][2:] == [*names, "filled box", "inscribed ellipse"]
    assert "| loose-15pct-seed0 | 3 | proposed-int8 | proposed |" in "\n".join(table)
    assert sum(line.startswith("## ") for line in table) == 6
    lines = read(folder / "results/differences.csv")
    pairs = {(line["system"], line["minus"]) for line in lines}
    assert pairs == {("proposed", "baseline"), ("proposed", "inscribed ellipse"), ("proposed-int8", "proposed")}
    assert list(lines[0])[:4] == ["boxes", "system", "minus", "modality"]
    settings = json.loads((folder / "results/settings.json").read_text())
    assert settings["cases"] == 3 and len(settings["sha256 of weights"]["baseline"]) == 64


@pytest.mark.long
def test_every_folder_and_kind_of_boxes_has_its_row_and_the_figure_shows_the_means(place):
    folder, _ = place
    write_training_case(folder / "other", tiny_case(3, 2))
    rows = run("looseness", cases=("val", "other"))
    assert len(rows) == (2 + 1) * 5 * 3 and {row["case"][:2] for row in rows} == {"2D"}  # volumes are left out
    assert list(read(folder / "results/cases.csv")[0])[:3] == ["folder", "boxes", "system"]
    table = (folder / "results/table.md").read_text()
    assert "| other, exact | 1 | proposed | baseline | +0.00 | +0.00 |" in table, "both systems are the same stand-in"
    ax = accuracy.looseness_plot(rows).axes[0]
    ellipse = ax.lines[2].get_ydata()
    assert ellipse[0] > ellipse[1] > ellipse[2] and ax.get_title() == "val: DSC"
    of = [r["dsc_strict"] for r in rows if (r["folder"], r["boxes"], r["system"]) == ("val", "exact", accuracy.ELLIPSE)]
    assert ellipse[0] == pytest.approx(100 * np.mean(of)) and (folder / "results/looseness.png").is_file()


def test_differences_run_on_their_own_kind_of_case_and_are_subtracted_from_fixed(place):
    folder, loaded = place
    run("differences")
    rows = read(folder / "results/cases.csv")
    of = {kind: {r["system"] for r in rows if r["case"].startswith(kind)} for kind in ("2D", "3D")}
    only = {kind: {s.name for s in accuracy.TABLES["differences"].systems if s.only in ("", kind)} for kind in ("pictures", "volumes")}  # fmt: skip
    references = {"filled box", accuracy.ELLIPSE}
    assert of == {"2D": only["pictures"] | references, "3D": only["volumes"] | references}
    assert "mended loop" not in of["2D"] and "colour turns gray" not in of["3D"]
    assert ("ours.pt", "fixed", "torch", ("color=gray",)) in {one[:4] for one in loaded}
    # as notebook 03 reads it: places 2, 4 and 5 of a row
    lines = (folder / "results/table.md").read_text().splitlines()
    int8 = [line.strip("| ").split(" | ") for line in lines if "| int8, " in line]
    assert [row[2] for row in int8] == ["int8, a scale a channel", "int8, a scale a tensor"]
    assert all(row[0] == "pictures" and row[3] == "fixed (#39)" and len(row) == 6 for row in int8)
    assert sum(line.startswith("| volumes | 1 |") for line in lines) == len(only["volumes"]) - 1


def test_precision_asks_for_its_numbers_and_refuses_a_processor_without_bfloat16(place, monkeypatch):
    _, loaded = place
    monkeypatch.setattr("engines.openvino_engine.has_bfloat16", lambda: True)
    rows = run("precision")
    assert {(one[2], one[4]["precision"]) for one in loaded} == {
        (engine, precision) for engine in ("openvino", "openvino-int8") for precision in ("f32", "bf16")
    }
    assert {row["system"] for row in rows} >= {"float32", "bfloat16", "int8", "int8 and bfloat16"}
    monkeypatch.setattr("engines.openvino_engine.has_bfloat16", lambda: False)
    with pytest.raises(SystemExit, match="^accuracy.py: this processor has no bfloat16.*another machine$"):
        run("precision")


def test_each_row_of_the_propagation_is_one_constant_changed_and_the_constants_come_back(place):
    _, loaded = place
    before = tuple(getattr(volumes, name) for name in accuracy.SWEEP)
    rows = run("propagation")
    assert tuple(getattr(volumes, name) for name in accuracy.SWEEP) == before
    used = [one[5] for one in loaded]
    assert all(sum(a != b for a, b in zip(one, before, strict=True)) <= 1 for one in used)
    # beside each constant: the baseline, as set, and with the middle slice asked as drawn
    assert len(set(used)) == 1 + len(accuracy.SWEPT) and len(used) == 3 + len(accuracy.SWEPT)
    assert {row["case"] for row in rows} == {"3D_CT_tiny0.npz"}  # pictures are left out


def test_a_case_that_cannot_be_used_stops_the_measurement_in_one_sentence(place, capsys):
    folder, _ = place
    image = np.arange(600, dtype=np.uint8).reshape(20, 30)
    bad = (
        ("2D_US_none.npz", {"imgs": image}, "neither 'boxes' nor 'gts'"),
        ("2D_US_empty.npz", {"imgs": image, "gts": 0 * image}, "its masks hold no object"),
        ("3D_MR_nospacing.npz", {"imgs": image[None], "gts": (image > 9)[None].astype(np.uint8)}, "no key 'spacing'"),
    )
    for name, arrays, words in bad:
        save_npz(folder / "val" / name, **arrays)
        with pytest.raises(SystemExit) as stop:
            run("differences")
        told = [line for line in [*capsys.readouterr().err.splitlines(), str(stop.value.code)] if words in line]
        assert told and stop.value.code and not (folder / "results").exists()
        (folder / "val" / name).unlink()


def test_what_is_missing_is_told_in_one_sentence(place, capsys):
    folder, loaded = place
    for path in (folder / "val").glob("2D*"):
        path.unlink()
    with pytest.raises(
        SystemExit, match="^accuracy.py: --cases: these folders hold none of the pictures of this table; "
    ):
        run("looseness")
    with pytest.raises(SystemExit, match="no such folder"):
        run("looseness", cases=("nowhere",))
    assert loaded == []
    for arguments in (["table9", "--cases", "val"], ["table4"]):
        with pytest.raises(SystemExit):
            accuracy.main(arguments)
    assert "the following arguments are required: --cases" in capsys.readouterr().err


@pytest.mark.long
def test_the_real_models_make_a_table_of_an_image_and_a_volume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for dims in (2, 3):
        write_training_case(tmp_path / "tiny", tiny_case(dims=dims))
    rows = accuracy.main(["table4", "--cases", "tiny"])
    assert len(rows) == 2 * 6 and all(0 <= row["dsc_strict"] <= 1 for row in rows)
    assert capsys.readouterr().out.splitlines()[-1].startswith("accuracy.py: 2 cases; wrote ")
