"""Volumes that say where they lie in the patient: NIfTI, by nibabel, and NRRD and MetaImage, by SimpleITK.

An affine (4, 4) takes voxel indices (x, y, z) to millimetres, in the frame RAS+: x to the patient's
right, y to the front, z to the head. NIfTI stores it so; DICOM and ITK (NRRD, MHA) count x to the
left and y to the back (LPS+).
A file's slices are the planes of its third axis. They are turned as radiologists see them: the
patient's front, or head, is up; the patient's left is on the right, in sagittal planes the back is.
Slices go from feet to head, right to left, or front to back.
"""

import gzip
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from formats import InputError
from formats.case import Case, why
from formats.intensity import Window, gray_case
from formats.writing import save_bytes

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MAX_VOXELS = 2**31  # a damaged header, or one that was made to fill the memory, may claim any size


# ---------------------------------------------------------------- how a volume is turned


def view_of(affine: np.ndarray) -> np.ndarray:
    """How a file with this affine (RAS+) is turned. ValueError if the affine is not invertible.

    (3, 2), as nibabel has orientations: of each axis of the file, which one of (D, H, W) it becomes, and
    whether it keeps its direction (1) or is turned round (-1).
    """
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError("its affine does not span three directions")
    world, sign = io_orientation(affine).astype(int).T  # of each file axis: 0 right, 1 front, 2 head; +1 or -1
    columns, rows = sorted((0, 1), key=lambda axis: world[axis])
    # in the plane: to the patient's left, to the back, to the feet; slices: to the head, to the left, to the back
    wanted = np.array([1 if world[2] == 2 else -1, -1, -1])
    view, axes = np.zeros((3, 2), int), [2, rows, columns]  # of the file, that become D, H, W
    view[axes, 0], view[axes, 1] = (0, 1, 2), sign[axes] * wanted
    return view


