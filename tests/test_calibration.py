"""benchmarks/calibration.py: agreement of two masks by hand, noise, the table."""

import calibration
import numpy as np
import pytest

from files.npz import write_case
from grid import NO_MASK, MaskPatch
from phantoms import tiny_case


def patch(top, bottom, left, right):
    return MaskPatch(np.ones((bottom - top, right - left), np.float32), slice(top, bottom), slice(left, right))


def test_agreement_by_hand():
    assert calibration.agreement(patch(0, 4, 0, 4), patch(2, 6, 0, 4), (9, 9)) == pytest.approx(0.5)
    assert calibration.agreement(patch(0, 2, 0, 2), patch(5, 9, 5, 9), (9, 9)) == 0
    assert calibration.agreement(patch(0, 2, 0, 2), NO_MASK, (9, 9)) == 0
    assert calibration.agreement(NO_MASK, NO_MASK, (9, 9)) == 1


def test_noise_moves_channels_alike_and_by_no_more_than_asked():
    image = np.full((6, 7, 3), 100, np.uint8)
    moved = calibration.noisy(image, 3).astype(int) - 100
    assert set(np.unique(moved)) <= set(range(-3, 4)) and moved.any() and (moved == moved[..., :1]).all()
    assert np.array_equal(calibration.noisy(image[..., 0], 3) - 100.0, moved[..., 0])


def test_the_table_counts_low_ones():
    rows = [{"set": "a", "pictures": "real", "dice": dice} for dice in (0.9, 0.94, 0.99, 1.0)]
    assert "| a | real | 4 | 0.900 | 0.906 | 0.965 | 2 |" in calibration.agreement_table(rows)


def test_pictures_are_drawn_and_read_with_their_exact_boxes(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "DRAWN", ("2DBox_US_tiny",))
    monkeypatch.setattr(calibration, "CROWDED", ("Microscopy", "US"))
    write_case(tmp_path, tiny_case())
    (tmp_path / "all").mkdir()
    (case,) = (tmp_path / "imgs").iterdir()
    arrays = dict(np.load(case)) | dict(np.load(tmp_path / "gts" / case.name))
    np.savez(tmp_path / "all" / "2DBox_US_a.npz", imgs=arrays["imgs"], gts=arrays["gts"])
    found = calibration.pictures(tmp_path / "all")
    assert list(found) == ["2 drawn", "real"] and [len(cases) for cases in found.values()] == [1, 1]
    for cases in found.values():
        assert cases[0].boxes.shape[1] == 4 and len(cases[0].boxes) == len(np.unique(cases[0].labels)) - 1
