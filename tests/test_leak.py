"""benchmarks/leak.py: the answer of a neighbour slice and that of another patient, by hand."""

import csv

import leak
import numpy as np
import pytest

from files.case import Case
from files.npz import write_training_case


def test_a_neighbour_answers_well_and_another_patient_does_not(tmp_path):
    for name, shift in (("3D_MR_Set_a", 0), ("3D_MR_Set_b", 10), ("3D_CT_Lone_c", 0)):
        labels = np.zeros((4, 32, 32), np.uint16)
        labels[:, 5:15, 5 + shift : 15 + shift] = 2
        labels[3, 14] = 0  # one of ten rows is missing in the last slice
        case = Case(name, np.zeros(labels.shape, np.uint8), None, labels, (1.0, 1.0, 1.0), True)
        write_training_case(tmp_path / "cases", case)
    leak.main(["--cases", str(tmp_path / "cases"), "-o", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "slices.csv").open()))
    assert len(rows) == 3 * 3 and {row["label"] for row in rows} == {"2"}
    last = [row for row in rows if row["slice"] == "3"]
    assert all(float(row["same patient"]) == pytest.approx(2 * 90 / 190, abs=1e-4) for row in last)
    assert {row["other patient"] for row in rows if "MR" in row["case"]} == {"0.0000"}, "they do not meet"
    assert {row["other patient"] for row in rows if "CT" in row["case"]} == {""}, "there is no other patient"


def test_pictures_alone_are_refused(tmp_path):
    from phantoms import tiny_case

    write_training_case(tmp_path, tiny_case())
    with pytest.raises(SystemExit, match="holds no volume"):
        leak.main(["--cases", str(tmp_path)])
