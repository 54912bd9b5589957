"""benchmarks/choices.py: both tables come out of tiny data."""

import csv

import choices

from phantoms import tiny_case, write_training_case


def test_changed_inputs_are_scored_on_the_same_boxes(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "INPUTS", {"as trained": [], "gray three times": choices.GRAY_THREE_TIMES})
    for dims in (2, 3):  # the volume is left out
        write_training_case(tmp_path / "cases", tiny_case(0, dims))
    choices.main(["--cases", str(tmp_path / "cases"), "--work", str(tmp_path / "work"), "-o", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "inputs.csv").open()))
    average = {row["input"]: float(row["DSC"]) for row in rows if row["modality"] == "Average"}
    assert set(average) == set(choices.INPUTS) and all(0 < dsc <= 1 for dsc in average.values())
    assert {row["cases"] for row in rows} == {"1"}


def test_runs_differ_in_one_thing_have_equal_length_and_are_kept(tmp_path, monkeypatch):
    commands = []

    class Done:
        returncode = 0

    def run(command):
        commands.append(command)
        out = tmp_path / "work" / f"run{len(commands) - 1}"
        out.mkdir(parents=True)
        (out / "log.csv").write_text("step,validation_dice\n3,0.5\n")
        return Done

    monkeypatch.setattr(choices.subprocess, "run", run)
    arguments = ["--cache", "cache", "--steps", "3", "--work", str(tmp_path / "work"), "-o", str(tmp_path / "out")]
    choices.main(arguments)
    choices.main(arguments)
    assert len(commands) == len(choices.RUNS)
    assert all(c[c.index("--steps") + 1] == "3" and c[c.index("--seed") + 1] == "0" for c in commands)
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert [row["run"] for row in rows] == list(choices.RUNS) and {float(row["Dice"]) for row in rows} == {0.5}
