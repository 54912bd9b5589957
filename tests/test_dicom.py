"""formats/dicom.py and dicom_out.py: kinds of DICOM that people have. What is right, other libraries say: highdicom, SimpleITK, pydicom."""

import sys

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from formats import InputError
from formats.case import Case, paint
from formats.dicom_out import save_segmentation
from formats.intensity import WINDOWS
from formats.readers import list_cases, read_case
from formats.results import files_to_do
from grid import MaskPatch

SIZE = (40, 50)  # rows, columns
SPACING = [0.7, 0.9]  # of rows, of columns, mm
STEP = 3.0  # of slices


def sentence(path, match):
    """The reader refuses a path with one line, in which `match` stands."""
    with pytest.raises(InputError, match=match) as refused:
        read_case(path)
    assert "\n" not in str(refused.value)


def body(k=0):
    """One slice as a scanner stores it, HU + 1024: air, a body, and a lesion that grows from slice to slice."""
    pixels = np.full(SIZE, 20, np.int16)
    pixels[8:32, 10:40] = 1060
    pixels[14 : 20 + k % 5, 16:24] = 1200
    pixels[2, 3] = 100 + k  # tells slices apart
    return pixels


def dicom(path, pixels, place=(-10, -20, 0.0), **elements):
    """One CT slice, or what `elements` make of it; None leaves an element empty, ... out."""
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID, one.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
    one.SOPClassUID, one.Modality, one.PatientID = CTImageStorage, "CT", "P1"
    one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = "1.2.1", "1.2.2", "1.2.3"
    one.Rows, one.Columns = pixels.shape[-2:]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated = one.BitsStored = 8 * pixels.dtype.itemsize
    one.HighBit, one.PixelRepresentation = one.BitsStored - 1, int(pixels.dtype.kind == "i")
    one.RescaleSlope, one.RescaleIntercept = 1, -1024
    one.PixelSpacing, one.ImageOrientationPatient, one.ImagePositionPatient = SPACING, [1, 0, 0, 0, 1, 0], list(place)
    for key, value in elements.items():
        if value is ...:
            del one[key]
        else:
            setattr(one, key, value)
    one.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path, enforce_file_format=True)
    return path


def series(folder, places=None, each=lambda k: {}, **elements):
    """A series of slices at places z (mm), whose names run against them."""
    for k, z in enumerate(np.arange(8) * STEP if places is None else places):
        more = elements | each(k)
        dicom(folder / f"{500 - k}.dcm", more.pop("pixels", body(k)), more.pop("place", (-10, -20, float(z))), **more)
    return folder


def sequence(*items):
    """A sequence of items that are given as dicts."""
    found = []
    for item in items:
        found.append(Dataset())
        for key, value in item.items():
            setattr(found[-1], key, value)
    return pydicom.Sequence(found)


