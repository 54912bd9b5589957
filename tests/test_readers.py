"""formats/: the formats that people have. Orientation and spacing are compared with what nibabel, SimpleITK and pydicom say."""

import gzip
import json
import shutil
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from demo_data import tiny_case
from formats import InputError, annotations, modality_of
from formats.annotations import read_coco, read_supervisely
from formats.intensity import WINDOWS, parse_window, to_grey_levels
from formats.partners import label_files
from formats.pictures import read_mask
from formats.readers import list_cases, read_boxed, read_boxes, read_case, read_pair
from formats.results import save_nifti_labels
from formats.scans import turn, turn_back, view_of
from formats.writing import save_image, save_npz

SAMPLES = Path(__file__).parents[2] / "shared" / "data" / "raw_samples"  # not part of the repository


def sentence(function, *args):
    """What `function` refuses its arguments with: one line."""
    with pytest.raises(InputError) as refused:
        function(*args)
    text = str(refused.value)
    assert "\n" not in text and len(text) > 30
    return text


def volume(shape=(20, 16, 6), dtype=np.int16, scale=1000):
    return (np.random.default_rng(0).random(shape) * scale).astype(dtype)


def save_nifti(path, voxels, affine=None):
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([0.5, 0.8, 3, 1.0]) if affine is None else affine), path)
    return path


# ---------------------------------------------------------------- orientation and spacing

AXES = ("RAS", "LPS", "LAS", "ASR", "SPL", "IRA", "PIL")


def tilted(codes, degrees=20):
    """An affine with these axes, tilted round the first world axis, with spacing 0.5, 0.8, 3 mm along the file's axes."""
    turned = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(tuple(codes)), (20, 16, 6))
    angle = np.deg2rad(degrees)
    tilt = np.array(
        [[1, 0, 0, 0], [0, np.cos(angle), -np.sin(angle), 0], [0, np.sin(angle), np.cos(angle), 0], [0, 0, 0, 1]]
    )
    affine = tilt @ np.linalg.inv(turned) @ np.diag([0.5, 0.8, 3, 1])
    affine[:3, 3] = (11, -7, 5)
    return affine


@pytest.mark.parametrize("degrees", [0, 20])
@pytest.mark.parametrize("codes", AXES)
def test_a_nifti_of_any_orientation_is_turned_as_radiologists_see_it_and_goes_back(tmp_path, codes, degrees):
    affine, voxels = tilted(codes, degrees), volume()
    path = save_nifti(tmp_path / "a.nii.gz", voxels, affine)
    case = read_case(path)
    world = dict(zip("RLAPSI", (0, 0, 1, 1, 2, 2), strict=True))
    assert case.image.shape[0] == voxels.shape[2], "slices are the planes of the file's third axis"
    steps = case.affine[:3, :3] / np.linalg.norm(case.affine[:3, :3], axis=0)  # directions of x, y, z
    for column, wanted in ((0, -1), (1, -1)):  # columns go left or back, rows go back or down
        axis = int(np.argmax(np.abs(steps[:, column])))
        assert np.sign(steps[axis, column]) == wanted
    assert int(np.argmax(np.abs(steps[:, 2]))) == world[codes[2]]
    assert case.spacing_mm == pytest.approx(np.linalg.norm(case.affine[:3, :3], axis=0)[::-1])
    # the same value lies at the same place in the patient, as nibabel's affine says
    gray = to_grey_levels(voxels, path)[0]
    for z, y, x in ((0, 0, 0), (3, 4, 5), (5, 7, 9)):
        place = np.linalg.inv(affine) @ case.affine @ [x, y, z, 1]
        assert np.abs(place - np.round(place)).max() < 1e-6
        assert gray[tuple(np.round(place[:3]).astype(int))] == case.image[z, y, x]
    # a label map on the case's grid, saved, has the file's grid and affine
    save_nifti_labels(tmp_path / "out.nii.gz", (case.image > 128).astype(np.uint16), case.affine, path)
    saved = nibabel.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asarray(saved.dataobj), gray > 128) and np.allclose(saved.affine, affine)


