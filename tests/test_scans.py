"""NIfTI, NRRD and MetaImage, in and out: what nibabel (RAS) and SimpleITK (LPS) say of the same files decides."""

import gzip
import importlib
import itertools

import nibabel
import numpy as np
import pytest

from demo_data import tiny_case
from formats import InputError, case
from formats.partners import label_files, list_pairs
from formats.readers import Asked, list_cases, read_case, read_pair, window_of
from formats.results import object_rows, save_label_map, save_nifti_labels
from formats.sources import Options, Source
from formats.writing import save_image, save_npz
from tables import read_prediction, read_truth
from volumes import Found

sitk = pytest.importorskip("SimpleITK")
SHAPE = (11, 7, 5)  # x, y, z of a file: no axis is as long as another
PALETTE = np.array([[255, 0, 0]])


def sentence(function, *args, **options):
    """What `function` refuses its arguments with: one line."""
    with pytest.raises(InputError) as refused:
        function(*args, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def voxels(shape=SHAPE, low=-1000, high=200, dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def save_nifti(path, values, affine=None, **fields):
    image = nibabel.Nifti1Image(values, np.diag([0.5, 0.8, 3, 1.0]) if affine is None else affine)
    for field, value in fields.items():
        image.header[field] = value
    nibabel.save(image, path)
    return path


def save_itk(path, values, affine=None, compress=True):
    """values (x, y, z); affine RAS+, whose columns need not be at right angles."""
    affine = np.diag([0.5, 0.8, 3, 1.0]) if affine is None else affine
    lps, spacing = np.diag([-1, -1, 1, 1]) @ affine, np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(values.T)
    image.SetSpacing(spacing.tolist()), image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), compress)
    return path


