"""benchmarks/differences.py: every variant is loaded and scored on its own kind of case, and the table subtracts `fixed`."""

import csv

import differences
from fake_model import BrightModel

from files.npz import write_training_case
from phantoms import tiny_case
from presets import PRESETS, override
from segment import Segmenter


def test_pictures_and_volumes_are_compared_with_fixed(tmp_path, monkeypatch):
    def load(model, weights, preset, engine, settings=(), force=False):
        return Segmenter(BrightModel(0.45), override(PRESETS[preset], settings), enhanced=True)

    monkeypatch.setattr(differences.engines, "load", load)
    for dims in (2, 3):
        write_training_case(tmp_path / "cases", tiny_case(0, dims))
    differences.main(["--cases", str(tmp_path / "cases"), "-o", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "cases.csv").open()))
    of = {kind: [r["system"] for r in rows if r["case"].startswith(kind)] for kind in ("2D", "3D")}
    both = [differences.FIXED, differences.WHOLE]
    assert sorted(of["2D"]) == sorted([*both, *differences.PICTURES, *differences.INT8])
    assert sorted(of["3D"]) == sorted([*both, *differences.VOLUMES])
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert sum(line.startswith("| pictures | 1 |") for line in lines) == len(of["2D"]) - 1
    assert sum(line.startswith("| volumes | 1 |") for line in lines) == len(of["3D"]) - 1
