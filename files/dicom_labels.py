"""Labels of a DICOM series: outlines (RTSTRUCT) and segmentations (SEG). pydicom alone reads both.

Label i + 1 is the i-th structure that has pixels here, in the order of the file. A later one covers an earlier one.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pydicom

from files import InputError
from files.geometry import LPS_TO_RAS


def read_label_objects(
    files: list[Path], shape: tuple[int, int, int], affine: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """-> (labels (D, H, W) uint16, in the order of the series, the name of each label)

    shape: (D, H, W) of the series.   affine: RAS+, from voxels (column, row, slice).
    InputError if a file does not fit the series, or has nothing in it.
    """
    labels, names = np.zeros(shape, np.uint16), []
    to_voxels = np.linalg.inv(LPS_TO_RAS @ affine)  # DICOM's own frame -> (column, row, slice)
    for file in files:
        dataset = pydicom.dcmread(file)
        masks = _outlined if dataset.Modality == "RTSTRUCT" else _segmented
        for name, mask in masks(file, dataset, shape, to_voxels):
            if mask.any():
                names.append(name)
                labels[mask] = len(names)
    if not names:
        raise InputError(f"{files[0]}: outlines nothing in this series; is it of another one?")
    return labels, tuple(names)


def _outlined(file: Path, dataset: pydicom.Dataset, shape: tuple, to_voxels: np.ndarray):
    """Each structure of an RTSTRUCT: (name, mask (D, H, W)). A pixel is inside if its centre is; a second outline cuts a hole."""
    from skimage.draw import polygon2mask  # slow to import, and needed here only

    named = {roi.ROINumber: str(roi.ROIName) for roi in dataset.get("StructureSetROISequence", [])}
    for contours in dataset.get("ROIContourSequence", []):
        mask = np.zeros(shape, bool)
        for contour in contours.get("ContourSequence", []):
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            column, row, z = (np.column_stack([points, np.ones(len(points))]) @ to_voxels.T)[:, :3].T
            if len(points) < 3 or np.ptp(z) > 0.5:  # a point or a line, or an outline that crosses the slices
                continue
            if 0 <= round(z.mean()) < shape[0]:
                mask[round(z.mean())] ^= polygon2mask(shape[1:], np.column_stack([row, column]))
        yield named.get(contours.ReferencedROINumber, f"structure {contours.ReferencedROINumber}"), mask


def _segmented(file: Path, dataset: pydicom.Dataset, shape: tuple, to_voxels: np.ndarray):
    """Each segment of a SEG: (name, mask (D, H, W)). Its frames must lie on the slices of the series."""
    if (dataset.Rows, dataset.Columns) != shape[1:]:
        raise InputError(
            f"{file}: its frames are {dataset.Rows} x {dataset.Columns}, the series' slices {shape[1]} x {shape[2]}; "
            "resample it to the series"
        )
    try:
        frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"{file}: its frames can't be decoded; run: pip install -r requirements-formats.txt"
        ) from error
    if dataset.get("SegmentationType") == "FRACTIONAL":
        frames = frames >= int(dataset.get("MaximumFractionalValue", 255)) / 2
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    masks = defaultdict(lambda: np.zeros(shape, bool))
    for frame, groups in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        z = _slice_of(file, groups, shared, to_voxels, shape[0])
        if z is None:
            continue
        if dataset.get("SegmentationType") == "LABELMAP":
            for number in np.unique(frame[frame > 0]):
                masks[int(number)][z] |= frame == number
        else:
            where = groups if "SegmentIdentificationSequence" in groups else shared
            masks[int(where.SegmentIdentificationSequence[0].ReferencedSegmentNumber)][z] |= frame > 0
    named = {int(one.SegmentNumber): str(one.SegmentLabel) for one in dataset.SegmentSequence}
    for number, mask in sorted(masks.items()):
        yield named.get(number, f"segment {number}"), mask


def _slice_of(file: Path, groups, shared, to_voxels: np.ndarray, depth: int) -> int | None:
    """The slice on which a frame lies, by its place; None if it lies beside the series. InputError if it lies between two."""
    where = groups if "PlanePositionSequence" in groups else shared
    place = np.array([*map(float, where.PlanePositionSequence[0].ImagePositionPatient), 1.0])
    column, row, z = (to_voxels @ place)[:3]
    turned = groups if "PlaneOrientationSequence" in groups else shared
    if "PlaneOrientationSequence" in turned:
        along = np.array(turned.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
        steps = along @ to_voxels[:3, :3].T  # one pixel along the frame's rows and columns, in voxels of the series
        if steps[0] @ [1, 0, 0] <= 0 or steps[1] @ [0, 1, 0] <= 0 or np.abs(steps[:, 2]).max() > 0.01:
            raise InputError(f"{file}: its frames are turned against the series' slices; resample it to the series")
    if max(abs(column), abs(row)) > 0.5 or abs(z - round(z)) > 0.25:
        raise InputError(f"{file}: its frames lie between the series' slices or beside them; resample it to the series")
    return round(z) if 0 <= round(z) < depth else None
