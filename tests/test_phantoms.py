"""The demo data: what demo_data/ promises to 04_infer.py, 05_evaluate.py and the figures."""

import json

import cv2
import numpy as np
import pytest

from demo_data import ANNOTATIONS, RECIPES, apply_rule, demo_cases, read_packaged, real_cases, synthetic_case, tiny_case
from demo_data.__main__ import main
from demo_data.drawn import ball, blob, blur, fill_outline
from formats import is_drawn
from formats.case import Case
from formats.intensity import percentile_to_uint8, window_to_uint8
from formats.npz import write_case

MODALITIES = "US Fundus Microscope CT MR".split()


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return demo_cases()


@pytest.fixture(scope="module")
def synthetic() -> list[Case]:
    return [synthetic_case(modality) for modality in RECIPES]


@pytest.fixture(scope="module")
def every(cases, synthetic) -> list[Case]:
    return [case for case in cases if not is_drawn(case.name)] + synthetic


def brute_force_box(mask: np.ndarray) -> list[int]:
    """Inclusive box (x, y[, z] minima, then maxima) by scanning one axis after another."""
    lows, highs = [], []
    for axis in reversed(range(mask.ndim)):  # x first
        used = [i for i in range(mask.shape[axis]) if np.take(mask, i, axis=axis).any()]
        lows.append(used[0])
        highs.append(used[-1])
    return lows + highs


def test_five_modalities_are_there_and_real_ones_are_not_drawn_again(cases, synthetic):
    assert {case.name.split("_")[1] for case in cases} == set(MODALITIES)
    for case, modality in zip(synthetic, RECIPES, strict=True):
        assert case.name == f"{'3DBox' if modality == 'CT' else '2DBox'}_{modality}_synthetic0"
    assert [case.name for case in cases if is_drawn(case.name)] == ["3DBox_CT_synthetic0"]


def test_names_are_unique(cases):
    assert len({c.name for c in cases}) == len(cases) == 9


@pytest.mark.parametrize("modality", RECIPES)
def test_same_seed_same_case_other_seed_other_case(modality, synthetic):
    first = synthetic[list(RECIPES).index(modality)]
    again, other = synthetic_case(modality, 0), synthetic_case(modality, 1)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.image != other.image).mean() > 0.05
    assert (first.labels != other.labels).any()


@pytest.mark.parametrize("dims", [2, 3])
def test_tiny_case_is_tiny_seeded_and_has_two_objects(dims):
    case = tiny_case(3, dims)
    assert case.image.shape == ((64, 80) if dims == 2 else (6, 48, 40))
    assert np.unique(case.labels).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(case.image, tiny_case(3, dims).image)
    assert (case.image != tiny_case(4, dims).image).any()


def test_types_ranges_and_shapes(every):
    for case in every:
        assert case.image.dtype == np.uint8 and case.labels.dtype == np.uint16, case.name
        is_3d = case.name.startswith("3DBox")
        assert (case.spacing_mm is not None) == is_3d, case.name
        assert case.image.shape[: case.labels.ndim] == case.labels.shape and case.labels.ndim == 2 + is_3d, case.name
        assert case.image.shape[case.labels.ndim :] in ((), (3,)), case.name
        assert case.image.max() > 150 and case.image.std() > 10, case.name  # uses the grey scale


def test_labels_run_from_1_to_n_with_one_description_each(every):
    for case in every:
        n = len(case.label_names)
        assert np.unique(case.labels).tolist() == list(range(n + 1)), case.name
        assert all(len(text) > 2 for text in case.label_names), case.name


def test_objects_are_big_enough(every):
    """The challenge drops objects under 100 px in 2D and 1000 voxels in 3D."""
    for case in every:
        least = 100 if case.labels.ndim == 2 else 1000
        assert np.bincount(case.labels.ravel())[1:].min() >= least, case.name


def test_microscopy_has_more_than_100_objects(synthetic):
    assert synthetic[list(RECIPES).index("Microscope")].labels.max() > 100


def test_objects_differ_from_their_surroundings(every):
    """Mean grey level in the object against a ring of 5 px around it, on its largest slice."""
    for case in every:
        for i in range(1, case.labels.max() + 1):
            labels, image = case.labels, case.image
            if labels.ndim == 3:
                z = int(np.argmax((labels == i).sum(axis=(1, 2))))
                labels, image = labels[z], image[z]
            mask = (labels == i).astype(np.uint8)
            ring = cv2.dilate(mask, np.ones((11, 11), np.uint8)).astype(bool) & ~mask.astype(bool)
            difference = image[mask > 0].mean(axis=0) - image[ring].mean(axis=0)  # gray, or one a channel
            assert np.abs(difference).max() > 5, f"{case.name}, object {i}"


def test_written_boxes_are_exact_and_files_round_trip(tmp_path, cases):
    for case in cases:
        path = write_case(tmp_path, case)
        with np.load(path) as stored, np.load(tmp_path / "gts" / path.name) as truth:
            np.testing.assert_array_equal(stored["imgs"], case.image)
            np.testing.assert_array_equal(truth["gts"], case.labels)
            assert stored["boxes"].dtype == np.int64 and truth["gts"].dtype == np.uint8
            some = range(1, case.labels.max() + 1, 1 if case.labels.max() < 20 else 10)
            for i in some:
                assert stored["boxes"][i - 1].tolist() == brute_force_box(case.labels == i), f"{case.name}, object {i}"
            for file in (stored, truth):
                assert ("spacing" in file) == (case.spacing_mm is not None)
    assert not list(tmp_path.rglob("*.tmp"))


