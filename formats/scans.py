"""Volumes that say where they lie in the patient: NIfTI, by nibabel, and NRRD and MetaImage, by SimpleITK.

An affine (4, 4) takes voxel indices (x, y, z) to millimetres, in the frame RAS+: x to the patient's right, y to the
front, z to the head. NIfTI stores it so; DICOM and ITK (NRRD, MHA) count x to the left and y to the back (LPS+).
A file's slices are the planes of its third axis. They are turned as radiologists see them: front or head up, the
patient's left, or in sagittal planes the back, on the right; from feet to head, right to left, or front to back.
"""

import gzip
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from formats import MOST_BYTES, InputError
from formats.case import Case, check_claim, told_in_a_sentence
from formats.intensity import Window, gray_case

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
DEFLATE = 1032  # bytes that one byte of gzip or zlib unpacks to at most
COUNTS, SIZES = ("dimension", "ndims"), ("sizes", "dimsize")  # of NRRD and MetaImage: how many axes, how long they are
VIEWS = ("LIP", "PIL", "SPL")  # where slices, rows and columns of sagittal, coronal, axial volumes follow each other
PACKED = ("gz", "gzip", "true")  # how they say that their voxels are compressed
MOST_LINES = 2000  # of a header that ITK can parse
NEAR = 0.1  # of a voxel: grids whose corners are no farther apart lie at one place
UNIT_MM = {"meter": 1000.0, "micron": 0.001}  # all else, and a NIfTI file that names none, is in mm


# ---------------------------------------------------------------- how a volume is turned


def view_of(affine: np.ndarray) -> np.ndarray:
    """How a file with this affine (RAS+) is turned, as nibabel has orientations. ValueError if the affine is not invertible.

    (3, 2): of each axis of the file, which one of (D, H, W) it becomes, and whether it keeps its direction (1) or not (-1).
    """
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * np.prod(spacing_of_affine(affine)):
        raise ValueError("its affine does not span three directions")
    stored = io_orientation(affine)
    return ornt_transform(stored, axcodes2ornt(VIEWS[int(stored[2, 0])])).astype(int)


def turn(voxels: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Voxels (X, Y, Z) of a file -> (D, H, W)."""
    return np.ascontiguousarray(apply_orientation(voxels, view))


def turn_back(volume: np.ndarray, view: np.ndarray) -> np.ndarray:
    """The inverse of `turn`: (D, H, W) -> (X, Y, Z) of the file."""
    return turn(volume, ornt_transform(np.array([(0, 1), (1, 1), (2, 1)]), view))


def turned(path: Path, voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    """Voxels (X, Y, Z) of a file with their affine -> (volume (D, H, W), its spacing (z, y, x) mm, its affine).

    That affine takes (x, y, z), as the axes W, H, D count them, to mm. InputError if it is not invertible.
    """
    with told_in_a_sentence(path, "can't be turned", "correct its header"):
        view = view_of(affine)
    its_affine = (affine @ inv_ornt_aff(view, voxels.shape))[:, [2, 1, 0, 3]]
    return turn(voxels, view), spacing_of_affine(its_affine)[::-1], its_affine


def spacing_of_affine(affine: np.ndarray) -> tuple[float, float, float]:
    """Distances of neighbouring voxels, mm, along (x, y, z)."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return x, y, z


# ---------------------------------------------------------------- reading


class Scan(NamedTuple):
    """A file whose voxels are not read yet."""

    shape: tuple[int, ...]  # (X, Y, Z)
    places: list[np.ndarray]  # affines (4, 4), RAS+, mm: where it lies; NIfTI may name two places, the first counts
    voxels: Callable[[], np.ndarray]  # reads them: (X, Y, Z), scaled as the header says


def read_scan(path: Path, window: Window | None = None, modality: str = "") -> Case:
    """A file as a case without boxes and labels: a volume (D, H, W), or (H, W) if it has one slice.

    modality: of MODALITIES; "": the file's name says it.   InputError if it is damaged, too large, not 3D, or not gray.
    """
    scan = open_scan(path)
    volume, spacing, affine = turned(path, numbers_of(scan, path), scan.places[0])
    return gray_case(path, volume, window, True, spacing, affine, modality)


def read_scan_labels(path: Path, image_path: Path) -> np.ndarray:
    """The label map of an image -> (D, H, W) or (H, W), whole numbers, turned as the image is.

    InputError unless it has the image's grid and place. A .seg.nrrd may be smaller than the image: 3D Slicer crops it.
    """
    labels, image = open_scan(path), open_scan(image_path)
    affine, shift = image.places[0], np.zeros(3, int)
    if path.name.lower().endswith(".seg.nrrd"):
        shift = np.rint(np.linalg.solve(affine, labels.places[0]))[:3, 3].astype(int)
    elif labels.shape != image.shape:
        raise InputError(f"{path}: its grid is {labels.shape}, but {image_path.name} has {image.shape}; resample it")
    # ITK writes labels with the one of the image's two places that it reads
    if min(apart(mine, its, labels.shape, shift) for mine in labels.places for its in image.places) > NEAR:
        mine, its = ("".join(nibabel.aff2axcodes(one.places[0])) for one in (labels, image))
        differ = f"does not lie as {image_path.name} does (orientation {mine} and {its}, affines differ)"
        raise InputError(f"{path}: {differ}; resample it to the image's grid")
    values = numbers_of(labels, path)
    if values.dtype.kind not in "uib":
        # a slope in the header leaves a label 1 as 1.00000006
        if (wrong := ~(np.abs(values - np.rint(values)) <= 1e-3)).any():
            raise InputError(f"{path}: is no label map, it holds values such as {values[wrong][0]:g}")
        values = np.rint(values).astype(np.int64)
    whole = np.zeros(image.shape, values.dtype)
    low, high = np.maximum(shift, 0), np.minimum(shift + labels.shape, image.shape).clip(min=0)
    if (low < high).all():
        whole[tuple(map(slice, low, high))] = values[tuple(map(slice, low - shift, high - shift))]
    found = turn(whole, view_of(affine))
    return found if len(found) > 1 else found[0]


def apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...], shift: np.ndarray | int = 0) -> float:
    """The most that two affines set the corners of a grid apart, in voxels.   shift: (3,) of the grid, in the other one."""
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * [*np.subtract(shape, 1), 1]
    moved = corners + np.append(np.zeros(3) + shift, 0)
    return np.abs(corners @ one.T - moved @ other.T)[:, :3].max() / min(spacing_of_affine(other))