def turn(voxels: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Voxels (X, Y, Z) of a file -> (D, H, W)."""
    return np.ascontiguousarray(apply_orientation(voxels, view))


def turn_back(volume: np.ndarray, view: np.ndarray) -> np.ndarray:
    """The inverse of `turn`: (D, H, W) -> (X, Y, Z) of the file."""
    return turn(volume, ornt_transform(np.array([(0, 1), (1, 1), (2, 1)]), view))


def turned(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    """Voxels (X, Y, Z) with their affine -> (volume (D, H, W), its spacing (z, y, x) mm, its affine).

    That affine takes (x, y, z), as the axes W, H, D count them, to mm.
    """
    view, its_affine = view_of(affine), affine.copy()
    for column, axis in enumerate(np.argsort(-view[:, 0])):  # of the file, that become W, H, D
        step, direction = affine[:3, axis], view[axis, 1]
        its_affine[:3, column] = direction * step
        if direction < 0:
            its_affine[:3, 3] += step * (voxels.shape[axis] - 1)
    return turn(voxels, view), spacing_of_affine(its_affine)[::-1], its_affine


def spacing_of_affine(affine: np.ndarray) -> tuple[float, float, float]:
    """Distances of neighbouring voxels, mm, along (x, y, z)."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return x, y, z


# ---------------------------------------------------------------- reading


def read_scan(path: Path, window: Window | None = None) -> Case:
    """A file as a case without boxes and labels: a volume (D, H, W), or (H, W) if it has one slice.

    InputError, one sentence, if it is damaged, too large, not 3D, not gray, or holds no image.
    """
    image = open_scan(path)
    values = _numbers(image, path)
    try:
        volume, spacing, affine = turned(values, image.affine)
    except ValueError as error:
        raise InputError(f"{path}: {error}; correct its header") from error
    return gray_case(path, volume, window, True, spacing, affine)


def read_scan_labels(path: Path, image_path: Path) -> np.ndarray:
    """The label map of an image -> (D, H, W) or (H, W), whole numbers, turned as the image is.

    InputError unless it has the image's grid, orientation and place, and whole numbers.
    """
    labels, image = open_scan(path), open_scan(image_path)
    if labels.shape != image.shape:
        raise InputError(f"{path}: its grid is {labels.shape}, but {image_path.name} has {image.shape}; resample it")
    # the corners of the grid lie at one place, to a tenth of a voxel
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * [*np.subtract(image.shape, 1), 1]
    apart = np.abs(corners @ (image.affine - labels.affine).T)[:, :3].max()
    if apart > 0.1 * min(spacing_of_affine(image.affine)):
        mine, its = ("".join(nibabel.aff2axcodes(one.affine)) for one in (labels, image))
        differ = f"orientation {mine} and {its}, affines differ"
        raise InputError(f"{path}: does not lie as {image_path.name} does ({differ}); resample it to the image's grid")
    values = _numbers(labels, path)
    if values.dtype.kind not in "uib":
        rounded = np.rint(values)
        if not np.array_equal(values, rounded):
            raise InputError(f"{path}: is no label map, it holds values such as {values[values != rounded][0]:g}")
        values = rounded.astype(np.int64)
    found = turn(values, view_of(image.affine))
    return found if len(found) > 1 else found[0]


def open_scan(path: Path):
    """A file as an image of nibabel, (X, Y, Z), with an affine RAS+. InputError if it can't be read."""
    return open_nifti(path) if path.name.lower().endswith((".nii", ".nii.gz")) else open_itk(path)


def open_nifti(path: Path):
    """nibabel's image, (X, Y, Z), its voxels not read yet. InputError if it can't be read or is not 3D."""
    try:
        image = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
    except Exception as error:  # nibabel raises many kinds for files from outside
        raise InputError(f"{path}: not a NIfTI file that can be read ({why(error)}); export it again") from error
    spatial = shape + (1,) * (3 - len(shape))
    if any(n != 1 for n in spatial[3:]) or min(spatial) < 1:
        raise InputError(f"{path}: has the shape {shape}; save one volume of three dimensions as a file of its own")
    if np.prod(spatial, dtype=float) > MAX_VOXELS:
        raise InputError(f"{path}: claims {shape} voxels, more than {MAX_VOXELS:,}; crop it, or repair its header")
    if image.get_data_dtype().fields:
        raise InputError(f"{path}: is a colour NIfTI; save its slices as pictures, or the volume in gray")
    if shape == spatial[:3]:
        return image
    return nibabel.Nifti1Image(_numbers(image, path).reshape(spatial[:3]), image.affine)


def open_itk(path: Path):
    """An NRRD or MetaImage file as an image of nibabel, (X, Y, Z), affine RAS+. InputError if it can't be read."""
    try:
        import SimpleITK

        image = SimpleITK.ReadImage(str(path))
    except ImportError as error:
        raise InputError(f"{path}: needs SimpleITK; run: pip install -r requirements-formats.txt") from error
    except RuntimeError as error:
        raise InputError(f"{path}: SimpleITK can't read it ({why(error)}); export it again") from error
    dimensions, values = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if values != 1 or dimensions not in (2, 3):
        raise InputError(f"{path}: has {dimensions} dimensions and {values} values a voxel; save one gray volume")
    if dimensions == 2:
        image = SimpleITK.JoinSeries(image)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    voxels = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    return nibabel.spatialimages.SpatialImage(voxels, LPS_TO_RAS @ affine)


def _numbers(image, path: Path) -> np.ndarray:
    """Voxels (X, Y, Z), scaled as the header says. InputError if the file ends too early."""
    try:
        return np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        raise InputError(f"{path}: ends too early or is damaged ({why(error)}); copy or export it again") from error


# ---------------------------------------------------------------- writing


def save_nifti_labels(path: Path, labels: np.ndarray, affine: np.ndarray, like: Path | None = None) -> None:
    """Write a label map (D, H, W) or (H, W) as .nii.gz.

    affine: of the case (`Case.affine`).   like: the NIfTI file that the case was read from. The label
    map then has its grid, axis by axis, and its affine, so that any viewer lays one over the other.
    """
    volume = labels if labels.ndim == 3 else labels[None]
    small = volume.astype(np.uint8 if volume.max() <= 255 else np.uint16)
    if like is None:
        voxels = small.transpose(2, 1, 0)
    else:
        source = open_nifti(like)
        voxels, affine = turn_back(small, view_of(source.affine)), source.affine
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    # level 1: a higher one is slower and hardly smaller. No time in it: the same bytes each run
    save_bytes(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