def enhanced(path, order, each=lambda k: {}, shared=(), **elements):
    """An enhanced file: frame k of space, stored where `order` says. each: more functional groups of a frame."""
    groups = []
    for k in order:
        place = {"PlanePositionSequence": sequence({"ImagePositionPatient": [-10, -20, k * STEP]})}
        content = {"StackID": "1", "InStackPositionNumber": k + 1, "DimensionIndexValues": [k + 1]}
        groups.append(place | {"FrameContentSequence": sequence(content)} | each(k))
    every = {
        "PlaneOrientationSequence": sequence({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}),
        "PixelMeasuresSequence": sequence(
            {"PixelSpacing": SPACING, "SliceThickness": STEP, "SpacingBetweenSlices": STEP}
        ),
    }
    index = {
        "DimensionIndexPointer": 0x00209057,
        "FunctionalGroupPointer": 0x00209111,
        "DimensionOrganizationUID": "1.9",
    }
    left_out = ("RescaleSlope", "RescaleIntercept", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient")
    more = {
        "SOPClassUID": EnhancedCTImageStorage, "NumberOfFrames": len(groups), **dict.fromkeys(left_out, ...),
        "PerFrameFunctionalGroupsSequence": sequence(*groups), "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "SharedFunctionalGroupsSequence": sequence(every | dict(shared)),
        "DimensionOrganizationSequence": sequence({"DimensionOrganizationUID": "1.9"}),
        "DimensionIndexSequence": sequence(index),
    }  # fmt: skip
    return dicom(path, np.stack([body(k) for k in order]), **(more | elements))


def rescale(slope, intercept):
    return {
        "PixelValueTransformationSequence": sequence(
            {"RescaleSlope": slope, "RescaleIntercept": intercept, "RescaleType": "HU"}
        )
    }


# ---------------------------------------------------------------- structures within one another, and their planes


def circle(radius, z, middle=(10, -5), count=90, turned=0.0):
    """An outline (n, 3) mm round a middle (x, y), turned by so many degrees round x."""
    angles, tilt = np.linspace(0, 2 * np.pi, count, endpoint=False), np.radians(turned)
    x, y = radius * np.cos(angles), radius * np.sin(angles)
    return np.column_stack([middle[0] + x, middle[1] + y * np.cos(tilt), z + y * np.sin(tilt)])


def structures(path, outlines, kind="CLOSED_PLANAR", frame="1.2.3", **elements):
    """An RTSTRUCT of {name: outlines}."""
    left_out = (
        "Rows",
        "Columns",
        "PixelSpacing",
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "FrameOfReferenceUID",
    )
    rois = [
        {"ROINumber": i, "ROIName": name, "ReferencedFrameOfReferenceUID": frame}
        for i, name in enumerate(outlines, start=1)
    ]
    contours = [
        {
            "ReferencedROINumber": i,
            "ContourSequence": sequence(
                *(
                    {
                        "ContourGeometricType": kind,
                        "NumberOfContourPoints": len(points),
                        "ContourData": [f"{value:.4f}" for value in points.ravel()],
                    }
                    for points in found
                )
            ),
        }
        for i, found in enumerate(outlines.values(), start=1)
    ]
    more = {
        "Modality": "RTSTRUCT", "SeriesInstanceUID": "1.2.9", **dict.fromkeys(left_out, ...),
        "StructureSetROISequence": sequence(*rois), "ROIContourSequence": sequence(*contours),
    }  # fmt: skip
    dicom(path, np.zeros((1, 1), np.uint8), **(more | elements))
    one = pydicom.dcmread(path)
    del one.PixelData
    one.save_as(path)
    return path


NESTED = {"GTV": 3, "CTV": 5, "PTV": 7, "BODY": 11}


@pytest.mark.parametrize("order", [list(NESTED), list(NESTED)[::-1], ["CTV", "BODY", "GTV", "PTV"]])
def test_structures_within_one_another_keep_their_boxes_in_any_order(tmp_path, capsys, order):
    scan = series(tmp_path / "scan")
    structures(scan / "RS.dcm", {name: [circle(NESTED[name], k * STEP) for k in range(2, 6)] for name in order})
    case = read_case(scan, boxes_from_masks=True)
    assert case.label_names == tuple(order) and len(case.boxes) == 4
    assert read_case(scan).boxes is None, "nobody asked for those of masks"
    for name, box in zip(order, case.boxes, strict=True):
        # pixel centres within the radius: x = -10 + 0.9 column, y = -20 + 0.7 row
        columns = np.flatnonzero(np.abs(-10 + 0.9 * np.arange(50) - 10) <= NESTED[name])
        rows = np.flatnonzero(np.abs(-20 + 0.7 * np.arange(40) + 5) <= NESTED[name])
        assert np.abs(box - [columns[0], rows[0], 2, columns[-1], rows[-1], 5]).max() <= 1
    areas = [np.count_nonzero(case.labels == order.index(name) + 1) for name in NESTED]
    discs = [np.pi * radius**2 / 0.63 * 4 for radius in NESTED.values()]
    assert areas == pytest.approx(np.diff([0, *discs]), rel=0.1), "each shows what no smaller one covers"
    assert f"object {order.index('BODY') + 1} (BODY)" in capsys.readouterr().err


def test_what_a_label_map_hides_is_told_with_the_number_of_pixels(capsys):
    small, large = np.zeros((2, 6, 6), bool)
    small[2:4, 2:4], large[1:5, 1:5] = True, True
    for masks, numbers in (([small, large], (1, 2)), ([large, small], (2, 1))):
        labels, boxes = paint(iter(masks), ["a", "b"], "here")
        assert (labels[2, 2], labels[1, 1]) == numbers and "here: smaller" in (told := capsys.readouterr().err)
        assert "4 of 16" in told and boxes[numbers[1] - 1].tolist() == [1, 1, 4, 4], "boxes are of whole masks"
    labels, _ = paint([small, small.copy()], ["", ""], "here")
    assert set(np.unique(labels)) == {0, 2} and "object 1 4 of 4" in capsys.readouterr().err
    paint([small], ["a"], "here")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "places, slices",
    [
        (np.arange(5) * 3 + 7.5, 6),  # half a slice beside: from 6 to 21 mm
        (np.arange(17) + 7.0, 5),  # every 1 mm, from 6.5 to 23.5 mm
        (np.arange(5) * 3 + 6.4, 5),  # a little beside
        (np.array([6.0, 12, 18]), 5),  # on every second slice
    ],
)
def test_a_slice_takes_the_nearest_outline(tmp_path, places, slices):
    scan = series(tmp_path / "scan", np.arange(10) * STEP)
    structures(scan / "RS.dcm", {"organ": [circle(9, z) for z in places]})
    areas = np.count_nonzero(read_case(scan).labels, axis=(1, 2))
    assert areas[areas > 0] == pytest.approx(np.pi * 81 / 0.63, rel=0.03) and np.count_nonzero(areas) == slices


