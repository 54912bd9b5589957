"""benchmarks/choices.py: the table comes out of tiny data."""

import csv

import choices
from fake_model import BrightModel

from files.npz import write_training_case
from phantoms import tiny_case
from presets import PRESETS, override
from segment import Segmenter


def test_changed_inputs_are_scored_on_the_same_boxes(tmp_path, monkeypatch):
    loaded = []

    def load(model, settings):
        loaded.append((model, settings))
        return Segmenter(BrightModel(0.45), override(PRESETS["fixed"], settings), enhanced=True)

    monkeypatch.setattr(choices.engines, "load", load)
    for dims in (2, 3):  # the volume is left out
        write_training_case(tmp_path / "cases", tiny_case(0, dims))
    choices.main(["--cases", str(tmp_path / "cases"), "-o", str(tmp_path / "out")])
    assert loaded == [("proposed", settings) for settings in choices.INPUTS.values()]
    rows = list(csv.DictReader((tmp_path / "out" / "inputs.csv").open()))
    average = {row["input"]: float(row["DSC"]) for row in rows if row["modality"] == "Average"}
    assert set(average) == set(choices.INPUTS) and all(0 < dsc <= 1 for dsc in average.values())
    assert {row["cases"] for row in rows} == {"1"}


def test_equal_runs_are_subtracted_case_by_case_after_the_mean_over_the_seeds():
    def rows(title, seed, values):
        scores = dict.fromkeys(choices.tables.score_names(), 0.5)
        return [{"system": title, "seed": seed, "folder": "val", "case": f"{i}.npz", "modality": "CT", "objects": 1}
                | scores | {"dsc_strict": value} for i, value in enumerate(values)]  # fmt: skip

    found = rows(choices.RAW, 0, [0.5, 0.7]) + rows("released channels", 0, [0.6, 0.9])
    found += rows(choices.RAW, 1, [0.5, 0.7]) + rows("released channels", 1, [0.5, 0.6])
    dsc, nsd = choices.differences(found)
    assert abs(dsc["difference"] - 0.05) < 1e-9 and nsd["difference"] == 0
    assert abs(dsc["least seed"] + 0.05) < 1e-9 and abs(dsc["most seed"] - 0.15) < 1e-9
    assert "| val | released channels | DSC | +5.00 |" in choices.runs_table(found, [dsc, nsd], 30)
    assert len(choices.difference_plot([dsc, nsd]).axes) == 2
