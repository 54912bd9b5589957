"""formats/ and the seam of segment.py: what is a case, what is refused and in which words, and that no half file stays."""

import importlib
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from fake_model import BrightModel

from data import load_entry
from demo_data import tiny_case
from formats import SUBMODALITIES, InputError, bare_name, modality_of, patient_of, submodality_of
from formats.case import Case, check_boxes, check_image, check_labels, spacing_zyx
from formats.npz import load_npz, read_npz
from formats.pictures import read_image
from formats.readers import READERS, list_cases, read_case
from formats.writing import save_image, save_json, save_npz, save_text
from grid import boxes_from_labels, resize_labels_to_grid
from presets import PRESETS
from segment import Segmenter

HERE = Path("case.npz")  # the name that the checks put in front of their sentences
GRAY = np.arange(120, dtype=np.uint8).reshape(10, 12)
VOLUME = np.arange(5 * 8 * 9, dtype=np.uint16).reshape(5, 8, 9).astype(np.uint8)
LABELS = np.kron(np.array([[0, 1], [2, 0]], np.uint8), np.ones((5, 6), np.uint8))  # (10, 12), two objects


def sentence(function, *args):
    """What `function` refuses its arguments with: one line."""
    with pytest.raises(InputError) as refused:
        function(*args)
    text = str(refused.value)
    assert "\n" not in text and len(text) > 20
    return text


def save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


SPELLINGS = {
    "X-Ray": "2DBox_X-Ray_0053 2DBox_XRay_1 2DBox_CXR_1 2DBox_XR_1 XRay_Chest_1 hipxray_1 teeth_12 2D_x-ray_1",
    "US": "2DBox_US_1 2DBox_Ultra_1 2DBox_Ultrasound_1 US_Breast_1 microUS_train_3 2DBox_microUS_1 2DBox_US",
    "Endoscopy": "2DBox_Endoscopy_1 2DBox_Endoscope_1 Endoscopy_Kvasir_1",
    "Dermoscopy": "2DBox_Dermoscopy_1 2DBox_Dermoscope_1 Dermoscopy_ISIC_1",
    "Microscopy": "2DBox_Microscopy_1 2DBox_Microscope_0 Microscopy_NeurIPS_1 nuclei_1",
    "OCT": "2DBox_OCT_1 OCT_Retouch_1-012 3DBox_OCT_2",
    "CT": "2DBox_CT_1 3DBox_CT_1 CT_AMOS_x CT_COVID-19-20-CT-SegChallenge_1 CT_CT-ORG_2 CT_TotalSeg_1-012 btcv_1",
    "MR": "3DBox_MR_1 2DBox_MRI_1 MR_BraTS_FLAIR-1 MR_QIN-PROSTATE-Lesion_1 3D_MR_MSDHippocampus_114",
    "PET": "3DBox_PET_1 2DBox_PETs_1 PET_AutoPET_1",
    "Mammography": "2DBox_Mammography_demo Mammo_CDD_1 Mamm_1",
    "Fundus": "2DBox_Fundus_1 Fundus_REFUGE_1",
    "Other": "2DBox_Thermal_1 scan 2DBox 3D _CT_1 x",
}


@pytest.mark.parametrize("modality, name", [(m, name) for m, names in SPELLINGS.items() for name in names.split()])
def test_every_spelling_of_the_challenge_is_known(modality, name):
    assert modality_of(name) == modality


@pytest.mark.parametrize(
    "name, group",
    [
        ("CT_AMOS_amos_0001-012", "CT_AMOS"),
        ("CT_COVID-19-20-CT-SegChallenge_0001", "CT_COVID-19-20-CT-SegChallenge"),
        ("MR_AMOSMR_amos_0507", "MR_AMOSMR"),
        ("MR_QIN-PROSTATE-Lesion_a_1", "MR_QIN-PROSTATE-Lesion"),
        ("Mamm_CDD-CESM_P1", "Mammo"),
        ("2D_Mammography_CDDCESM_P161-L-CM-MLO", "Mammo"),
        ("2DBox_X-Ray_0053", "XRay"),
        ("2D_XRay_JSRT_JPCLN109", "XRay"),
        ("CXR_some_1", "XRay"),
        ("2DBox_Microscope_0001", "Microscopy"),
        ("microUS_train_02", "microUS"),
        ("2D_US_Nerve_17-52", "US"),
        ("3D_PET_STS_STS-024", "PET"),
        ("3D_MR_MSDHippocampus_114", "MR_MSDHippocampus"),
        ("3D_CT_STS_STS-031", "CT_STS"),
        ("3DBox_CT_0012", "CT"),
        ("teeth_3", "teeth"),
    ],
)
def test_names_go_to_the_groups_of_the_sampler(name, group):
    assert submodality_of(name) == group


