"""Where a volume's voxels lie in the patient, and how its slices are turned so that all formats look alike.

An affine (4, 4) takes voxel indices (x, y, z) to millimetres, in the frame RAS+: x to the patient's right, y to the front,
z to the head. NIfTI stores it so; DICOM and ITK (NRRD, MHA) count x to the left and y to the back (LPS+).
A file's slices are the planes of its third axis. They are turned as radiologists see them: the patient's front, or head,
is up; the patient's left is on the right, in sagittal planes the back is. Slices go from feet to head, right to left, or
front to back.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel.orientations import io_orientation

from files.case import Case
from files.intensity import to_grey_levels

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class View(NamedTuple):
    """Which axis of the file became which axis of the volume (D, H, W), and which of these were turned round."""

    axes: tuple[int, int, int]  # file axis of D, H, W
    flips: tuple[bool, bool, bool]  # whether D, H, W run against the file


def view_of(affine: np.ndarray) -> View:
    """How a file with this affine (RAS+) is turned. ValueError if the affine is not invertible."""
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError("its affine does not span three directions")
    world, sign = io_orientation(affine).astype(int).T  # of each file axis: 0 right, 1 front, 2 head; +1 or -1
    columns, rows = sorted((0, 1), key=lambda axis: world[axis])
    axes = (2, rows, columns)
    # in the plane: to the patient's left, to the back, to the feet; slices: to the head, to the left, to the back
    wanted = (1 if world[2] == 2 else -1, -1, -1)
    return View(axes, tuple(bool(sign[axis] != want) for axis, want in zip(axes, wanted, strict=True)))


def turn(voxels: np.ndarray, view: View) -> np.ndarray:
    """Voxels (X, Y, Z) of a file -> (D, H, W)."""
    turned = voxels.transpose(view.axes)
    return np.ascontiguousarray(np.flip(turned, [axis for axis in range(3) if view.flips[axis]]))


def turn_back(volume: np.ndarray, view: View) -> np.ndarray:
    """The inverse of `turn`: (D, H, W) -> (X, Y, Z) of the file."""
    turned = np.flip(volume, [axis for axis in range(3) if view.flips[axis]])
    return np.ascontiguousarray(turned.transpose(np.argsort(view.axes)))


def turned_affine(affine: np.ndarray, view: View, shape: tuple[int, ...]) -> np.ndarray:
    """Affine of the turned volume, from its (x, y, z) = (W, H, D) to mm.   shape: (X, Y, Z) of the file."""
    turned = affine.copy()
    for column, (axis, flip) in enumerate(zip(reversed(view.axes), reversed(view.flips), strict=True)):
        step = affine[:3, axis]
        turned[:3, column] = -step if flip else step
        if flip:
            turned[:3, 3] = turned[:3, 3] + step * (shape[axis] - 1)
    return turned


def spacing_of_affine(affine: np.ndarray) -> tuple[float, float, float]:
    """Distances of neighbouring voxels, mm, along (x, y, z)."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return x, y, z


def volume_case(path: Path, voxels: np.ndarray, affine: np.ndarray, window: tuple[float, float] | None) -> Case:
    """Voxels (X, Y, Z) of a file with its affine -> a volume (D, H, W), or a picture (H, W) if it has one slice; grey levels.

    ValueError if the affine is not invertible; InputError for values that are no image.
    """
    gray, view, by_axis = to_grey_levels(voxels, path, window), view_of(affine), spacing_of_affine(affine)
    volume = turn(gray.levels, view)
    is_3d = len(volume) > 1
    spacing = tuple(by_axis[axis] for axis in view.axes) if is_3d else None
    turned = turned_affine(affine, view, voxels.shape)
    image = volume if is_3d else volume[0]
    return Case(path.name, image, None, None, spacing, is_3d, None, turned, gray.window, gray.source_range)


def same_place(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether two affines put the corners of a grid (X, Y, Z) at the same place, to a tenth of a voxel."""
    corners = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)])
    apart = np.abs(corners @ (a - b).T)[:, :3].max()
    return bool(apart <= 0.1 * min(spacing_of_affine(a)))