def rotated(degrees, axis=0):
    one, two = (i for i in range(3) if i != axis)
    matrix, angle = np.eye(4), np.deg2rad(degrees)
    matrix[[one, one, two, two], [one, two, one, two]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


def sheared(degrees):
    """Slices that lie one beside the other, as a tilted gantry takes them."""
    affine = np.diag([0.5, 0.8, 3, 1.0])
    affine[1, 2] = 3 * np.tan(np.deg2rad(degrees))
    return affine


def itk_place(path, index):
    return np.array(sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint([int(i) for i in index])) * [-1, -1, 1]


def marked_index(path):
    """(x, y, z) of the only voxel above 0 in a file, as SimpleITK numbers them."""
    (index,) = np.argwhere(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T > 0)
    return index


def write_mask(scan, folder, labels=None):
    """The file that step 4 writes of a case: its label map, which is here its brightest voxel, and that voxel's number."""
    found = read_case(scan)
    index = np.unravel_index(np.argmax(found.image), found.image.shape)
    if labels is None:
        labels = np.zeros(found.grid_shape, np.uint16)
        labels[index] = 1
    name = save_label_map(folder, found, labels, scan, PALETTE)[1]
    return found, index, folder / name


# ---------------------------------------------------------------- where a voxel lies, in and out

ORIENTATIONS = [
    (axes, signs) for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_voxel_lies_at_one_place_in_scan_and_mask_in_all_48_orientations(tmp_path, ending):
    assert len(ORIENTATIONS) == 48
    mark = (8, 1, 3)
    values = voxels()
    values[mark] = 3000
    for number, (axes, signs) in enumerate(ORIENTATIONS):
        affine = np.zeros((4, 4))
        affine[axes, range(3)] = np.array(signs) * (0.5, 0.8, 3)
        affine[:, 3] = 11, -7, 5, 1
        save = save_nifti if ending == ".nii.gz" else save_itk
        scan = save(tmp_path / f"CT_{number}{ending}", values, affine)
        found, (z, y, x), mask = write_mask(scan, tmp_path / "out")
        where = (affine @ [*mark, 1])[:3]
        assert (found.affine @ [x, y, z, 1])[:3] == pytest.approx(where, abs=1e-4)
        assert itk_place(scan, mark) == pytest.approx(where, abs=1e-4)
        assert itk_place(mask, marked_index(mask)) == pytest.approx(where, abs=1e-4)
        image = nibabel.load(mask)
        (index,) = np.argwhere(np.asarray(image.dataobj) > 0)
        assert (image.affine @ [*index, 1])[:3] == pytest.approx(where, abs=1e-4)


FIELDS = (
    "qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z srow_x srow_y srow_z".split()
)


@pytest.mark.parametrize("s_code, q_code", [*itertools.product(range(5), (0, 1, 2))])
def test_a_mask_has_both_places_of_its_scan_with_their_codes(tmp_path, s_code, q_code):
    image = nibabel.Nifti1Image(voxels(), np.eye(4))
    q_affine = rotated(20) @ np.diag([-0.6, -0.7, 3, 1.0])
    s_affine = np.diag([-0.6, -0.7, 3, 1.0])
    s_affine[:3, 3] = 40, 30, 100
    image.set_qform(q_affine, q_code), image.set_sform(s_affine, s_code)
    image.header["xyzt_units"], image.header["intent_code"] = 2, 1002
    nibabel.save(image, tmp_path / "CT_a.nii.gz")
    mask = write_mask(tmp_path / "CT_a.nii.gz", tmp_path / "out")[2]
    theirs, ours = (nibabel.load(path).header for path in (tmp_path / "CT_a.nii.gz", mask))
    for field in (*FIELDS, "pixdim", "xyzt_units", "intent_code"):
        assert np.array_equal(theirs[field], ours[field]), field
    for index in ((0, 0, 0), (10, 6, 4), (10, 0, 0)):
        assert np.array_equal(itk_place(tmp_path / "CT_a.nii.gz", index), itk_place(mask, index))
    if not s_code and not q_code:  # says nowhere where it lies: nibabel and ITK guess, each otherwise
        return
    # what ITK writes of such a scan knows one of the two places only, and still belongs to it
    itk_mask = sitk.ReadImage(str(tmp_path / "CT_a.nii.gz")) > 0
    sitk.WriteImage(itk_mask, str(tmp_path / "CT_a_mask.nii.gz"))
    assert read_case(tmp_path / "CT_a.nii.gz").labels.sum() == np.count_nonzero(voxels() > 0)


@pytest.mark.parametrize("unit, in_mm", [("mm", 1), ("micron", 1e-3), ("meter", 1e3), ("unknown", 1)])
def test_units_of_nifti_become_mm_and_go_back_out(tmp_path, unit, in_mm):
    affine = np.diag([*np.array([0.5, 0.8, 3]) / in_mm, 1.0])
    image = nibabel.Nifti1Image(voxels(), affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "CT_a.nii.gz")
    found, index, mask = write_mask(tmp_path / "CT_a.nii.gz", tmp_path / "out")
    assert found.spacing_mm == pytest.approx((3, 0.8, 0.5))
    assert nibabel.load(mask).header.get_xyzt_units()[0] == unit
    assert np.allclose(nibabel.load(mask).affine, affine)
    x, y, z = marked_index(mask)
    assert itk_place(mask, (x, y, z)) == pytest.approx(itk_place(tmp_path / "CT_a.nii.gz", (x, y, z)))


def mm3_of(scan, tmp_path):
    """mm3 that objects.csv says of all voxels, and the file of the mask."""
    found = read_case(scan)
    labels = np.ones(found.grid_shape, np.uint16)
    found = case.replace(found, boxes=np.array([[0, 0, 0, 10, 6, 4.0]]))
    rows = object_rows(found, Found(labels, np.array([0.9]), np.array([labels.size])), np.array([1]), None)
    return float(rows[0]["mm3"]), write_mask(scan, tmp_path / "out", labels)[2]


@pytest.mark.parametrize("degrees", [0, 3, 15, -25])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_sheared_slices_count_by_the_determinant_and_are_written_so_that_itk_opens_them_or_told(
    tmp_path, capsys, ending, degrees
):
    affine = sheared(degrees)
    save = save_nifti if ending == ".nii.gz" else save_itk
    values = voxels()
    values[8, 1, 3] = 3000
    scan = save(tmp_path / f"CT_a{ending}", values, affine)
    mm3, mask = mm3_of(scan, tmp_path)
    # the slices are moved sideways, so the volume is that of the upright block
    assert mm3 == pytest.approx(np.prod(SHAPE) * 0.5 * 0.8 * 3, rel=1e-4)
    told = capsys.readouterr().err
    if degrees == 0:
        assert not told and mask.name.endswith(".nii.gz")
    elif ending == ".nii.gz":
        assert "not at right angles and no qform: ITK's viewers open neither; resample it" in told
        assert np.allclose(nibabel.load(mask).affine, affine), "as the scan, for all that read NIfTI by its sform"
    else:
        assert mask.name == "CT_a.nrrd" and "its slices are sheared" in told
        image = sitk.ReadImage(str(mask))
        size = abs(np.linalg.det(np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()))
        assert np.count_nonzero(sitk.GetArrayFromImage(image)) * size == pytest.approx(mm3, rel=1e-4)
        mask = write_mask(scan, tmp_path / "out")[2]
        assert itk_place(mask, marked_index(mask)) == pytest.approx(itk_place(scan, (8, 1, 3)), abs=1e-6)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@pytest.mark.parametrize("decimals", [2, 3, 6])
def test_rounded_cosines_are_written_as_nifti_that_itk_opens(tmp_path, capsys, ending, decimals):
    turn = np.round((rotated(17) @ rotated(8, 1) @ rotated(-5, 2))[:3, :3], decimals)
    affine = np.eye(4)
    affine[:3, :3] = turn * (0.5, 0.8, 3)
    values = voxels()
    values[8, 1, 3] = 3000
    scan = save_itk(tmp_path / f"CT_a{ending}", values, affine)
    _, _, mask = write_mask(scan, tmp_path / "out")
    assert mask.name == "CT_a.nii.gz" and not capsys.readouterr().err
    assert itk_place(mask, marked_index(mask)) == pytest.approx(itk_place(scan, (8, 1, 3)), abs=0.05)


def test_a_mask_of_a_flat_or_a_4d_file_of_one_volume_has_its_grid(tmp_path):
    for name, shape in (("CT_flat", (11, 7)), ("CT_one", (11, 7, 1)), ("CT_time", (11, 7, 5, 1))):
        scan = save_nifti(tmp_path / f"{name}.nii.gz", voxels(shape))
        mask = nibabel.load(write_mask(scan, tmp_path / "out")[2])
        assert mask.shape == shape[:3] and np.allclose(mask.affine, nibabel.load(scan).affine)


def test_a_mask_of_a_nifti_2_scan_is_nifti_1_which_itk_opens(tmp_path):
    affine = rotated(20) @ np.diag([-0.5, 0.8, 3, 1.0])
    values = voxels()
    values[8, 1, 3] = 3000
    nibabel.save(nibabel.Nifti2Image(values, affine), tmp_path / "CT_a.nii")
    mask = write_mask(tmp_path / "CT_a.nii", tmp_path / "out")[2]
    assert itk_place(mask, marked_index(mask)) == pytest.approx((affine @ [8, 1, 3, 1])[:3], abs=1e-4)


# ---------------------------------------------------------------- damage, and headers that claim too much


def changed_bytes(start, end):
    return [*range(start, start + 12), *range(start + 12, end - 12, 41), *range(end - 12, end)]


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_one_changed_byte_is_refused_and_never_gives_other_voxels(tmp_path, ending, capfd):
    values = voxels((20, 16, 6), dtype=np.int16)
    scan = (save_nifti if ending == ".nii.gz" else save_itk)(tmp_path / f"CT_a{ending}", values)
    good = read_case(scan)
    stored = {".nhdr": tmp_path / "CT_a.raw.gz", ".mhd": tmp_path / "CT_a.zraw"}.get(ending, scan)
    content = stored.read_bytes()
    header = {".nrrd": b"\n\n", ".mha": b"LOCAL\n"}.get(ending)
    start = content.index(header) + len(header) if header else 0
    refused = 0
    for i in changed_bytes(start, len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 0x40
        stored.write_bytes(damaged)
        try:
            assert np.array_equal(read_case(scan).image, good.image)
        except InputError as error:
            assert str(error).endswith(("copy or export it again", "; export it again"))
            refused += 1
    # a byte of gzip's own header (its time, its system) is no voxel
    assert refused > len(changed_bytes(start, len(content))) - 12
    for end in (-1, -5, -9, len(content) // 2):
        stored.write_bytes(content[:end])
        assert "it again" in sentence(read_case, scan)


def test_metaimage_whose_compressed_size_is_not_said_is_not_taken_with_other_voxels(tmp_path):
    scan = save_itk(tmp_path / "CT_a.mha", voxels())
    scan.write_bytes(scan.read_bytes().replace(b"CompressedDataSize", b"CompressedDataDize"))
    assert "damaged" in sentence(read_case, scan)  # SimpleITK reads other voxels there, without a word


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("compress", [False, True])
def test_a_header_that_claims_more_than_the_file_holds_is_refused_before_memory_is_asked_for(
    tmp_path, monkeypatch, ending, compress
):
    values, path = voxels(), tmp_path / f"CT_a{ending}"
    if "nii" in ending:
        content = bytearray(nibabel.Nifti1Image(values, np.eye(4)).to_bytes())
        content[42:48] = np.array([1000, 1000, 1000], "<i2").tobytes()
        path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    else:
        save_itk(path, values, compress=compress)
        path.write_bytes(path.read_bytes().replace(b"11 7 5", b"1000 1000 1000"))
        monkeypatch.setattr(sitk.ImageFileReader, "Execute", None)
    assert "it can't hold the (1000, 1000, 1000) voxels that it claims" in sentence(read_case, path)
    path.write_bytes(path.read_bytes().replace(b"1000 1000 1000", b"11 7 5"))
    if "nii" not in ending:
        monkeypatch.setattr(case, "MOST_BYTES", 2**9)
        most = "claims (11, 7, 5) voxels of 2 bytes, more than 4.76837e-07 GiB; crop it, or set GRAYS_LIMIT_GB=1"
        assert most in sentence(read_case, path)


def test_voxels_in_a_file_of_another_folder_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    scan = save_itk(tmp_path / "in" / "CT_a.mhd", voxels(), compress=False)
    assert read_case(scan).is_3d
    (tmp_path / "in" / "CT_a.raw").rename(tmp_path / "CT_a.raw")
    scan.write_text(scan.read_text().replace("CT_a.raw", "../CT_a.raw"))
    assert "names '../CT_a.raw' as the file of its voxels; put that one file beside it" in sentence(read_case, scan)


# ---------------------------------------------------------------- what is no gray volume


def test_times_channels_colours_and_complex_values_are_refused_with_what_was_found(tmp_path):
    save_nifti(tmp_path / "time.nii.gz", voxels((5, 6, 7, 3)))
    assert "(its axes: x 5, y 6, z 7, time 3)" in sentence(read_case, tmp_path / "time.nii.gz")
    save_nifti(tmp_path / "vector.nii.gz", voxels((5, 6, 7, 1, 3)))
    assert "(its axes: x 5, y 6, z 7, time 1, channel 3)" in sentence(read_case, tmp_path / "vector.nii.gz")
    save_nifti(tmp_path / "complex.nii.gz", voxels().astype(np.complex64))
    assert "holds complex values in its (11, 7, 5) voxels" in sentence(read_case, tmp_path / "complex.nii.gz")
    rgb = np.zeros((5, 6, 7), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    save_nifti(tmp_path / "rgb.nii.gz", rgb)
    assert "is a colour NIfTI" in sentence(read_case, tmp_path / "rgb.nii.gz")
    vectors = sitk.GetImageFromArray(voxels((7, 6, 5, 3)), isVector=True)
    sitk.WriteImage(vectors, str(tmp_path / "vector.nrrd")), sitk.WriteImage(vectors, str(tmp_path / "vector.mha"))
    for ending in ("nrrd", "mha"):
        assert "has 3 dimensions ((5, 6, 7)) and 3 values a voxel" in sentence(read_case, tmp_path / f"vector.{ending}")
    sitk.WriteImage(sitk.GetImageFromArray(voxels((3, 7, 6, 5)), isVector=False), str(tmp_path / "time.nrrd"))
    assert "has 4 dimensions ((5, 6, 7, 3)) and 1 values a voxel" in sentence(read_case, tmp_path / "time.nrrd")
    sitk.WriteImage(sitk.GetImageFromArray(voxels().astype(np.complex64)), str(tmp_path / "complex.mha"))
    assert "and 2 values a voxel" in sentence(read_case, tmp_path / "complex.mha")


# ---------------------------------------------------------------- CT without Hounsfield units, and the modality


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_ct_plus_1024_looks_as_ct_and_is_told(tmp_path, capsys, ending):
    hounsfield = tiny_phantom()
    save = save_nifti if ending == ".nii.gz" else save_itk
    control = read_case(save(tmp_path / f"CT_hu{ending}", hounsfield))
    assert control.window == (400, 40) and not capsys.readouterr().err
    moved = read_case(save(tmp_path / f"CT_1024{ending}", hounsfield + 1024))
    assert np.array_equal(moved.image, control.image) and moved.window == (400, 1064)
    assert "a CT, but its values, 0 to 2124, are no Hounsfield units; they are shown as HU plus 1024" in (
        capsys.readouterr().err
    )
    padded = hounsfield + 1024
    padded[:2] = -2000  # outside the round field of view
    found = read_case(save(tmp_path / f"CT_padded{ending}", padded))
    assert found.window == (400, 1064) and "as HU plus 1024" in capsys.readouterr().err
    asked = read_case(tmp_path / f"CT_1024{ending}", window=window_of(["window=400/1064"]))
    assert np.array_equal(asked.image, control.image) and not capsys.readouterr().err


def tiny_phantom():
    """HU: air, a body of fat and muscle, a bone."""
    values = np.full((40, 30, 6), -1024, np.int16)
    values[5:35, 4:26] = -100
    values[8:32, 7:23] = voxels((24, 16, 6), 30, 70)
    values[15:19, 10:14] = 1100
    return values


@pytest.mark.parametrize(
    "values, how",
    [
        (voxels(low=0, high=256, dtype=np.int16), "from their lowest to their highest"),
        (voxels(low=0, high=1000) / 1000.0, "from their lowest to their highest"),
        (np.random.default_rng(0).normal(size=SHAPE), "from their lowest to their highest"),
        (voxels(low=0, high=600), "as if they were"),
    ],
)
def test_ct_of_other_units_is_told(tmp_path, capsys, values, how):
    found = read_case(save_nifti(tmp_path / "CT_a.nii.gz", values))
    told = capsys.readouterr().err
    assert f"are no Hounsfield units; they are shown {how}" in told and "--read window=WIDTH/LEVEL" in told
    assert len(np.unique(found.image)) > 50, "and it is to be seen"
    read_case(save_nifti(tmp_path / "MR_a.nii.gz", values))
    assert not capsys.readouterr().err


def test_the_modality_is_asked_for_where_the_name_does_not_say_it(tmp_path):
    values = voxels(low=-400, high=400)
    paths = [save_nifti(tmp_path / "scan7.nii.gz", values), save_itk(tmp_path / "scan7.mha", values)]
    for path in paths:
        plain, asked = read_case(path), read_case(path, window=window_of(["modality=CT"]))
        assert (plain.modality, plain.window) == ("Other", (0, 0))
        assert (asked.modality, asked.window) == ("CT", (400, 40))
    save_image(tmp_path / "scan8.png", tiny_case().image)
    save_npz(tmp_path / "scan9.npz", imgs=tiny_case().image, gts=tiny_case().labels)
    for name in ("scan8.png", "scan9.npz"):
        assert read_case(tmp_path / name, window=window_of(["modality=ultrasound"])).modality == "US"
    assert window_of([]) == Asked(None, None) and window_of(["window=lung", "modality=MRI"]).modality == "MR"
    assert "--read modality=liver: begin with a known one" in sentence(window_of, ["modality=liver"])
    # step 1 names the case by the modality
    save_nifti(tmp_path / "scan7_mask.nii.gz", (values > 0).astype(np.uint8))
    found = Source("CT_scan7", paths[0], None, "", Options()).read()[0]
    assert (found.name, found.modality, found.window) == ("CT_scan7", "CT", (400, 40))


def test_step_4_takes_the_modality(tmp_path):
    infer = importlib.import_module("04_infer")
    scan = save_nifti(tmp_path / "scan7.nii.gz", tiny_phantom())
    with pytest.raises(SystemExit, match="modality=liver: begin with a known one"):
        infer.main(["-i", str(scan), "--box", "1", "1", "2", "9", "9", "3", "--read", "modality=liver"])


# ---------------------------------------------------------------- labels


def test_labels_that_a_slope_made_nearly_whole_are_whole(tmp_path):
    labels = (voxels() > 0).astype(np.uint8)
    scan = save_nifti(tmp_path / "CT_a.nii.gz", voxels())
    image = nibabel.Nifti1Image(labels, np.diag([0.5, 0.8, 3, 1.0]))
    image.header.set_slope_inter(1.0000000591389835, 0)
    (tmp_path / "CT_a_label.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
    found = read_case(scan, boxes_from_masks=True)
    assert len(found.boxes) == 1 and found.labels.sum() == labels.sum()
    for wrong in (0.5, 1.01, np.nan, -0.2):
        save_nifti(tmp_path / "CT_a_label.nii.gz", np.where(labels, wrong, 0).astype(np.float32))
        assert f"is no label map, it holds values such as {wrong:g}" in sentence(read_case, scan)


def test_nnu_net_names_go_together(tmp_path):
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    images, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
    for patient, channel in itertools.product(("MR_001", "MR_002"), ("0000", "0001")):
        save_nifti(images / f"{patient}_{channel}.nii.gz", voxels(low=1))
    for patient in ("MR_001", "MR_003"):
        save_nifti(labels / f"{patient}.nii.gz", (voxels() > 0).astype(np.uint8))
    found = {path.name: [one.name for one in label_files(path)] for path in list_cases(images)}
    mine = ["MR_001.nii.gz"]
    assert found == {
        "MR_001_0000.nii.gz": mine, "MR_001_0001.nii.gz": mine, "MR_002_0000.nii.gz": [], "MR_002_0001.nii.gz": [],
    }  # fmt: skip
    assert len(read_case(images / "MR_001_0000.nii.gz", boxes_from_masks=True).boxes) == 1
    pairs, problems = list_pairs(images, labels)
    assert [(a.name, b.name) for a, b in pairs] == [(f"MR_001_{n}.nii.gz", "MR_001.nii.gz") for n in ("0000", "0001")]
    assert [str(problem).split(": has no")[0] for problem in problems] == [
        str(images / "MR_002_0000.nii.gz"), str(images / "MR_002_0001.nii.gz"), str(labels / "MR_003.nii.gz"),
    ]  # fmt: skip


def test_numbered_images_and_masks_of_one_name_are_no_channels(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name in ("US_0001", "US_0002"):
        save_image(tmp_path / "images" / f"{name}.png", tiny_case().image)
    for name in ("US_0001", "US_0003"):
        save_image(tmp_path / "masks" / f"{name}.png", tiny_case().labels.astype(np.uint8))
    found = [[one.name for one in label_files(tmp_path / "images" / f"US_000{i}.png")] for i in (1, 2)]
    assert found == [["US_0001.png"], []]


@pytest.mark.parametrize("low, high", [((0, 0, 0), SHAPE), ((3, 2, 1), (9, 6, 4)), ((-2, 1, -1), (5, 9, 3))])
def test_a_segmentation_that_3d_slicer_cropped_lies_where_simpleitk_puts_it(tmp_path, low, high):
    affine = rotated(20) @ np.diag([-0.5, 0.8, 3, 1.0])
    scan = save_itk(tmp_path / "CT_a.nrrd", voxels(), affine)
    part = np.eye(4)
    part[:3, 3] = low
    segments = np.random.default_rng(1).integers(0, 3, np.subtract(high, low)).astype(np.uint8)
    save_itk(tmp_path / "CT_a.seg.nrrd", segments, affine @ part)
    image, theirs = (sitk.ReadImage(str(path)) for path in (scan, tmp_path / "CT_a.seg.nrrd"))
    resampled = sitk.GetArrayFromImage(sitk.Resample(theirs, image, sitk.Transform(), sitk.sitkNearestNeighbor))
    found = read_case(scan, boxes_from_masks=True)
    assert np.array_equal(np.sort(found.labels, axis=None), np.sort(resampled, axis=None))
    for z, y, x in np.argwhere(found.labels)[::7]:
        place = (found.affine @ [x, y, z, 1] * [-1, -1, 1, 1])[:3].tolist()
        assert (
            found.labels[z, y, x]
            == image[image.TransformPhysicalPointToIndex(place)] * 0
            + (resampled[image.TransformPhysicalPointToIndex(place)[::-1]])
        )
    save_itk(tmp_path / "CT_a.seg.nrrd", segments, affine @ part @ np.diag([1, 1.1, 1, 1]))
    assert "does not lie as CT_a.nrrd does" in sentence(read_case, scan)


def test_overlapping_layers_of_3d_slicer_are_refused_with_the_way_out(tmp_path):
    scan = save_itk(tmp_path / "CT_a.nrrd", voxels())
    layers = sitk.GetImageFromArray((voxels((*SHAPE[::-1], 2)) > 0).astype(np.uint8), isVector=True)
    layers.SetSpacing((0.5, 0.8, 3))
    sitk.WriteImage(layers, str(tmp_path / "CT_a.seg.nrrd"))
    told = sentence(read_case, scan)
    assert "holds segments that overlap, in 2 layers; in 3D Slicer" in told and "save each segment" in told


def test_two_label_maps_of_one_scan_are_told(tmp_path):
    scan = save_nifti(tmp_path / "CT_a.nii.gz", voxels())
    for name in ("CT_a_label_1", "CT_a_label_2"):
        save_nifti(tmp_path / f"{name}.nii.gz", (voxels() > 0).astype(np.uint8))
    assert "has labels in CT_a_label_1.nii.gz, CT_a_label_2.nii.gz; merge them" in sentence(read_case, scan)


# ---------------------------------------------------------------- step 5


@pytest.mark.parametrize("truth, found", [(255, 1), (1, 255), (255, 255), (65535, 1), (1, 1), (7, 255)])
def test_one_white_object_is_that_object(tmp_path, truth, found):
    mask = tiny_case().labels == 1
    save_npz(tmp_path / "US_a.npz", gts=mask * np.uint16(truth), boxes=[[1, 2, 30, 40]])
    save_npz(tmp_path / "segs" / "US_a.npz", segs=mask * np.uint16(found))
    wanted = read_truth(tmp_path / "US_a.npz")
    labels = read_prediction(tmp_path / "segs" / "US_a.npz", wanted)
    assert np.array_equal(labels, wanted.labels) and np.array_equal(wanted.labels > 0, mask)
    assert truth == 7 or wanted.labels.max() == 1


def test_a_prediction_without_any_label_of_the_truth_is_told(tmp_path):
    labels = tiny_case().labels
    save_npz(tmp_path / "US_a.npz", gts=labels)
    save_npz(tmp_path / "segs" / "US_a.npz", segs=np.where(labels, labels + 10, 0))
    wanted = read_truth(tmp_path / "US_a.npz")
    told = sentence(read_prediction, tmp_path / "segs" / "US_a.npz", wanted)
    assert "has labels 11 12, and the truth 1 2: none in common" in told
    save_npz(tmp_path / "segs" / "US_a.npz", segs=labels * 0)
    assert not read_prediction(tmp_path / "segs" / "US_a.npz", wanted).any(), "nothing found is a miss"


def test_a_mask_is_written_the_same_each_time(tmp_path):
    scan = save_nifti(tmp_path / "CT_a.nii.gz", voxels())
    labels = np.zeros((5, 7, 11), np.uint16)
    written = [save_nifti_labels(tmp_path / f"{i}.nii.gz", labels, np.eye(4), scan).read_bytes() for i in range(2)]
    assert written[0] == written[1]
    assert read_pair(scan, save_nifti(tmp_path / "m.nii.gz", labels.T * 0 + 1), "CT_a").labels.all()