def test_there_are_34_groups():
    assert len(SUBMODALITIES) == len(set(SUBMODALITIES)) == 34


@pytest.mark.parametrize(
    "name, patient",
    [
        ("2D_CT_CURVAS_10007-532", "CT_CURVAS_10007"),
        ("2D_US_Nerve_17-52", "US_Nerve_17"),
        ("2D_Mammography_CDDCESM_P161-L-CM-MLO", "Mammography_CDDCESM_P161"),
        ("2D_Microscopy_WBC1_169-nucleus", "Microscopy_WBC1_169"),
        ("2D_XRay_Shenzhen_CHNCXR-0090-0", "XRay_Shenzhen_CHNCXR-0090"),
        ("2D_Dermoscopy_ISIC2017_ISIC-0014572", "Dermoscopy_ISIC2017_ISIC-0014572"),  # not one patient, ISIC
        ("3D_CT_STS_STS-031", "CT_STS_STS-031"),
        ("3D_CT_STS_STS-031-017", "CT_STS_STS-031"),  # a slice of the line above
        ("MR_BraTS_T1_bratssample-12-034", "MR_BraTS_T1_bratssample-12"),
        ("3D_MR_MSDHippocampus_114", "MR_MSDHippocampus_114"),
        ("US_a-b", "US_a-b"),
        ("scan", "scan"),
    ],
)
def test_patients_are_read_from_names(name, patient):
    assert patient_of(name) == patient
    assert bare_name(name) == name.removeprefix("2D_").removeprefix("3D_")


def test_spacing_is_turned_to_array_order():
    assert spacing_zyx(np.array([0.7, 0.8, 5.0])) == (5.0, 0.8, 0.7)  # stored x, y, z


@pytest.mark.parametrize("spacing", [[1.0, 1.0], [1, 1, 0], [1, 1, -2], [1, np.nan, 1], [1, 1, np.inf], 1.0])
def test_spacing_must_be_three_positive_numbers(spacing):
    with pytest.raises(ValueError, match="three positive numbers"):
        spacing_zyx(np.array(spacing))


@pytest.mark.parametrize("image, is_3d", [(GRAY, False), (np.stack([GRAY] * 3, -1), False), (VOLUME, True)])
def test_images_of_8_bits_pass_unchanged(image, is_3d):
    assert check_image(image, is_3d, HERE) is image


@pytest.mark.parametrize("dtype", ["int16", ">u2", "int64", "float32", "float16"])
def test_other_numbers_within_0_to_255_become_8_bits(dtype):
    found = check_image(GRAY.astype(dtype), False, HERE)
    assert found.dtype == np.uint8 and np.array_equal(found, GRAY)


def test_floats_are_rounded_not_truncated():
    assert check_image(np.array([[0.4, 0.6, 254.6, 255.0]]), False, HERE).tolist() == [[0, 1, 255, 255]]
    assert not check_image(np.zeros((2, 2)), False, HERE).any()  # black is no float in 0..1


BAD_IMAGES = {
    "float 0..1": (GRAY / 255.0, False, "float in 0..1, expected 0..255; multiply it by 255"),
    "nan": (np.where(GRAY == 5, np.nan, GRAY), False, "NaN or infinity"),
    "infinity": (np.where(GRAY == 5, np.inf, GRAY), False, "NaN or infinity"),
    "negative": (GRAY.astype(int) - 1, False, "ranges from -1 to 118"),
    "16 bit": (GRAY.astype(np.uint16) * 100, False, "ranges from 0 to 11900"),
    "CT numbers": (VOLUME.astype(np.int16) - 1000, True, "ranges from -1000 to -745"),
    "1D": (GRAY[0], False, "shape (12,), expected (H, W) or (H, W, 3)"),
    "alpha": (np.zeros((4, 5, 4), np.uint8), False, "shape (4, 5, 4)"),
    "2D volume": (GRAY, True, "shape (10, 12), expected (D, H, W)"),
    "4D color": (np.zeros((2, 3, 4, 3), np.uint8), False, "shape (2, 3, 4, 3)"),
    "empty": (np.zeros((0, 5), np.uint8), False, "is empty"),
    "text": (np.array([["a", "b"]]), False, "has dtype <U1"),
    "yes and no": (GRAY > 3, False, "has dtype bool"),
}


