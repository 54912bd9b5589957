"""benchmarks/propagation.py: every constant is changed alone, and put back."""

import csv

import propagation
import pytest
from fake_model import BrightModel

import volumes
from files.npz import write_training_case
from phantoms import tiny_case
from presets import PRESETS
from segment import Segmenter


def test_each_row_is_one_constant_changed_and_the_constants_come_back(tmp_path, monkeypatch):
    used = []

    def prompted(segmenter, image, boxes, *rest):
        used.append(tuple(getattr(volumes, name) for name in propagation.SWEEP))
        return volumes_prompted(segmenter, image, boxes, *rest)

    volumes_prompted = volumes.prompted
    monkeypatch.setattr(volumes, "prompted", prompted)
    load = lambda *args: Segmenter(BrightModel(0.4), PRESETS["fixed"], enhanced=False)  # noqa: E731
    monkeypatch.setattr(propagation.engines, "load", load)
    monkeypatch.setattr(propagation, "synthetic_case", lambda modality: tiny_case(1, 3))
    for dims in (2, 3):  # the picture is left out
        write_training_case(tmp_path / "cases", tiny_case(0, dims))
    rows = propagation.main(["--cases", str(tmp_path / "cases"), "-o", str(tmp_path / "out")])
    before = tuple(propagation.AS_SET.values())
    assert tuple(getattr(volumes, name) for name in propagation.SWEEP) == before
    assert all(sum(a != b for a, b in zip(one, before, strict=True)) <= 1 for one in used)
    changed = sum(value != propagation.AS_SET[name] for name, values in propagation.SWEEP.items() for value in values)
    assert len(set(used)) == 1 + changed and len(rows) == (3 + changed) * 4  # a volume and three synthetic ones
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    ours = [row["DSC"] for row in rows if row["system"] == "proposed"]
    line = next(line for line in table if line.startswith("| proposed |"))
    assert len(ours) == 4 and table[0].count("|") == line.count("|")


def test_a_folder_without_volumes_is_told(tmp_path):
    write_training_case(tmp_path / "cases", tiny_case(0, 2))
    with pytest.raises(SystemExit, match="holds no volume"):
        propagation.main(["--cases", str(tmp_path / "cases")])
