"""benchmarks/choices.py: both tables come out of tiny data."""

import csv

import choices
import pytest
from fake_model import BrightModel

from files.npz import write_training_case
from phantoms import tiny_cache, tiny_case
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
    choices.main(["--cases", str(tmp_path / "cases"), "--work", str(tmp_path / "work"), "-o", str(tmp_path / "out")])
    assert loaded == [("proposed", settings) for settings in choices.INPUTS.values()]
    rows = list(csv.DictReader((tmp_path / "out" / "inputs.csv").open()))
    average = {row["input"]: float(row["DSC"]) for row in rows if row["modality"] == "Average"}
    assert set(average) == set(choices.INPUTS) and all(0 < dsc <= 1 for dsc in average.values())
    assert {row["cases"] for row in rows} == {"1"}


def train(tmp_path, *more):
    choices.main(
        ["--cache", "cache", "--steps", "3", "--work", str(tmp_path / "work"), "-o", str(tmp_path / "out"), *more]
    )
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert [row["run"] for row in rows] == list(choices.RUNS)
    return rows


def test_runs_differ_in_one_thing_have_equal_length_and_are_kept(tmp_path, monkeypatch):
    asked = []

    def run_stage(stage, args, extras):
        asked.append((stage, args, extras))
        (args.out / stage.name).mkdir(parents=True)
        (args.out / stage.name / "log.csv").write_text("step,validation_dice\n3,0.5\n")

    monkeypatch.setattr(choices, "run_stage", run_stage)
    train(tmp_path)
    rows = train(tmp_path)
    assert {(float(row["Dice"]), row["images"]) for row in rows} == {(0.5, "18")}
    assert [stage.name for stage, *_ in asked] == [stage for stage, _ in choices.RUNS.values()]
    own = ("out", "set")
    others = [{key: value for key, value in vars(args).items() if key not in own} for _, args, _ in asked]
    assert all(one == others[0] for one in others) and others[0]["teacher_cache"]
    assert {name: others[0][name] for name in ("steps", "validate_every", "seed", "batch", "objects")} == {
        "steps": 3, "validate_every": 3, "seed": 0, "batch": 6, "objects": 2
    }  # fmt: skip
    assert [args.set[2:] for _, args, _ in asked] == [settings for _, settings in choices.RUNS.values()]
    assert {tuple(args.set[:2]) for _, args, _ in asked} == {("jitter=both", "learning_rate=0.0015")}
    assert {(extras.clip, extras.average, extras.weight_decay) for *_, extras in asked} == {(1.0, 0.0, 0.01)}


@pytest.mark.long
def test_a_real_run_of_each_stage_starts_from_random_weights(tmp_path, monkeypatch):
    runs = {name: run for name, run in choices.RUNS.items() if "MedSAM's decoder" in name}
    monkeypatch.setattr(choices, "RUNS", runs)
    cache = tiny_cache(tmp_path / "cache")
    rows = train(tmp_path, "--cache", str(cache), "--steps", "1", "--batch", "1")
    assert len(rows) == 2 and all(0 <= float(row["Dice"]) <= 1 for row in rows)
