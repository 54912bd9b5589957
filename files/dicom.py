"""DICOM: a single image, a multi-frame file, or the folder of a series, read by pydicom.

Slices are sorted by their position along the series' normal, never by name. Values are rescaled (HU in CT), cut to the window
that is asked for, else to the file's own, and turned over where the file counts black as high (MONOCHROME1).
Outlines (RTSTRUCT) and segmentations (SEG) that lie in the folder become labels: dicom_labels.py.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from files import InputError
from files.case import Case
from files.geometry import LPS_TO_RAS, spacing_of_affine, turn, turned_affine, view_of
from files.intensity import WINDOWS, Window, to_grey_levels

DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
LABEL_KINDS = ("RTSTRUCT", "SEG")
UNEVEN = 0.1  # of the distance between slices: more is a gap


def read_dicom(path: Path, window: Window | None = None) -> Case:
    """A DICOM file, or the folder of one series, as a case without boxes; with labels where the folder has them.

    A file of outlines or a segmentation is read as the series that lies beside it, with its labels.
    InputError, one sentence, for no image, several series, missing slices, colour volumes, or pixels that can't be decoded.
    """
    if path.is_dir():
        return read_series(path, sorted(dicom_files(path)), window)
    header = read_header(path)
    if header.get("Modality") in LABEL_KINDS:
        images = [file for file in dicom_files(path.parent) if read_header(file).get("Modality") not in LABEL_KINDS]
        if not images:
            raise InputError(f"{path}: is a {header.Modality} of another series; put that series' files beside it")
        return read_series(path, [*sorted(images), path], window)
    dataset = pydicom.dcmread(path)
    if int(header.get("NumberOfFrames", 1)) > 1:
        return _as_case(path, _frames(path, dataset), dataset, _affine_of_frames(dataset), window)
    return _as_case(path, rescaled(dataset, path), dataset, None, window)


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder: by their ending, or without one by their first bytes."""
    return [path for path in folder.iterdir() if is_dicom(path)]


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its ending, or, if its name has none or only numbers, by "DICM" after 128 bytes."""
    if path.suffix.lower() in DICOM_ENDINGS:
        return path.is_file()
    if path.suffix.strip(".0123456789") or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: Path) -> pydicom.Dataset:
    """A DICOM file without its pixels. InputError if it can't be read."""
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except (InvalidDicomError, OSError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise InputError(f"{path}: not a DICOM file that can be read; copy or export it again") from error


def read_series(path: Path, files: list[Path], window: Window | None) -> Case:
    """The slices of one series, sorted by position, as a volume; with the labels that are among the files.

    path: the folder, or the label file that was named; it gives the case its name.
    """
    headers = {file: read_header(file) for file in files}
    labels = [file for file, header in headers.items() if header.get("Modality") in LABEL_KINDS]
    series = defaultdict(list)
    for file in files:
        if file not in labels and "Rows" in headers[file]:
            series[str(headers[file].get("SeriesInstanceUID", ""))].append(file)
    if not series:
        raise InputError(f"{path}: holds no DICOM image; name the folder of a series")
    if len(series) > 1:
        counts = ", ".join(f"{len(group)} of {group[0].name}'s series" for group in series.values())
        raise InputError(f"{path}: holds {len(series)} series ({counts}); put each into a folder of its own")
    (slices,) = series.values()
    if len(slices) == 1 and not labels:
        return read_dicom(slices[0], window)
    if len(slices) == 1 and int(headers[slices[0]].get("NumberOfFrames", 1)) > 1:
        dataset = pydicom.dcmread(slices[0])
        values, affine = _frames(slices[0], dataset), _affine_of_frames(dataset)
    else:
        slices, affine = sorted_slices(path, {file: headers[file] for file in slices})
        dataset = pydicom.dcmread(slices[0])
        values = np.stack([rescaled(pydicom.dcmread(file), file) for file in slices])
    case = _as_case(path, values, dataset, affine, window)
    if not labels:
        return case
    if affine is None:
        raise InputError(f"{path}: the series does not say where it lies, so {labels[0].name} can't be laid over it")
    from files.dicom_labels import read_label_objects  # only here: most series have none

    found, names = read_label_objects(labels, values.shape, affine)
    found = turn(found.transpose(2, 1, 0), view_of(affine))
    return replace(case, labels=found if case.is_3d else found[0], label_names=names)


def sorted_slices(path: Path, headers: dict[Path, pydicom.Dataset]) -> tuple[list[Path], np.ndarray]:
    """The files of a series from its first slice to its last, and the affine (RAS+) of voxels (column, row, slice).

    InputError if slices differ in size or direction, lie at one place, or leave a gap.
    """
    first_file, first = next(iter(headers.items()))
    for file, header in headers.items():
        for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            if not header.get(key):
                raise InputError(f"{file}: has no {key}, so its place in the series is not known; read it by itself")
        if (header.Rows, header.Columns) != (first.Rows, first.Columns):
            raise InputError(
                f"{file}: is {header.Rows} x {header.Columns}, but {first_file.name} is {first.Rows} x {first.Columns}; "
                "a series has one size: sort the files into folders"
            )
        if not np.allclose(header.ImageOrientationPatient, first.ImageOrientationPatient, atol=1e-3):
            raise InputError(f"{file}: is tilted against {first_file.name}; sort the directions into folders")
    along_row, along_column = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    depth = {file: float(np.dot(header.ImagePositionPatient, normal)) for file, header in headers.items()}
    files = sorted(depth, key=depth.get)
    row_mm, column_mm = map(float, first.PixelSpacing)  # distances of rows, of columns
    step = normal * float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1)
    if len(files) > 1:
        gaps = np.diff([depth[file] for file in files])
        if gaps.min() <= 1e-3:
            twin = int(np.argmin(gaps))
            raise InputError(f"{files[twin + 1]}: lies where {files[twin].name} lies; sort the passes into folders")
        if gaps.max() > (1 + UNEVEN) * np.median(gaps):
            gap = int(np.argmax(gaps))
            raise InputError(
                f"{path}: {gaps[gap]:.2f} mm lie between {files[gap].name} and {files[gap + 1].name}, elsewhere "
                f"{np.median(gaps):.2f} mm; a slice is missing: copy the whole series"
            )
        places = [np.array(headers[file].ImagePositionPatient, float) for file in (files[0], files[-1])]
        step = (places[1] - places[0]) / (len(files) - 1)  # a tilted gantry moves the slices along more than the normal
    affine = np.eye(4)
    affine[:3] = np.stack(
        [along_row * column_mm, along_column * row_mm, step, headers[files[0]].ImagePositionPatient], 1
    )
    return files, LPS_TO_RAS @ affine


