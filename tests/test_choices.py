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