def open_scan(path: Path) -> Scan:
    """The header of a file. InputError if it can't be read, claims more than the file can hold, or is not 3D and gray."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    return open_nifti(path) if path.name.lower().endswith((".nii", ".nii.gz")) else open_itk(path)


def open_nifti(path: Path) -> Scan:
    """The header of a NIfTI file, read by nibabel. InputError: see `open_scan`."""
    with told_in_a_sentence(path, "not a NIfTI file that can be read"):
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise TypeError(f"it is a {type(image).__name__}")
        shape, dtype = tuple(int(n) for n in image.shape), image.get_data_dtype()
        forms = [form for form, code in (image.get_sform(coded=True), image.get_qform(coded=True)) if code]
        to_mm = np.diag([*[UNIT_MM.get(image.header.get_xyzt_units()[0], 1.0)] * 3, 1.0])
        start = int(image.dataobj.offset)  # of the voxels in the file
    spatial = shape + (1,) * (3 - len(shape))
    if any(n != 1 for n in spatial[3:]) or min(spatial) < 1:
        axes = ", ".join(map("{} {}".format, ("x", "y", "z", "time", "channel", "6th", "7th"), shape))
        raise InputError(f"{path}: has the shape {shape}; save one volume as a file of its own (its axes: {axes})")
    if dtype.fields:
        raise InputError(f"{path}: is a colour NIfTI; save its slices as pictures, or the volume in gray")
    is_packed = path.suffix.lower() == ".gz"
    claimed = check_claim(path, spatial[:3], dtype, path.stat().st_size * (DEFLATE if is_packed else 1) - start)

    def voxels() -> np.ndarray:
        whole = image
        if is_packed:  # to the end, where gzip's checksum stands: nibabel stops before it
            with gzip.open(path) as file:
                whole = type(image).from_bytes(file.read(start + claimed))
                if file.read(2**20) and file.read(1):
                    raise ValueError("more follows behind its voxels")
        return np.asanyarray(whole.dataobj).reshape(spatial[:3])

    return Scan(spatial[:3], [to_mm @ form for form in forms or [image.affine]], voxels)


def open_itk(path: Path) -> Scan:
    """The header of an NRRD or MetaImage file, read by SimpleITK. InputError: see `open_scan`."""
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError(f"{path}: needs SimpleITK; run: pip install -r requirements-formats.txt") from error
    with told_in_a_sentence(path, "SimpleITK can't read it"):
        # before C++ sees it, which a bad header or name can kill
        path.name.encode()
        file, start, packing = _data_of(path)
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        n, values, size = reader.GetDimension(), reader.GetNumberOfComponents(), reader.GetSize()
        dtype = SimpleITK.GetArrayViewFromImage(SimpleITK.Image([1, 1], reader.GetPixelID())).dtype
    if values != 1 and path.name.lower().endswith(".seg.nrrd"):
        way = "in 3D Slicer, Segmentations, Export to files, save each segment as a NIfTI or NRRD of its own"
        raise InputError(f"{path}: holds segments that overlap, in {values} layers; {way}, and use one at a time")
    if values != 1 or n not in (2, 3):
        raise InputError(f"{path}: has {n} dimensions ({size}) and {values} values a voxel; save one gray volume")
    check_claim(path, size, dtype, (file.stat().st_size - start) * (1 if packing == "raw" else DEFLATE))
    affine, shape = np.eye(4), (*size, *[1] * (3 - n))
    affine[:n, :n] = np.reshape(reader.GetDirection(), (n, n)) * reader.GetSpacing()
    affine[:n, 3] = reader.GetOrigin()
    with told_in_a_sentence(path, "can't be turned", "correct its header"):
        view_of(affine)  # ITK would look for its inverse without end

    def voxels() -> np.ndarray:
        # first: a file that was cut short ends here, and ITK prints nothing of its own
        crc = crc_of_unpacked(file, start) if packing in PACKED else None
        found = SimpleITK.GetArrayFromImage(reader.Execute())
        if crc not in (None, zlib.crc32(found), zlib.crc32(found.byteswap())):
            raise ValueError("SimpleITK unpacks other voxels than the file holds")
        return found.T.reshape(shape)

    return Scan(shape, [LPS_TO_RAS @ affine], voxels)


def _data_of(path: Path) -> tuple[Path, int, str]:
    """Where an NRRD or MetaImage has its voxels: (file, first byte, packing: "raw", one of PACKED, or another).

    ValueError for a header that says how many axes it has twice, or not as its sizes do, or that has very long lines.
    """
    with path.open("rb") as file:
        head = file.read(2**22)
    is_nrrd = head.startswith(b"NRRD")
    end = re.search(rb"\r?\n\r?\n" if is_nrrd else rb"(?m)^ElementDataFile.*\n?", head)
    head = head[: end.end()] if end else head
    lines = re.findall(r"(?m)^([^#:=\n]+?) *[:=] *(.*?)\s*$", head.decode("latin-1"))
    lines = [("".join(key.lower().split()), value) for key, value in lines]
    counts, sizes = ([value for key, value in lines if key in keys] for keys in (COUNTS, SIZES))
    if not (len(counts) == len(sizes) == 1 and counts[0] == str(len(sizes[0].split())) in ("2", "3", "4")):
        raise ValueError(f"it has the axes {', '.join(counts)[:20]}, and the sizes {', '.join(sizes)[:40]}")
    # of NRRD, texts and notes may be longer: ITK's C copies of all other lines have room for 1,000 letters
    if len(lines) > MOST_LINES or re.search(rb"(?m)^(?!#|[^:\n]*:=).{501}|.{16385}" if is_nrrd else b".{16385}", head):
        raise ValueError("its header is too long")
    fields = {"binarydata": "True", "compresseddata": "raw"} | dict(lines)
    packing = fields.get("encoding", fields["compresseddata"]).lower() if fields["binarydata"] != "False" else "text"
    names = [value for key, value in lines if key in ("datafile", "elementdatafile")]
    if names in ([], ["LOCAL"]):
        return path, len(head), packing
    name, data = ", ".join(names), path.parent / names[0]
    is_file = len(names) == 1 and "%" not in name and name[:4].upper() != "LIST" and data != path and data.is_file()
    if not is_file or not data.resolve().is_relative_to(path.parent.resolve()):
        raise InputError(f"{path}: names {name!r} as the file of its voxels; put that one file beside it")
    return data, 0, packing


def crc_of_unpacked(file: Path, start: int, bits: int = 47) -> int:
    """CRC-32 of what the compressed bytes from `start` on unpack to. ITK compares no checksum; this raises ValueError.

    bits: zlib's; 47 is gzip or zlib.
    """
    unpacker = zlib.decompressobj(bits)
    crc = zlib.crc32(unpacker.decompress(file.read_bytes()[start:], MOST_BYTES + 1))
    if not unpacker.eof:
        raise ValueError("what it has compressed has no end, or is too large")
    return crc


def numbers_of(scan: Scan, path: Path) -> np.ndarray:
    """The voxels of a scan. InputError if the file ends too early, or has changed on its way."""
    with told_in_a_sentence(path, "ends too early or is damaged", "copy or export it again"):
        return scan.voxels()