def test_more_than_255_objects_are_stored_in_16_bits(tmp_path):
    labels = np.repeat(np.repeat(np.arange(1, 301, dtype=np.uint16).reshape(15, 20), 2, axis=0), 2, axis=1)
    path = write_case(tmp_path, Case("2DBox_Microscope_many", labels.astype(np.uint8), None, labels, None, False))
    with np.load(tmp_path / "gts" / path.name) as truth:
        assert truth["gts"].dtype == np.uint16 and truth["gts"].max() == 300


def test_spacing_is_zyx_in_memory_and_xyz_in_files(tmp_path, synthetic):
    ct = synthetic[list(RECIPES).index("CT")]
    assert ct.spacing_mm == (8.0, 1.8, 1.8)  # thick slices
    with np.load(write_case(tmp_path, ct)) as stored:
        assert stored["spacing"].dtype == np.float64 and stored["spacing"].tolist() == [1.8, 1.8, 8.0]


def test_real_images_are_read_and_their_outlines_lie_inside():
    cases = real_cases()
    assert len(cases) == 8
    assert {c.name.split("_")[1] for c in cases} == {"Fundus", "Microscope", "MR", "CT", "US"}
    entries = json.loads(ANNOTATIONS.read_text(encoding="utf-8"))["images"]
    for case, entry in zip(cases, entries, strict=True):
        assert entry["licence"] and entry["source"], case.name
        assert case.labels.max() == len(entry["objects"]), case.name
        x0, y0, x1, y1 = entry.get("crop", (0, 0, case.labels.shape[1], case.labels.shape[0]))
        assert case.labels.shape == (y1 - y0, x1 - x0), case.name
        for i, item in enumerate(entry["objects"]):
            drawn = np.array(item["outline"]) - (x0, y0)
            size = np.array(case.labels.shape[::-1]) - 1
            low, high = np.clip(drawn.min(axis=0), 0, size), np.clip(drawn.max(axis=0), 0, size)
            box = np.array(brute_force_box(case.labels == i + 1))
            assert (box[:2] >= low - 3).all() and (box[2:] <= high + 3).all(), f"{case.name}, object {i + 1} outside"
            assert (box[2:] - box[:2] > 0.6 * (high - low)).all(), f"{case.name}, object {i + 1} lost by its rule"


def test_annotations_say_that_they_are_no_reference_standard():
    about = json.loads(ANNOTATIONS.read_text(encoding="utf-8"))["about"]
    assert "ours" in about and "without clinical training" in about and "no reference standard" in about


def test_a_filled_outline_has_the_area_of_its_circle():
    turn = np.arange(16) * 2 * np.pi / 16
    area = fill_outline(50 + 30 * np.stack([np.cos(turn), np.sin(turn)], axis=1), (101, 101)).sum()
    assert area == pytest.approx(np.pi * 30**2, rel=0.04)  # the filled polygon holds the pixels on its border too


def test_rule_keeps_the_largest_bright_piece_and_fills_its_hole():
    image = np.zeros((20, 30), np.uint8)
    image[2:12, 2:12], image[5:8, 5:8] = 200, 0  # a square with a hole
    image[15:18, 20:25] = 200  # a smaller piece
    kept = apply_rule(np.ones(image.shape, bool), image, {"above": 100})
    want = np.zeros(image.shape, bool)
    want[2:12, 2:12] = True
    np.testing.assert_array_equal(kept, want)


def test_windows_map_their_ends_to_black_and_white():
    hounsfield = np.array([[-161.0, -160.0, 240.0, 900.0]])
    assert window_to_uint8(hounsfield).tolist() == [[0, 0, 255, 255]]
    ramp = np.arange(1, 1002, dtype=float).reshape(7, 143)
    assert percentile_to_uint8(ramp).ravel()[[0, 5, 500, -6, -1]].tolist() == [0, 0, 127, 255, 255]


def test_ellipses_have_the_volume_of_the_formula():
    area = (blob(np.random.default_rng(0), (200, 300), (0.5, 0.5), (0.3, 0.2)) < 1).sum()
    assert area == pytest.approx(np.pi * 60 * 60, rel=0.01)
    volume = (ball((40, 50, 60), (0.5, 0.5, 0.5), (0.4, 0.4, 0.4)) < 1).sum()
    assert volume == pytest.approx(4 / 3 * np.pi * 16 * 20 * 24, rel=0.02)


def test_blur_keeps_the_sum_and_spreads_by_sigma_along_each_axis():
    point = np.zeros((21, 41, 61), np.float32)
    point[10, 20, 30] = 1
    smooth = blur(point, (1.0, 2.0, 3.0))
    assert smooth.sum() == pytest.approx(1, abs=1e-4)
    for axis, sigma in enumerate((1.0, 2.0, 3.0)):
        profile = smooth.sum(axis=tuple(a for a in range(3) if a != axis))
        offset = np.arange(point.shape[axis]) - point.shape[axis] // 2
        assert np.sqrt((profile * offset**2).sum()) == pytest.approx(sigma, rel=0.03)


def test_smoke_writes_two_small_cases_and_names_the_next_command(tmp_path, capsys):
    main(["--smoke", "--out", str(tmp_path)])
    for folder in ("imgs", "gts"):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == ["2DBox_US_tiny0.npz", "3DBox_CT_tiny0.npz"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # one a case, and the summary
    assert f"Next: python 04_infer.py -i {tmp_path / 'imgs'} -o {tmp_path / 'segs'} --model baseline" in lines[-1]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="'XRay'.*Fundus"):
        synthetic_case("XRay")


def test_a_missing_packaged_image_says_what_to_install():
    with pytest.raises(FileNotFoundError, match="install the skimage that requirements.txt names"):
        read_packaged("skimage", "data/no_such_image.png", "picture")