def rescaled(dataset: pydicom.Dataset, path: Path) -> np.ndarray:
    """Pixels of one file: (H, W), colour (H, W, 3), or frames before these; values as the slope and intercept say."""
    try:
        pixels = dataset.pixel_array  # YBR becomes RGB on the way
    except (RuntimeError, NotImplementedError) as error:
        name = dataset.file_meta.TransferSyntaxUID.name
        raise InputError(
            f"{path}: its pixels are compressed ({name}), and what decodes them is not installed; run: "
            "pip install -r requirements-formats.txt"
        ) from error
    except (AttributeError, ValueError, KeyError, TypeError, OSError) as error:
        why = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: has no pixels that can be read ({why}); copy or export it again") from error
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    if slope == 1 and intercept == 0:
        return pixels
    return (pixels * np.float32(slope) + np.float32(intercept)).astype(np.float32)


def own_window(dataset: pydicom.Dataset) -> Window | None:
    """The first window that a file names, None if it names none. Its unit is that of the rescaled values."""
    try:
        width, level = (
            float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)
            for value in (dataset.get("WindowWidth"), dataset.get("WindowCenter"))
        )
    except (TypeError, ValueError, IndexError):
        return None
    return Window(width, level) if width > 0 else None


def _as_case(path: Path, values: np.ndarray, dataset: pydicom.Dataset, affine: np.ndarray | None, window) -> Case:
    """Values (H, W), (H, W, 3) or (D, H, W) as a case, turned if there is an affine."""
    colour = int(dataset.get("SamplesPerPixel", 1)) > 1
    if colour and values.ndim == 4:
        raise InputError(f"{path}: holds {len(values)} colour frames; save the frame to use as a picture")
    chosen = window or own_window(dataset) or (WINDOWS["soft"] if dataset.get("Modality") == "CT" else None)
    gray = to_grey_levels(values, path, None if colour or values.dtype == np.uint8 and not window else chosen)
    levels = gray.levels
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        levels = 255 - levels
    if colour or values.ndim == 2:
        return Case(path.name, levels, None, None, None, False, window=gray.window, source_range=gray.source_range)
    spacing = None
    if affine is not None:
        view, shape = view_of(affine), levels.shape[::-1]
        levels, by_axis = turn(levels.transpose(2, 1, 0), view), spacing_of_affine(affine)
        spacing, affine = tuple(by_axis[axis] for axis in view.axes), turned_affine(affine, view, shape)
    is_3d = len(levels) > 1
    return Case(
        path.name, levels if is_3d else levels[0], None, None, spacing if is_3d else None, is_3d,
        affine=affine, window=gray.window, source_range=gray.source_range,
    )  # fmt: skip


def _frames(path: Path, dataset: pydicom.Dataset) -> np.ndarray:
    """All frames of a multi-frame file, rescaled. An enhanced file names slope and intercept for each frame or for all."""
    groups = dataset.get("SharedFunctionalGroupsSequence") or dataset.get("PerFrameFunctionalGroupsSequence")
    if groups and "PixelValueTransformationSequence" in groups[0]:
        transform = groups[0].PixelValueTransformationSequence[0]
        dataset.RescaleSlope, dataset.RescaleIntercept = transform.RescaleSlope, transform.RescaleIntercept
    return rescaled(dataset, path)


def _affine_of_frames(header: pydicom.Dataset) -> np.ndarray | None:
    """Affine (RAS+) of an enhanced multi-frame file; None for a film, whose frames follow each other in time."""
    frames = header.get("PerFrameFunctionalGroupsSequence")
    if not frames or "PlanePositionSequence" not in frames[0]:
        return None
    shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    orientation, measures = (
        (frames[0][key] if key in frames[0] else shared[key])[0]
        for key in ("PlaneOrientationSequence", "PixelMeasuresSequence")
    )
    places = [np.array(f.PlanePositionSequence[0].ImagePositionPatient, float) for f in (frames[0], frames[-1])]
    along_row, along_column = np.array(orientation.ImageOrientationPatient, float).reshape(2, 3)
    row_mm, column_mm = map(float, measures.PixelSpacing)
    step = (places[1] - places[0]) / max(1, len(frames) - 1)
    if not step.any():
        step = np.cross(along_row, along_column) * float(measures.get("SliceThickness", 1))
    affine = np.eye(4)
    affine[:3] = np.stack([along_row * column_mm, along_column * row_mm, step, places[0]], 1)
    return LPS_TO_RAS @ affine