def test_turning_is_exact_for_every_orientation():
    voxels = volume()
    for codes in AXES:
        view = view_of(tilted(codes))
        assert np.array_equal(turn_back(turn(voxels, view), view), voxels)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_itk_formats_lie_where_simpleitk_says(tmp_path, ending):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(volume().transpose(2, 1, 0))
    image.SetSpacing((0.5, 0.8, 3.0))
    image.SetOrigin((10, 20, -30))
    image.SetDirection((1, 0, 0, 0, 0, -1, 0, 1, 0))  # coronal slices
    sitk.WriteImage(image, str(tmp_path / f"a{ending}"))
    sitk.WriteImage(image > 500, str(tmp_path / f"a_label{ending}"))
    case = read_case(tmp_path / f"a{ending}")
    gray = to_grey_levels(sitk.GetArrayFromImage(image), "a")[0]
    for z, y, x in ((0, 0, 0), (3, 4, 5), (5, 7, 9)):
        place = case.affine @ [x, y, z, 1] * [-1, -1, 1, 1]  # RAS to LPS, which ITK uses
        i, j, k = image.TransformPhysicalPointToIndex(place[:3].tolist())
        assert gray[k, j, i] == case.image[z, y, x]
    assert np.array_equal(case.labels > 0, case.image > case.image[case.labels == 0].max()) or case.labels.any()
    assert sorted(case.spacing_mm) == pytest.approx([0.5, 0.8, 3.0])


def test_without_simpleitk_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004")
    assert "needs SimpleITK; run: pip install -r requirements-formats.txt" in sentence(read_case, tmp_path / "a.nrrd")


# ---------------------------------------------------------------- the round trip through the grid


@pytest.mark.parametrize("side, dice", [(256, 1.0), (512, 0.97), (700, 0.97)])
def test_labels_come_back_from_the_grid_where_they_were(side, dice):
    """Through the 256 grid and back, as the cache and the network see them: Dice, and centroids within half a pixel."""
    from grid import logits_to_original, pad_to_square, resize_labels_to_grid

    y, x = np.mgrid[:side, : side - 60]
    labels = np.zeros(y.shape, np.uint16)
    labels[((y - 0.31 * side) / (0.17 * side)) ** 2 + ((x - 0.33 * side) / (0.13 * side)) ** 2 < 1] = 1
    labels[((y - 0.7 * side) / (0.12 * side)) ** 2 + ((x - 0.6 * side) / (0.2 * side)) ** 2 < 1] = 2
    small = pad_to_square(resize_labels_to_grid(labels), 256)
    for label in (1, 2):
        truth = labels == label
        assert np.count_nonzero(truth) > (5000 if side > 256 else 0)
        logits = np.where(small == label, 4.0, -4.0).astype(np.float32)
        values, rows, columns = logits_to_original(logits, *labels.shape)
        back = np.zeros(labels.shape, bool)
        back[rows, columns] = values > 0
        assert 2 * np.count_nonzero(back & truth) / (back.sum() + truth.sum()) >= dice
        shift = [np.mean(a) - np.mean(b) for a, b in zip(np.nonzero(back), np.nonzero(truth), strict=True)]
        assert np.abs(shift).max() <= 0.3  # the bar is half a source pixel


# ---------------------------------------------------------------- DICOM


def dicom(path, pixels, z=0.0, series="1.2.3", **more):
    """One CT slice at z mm."""
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID, one.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
    one.SOPClassUID, one.Modality, one.SeriesInstanceUID = CTImageStorage, "CT", series
    one.Rows, one.Columns = pixels.shape
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated = one.BitsStored = 16
    one.HighBit, one.PixelRepresentation = 15, 1
    one.RescaleSlope, one.RescaleIntercept = 1, -1024
    one.PixelSpacing, one.ImageOrientationPatient = [0.7, 0.9], [1, 0, 0, 0, 1, 0]
    one.ImagePositionPatient = [-10, -20, z]
    for key, value in more.items():
        setattr(one, key, value)
    one.PixelData = pixels.astype(np.int16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path, enforce_file_format=True)
    return path


def series(folder, count=4, step=2.5, **more):
    """Slices whose file names run against their positions."""
    for k in range(count):
        dicom(folder / f"{9 - k}.dcm", 1000 + 10 * k + volume((12, 14), scale=50), k * step, **more)
    return folder


