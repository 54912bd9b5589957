"""NIfTI volumes (.nii, .nii.gz), read and written by nibabel. Any orientation: see geometry.py."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import nibabel
import numpy as np

from files import InputError
from files.case import Case
from files.geometry import same_place, turn, turn_back, view_of, volume_case
from files.intensity import Window
from files.writing import save_bytes

MAX_VOXELS = 2**31  # a damaged header, or one that was made to fill the memory, may claim any size


def read_nifti(path: Path, window: Window | None = None) -> Case:
    """A NIfTI image as a case without boxes and labels: a volume (D, H, W), or (H, W) if it has one slice.

    InputError, one sentence, if it is damaged, too large, not 3D, not gray, or has values that are no image.
    """
    image = open_nifti(path)
    try:
        return volume_case(path, _numbers(image, path), image.affine, window)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}; correct its header") from error


def read_nifti_labels(path: Path, image_path: Path) -> np.ndarray:
    """The label map that belongs to a NIfTI image -> (D, H, W) or (H, W), whole numbers, turned as the image is.

    InputError unless it has the image's grid, orientation and place, and whole numbers.
    """
    image, labels = open_nifti(image_path), open_nifti(path)
    if labels.shape != image.shape:
        raise InputError(
            f"{path}: its grid is {labels.shape}, but {image_path.name} has {image.shape}; they must agree"
        )
    if not same_place(image.affine, labels.affine, image.shape):
        mine, its = ("".join(nibabel.aff2axcodes(one.affine)) for one in (labels, image))
        raise InputError(
            f"{path}: does not lie as {image_path.name} does (orientation {mine} and {its}, affines differ); "
            "resample it to the image's grid"
        )
    values = whole_numbers(_numbers(labels, path), path)
    turned = turn(values, view_of(image.affine))
    return turned if len(turned) > 1 else turned[0]


def whole_numbers(values: np.ndarray, path: Path) -> np.ndarray:
    """Labels as integers. InputError if one is no whole number: then it is an image, or probabilities."""
    if values.dtype.kind in "uib":
        return values
    rounded = np.rint(values)
    if not np.array_equal(values, rounded):
        raise InputError(f"{path}: is no label map, it holds values such as {values[values != rounded][0]:g}")
    return rounded.astype(np.int64)


def open_nifti(path: Path):
    """nibabel's image, (X, Y, Z), its voxels not read yet. InputError if it can't be read or is not 3D."""
    try:
        image = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except Exception as error:  # nibabel raises many kinds for files from outside
        why = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not a NIfTI file that can be read ({why}); export it again") from error
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


def save_nifti_labels(path: Path, labels: np.ndarray, affine: np.ndarray, like: Path | None = None) -> None:
    """Write a label map (D, H, W) or (H, W) as .nii.gz.

    affine: of the case (`Case.affine`).   like: the NIfTI file that the case was read from; the label map then has its grid, axis
    by axis, and its affine, so that any viewer lays the one over the other.
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
    # level 1: label maps are mostly one value, a higher one is slower and hardly smaller. No time in it: the same bytes each run
    save_bytes(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _numbers(image, path: Path) -> np.ndarray:
    """Voxels (X, Y, Z), scaled as the header says. InputError if the file ends too early."""
    try:
        return np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        why = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: ends too early or is damaged ({why}); copy or export it again") from error