def test_a_second_outline_of_one_plane_cuts_a_hole_and_points_are_none(tmp_path, capsys):
    scan = series(tmp_path / "scan")
    structures(scan / "RS.dcm", {"ring": [circle(9, 6), circle(4, 6)], "far": [circle(9, 600)]})
    labels = read_case(scan).labels
    assert np.count_nonzero(labels) == pytest.approx(np.pi * (81 - 16) / 0.63, rel=0.03)
    assert "no pixel in this series: far" in capsys.readouterr().err
    structures(scan / "RS.dcm", {"marker": [circle(9, 6)]}, kind="POINT")
    sentence(scan, "outlines nothing in this series")


@pytest.mark.parametrize("turned", [4, 30, 90])
def test_turned_outlines_are_refused(tmp_path, turned):
    scan = series(tmp_path / "scan")
    structures(scan / "RS.dcm", {"organ": [circle(9, z, turned=turned) for z in (6, 9, 12)]})
    sentence(scan, f"an outline of organ is turned by {turned} degrees")


@pytest.mark.parametrize(
    "other, key",
    [
        ({"PatientID": "P2"}, "PatientID"),
        ({"frame": "1.7.7"}, "FrameOfReferenceUID"),
        ({"frame": "", "StudyInstanceUID": "1.7.8"}, "StudyInstanceUID"),
    ],
)
def test_outlines_of_another_patient_or_frame_of_reference_are_refused(tmp_path, other, key):
    scan = series(tmp_path / "scan")
    structures(scan / "RS.dcm", {"organ": [circle(9, 6)]}, **other)
    sentence(scan, f"is of another {key}")