def test_a_series_is_sorted_by_position_and_lies_where_simpleitk_says(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    case = read_case(series(tmp_path / "scan"))
    assert case.name == "scan" and case.spacing_mm == pytest.approx((2.5, 0.7, 0.9)) and case.window == WINDOWS["soft"]
    means = case.image.mean(axis=(1, 2))
    assert (np.diff(means) > 0).all(), "sorted from feet to head, not by name"
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "scan")))
    image = reader.Execute()
    gray = to_grey_levels(sitk.GetArrayFromImage(image), "CT_a", WINDOWS["soft"])[0]
    for z, y, x in ((0, 0, 0), (2, 3, 5), (3, 11, 13)):
        place = case.affine @ [x, y, z, 1] * [-1, -1, 1, 1]
        i, j, k = image.TransformPhysicalPointToIndex(place[:3].tolist())
        assert gray[k, j, i] == case.image[z, y, x]


def test_a_window_is_that_of_the_name_else_the_files_own_and_monochrome1_is_turned_over(tmp_path):
    path = dicom(tmp_path / "a.dcm", volume((12, 14), scale=2000), WindowWidth=["300", "20"], WindowCenter=["50", "7"])
    assert read_case(path).window == (300, 50)
    empty = dicom(tmp_path / "d.dcm", volume((12, 14), scale=2000), WindowWidth=["", ""], WindowCenter=["", ""])
    assert read_case(empty).window == WINDOWS["soft"]
    lung = read_case(path, window=parse_window("lung"))
    assert lung.window == (1500, -600) and lung.source_range[0] >= -1024
    inverse = dicom(
        tmp_path / "b.dcm", volume((12, 14), scale=2000), PhotometricInterpretation="MONOCHROME1", Modality="DX"
    )
    same = dicom(tmp_path / "c.dcm", volume((12, 14), scale=2000), Modality="DX")
    assert np.array_equal(read_case(inverse).image, 255 - read_case(same).image)


