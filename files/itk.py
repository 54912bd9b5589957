"""NRRD and MetaImage volumes (.nrrd, .nhdr, .mha, .mhd), read by SimpleITK where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from files import InputError
from files.case import Case
from files.geometry import LPS_TO_RAS, same_place, turn, view_of, volume_case
from files.intensity import Window
from files.nifti import whole_numbers


def read_itk(path: Path, window: Window | None = None) -> Case:
    """A volume (D, H, W), or a picture (H, W) if it has one slice, without boxes and labels. InputError, one sentence."""
    return volume_case(path, *_open_itk(path), window)


def read_itk_labels(path: Path, image_path: Path) -> np.ndarray:
    """The label map that belongs to an image -> (D, H, W) or (H, W), turned as the image is. InputError if it lies elsewhere."""
    (image, affine), (labels, its_affine) = _open_itk(image_path), _open_itk(path)
    if labels.shape != image.shape or not same_place(affine, its_affine, image.shape):
        raise InputError(
            f"{path}: its grid {labels.shape} lies elsewhere than {image_path.name}'s {image.shape}; resample it to that grid"
        )
    turned = turn(whole_numbers(labels, path), view_of(affine))
    return turned if len(turned) > 1 else turned[0]


def _open_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> (voxels (X, Y, Z), affine RAS+ (4, 4))"""
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError(
            f"{path}: {path.suffix} needs SimpleITK; run: pip install -r requirements-formats.txt"
        ) from error
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1][:120]
        raise InputError(f"{path}: SimpleITK can't read it ({why}); export it again") from error
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() not in (2, 3):
        raise InputError(f"{path}: has {image.GetDimension()} dimensions and {image.GetNumberOfComponentsPerPixel()} "
                         "values a voxel; save one gray volume")  # fmt: skip
    if image.GetDimension() == 2:
        image = SimpleITK.JoinSeries(image)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine
