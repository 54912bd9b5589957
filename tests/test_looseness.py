"""benchmarks/looseness.py: a row for each folder, kind of boxes and system; the figure shows what the table says."""

import csv

import looseness
import numpy as np
import pytest
from fake_model import BrightModel

from files.npz import write_training_case
from phantoms import tiny_case
from presets import PRESETS
from segment import Segmenter


@pytest.fixture
def means(tmp_path, monkeypatch):
    def load(model, weights, preset, engine):
        return Segmenter(BrightModel(0.4), PRESETS[preset], enhanced=False)

    monkeypatch.setattr(looseness.table4.engines, "load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours.pt").write_bytes(b"weights")
    row = looseness.table4.segment.MODELS["baseline"]._replace(weights=lambda: tmp_path / "ours.pt")
    monkeypatch.setitem(looseness.table4.segment.MODELS, "baseline", row)
    for seed, folder in enumerate(("val", "other")):
        write_training_case(tmp_path / folder, tiny_case(seed, 2))
        write_training_case(tmp_path / folder, tiny_case(seed, 3))  # left out
    return looseness.main(["--cases", "val", "other", "--weights", "ours.pt", "-o", "results"])


def test_every_folder_and_kind_of_boxes_has_its_row(means, tmp_path):
    assert len(means) == 2 * 4 * 3 and all(line["cases"] == 1 for line in means)
    with (tmp_path / "results" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 4 and {row["folder"] for row in rows} == {"val", "other"}
    table = (tmp_path / "results" / "table.md").read_text().splitlines()
    assert table[2].count("|") == table[3].count("|") == table[4].count("|") == 11
    ours = next(
        line for line in means if (line["folder"], line["boxes"], line["system"]) == ("other", "exact", "proposed")
    )
    cells = [cell.strip() for cell in table[8].split("|")[1:-1]]
    assert cells[:2] == ["other", "exact"] and cells[4:6] == [f"{100 * ours['DSC']:.1f}", f"{100 * ours['NSD']:.1f}"]
    assert cells[8].startswith("+0.0"), "both systems are the same stand-in"


def test_the_ellipse_gets_worse_as_boxes_get_looser_and_the_figure_shows_the_means(means):
    dsc = [line["DSC"] for line in means if (line["folder"], line["system"]) == ("val", "inscribed ellipse")]
    assert dsc[0] > dsc[2] > dsc[3]
    line = looseness.looseness_plot(means).axes[0].lines[2]
    assert np.allclose(line.get_ydata(), 100 * np.array(dsc))