def test_series_that_cannot_be_put_together_are_told(tmp_path):
    assert "holds no case" in sentence(list_cases, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no DICOM image; name the folder of a series" in sentence(read_case, tmp_path / "empty")
    mixed = series(tmp_path / "mixed")
    dicom(mixed / "x.dcm", volume((12, 14)), series="1.2.4")
    assert "holds 2 series" in sentence(read_case, mixed) and "folder of its own" in sentence(read_case, mixed)
    gap = series(tmp_path / "gap", 6)
    (gap / "6.dcm").unlink()
    assert "a slice is missing" in sentence(read_case, gap)
    twice = series(tmp_path / "twice")
    dicom(twice / "z.dcm", volume((12, 14)), 2.5)
    assert "lies where" in sentence(read_case, twice)
    sizes = series(tmp_path / "sizes")
    dicom(sizes / "z.dcm", volume((12, 15)), 20)
    assert "a series has one size" in sentence(read_case, sizes)
    tilt = series(tmp_path / "tilt")
    dicom(tilt / "z.dcm", volume((12, 14)), 20, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    assert "has ImageOrientationPatient" in sentence(read_case, tilt)
    nowhere = series(tmp_path / "nowhere")
    dicom(nowhere / "z.dcm", volume((12, 14)), PixelSpacing=None)
    assert "has no PixelSpacing" in sentence(read_case, nowhere)
    (tmp_path / "text.dcm").write_text("no image")
    assert "not a DICOM file that can be read" in sentence(read_case, tmp_path / "text.dcm")


def test_a_compressed_dicom_without_its_decoder_names_the_package(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm", volume((12, 14)))
    one = pydicom.dcmread(path)
    one.file_meta.TransferSyntaxUID = JPEG2000Lossless
    one.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
    one["PixelData"].is_undefined_length = True
    one.save_as(path, enforce_file_format=True)

    def none(self, *args, **kwargs):
        raise RuntimeError("Unable to decompress: missing dependencies")

    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(none))
    text = sentence(read_case, path)
    assert "compressed (JPEG 2000" in text and "pip install -r requirements-formats.txt" in text


def test_a_folder_of_series_and_a_folder_that_is_one(tmp_path):
    series(tmp_path / "study" / "a"), series(tmp_path / "study" / "b")
    assert [path.name for path in list_cases(tmp_path / "study")] == ["a", "b"]
    assert list_cases(tmp_path / "study" / "a") == [tmp_path / "study" / "a"]


def test_dicom_without_ending_and_series_in_folders_beside_pictures_are_cases_too(tmp_path):
    save_image(tmp_path / "a.png", tiny_case().image)
    dicom(tmp_path / "IM0001", volume((12, 14)))
    series(tmp_path / "scan")
    (tmp_path / "notes").write_text("no image")
    assert [path.name for path in list_cases(tmp_path)] == ["IM0001", "a.png", "scan"]


# ---------------------------------------------------------------- labels beside images


def test_labels_beside_a_nifti_are_found_and_must_lie_where_it_lies(tmp_path):
    labels = (volume() > 500).astype(np.uint8)
    for image, partner in (
        ("img01.nii.gz", "label01.nii.gz"),
        ("p 2_image.nii.gz", "p 2_mask.nii.gz"),
        ("ä.nii", "ä_seg.nii"),
    ):
        save_nifti(tmp_path / image, volume(), tilted("LPS"))
        save_nifti(tmp_path / partner, labels, tilted("LPS"))
        case = read_case(tmp_path / image, boxes_from_masks=True)
        assert len(case.boxes) == 1 and case.labels.sum() == labels.sum()
    assert [path.name for path in list_cases(tmp_path)] == ["img01.nii.gz", "p 2_image.nii.gz", "ä.nii"]
    save_nifti(tmp_path / "label01.nii.gz", labels, tilted("RPS"))
    assert "does not lie as img01.nii.gz does (orientation RPS and LPS" in sentence(
        read_case, tmp_path / "img01.nii.gz"
    )
    save_nifti(tmp_path / "label01.nii.gz", labels[:-1], tilted("LPS"))
    assert "its grid is (19, 16, 6), but img01.nii.gz has (20, 16, 6)" in sentence(read_case, tmp_path / "img01.nii.gz")
    save_nifti(tmp_path / "label01.nii.gz", labels * 0.5, tilted("LPS"))
    assert "is no label map, it holds values such as 0.5" in sentence(read_case, tmp_path / "img01.nii.gz")


def test_partners_of_pictures_go_to_the_image_with_the_longest_name(tmp_path):
    names = (
        "a.png",
        "a_1.png",
        "a_mask.png",
        "a_1_mask_1.png",
        "a_1_mask_2.png",
        "b.jpg",
        "b_segmentation.png",
        "notes.txt",
    )
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    found = {name: [path.name for path in label_files(tmp_path / name)] for name in ("a.png", "a_1.png", "b.jpg")}
    assert found == {
        "a.png": ["a_mask.png"], "a_1.png": ["a_1_mask_1.png", "a_1_mask_2.png"], "b.jpg": ["b_segmentation.png"],
    }  # fmt: skip
    for folder in ("imagesTr", "labelsTr", "labelsTs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.png").write_bytes(b"x")
    assert label_files(tmp_path / "imagesTr" / "c.png") == [tmp_path / "labelsTr" / "c.png"]


def test_masks_of_every_kind_become_label_maps(tmp_path):
    truth = tiny_case().labels
    save_image(tmp_path / "gray.png", (truth * 100).astype(np.uint8))
    assert np.unique(read_mask(tmp_path / "gray.png")).tolist() == [0, 100, 200]
    indexed = Image.fromarray(truth.astype(np.uint8))
    indexed.putpalette([10, 20, 30, 255, 0, 0, 0, 0, 255])  # its background is not black
    indexed.save(tmp_path / "indexed.png")
    assert np.array_equal(read_mask(tmp_path / "indexed.png"), truth)
    for background in ((0, 0, 0), (250, 250, 250)):
        colours = np.array([background, (0, 200, 0), (200, 0, 10)], np.uint8)[truth]
        save_image(tmp_path / "colours.png", colours)
        assert np.array_equal(read_mask(tmp_path / "colours.png"), truth)
    large = np.zeros((180, 190), np.uint8)
    large[20:161, 20:171] = 255
    soft = cv2.blur(large, (3, 3))
    save_image(tmp_path / "soft.png", soft)
    assert np.array_equal(read_mask(tmp_path / "soft.png"), soft > 127), "soft edges are no objects"
    cv2.imencodemulti(".tif", [truth.astype(np.uint8), truth.astype(np.uint8) * 2])[1].tofile(tmp_path / "pages.tif")
    assert read_mask(tmp_path / "pages.tif").shape == (2, *truth.shape)
    image = tmp_path / "x.png"
    save_image(image, tiny_case().image)
    for i in (1, 2):
        save_image(tmp_path / f"x_mask_{i}.png", ((truth == i) * 255).astype(np.uint8))
    case = read_case(image)
    assert np.array_equal(case.labels, truth) and case.label_names == ("x_mask_1", "x_mask_2")
    save_image(tmp_path / "x_mask_2.png", np.zeros((3, 4), np.uint8))
    assert "its size is (3, 4), but x_mask_1.png has (64, 80)" in sentence(read_case, image)


def test_every_page_of_a_tiff_is_a_slice(tmp_path):
    pages = [np.full((20, 30), 1000 * (i + 1), np.uint16) for i in range(3)]
    cv2.imencodemulti(".tif", pages)[1].tofile(tmp_path / "a.tif")
    case = read_case(tmp_path / "a.tif")
    assert case.is_3d and case.image.shape == (3, 20, 30) and case.source_range == (1000, 3000)
    assert (np.diff(case.image[:, 0, 0].astype(int)) > 0).all()


# ---------------------------------------------------------------- COCO and Supervisely


def coco(tmp_path, annotations, **image):
    listed = {"id": 7, "file_name": "sub/a.png", "height": 40, "width": 50} | image
    content = {"images": [listed], "annotations": annotations, "categories": [{"id": 3, "name": "cell"}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path / "instances.json"


def test_coco_outlines_are_those_of_pycocotools(tmp_path):
    tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for trial in range(20):
        mask = np.zeros((40, 50), np.uint8)
        x, y, w, h = rng.integers(0, 20, 4) + (0, 0, 4, 4)
        mask[y : y + h, x : x + w] = rng.random(mask[y : y + h, x : x + w].shape) > 0.2 * (trial % 3)
        packed = tools.encode(np.asfortranarray(mask))
        packed["counts"] = packed["counts"].decode()
        plain = {"size": [40, 50], "counts": [int(n) for n in runs_of(mask)]}
        for code in (packed, plain):
            path = coco(tmp_path, [{"image_id": 7, "category_id": 3, "segmentation": code}])
            labels, names, _ = read_coco(path, Path("a.png"), (40, 50))
            assert np.array_equal(labels > 0, mask > 0) and names == ("cell",)
    polygon = [5.5, 6.0, 33.0, 9.5, 40.2, 30.0, 12.0, 35.7]
    path = coco(tmp_path, [{"image_id": 7, "category_id": 3, "segmentation": [polygon]}])
    theirs = tools.decode(tools.merge(tools.frPyObjects([polygon], 40, 50))) > 0
    ours = read_coco(path, Path("a.png"), (40, 50))[0] > 0
    assert 2 * np.count_nonzero(ours & theirs) / (ours.sum() + theirs.sum()) > 0.97
    assert np.abs(np.mean(np.nonzero(ours), axis=1) - np.mean(np.nonzero(theirs), axis=1)).max() < 0.5


def runs_of(mask):
    """Run lengths down the columns, background first."""
    flat = np.concatenate([[0], mask.ravel(order="F"), [2]])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges]))


def test_coco_paints_small_objects_last_and_tells_what_is_wrong(tmp_path, monkeypatch):
    big, small = [2, 2, 40, 2, 40, 30, 2, 30], [10, 10, 20, 10, 20, 20, 10, 20]
    save_image(tmp_path / "a.png", volume((40, 50), np.uint8, 255))
    path = coco(tmp_path, [{"image_id": 7, "segmentation": [outline]} for outline in (small, big)])
    assert read_case(tmp_path / "a.png").labels[15, 15] == 1 and list_cases(tmp_path) == [tmp_path / "a.png"]
    assert "lists no image b.png" in sentence(read_coco, path, Path("b.png"), (40, 50))
    assert "is listed as 40 x 50 (H, W), but is 9 x 9" in sentence(read_coco, path, Path("a.png"), (9, 9))
    with monkeypatch.context() as patch:
        patch.setattr(annotations, "MAX_LABEL", 1)
        assert "has 2 objects of a.png; outline 1 to 1" in sentence(read_coco, path, Path("a.png"), (40, 50))
    path = coco(tmp_path, [{"image_id": 7, "segmentation": {"size": [40, 50], "counts": [3, 4]}}], width=50.0)
    assert "object 1 of a.png has no good outline (its runs cover 7 pixels" in sentence(
        read_coco, path, Path("a.png"), (40, 50)
    )
    path = coco(tmp_path, [], height=None, width=None)
    assert "has 0 objects of a.png" in sentence(read_coco, path, Path("a.png"), (40, 50))


def test_supervisely_polygons(tmp_path):
    triangle = {"exterior": [[10, 6], [14, 6], [12, 9]]}
    square = {
        "exterior": [[20, 20], [30, 20], [30, 30], [20, 30]],
        "interior": [[[24, 24], [26, 24], [26, 26], [24, 26]]],
    }
    content = {"size": {"height": 40, "width": 50}, "objects": [
        {"classTitle": "tooth", "points": triangle}, {"classTitle": "root", "points": square},
    ]}  # fmt: skip
    (tmp_path / "a.png.json").write_text(json.dumps(content))
    labels, names, _ = read_supervisely(tmp_path / "a.png.json", (40, 50))
    assert names == ("tooth", "root") and np.argwhere(labels == 1).min(axis=0).tolist() == [6, 10]
    assert labels[22, 22] == 2 and labels[25, 25] == 0
    told = sentence(read_supervisely, tmp_path / "a.png.json", (9, 9))
    assert "a.png is listed as 40 x 50 (H, W), but is 9 x 9" in told
    save_image(tmp_path / "a.png", volume((40, 50), np.uint8, 255))
    assert np.array_equal(read_case(tmp_path / "a.png").labels, labels)
    # some programs write empty or other points beside a bitmap: it must not become the polygon
    for points in ({}, {"points": {"exterior": [], "interior": []}}, {"points": triangle}):
        content["objects"][0] = {"classTitle": "tooth", "bitmap": {"data": "eJ", "origin": [10, 6]}} | points
        (tmp_path / "a.png.json").write_text(json.dumps(content))
        told = sentence(read_case, tmp_path / "a.png")
        assert "polygons (an object is a bitmap); export it again, bitmaps as polygons" in told


# ---------------------------------------------------------------- boxes.csv, intensities, and what is bad


def test_boxes_csv_names_files_boxes_and_objects(tmp_path):
    save_image(tmp_path / "scan é 1.png", volume((40, 50), np.uint8, 255))
    save_image(tmp_path / "other.png", volume((40, 50), np.uint8, 255))
    (tmp_path / "boxes.csv").write_text("﻿file; x0; y0; x1; y1; label\nscan é 1.png; 2; 3; 20; 30; heart\nscan é 1.png;5;6;9;12;\n", encoding="utf-8")  # fmt: skip
    case = read_case(tmp_path / "scan é 1.png")
    assert case.boxes.tolist() == [[2, 3, 20, 30], [5, 6, 9, 12]] and case.label_names == ("heart", "")
    assert list_cases(tmp_path, with_boxes=True) == [tmp_path / "scan é 1.png"]
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1\n")
    assert "has no column y1" in sentence(read_boxes, tmp_path / "boxes.csv")
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\na.png,1,2,x,4\n")
    assert "line 2 has no number in each of x0, y0, x1, y1" in sentence(read_boxes, tmp_path / "boxes.csv")
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\nscan é 1.png,1,2,99,4\n")
    assert "outside the image" in sentence(read_case, tmp_path / "scan é 1.png")


def test_a_broken_boxes_csv_stops_nobody_who_gives_boxes(tmp_path):
    save_image(tmp_path / "a.png", tiny_case().image)
    save_image(tmp_path / "a_mask.png", tiny_case().labels.astype(np.uint8))
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1\n")
    assert "has no column y1" in sentence(read_boxed, tmp_path / "a.png")
    assert read_boxed(tmp_path / "a.png", boxes=[[2, 3, 20, 30]]).boxes.tolist() == [[2, 3, 20, 30]]
    assert len(read_boxed(tmp_path / "a.png", looseness=0.0).boxes) == 2
    assert read_case(tmp_path / "a.png", boxes=False).boxes is None, "who draws needs none"
    assert "give 4 numbers for each" in sentence(read_boxed, tmp_path / "a.png", [[1, 2, 3, 4], [1, 2, 0, 3, 4, 0]])


def test_intensities_become_grey_levels_by_window_or_percentile():
    hounsfield = np.array([[-1000, -160, 40, 240, 3000]], np.int16)
    found = to_grey_levels(hounsfield, "scan.nii.gz")  # values below -500: CT
    assert found[0].tolist() == [[0, 0, 127, 255, 255]] and found[1:] == (WINDOWS["soft"], (-1000, 3000))
    values = np.arange(1001, dtype=np.uint16)[None]
    found = to_grey_levels(values, "MR_a.nii.gz")
    low, high = np.percentile(np.arange(1, 1001), (0.5, 99.5))
    assert np.array_equal(found[0], np.clip((values - low) / (high - low) * 255, 0, 255).astype(np.uint8))
    assert to_grey_levels(values, "a.nii.gz", modality="CT")[1] == WINDOWS["soft"]
    eight = np.arange(200, dtype=np.uint8)[None]
    assert to_grey_levels(eight, "a")[1] is None and np.array_equal(to_grey_levels(eight, "a")[0], eight)
    assert np.array_equal(to_grey_levels(eight, "a", parse_window("100/50"))[0], eight), "8 bits stay as they are"


@pytest.mark.parametrize("ending", [".nii.gz", ".png", ".mha"])
def test_a_case_is_ct_by_its_name_which_is_asked_once(tmp_path, monkeypatch, ending):
    asked = []
    for module in ("formats.case", "formats.intensity"):
        monkeypatch.setattr(f"{module}.modality_of", lambda name: asked.append(name) or modality_of(name))
    values = volume((20, 16, 1), np.uint16, 1000)
    for name, window in (("CT_a", WINDOWS["soft"]), ("MR_a", WINDOWS["percentile"])):
        path = tmp_path / f"{name}{ending}"
        if ending == ".png":
            save_image(path, values[..., 0])
        elif ending == ".mha":
            sitk = pytest.importorskip("SimpleITK")
            sitk.WriteImage(sitk.GetImageFromArray(values.T), str(path))
        else:
            save_nifti(path, values)
        case = read_case(path)
        assert (case.name, case.modality, case.window) == (name, name[:2], window)
        assert asked == [path.name]
        asked.clear()


def test_values_that_show_nothing_are_told(tmp_path):
    assert "3 of its 9 values are NaN or infinite" in sentence(
        to_grey_levels, np.array([np.nan, np.inf, -np.inf, *range(6)]), "a"
    )
    assert "every value is 7, so there is nothing to see" in sentence(to_grey_levels, np.full((4, 4), 7), "a")
    saturated = np.full((50, 50), 65_535, np.uint16)
    saturated[0, 0] = 1
    assert "99 % of its non-zero values are 65535: saturated" in sentence(to_grey_levels, saturated, "a")
    assert "all become 255 in the window 80/40" in sentence(to_grey_levels, np.arange(500, 600), "a", WINDOWS["brain"])
    save_nifti(tmp_path / "a.nii.gz", np.where(volume() > 500, np.nan, 1).astype(np.float32))
    assert "NaN or infinite" in sentence(read_case, tmp_path / "a.nii.gz")
    save_image(tmp_path / "a.png", saturated)
    assert "saturated" in sentence(read_case, tmp_path / "a.png")


def test_files_that_are_no_volume_or_claim_too_much_are_told(tmp_path):
    save_nifti(tmp_path / "4d.nii.gz", volume((5, 5, 5, 2)))
    assert "has the shape (5, 5, 5, 2); save one volume" in sentence(read_case, tmp_path / "4d.nii.gz")
    whole = save_nifti(tmp_path / "cut.nii", volume())
    whole.write_bytes(whole.read_bytes()[:1000])
    assert "ends too early or is damaged" in sentence(read_case, whole)
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"no image"))
    assert "not a NIfTI file that can be read" in sentence(read_case, tmp_path / "text.nii.gz")
    header = nibabel.Nifti1Header()  # a zip bomb: a few kilobytes that claim 200 GB
    header.set_data_dtype(np.int16)
    header.set_data_shape((5000, 5000, 4000))
    header["vox_offset"] = 352
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(10_000_000)))
    assert "can't hold the (5000, 5000, 4000) voxels that it claims" in sentence(read_case, tmp_path / "bomb.nii.gz")
    save_nifti(tmp_path / "flat.nii.gz", volume((20, 16, 1)))
    assert not read_case(tmp_path / "flat.nii.gz").is_3d
    with pytest.raises(ValueError, match="does not span three directions"):
        view_of(np.diag([1.0, 1, 0, 1]))