def test_plan_dose_scout_and_radiographs_beside_a_series_are_left_out_and_told(tmp_path, capsys):
    scan = series(tmp_path / "scan")
    alone = read_case(scan)
    structures(scan / "RS.dcm", {"organ": [circle(9, 6)]})
    dicom(scan / "RD.dcm", np.ones((4, 5, 5), np.uint16), Modality="RTDOSE", SeriesInstanceUID="1.8", NumberOfFrames=4)
    dicom(scan / "scout.dcm", body(), SeriesInstanceUID="1.9", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    dicom(scan / "chest.dcm", body(), SeriesInstanceUID="1.10", Modality="DX")
    case = read_case(scan)
    assert np.array_equal(case.image, alone.image) and case.label_names == ("organ",)
    assert "left out 3 files beside the series" in capsys.readouterr().err
    sentence(scan / "RD.dcm", "RTDOSE")
    assert list_cases(scan) == [scan]
    for i in range(3):
        dicom(
            tmp_path / "chests" / f"{i}.dcm",
            body(i),
            Modality="DX",
            ImagePositionPatient=...,
            SeriesInstanceUID=f"1.{i}",
        )
    assert [path.name for path in list_cases(tmp_path / "chests")] == ["0.dcm", "1.dcm", "2.dcm"]
    (tmp_path / "cd" / "DICOM" / "P1").mkdir(parents=True)
    deep = series(tmp_path / "cd" / "DICOM" / "P1" / "S1")
    assert list_cases(tmp_path / "cd") == [deep]


# ---------------------------------------------------------------- enhanced multi-frame files


def test_frames_are_put_in_the_order_of_space_and_rescaled_each_as_it_says(tmp_path):
    highdicom = pytest.importorskip("highdicom")
    order = [3, 0, 7, 5, 1, 2, 6, 4]
    path = enhanced(tmp_path / "a.dcm", order, each=lambda k: rescale(1 + k / 10, -1024 - 10 * k))
    case = read_case(path)
    volume = highdicom.imread(path).get_volume(apply_real_world_transform=False).to_patient_orientation("HPL")
    assert case.spacing_mm == pytest.approx(volume.spacing) and case.image.shape == volume.shape
    assert case.source_range == pytest.approx((volume.array.min(), volume.array.max()))
    soft = np.clip((volume.array - (40 - 200)) / 400 * 255, 0, 255)
    assert case.image == pytest.approx(soft, abs=1.01)
    where = case.affine @ [2, 3, 4, 1] * [-1, -1, 1, 1]
    assert volume.affine @ [4, 3, 2, 1] == pytest.approx(where)
    shared = enhanced(tmp_path / "b.dcm", range(8), shared=rescale(2, -2000))
    volume = highdicom.imread(shared).get_volume(apply_real_world_transform=False)
    assert read_case(shared).source_range == pytest.approx((volume.array.min(), volume.array.max()))


@pytest.mark.parametrize(
    "order, each, match",
    [
        ([0, 1, 2, 4, 5, 6], lambda k: {}, "a slice is missing"),
        ([0, 1, 2, 0, 1, 2], lambda k: {}, "lies where"),
    ],
)
def test_gaps_and_frames_at_one_place_are_refused(tmp_path, order, each, match):
    sentence(enhanced(tmp_path / "a.dcm", order, each=each), match)


def test_two_echoes_or_phases_are_refused_with_what_tells_them_apart(tmp_path):
    count = iter(range(100))
    echo = lambda k: {"MREchoSequence": sequence({"EffectiveEchoTime": 20.0 if next(count) < 4 else 80.0})}  # noqa: E731
    sentence(
        enhanced(tmp_path / "a.dcm", [0, 1, 2, 3] * 2, each=echo, Modality="MR"), r"EffectiveEchoTime \(20.0, 80.0\)"
    )
    for i, time in enumerate((100, 400)):
        series(tmp_path / "phases" / "x", TriggerTime=time)
        for path in list((tmp_path / "phases" / "x").iterdir()):
            path.rename(tmp_path / "phases" / f"{i}_{path.name}")
    (tmp_path / "phases" / "x").rmdir()
    sentence(tmp_path / "phases", "TriggerTime")


# ---------------------------------------------------------------- grey values


def test_a_window_of_each_slice_is_no_window_of_the_series(tmp_path):
    scale = lambda k: {"pixels": (body(k) // 8 * (k + 1)).astype(np.int16)}  # noqa: E731
    own = lambda k: scale(k) | {"WindowWidth": 100 * (k + 1), "WindowCenter": 50 * (k + 1)}  # noqa: E731
    case = read_case(series(tmp_path / "own", each=own, Modality="MR", RescaleIntercept=0))
    assert case.window == WINDOWS["percentile"] and np.mean(case.image == 255, axis=(1, 2)).max() < 0.5
    one = read_case(series(tmp_path / "one", each=scale, Modality="MR", WindowWidth=900, WindowCenter=450))
    assert one.window == (900, 450), "all agree on one"
    frames = lambda k: {"FrameVOILUTSequence": sequence({"WindowWidth": 9.0 + k, "WindowCenter": 5.0})}  # noqa: E731
    assert read_case(enhanced(tmp_path / "a.dcm", range(8), each=frames, Modality="MR")).window == WINDOWS["percentile"]


def test_a_palette_becomes_the_colours_that_pydicom_says(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint8)
    tables = {
        f"{colour}PaletteColorLookupTableData": np.random.default_rng(i).permutation(256).astype(np.uint8).tobytes()
        for i, colour in enumerate(("Red", "Green", "Blue"))
    }
    kinds = {f"{colour}PaletteColorLookupTableDescriptor": [256, 0, 8] for colour in ("Red", "Green", "Blue")}
    palette = {"PhotometricInterpretation": "PALETTE COLOR", "Modality": "US", **tables, **kinds}
    path = dicom(tmp_path / "a.dcm", numbers, ImagePositionPatient=..., **palette)
    one = pydicom.dcmread(path)
    assert np.array_equal(read_case(path).image, apply_color_lut(one.pixel_array, one))
    assert read_case(path).modality == "US"
    gray = dict.fromkeys(tables, tables["RedPaletteColorLookupTableData"])
    film = dicom(tmp_path / "b.dcm", np.stack([numbers, numbers.T.reshape(SIZE)]), NumberOfFrames=2, **(palette | gray))
    one = pydicom.dcmread(film)
    assert np.array_equal(read_case(film).image, apply_color_lut(one.pixel_array, one)[..., 0])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("which", ["Modality", "VOI"])
def test_look_up_tables_are_applied_as_pydicom_does(tmp_path, which, photometric):
    pixels = np.random.default_rng(0).integers(0, 1024, SIZE).astype(np.uint16)
    table = (np.linspace(1, 0, 1024) ** 2 * 65535).astype(np.uint16)  # falls: leaving it out gives the negative
    lut = sequence({"LUTDescriptor": [1024, 0, 16], "LUTData": table.tobytes(), "ModalityLUTType": "US"})
    for element in ("LUTDescriptor", "LUTData"):
        lut[0][element].VR = "US" if element == "LUTDescriptor" else "OW"
    more = {f"{which}LUTSequence": lut, "Modality": "DX", "PhotometricInterpretation": photometric}
    path = dicom(tmp_path / "a.dcm", pixels, RescaleSlope=..., RescaleIntercept=..., ImagePositionPatient=..., **more)
    one = pydicom.dcmread(path)
    right = {"Modality": apply_modality_lut, "VOI": apply_voi_lut}[which](one.pixel_array, one).astype(float)
    if photometric == "MONOCHROME1":
        right = -right
    assert np.corrcoef(right.ravel(), read_case(path).image.ravel())[0, 1] > 0.999


def test_ct_without_hu_and_phase_images_are_no_ct_in_hu(tmp_path, capsys):
    right = read_case(series(tmp_path / "hu"))
    for name, elements in {
        "a": {"RescaleIntercept": 0},
        "b": {"RescaleIntercept": ..., "RescaleSlope": ...},
        "c": {"RescaleIntercept": 0, "WindowWidth": 400, "WindowCenter": 40},
    }.items():
        case = read_case(series(tmp_path / name, **elements))
        assert np.array_equal(case.image, right.image), name
        assert "no Hounsfield units" in capsys.readouterr().err
    phase = read_case(series(tmp_path / "CT_named", Modality="MR", RescaleSlope=4, RescaleIntercept=-4096))
    assert phase.window == WINDOWS["percentile"] and phase.modality == "MR", "the file's tag, not its name"
    assert phase.renamed("CT_named").modality == "MR"


# ---------------------------------------------------------------- slices


@pytest.mark.parametrize(
    "places",
    [
        [*np.arange(9) * 1.5, *(12 + np.arange(1, 17) * 3)],
        [*np.arange(17) * 3, *(48 + np.arange(1, 9) * 1.5)],
        np.cumsum(np.linspace(2, 4, 20)),
        [0, 3, 6, 9, 15, 18, 21],
        [0, 6, 9, 12],
        [0, 3, 9],
        [0, 3, 6, 9, 12, 13.5],
    ],
)
def test_uneven_slices_are_refused(tmp_path, places):
    sentence(series(tmp_path / "scan", places), "beside its even place .* a slice is missing, or the distance changes")


@pytest.mark.parametrize("step, digits", [(0.625, 1), (0.625, 2), (1.25, 1), (0.8333, 1), (2.5, 0), (3, 3)])
def test_rounded_positions_are_read(tmp_path, step, digits):
    case = read_case(series(tmp_path / "scan", np.round(7 + np.arange(40) * step, digits)))
    assert case.spacing_mm == pytest.approx((step, *SPACING), rel=0.01)


def test_rounded_cosines_make_right_angles(tmp_path):
    turns = np.round([np.cos(0.3), np.sin(0.3), 0, -np.sin(0.3), np.cos(0.3), 0], 2)
    case = read_case(series(tmp_path / "scan", ImageOrientationPatient=list(turns)))
    axes = case.affine[:3, :3] / np.linalg.norm(case.affine[:3, :3], axis=0)
    assert axes.T @ axes == pytest.approx(np.eye(3), abs=1e-9)
    assert case.spacing_mm == pytest.approx((STEP, *SPACING))


def test_a_tilted_gantry_has_the_volume_of_its_voxels(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    cosine, sine = np.cos(np.radians(15)), np.sin(np.radians(15))
    scan = series(tmp_path / "scan", ImageOrientationPatient=[1, 0, 0, 0, cosine, sine])
    case = read_case(scan)
    slice_ = sitk.ReadImage(str(scan / "500.dcm"))
    normal = np.reshape(slice_.GetDirection(), (3, 3))[:, 2]
    right = slice_.GetSpacing()[0] * slice_.GetSpacing()[1] * abs(normal @ [0, 0, STEP])
    assert np.prod(case.spacing_mm) == pytest.approx(right) == abs(np.linalg.det(case.affine[:3, :3]))
    for k in (0, 5):
        corner = case.affine @ [0, 0, k, 1] * [-1, -1, 1, 1]
        assert corner[:3] == pytest.approx([-10, -20, k * STEP])


# ---------------------------------------------------------------- elements that are empty or no numbers


@pytest.mark.parametrize(
    "key", ["RescaleSlope", "NumberOfFrames", "WindowWidth", "SliceThickness", "ImageType", "RescaleType"]
)
def test_an_empty_element_is_one_that_is_not_there(tmp_path, key):
    right, empty = (read_case(series(tmp_path / name, **more)) for name, more in (("a", {}), ("b", {key: None})))
    assert np.array_equal(right.image, empty.image) and right.spacing_mm == empty.spacing_mm


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("RescaleSlope", "1,5", "its RescaleSlope is no number .*'1,5'"),
        ("ImagePositionPatient", "1\\2\\NaN", "its ImagePositionPatient is no number"),
        ("PixelSpacing", "0\\0", "has pixels of .* mm|a series has one size"),
        ("ImageOrientationPatient", "", "has no ImageOrientationPatient"),
        ("ImageOrientationPatient", "1\\0\\0\\1\\0\\0", "not two unit vectors at right angles"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_number_is_told(tmp_path, key, value, match):
    scan = series(tmp_path / "scan")
    for path in scan.iterdir():
        one = pydicom.dcmread(path)
        text = value.encode() + b" " * (len(value) % 2)
        tag = one[key].tag
        one._dict[tag] = RawDataElement(tag, one[key].VR, len(text), text, 0, False, True)  # as it stands in a file
        one.save_as(path)
    sentence(scan, match)


@pytest.mark.parametrize("preamble", [True, False])
def test_a_file_without_ending_or_preamble_is_read(tmp_path, preamble):
    scan = series(tmp_path / "scan")
    right = read_case(scan)
    for path in list(scan.iterdir()):
        content = path.read_bytes()
        if not preamble:
            one = pydicom.dcmread(path)
            del one.file_meta
            one.preamble = None
            pydicom.dcmwrite(path, one, implicit_vr=True, little_endian=True, enforce_file_format=False)
            content = path.read_bytes()
            assert content[128:132] != b"DICM"
        (scan / f"I{path.stem}").write_bytes(content)
        path.unlink()
    assert np.array_equal(read_case(scan).image, right.image)
    alone = scan / "I498"
    assert files_to_do(alone, tmp_path / "out", "--box", False) == [alone]
    assert np.array_equal(read_case(alone).image, right.image[2])
    (tmp_path / "notes").write_text("no image")
    sentence(tmp_path / "notes", "no known format")


# ---------------------------------------------------------------- segmentations out


def found_in(case):
    """Labels of two objects that overlap, and their own masks as parts, of a case of 8 slices."""
    first, second = np.zeros((2, *case.image.shape), bool)
    first[2:5, 10:20, 12:22], second[3:7, 15:25, 15:30] = True, True
    labels = np.where(second, 2, first).astype(np.uint16)
    boxes = ((1, first), (2, second))
    parts = [(i, z, MaskPatch(m[z], slice(0, SIZE[0]), slice(0, SIZE[1]))) for i, m in boxes for z in range(len(m))]
    return labels, parts, (first, second)


@pytest.mark.parametrize("kind", ["series", "shuffled", "tilted", "feet_first", "sagittal"])
def test_objects_go_out_as_segments_that_overlap_and_lie_on_their_slices(tmp_path, kind):
    highdicom = pytest.importorskip("highdicom")
    if kind == "shuffled":
        source = enhanced(tmp_path / "a.dcm", [3, 0, 7, 5, 1, 2, 6, 4], shared=rescale(1, -1024))
    else:
        turns = {"tilted": [1, 0, 0, 0, 0.8, 0.6], "feet_first": [-1, 0, 0, 0, 1, 0], "sagittal": [0, 1, 0, 0, 0, -1]}
        along = 0 if kind == "sagittal" else 2
        place = lambda k: {"place": [k * STEP if axis == along else -9 for axis in range(3)]}  # noqa: E731
        source = series(tmp_path / "scan", each=place, ImageOrientationPatient=turns.get(kind, [1, 0, 0, 0, 1, 0]))
    case = read_case(source)
    labels, parts, masks = found_in(case)
    case = Case(**(vars(case) | {"label_names": ("liver", "")}))
    assert save_segmentation(tmp_path / "x_seg.dcm", case, labels, source, parts) == ["x_seg.dcm"]
    seg = highdicom.seg.segread(tmp_path / "x_seg.dcm")
    assert [one.SegmentLabel for one in seg.SegmentSequence] == ["liver", "object 2"]
    assert seg.segmentation_type.value == "BINARY" and seg.FrameOfReferenceUID == "1.2.3"
    back = np.zeros((2, *case.image.shape), bool)
    to_voxels = np.linalg.inv(np.diag([-1.0, -1, 1, 1]) @ case.affine)
    for frame, group in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        segment = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        shared = seg.SharedFunctionalGroupsSequence[0]
        turns = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
        sizes = shared.PixelMeasuresSequence[0].PixelSpacing
        for row, column in np.argwhere(frame):
            there = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
            there = there + column * sizes[1] * turns[0] + row * sizes[0] * turns[1]
            x, y, z = np.rint(to_voxels @ [*there, 1])[:3].astype(int)
            back[segment - 1, z, y, x] = True
    assert np.array_equal(back, masks)


def test_a_segmentation_is_read_back_by_simpleitk_and_by_us(tmp_path, capsys):
    sitk, _ = pytest.importorskip("SimpleITK"), pytest.importorskip("highdicom")
    scan = series(tmp_path / "scan", SliceThickness=STEP)
    case = read_case(scan)
    labels, parts, masks = found_in(case)
    save_segmentation(scan / "x_seg.dcm", case, labels, scan, parts)
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(scan / "x_seg.dcm")))
    assert np.count_nonzero(frames) == sum(map(np.count_nonzero, masks))
    again = read_case(scan, boxes_from_masks=True)
    assert again.boxes.tolist() == [[12, 10, 2, 21, 19, 4], [15, 15, 3, 29, 24, 6]]
    assert "smaller objects hide pixels" in capsys.readouterr().err
    (scan / "x_seg.dcm").unlink()
    save_segmentation(scan / "y_seg.dcm", case, labels, scan)  # of a label map alone: nothing overlaps
    assert np.array_equal(read_case(scan).labels, labels)


def test_a_segmentation_of_another_pixel_spacing_or_place_is_refused(tmp_path):
    pytest.importorskip("highdicom")
    scan = series(tmp_path / "scan", SliceThickness=STEP)
    case = read_case(scan)
    labels, _, _ = found_in(case)
    for name, more in {
        "finer": {"PixelSpacing": [0.5, 0.5]},
        "beside": {"each": lambda k: {"place": (-7, -20, k * STEP)}},
    }.items():
        other = series(tmp_path / name, **({"SliceThickness": STEP} | more))
        save_segmentation(scan / "x_seg.dcm", read_case(other), labels, other)
        sentence(scan, "its frames do not lie on the slices of the series; resample it")


def test_without_highdicom_the_rest_is_written_and_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    scan = series(tmp_path / "scan")
    case = read_case(scan)
    assert save_segmentation(tmp_path / "x_seg.dcm", case, found_in(case)[0], scan) == []
    assert "pip install -r requirements-formats.txt" in capsys.readouterr().err
    assert not (tmp_path / "x_seg.dcm").exists()


def test_all_48_orientations_come_in_as_simpleitk_lays_them_and_go_out_as_highdicom_does(tmp_path):
    """Rows, columns and slices in every direction: grey values and masks lie at their places in the patient."""
    sitk, highdicom = pytest.importorskip("SimpleITK"), pytest.importorskip("highdicom")
    axes = np.eye(3)
    for n, (a, b) in enumerate([(a, b) for a in range(3) for b in range(3) if a != b]):
        for i, (sign_a, sign_b, back) in enumerate(np.ndindex(2, 2, 2)):
            row, column = axes[a] * (1 - 2 * sign_a), axes[b] * (1 - 2 * sign_b)
            step = np.cross(row, column) * STEP * (1 - 2 * back)
            folder = tmp_path / f"{n}_{i}"
            turns = {"ImageOrientationPatient": [*row, *column], "SliceThickness": STEP}
            series(folder, range(4), each=lambda k, step=step: {"place": list(step * k - 9)}, **turns)
            case = read_case(folder)
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
            image = reader.Execute()
            values = sitk.GetArrayFromImage(image)
            to_lps = np.diag([-1.0, -1, 1, 1]) @ case.affine
            for place in ((1, 2, 3), (0, 9, 5), (3, 15, 17)):
                x, y, z = image.TransformPhysicalPointToIndex((to_lps @ [*place[::-1], 1])[:3].tolist())
                grey = int(np.clip((values[z, y, x] + 160) / 400 * 255, 0, 255))
                assert case.image[place] == grey, (row, column, step)
            labels = np.zeros(case.image.shape, np.uint16)
            labels[1:3, 5:9, 7:20], labels[1, 5, 20] = 1, 1
            save_segmentation(tmp_path / "x_seg.dcm", case, labels, folder)
            volume = highdicom.seg.segread(tmp_path / "x_seg.dcm").get_volume()
            there = np.argwhere(volume.array[..., 0]) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
            ours = np.argwhere(labels)[:, ::-1] @ to_lps[:3, :3].T + to_lps[:3, 3]
            assert sorted(there.round(3).tolist()) == sorted(ours.round(3).tolist()), (row, column, step)