@pytest.mark.parametrize("image, is_3d, words", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_refused(image, is_3d, words):
    text = sentence(check_image, image, is_3d, HERE)
    assert text.startswith("case.npz: 'imgs' ") and words in text


def test_label_maps_become_16_bits_and_bad_ones_are_refused():
    assert check_labels(LABELS.astype(np.int64) * 30_000, (10, 12), HERE).max() == 60_000
    assert check_labels(LABELS > 0, (10, 12), HERE).dtype == np.uint16
    assert "shape (10, 12) but the image has (12, 10)" in sentence(check_labels, LABELS, (12, 10), HERE)
    assert "float64, expected whole numbers" in sentence(check_labels, LABELS / 2, (10, 12), HERE)
    assert "range from -1 to 1" in sentence(check_labels, LABELS.astype(int) - 1, (10, 12), HERE)
    assert "to 80000, allowed" in sentence(check_labels, LABELS.astype(int) * 40_000, (10, 12), HERE)


BAD_BOXES = {  # for an image of 10 x 12 and a volume of 5 x 8 x 9 pixels
    "x swapped": ([[8, 2, 3, 6]], "box 0 [8.0, 2.0, 3.0, 6.0] is swapped or without area"),
    "y swapped": ([[1, 1, 2, 2], [3, 6, 8, 2]], "box 1 [3.0, 6.0, 8.0, 2.0] is swapped"),
    "no width": ([[3, 2, 3, 6]], "without area"),
    "no height": ([[3, 2, 5, 2]], "without area"),
    "left": ([[-1, 2, 3, 6]], "outside the image of size [12 10] (x, y, z)"),
    "y as x": ([[1, 2, 13, 6]], "outside the image"),
    "nan": ([[1, 2, np.nan, 6]], "must hold finite numbers (dtype float64)"),
    "text": ([["1", "2", "3", "6"]], "must hold finite numbers (dtype <U1)"),
    "columns": ([[1, 2, 3]], "shape (1, 3), expected (N, 4)"),
    "6 columns in 2D": ([[1, 2, 0, 3, 6, 0]], "expected (N, 4)"),
    "none": (np.zeros((0, 4)), "'boxes' is empty"),
    "more than labels": (np.tile([1, 1, 2, 2], (65_536, 1)), "65536 boxes, more than the 65535 labels"),
    "3D z swapped": ([[1, 2, 3, 4, 5, 2]], "swapped"),
    "3D z above": ([[1, 2, 3, 4, 5, 5]], "outside the image of size [9 8 5]"),  # slices are 0..4
    "3D z below": ([[1, 2, -1, 4, 5, 2]], "boxes are x_min y_min z_min x_max y_max z_max"),
    "3D no area": ([[1, 2, 0, 1, 5, 3]], "without area"),
    "3D 4 columns": ([[1, 2, 4, 5]], "expected (N, 6)"),
}


@pytest.mark.parametrize("name, boxes, words", [(name, *bad) for name, bad in BAD_BOXES.items()])
def test_bad_boxes_are_refused(name, boxes, words):
    grid = VOLUME.shape if name.startswith("3D ") else (10, 12)
    assert words in sentence(check_boxes, np.array(boxes), grid, HERE)


def test_good_boxes_become_float64_and_keep_their_values():
    whole = check_boxes(np.array([[0, 0, 12, 10], [3, 2, 4, 3]], np.uint16), (10, 12), HERE)  # exclusive maxima too
    assert whole.dtype == np.float64 and whole.tolist() == [[0, 0, 12, 10], [3, 2, 4, 3]]
    one_slice = check_boxes(np.array([[1, 2, 4, 4, 5, 4]]), VOLUME.shape, HERE)  # the last slice alone
    assert one_slice.tolist() == [[1, 2, 4, 4, 5, 4]]


BOXES = np.array([[6, 0, 11, 4], [0, 5, 5, 9]])


def test_a_case_of_the_challenge_is_read(tmp_path):
    case = read_npz(save(tmp_path / "2DBox_US_a.npz", imgs=GRAY, boxes=BOXES))
    assert (case.name, case.is_3d, case.labels, case.spacing_mm) == ("2DBox_US_a", False, None, None)
    assert np.array_equal(case.image, GRAY) and np.array_equal(case.boxes, BOXES)


def test_a_training_case_has_labels_and_boxes_only_if_asked(tmp_path):
    path = save(tmp_path / "US_Breast_a.npz", imgs=GRAY, gts=LABELS)
    case = read_npz(path)
    assert case.boxes is None and case.labels.dtype == np.uint16 and np.array_equal(case.labels, LABELS)
    assert read_case(path, boxes_from_masks=True).boxes.tolist() == BOXES.tolist()


def test_boxes_from_masks_win_over_stored_ones_and_may_be_one_pixel(tmp_path):
    gts = np.zeros_like(LABELS)
    gts[3, 4] = 1
    case = read_case(save(tmp_path / "a.npz", imgs=GRAY, gts=gts, boxes=BOXES), boxes_from_masks=True)
    assert case.boxes.tolist() == [[4, 3, 4, 3]]


VOLUME_BOX, SPACING = np.array([[1, 2, 0, 5, 6, 4]]), np.array([0.5, 0.6, 3.0])
RGB = np.zeros((5, 8, 3), np.uint8)
DIMENSIONS = {  # file name, arrays -> is_3d
    "3D by name": ("3DBox_CT_a", {"imgs": VOLUME, "gts": np.ones_like(VOLUME)}, True),
    "3D by boxes": ("scan", {"imgs": VOLUME, "boxes": VOLUME_BOX}, True),
    "3D by spacing": ("CT_AMOS_a", {"imgs": VOLUME, "gts": np.ones_like(VOLUME), "spacing": SPACING}, True),
    "2D by name": ("2D_CT_a", {"imgs": RGB, "boxes": np.array([[1, 1, 4, 4]]), "spacing": SPACING}, False),
    "2D by boxes": ("scan", {"imgs": RGB, "boxes": np.array([[1, 1, 4, 4]]), "spacing": SPACING}, False),
    "2D else": ("scan", {"imgs": RGB, "gts": np.ones((5, 8), int)}, False),
}


@pytest.mark.parametrize("name, arrays, is_3d", DIMENSIONS.values(), ids=DIMENSIONS)
def test_name_then_boxes_then_spacing_say_how_many_dimensions(tmp_path, name, arrays, is_3d):
    case = read_npz(save(tmp_path / f"{name}.npz", **arrays))
    assert case.is_3d == is_3d and case.image.shape == arrays["imgs"].shape
    assert case.spacing_mm == ((3.0, 0.6, 0.5) if is_3d and "spacing" in arrays else None)


BAD_FILES = {  # arrays -> what the sentence says
    "no imgs": ({"image": GRAY}, "has no key 'imgs' (found ['image'])"),
    "nothing to prompt with": ({"imgs": GRAY}, "has neither 'boxes' nor 'gts'"),
    "gts of another shape": ({"imgs": GRAY, "gts": LABELS.T}, "(12, 10)"),
    "boxes outside": ({"imgs": GRAY, "boxes": BOXES + 3}, "outside the image"),
    "volume called 2D": ({"imgs": np.zeros((5, 6, 7), np.uint8), "boxes": BOXES}, "expected (H, W) or (H, W, 3)"),
    "text for boxes": ({"imgs": GRAY, "boxes": np.array("none")}, "'boxes' has shape ()"),
    "no spacing": ({"imgs": VOLUME, "boxes": VOLUME_BOX, "spacing": np.zeros(3)}, "correct the key 'spacing'"),
}


@pytest.mark.parametrize("arrays, words", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(tmp_path, arrays, words):
    path = save(tmp_path / "scan.npz", **arrays)
    text = sentence(read_npz, path)
    assert text.startswith(f"{path}: ") and words in text


def test_masks_that_give_no_box_are_refused(tmp_path):
    assert "holds no masks to take boxes from (in .npz the key 'gts'" in sentence(
        read_case, save(tmp_path / "a.npz", imgs=GRAY, boxes=BOXES), True
    )
    assert "its masks hold no object" in sentence(read_case, save(tmp_path / "b.npz", imgs=GRAY, gts=0 * LABELS), True)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_an_object_array_is_refused_and_its_code_does_not_run(tmp_path):
    armed = np.array([Bomb(tmp_path / "ran")], dtype=object)
    path = save(tmp_path / "a.npz", imgs=GRAY, boxes=armed)
    assert "object array" in sentence(read_npz, path)
    armed.dump(tmp_path / "b.npz")  # a bare pickle
    assert "pickle" in sentence(read_npz, tmp_path / "b.npz")
    assert not (tmp_path / "ran").exists()
    with np.load(path, allow_pickle=True) as stored:
        assert stored["boxes"] is not None
    assert (tmp_path / "ran").is_dir()  # the bomb was a real one


def test_what_is_no_whole_npz_file_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    assert "no such file" in sentence(read_npz, path)
    whole = save(path, imgs=GRAY, boxes=BOXES).read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        sentence(read_npz, path)
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in sentence(read_npz, path)
    path.write_bytes(b"plain text")
    assert "no .npz file" in sentence(read_npz, path)
    with path.open("wb") as file:
        np.save(file, GRAY)  # .npy called .npz
    assert "single arrays, object arrays and pickles" in sentence(read_npz, path)


def test_damaged_bytes_are_refused_or_harmless(tmp_path):
    path, rng = tmp_path / "a.npz", np.random.default_rng(0)
    whole = save(path, imgs=GRAY, boxes=BOXES).read_bytes()
    for _ in range(400):
        at, value = rng.integers(len(whole)), rng.integers(256)
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        try:
            assert read_npz(path).image.dtype == np.uint8
        except InputError as error:
            assert "\n" not in str(error)
    header = whole.rindex(b"PK\x01\x02")  # of the last member, in the zip's directory: byte 8 says "encrypted"
    path.write_bytes(whole[: header + 8] + b"\x01" + whole[header + 9 :])
    assert "damaged" in sentence(load_npz, path)


def test_a_folder_lists_its_cases_by_name(tmp_path):
    assert "python -m demo_data" in sentence(list_cases, tmp_path / "missing")
    assert "holds no case (.bmp, " in sentence(list_cases, tmp_path)
    for name in ("b.npz", "a.npz", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_cases(tmp_path)] == ["a.npz", "b.npz"]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_gray_and_color_images_come_back_in_rgb_order(tmp_path, suffix):
    rgb = np.stack([GRAY, GRAY // 2, 200 - GRAY], -1)
    for name, wanted in (("gray", GRAY), ("Äußerst_größe_漢", rgb)):
        pixels = wanted if wanted.ndim == 2 else wanted[..., ::-1]  # OpenCV writes BGR
        cv2.imencode(suffix, pixels)[1].tofile(tmp_path / f"{name}{suffix}")
        found = read_image(tmp_path / f"{name}{suffix}")
        assert found.dtype == np.uint8 and np.array_equal(found, wanted)


def test_alpha_is_dropped(tmp_path):
    rgb = np.stack([GRAY, GRAY // 2, 200 - GRAY], -1)
    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([rgb[..., ::-1], np.zeros_like(GRAY)]))  # fully transparent
    assert np.array_equal(read_image(tmp_path / "a.png"), rgb)


def test_16_bit_images_become_grey_levels_by_percentiles(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), GRAY.astype(np.uint16) * 500)
    found, (low, high) = read_image(tmp_path / "a.png"), np.percentile(np.arange(1, 120) * 500, (0.5, 99.5))
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.clip((GRAY * 500.0 - low) / (high - low) * 255, 0, 255).astype(np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), GRAY.astype(np.uint16))  # 16 bits that hold 8
    assert np.array_equal(read_image(tmp_path / "b.png"), GRAY)


PNG = cv2.imencode(".png", GRAY)[1].tobytes()
HEADER = b"IHDR" + struct.pack(">II", 60_000, 60_000) + PNG[24:29]  # says that it has more pixels than OpenCV reads
HUGE = PNG[:12] + HEADER + struct.pack(">I", zlib.crc32(HEADER)) + PNG[33:]


@pytest.mark.parametrize("content", [b"", b"plain text", PNG[:60], HUGE], ids=["empty", "text", "cut", "huge"])
def test_what_opencv_cannot_read_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert "not an image that OpenCV can read" in sentence(read_image, tmp_path / "a.png")


def test_a_missing_image_and_a_folder_are_refused(tmp_path):
    assert "no such file" in sentence(read_image, tmp_path / "a.png")
    assert "no such file" in sentence(read_image, tmp_path)


def test_what_is_written_comes_back_and_folders_are_made(tmp_path):
    folder = tmp_path / "new" / "folder"
    save_npz(folder / "a.npz", segs=LABELS, more=BOXES)
    assert np.array_equal(load_npz(folder / "a.npz")["segs"], LABELS) and "more" in load_npz(folder / "a.npz")
    rgb = np.stack([GRAY, GRAY // 2, 200 - GRAY], -1)
    for image in (GRAY, rgb):
        save_image(folder / "a.png", image)
        assert np.array_equal(read_image(folder / "a.png"), image)
    save_image(folder / "b.png", GRAY.astype(np.uint16) * 500)
    assert cv2.imread(str(folder / "b.png"), cv2.IMREAD_UNCHANGED).max() == 59_500
    save_json(folder / "a.json", {"path": Path("x"), "n": 1})
    assert json.loads((folder / "a.json").read_text()) == {"path": "x", "n": 1}
    save_text(folder / "a.txt", "ä\nb\n")
    assert (folder / "a.txt").read_bytes() == b"\xc3\xa4\nb\n"
    assert sorted(p.name for p in folder.iterdir()) == ["a.json", "a.npz", "a.png", "a.txt", "b.png"]


@pytest.mark.parametrize("place, step", [(Path, "write_bytes"), (os, "replace")])
@pytest.mark.parametrize("stop", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch, place, step, stop):
    def fail(path, _):
        path.write_text("ha")  # half of it is there, then
        raise stop

    save_text(tmp_path / "a.txt", "old")
    with monkeypatch.context() as broken:
        broken.setattr(place, step, fail)
        for name in ("a.txt", "new.txt"):
            with pytest.raises(type(stop)):
                save_text(tmp_path / name, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_photo_is_read_as_viewers_show_it(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.fromarray(np.zeros((40, 80), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (80, 40)


def test_a_tiff_of_several_pages_is_refused(tmp_path):
    from PIL import Image

    page = Image.fromarray(np.zeros((8, 9), np.uint8))
    page.save(tmp_path / "one.tif")
    page.save(tmp_path / "two.tif", save_all=True, append_images=[page])
    assert read_image(tmp_path / "one.tif").shape == (8, 9)
    with pytest.raises(InputError, match="several pages"):
        read_image(tmp_path / "two.tif")


# A new format, and the seam of segment.py


def read_toy(path):
    """A format of somebody else: grey levels and label numbers as text, one line each and a line of the width."""
    width, image, labels = (np.array(line.split(), int) for line in path.read_text().splitlines())
    image, labels = (a.reshape(-1, width.item()).astype(kind) for a, kind in ((image, np.uint8), (labels, np.uint16)))
    return Case(path.stem, image, boxes_from_labels(labels)[1], labels, None, False)


@pytest.mark.parametrize("ending", [".toy", ".toy.txt"])
def test_a_new_format_is_one_function_and_one_row(tmp_path, monkeypatch, ending):
    monkeypatch.setitem(READERS, ending, read_toy)
    cases = [tiny_case(seed) for seed in range(2)]
    (tmp_path / "toys").mkdir()
    for case in cases:
        lines = (" ".join(map(str, a.ravel())) for a in (np.array(case.image.shape[1]), case.image, case.labels))
        (tmp_path / "toys" / f"{case.name}{ending}").write_text("\n".join(lines))
    preprocess, infer = (importlib.import_module(name) for name in ("01_preprocess", "04_infer"))

    cached = preprocess.main(["-i", str(tmp_path / "toys"), "-o", str(tmp_path / "cache"), "--jobs", "1"])
    assert [(entry.name, entry.objects, entry.source) for entry in cached] == [
        (case.name, 2, f"{case.name}{ending}") for case in cases
    ]
    small = resize_labels_to_grid(cases[0].labels)
    assert np.array_equal(load_entry(tmp_path / "cache", cached[0])[1][: len(small)], small)

    monkeypatch.setattr("segment.load", lambda *args, **options: Segmenter(BrightModel(), PRESETS["fixed"], False))
    infer.main(["-i", str(tmp_path / "toys"), "-o", str(tmp_path / "segs"), "--boxes-from-masks"])
    for case in cases:
        found = load_npz(tmp_path / "segs" / f"{case.name}.npz")["segs"]
        for label in (1, 2):
            a, b = found == label, case.labels == label
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.8


def test_one_folder_with_a_case_in_two_formats_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(READERS, ".toy", read_toy)
    save_npz(tmp_path / "a" / "US_x.npz", imgs=GRAY, gts=LABELS)
    (tmp_path / "a" / "US_x.toy").write_text("1\n1\n1")
    with pytest.raises(SystemExit, match="1 of 2 files done, 1 left out"):
        importlib.import_module("01_preprocess").main(["-i", str(tmp_path / "a"), "-o", str(tmp_path / "b")])
    assert f"US_x.toy: {tmp_path / 'a'} holds a case of this name too, which is kept" in capsys.readouterr().err


def test_an_unknown_ending_is_told_with_the_known_ones(tmp_path):
    assert "no known format; known endings are .npz, .png" in sentence(read_case, tmp_path / "a.gif")


@pytest.fixture
def segmenter():
    return Segmenter(BrightModel(), PRESETS["fixed"], enhanced=False)


@pytest.mark.parametrize(
    "boxes, words",
    [
        ([2, 1, 8, 6], "'boxes' has shape (4,), expected (N, 4)"),
        ([[8, 1, 2, 6]], "box 0 [8.0, 1.0, 2.0, 6.0] is swapped"),
        ([[2, 1, 8, 6], [2, 1, 13, 6]], "box 1 [2.0, 1.0, 13.0, 6.0] is outside the image of size [12 10]"),
    ],
)
def test_bad_boxes_are_refused_also_at_a_python_prompt(segmenter, boxes, words):
    text = sentence(segmenter.masks, segmenter.embed(GRAY), np.array(boxes), GRAY.shape)
    assert text.startswith("Segmenter.masks: ") and words in text


@pytest.mark.parametrize(
    "image, words",
    [
        (GRAY / 255.0, "float in 0..1, expected 0..255; multiply it by 255"),
        (GRAY[0], "shape (12,), expected (H, W) or (H, W, 3)"),
        (VOLUME, "shape (5, 8, 9), expected (H, W) or (H, W, 3)"),
    ],
)
def test_bad_images_are_refused_also_at_a_python_prompt(segmenter, image, words):
    text = sentence(segmenter.embed, image)
    assert text.startswith("Segmenter.embed: ") and words in text
    assert segmenter.engine.encoded == 0


def test_masks_returns_labels_each_objects_own_mask_and_its_iou():
    segmenter = Segmenter(BrightModel(), replace(PRESETS["fixed"], overlap="last"), enhanced=False)
    image = np.zeros((64, 96), np.uint8)
    image[8:40, 8:60] = 200
    boxes = np.array([[8, 8, 59, 39], [30, 8, 59, 39], [70, 45, 90, 60]])  # all, its right half, nothing
    found = segmenter.masks(segmenter.embed(image), boxes, image.shape)
    assert found.labels.dtype == np.uint16 and np.array_equal(found.labels > 0, image > 0)
    assert np.array_equal(found.own(0), image > 0)
    covered = found.own(0) & found.own(1)
    assert covered[:, 31:60].sum() == 32 * 29 == (image[:, 31:60] > 0).sum() and not found.own(1)[:, :28].any()
    assert np.array_equal(found.labels, np.where(covered, 2, found.own(0)))  # the later object covers the first one
    assert not found.own(2).any() and found.own(2).shape == image.shape and found.own(2).dtype == bool
    assert found.iou.dtype == np.float32 and found.iou.shape == (3,)
    assert found.iou[0] > 0.95 and 0.5 < found.iou[1] < 1 and found.iou[2] == 0