def test_an_npz_that_unpacks_to_any_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("formats.npz.MOST_BYTES", 10_000)
    save_npz(tmp_path / "a.npz", imgs=np.zeros((200, 200), np.uint8), boxes=[[1, 2, 3, 4]])
    assert "it unpacks to" in sentence(read_case, tmp_path / "a.npz")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_image(tmp_path / "secret.png", volume((40, 50), np.uint8, 255))
    (tmp_path / "in" / "a.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "in" / "a.png")
    for name in ("a.png", "b.png"):
        assert "is a link out of its folder" in sentence(read_case, tmp_path / "in" / name)


def test_labels_of_a_scan_may_have_another_ending_but_not_another_place(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    save_nifti(tmp_path / "a.nii.gz", volume(), np.diag([-0.5, -0.8, 3, 1.0]))  # ITK counts to the left and back
    labels = sitk.GetImageFromArray((volume() > 500).astype(np.uint8).transpose(2, 1, 0))
    labels.SetSpacing((0.5, 0.8, 3.0))
    sitk.WriteImage(labels, str(tmp_path / "b.nrrd"))
    case = read_pair(tmp_path / "a.nii.gz", tmp_path / "b.nrrd", "a")
    assert case.labels.sum() == np.count_nonzero(volume() > 500)
    labels.SetOrigin((0, 0, 40))
    sitk.WriteImage(labels, str(tmp_path / "b.nrrd"))
    assert "does not lie as a.nii.gz does" in sentence(read_pair, tmp_path / "a.nii.gz", tmp_path / "b.nrrd", "a")


def test_pairs_of_other_kinds_are_told(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", volume())
    save_image(tmp_path / "a.png", volume((20, 16), np.uint8, 255))
    assert "labels of this kind don't go with a.png" in sentence(
        read_pair, tmp_path / "a.png", tmp_path / "a.nii.gz", "a"
    )


# ---------------------------------------------------------------- real files

COUNTS = {  # file of raw_samples: (shape, objects)
    "LUNG1-001_ct_1-060.dcm": ((512, 512), 0),
    "LUNG1-001_ct_1-061.dcm": ((512, 512), 0),
    "LUNG1-001_rtstruct.dcm": ((2, 512, 512), 4),
    "STS_012_CT_image.nii.gz": ((53, 155, 159), 1),
    "STS_012_MR_T1_image.nii.gz": ((53, 98, 109), 1),
    "STS_012_PET_image.nii.gz": ((53, 29, 30), 1),
    "dcmqi_ct-3slice": ((3, 512, 512), 1),
    "dermoscopy_ISIC_0014600.jpg": ((1936, 2592, 3), 1),
    "em_mitochondria_10.png": ((1024, 1024), 0),
    "em_raw_10.tif": ((1024, 1024), 0),
    "fundus_drishtiGS_011.png": ((1752, 2049, 3), 2),
    "jsrt_JPCLN001.png": ((224, 224), 3),
    "kvasir_image_cju1fyb1d69et0878muzdak9u.jpg": ((528, 622, 3), 1),
    "kvasir_image_cju320gyvbch60801v2amdi2g.jpg": ((503, 616, 3), 1),
    "mr_brain1_image.nrrd": ((25, 256, 256), 1),
    "mr_breast1_image.nrrd": ((21, 120, 45), 1),
    "mr_hippocampus_025_image.nii.gz": ((35, 48, 35), 2),
    "mr_hippocampus_127_image.nii.gz": ((31, 55, 38), 2),
    "wbc2_001.bmp": ((300, 300, 3), 2),
}


@pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="real files of every kind lie beside the checkout of their maintainers only"
)
def test_every_real_sample_is_read_with_its_objects():
    found = {path.name: read_case(path) for path in list_cases(SAMPLES)}
    objects = {name: 0 if case.labels is None else len(np.unique(case.labels)) - 1 for name, case in found.items()}
    assert {name: (case.image.shape, objects[name]) for name, case in found.items()} == COUNTS
    assert found["dcmqi_ct-3slice"].label_names == ("Liver",)
    assert found["LUNG1-001_rtstruct.dcm"].label_names == ("GTV-1", "Spinal-Cord", "Lung-Left", "Lung-Right")


@pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="real files of every kind lie beside the checkout of their maintainers only"
)
def test_a_real_segmentation_covers_liver_and_a_real_outline_covers_lungs(tmp_path):
    liver = read_case(SAMPLES / "dcmqi_ct-3slice")
    assert 90 < liver.image[liver.labels == 1].mean() < 220, "soft tissue in its window"
    shutil.copy(SAMPLES / "LUNG1-001_rtstruct.dcm", tmp_path)
    for name in ("060", "061"):
        shutil.copy(SAMPLES / f"LUNG1-001_ct_1-{name}.dcm", tmp_path)
    lungs = read_case(tmp_path)
    inside = [lungs.image[lungs.labels == label].mean() for label in (3, 4)]
    assert max(inside) < 30, "lungs are black in a window of soft tissue"
