"""DICOM: a single image, a multi-frame file, or the folder of a series, read by pydicom.

Slices are sorted by their position along the series' normal, never by name. Values are rescaled (HU
in CT), cut to the window that is asked for, else to the file's own, and turned over where the file
counts black as high (MONOCHROME1).
Outlines (RTSTRUCT) and segmentations (SEG) that lie in the folder become labels. Label i + 1 is the
i-th structure that has pixels here, in the order of the file. A later one covers an earlier one.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from formats import InputError
from formats.case import Case, why
from formats.intensity import WINDOWS, Window, gray_case
from formats.scans import LPS_TO_RAS, turn, turned, view_of

LABEL_KINDS = ("RTSTRUCT", "SEG")
UNEVEN = 0.1  # of the distance between slices: more is a gap


def read_dicom(path: Path, window: Window | None = None) -> Case:
    """A DICOM file, or the folder of one series, as a case without boxes; with labels where the folder has them.

    A file of outlines or a segmentation is read as the series that lies beside it, with its labels.
    InputError, one sentence, for no image, several series, missing slices, colour volumes, or pixels that can't be decoded.
    """
    if path.is_dir():
        return read_series(path, dicom_files(path), window)
    header = read_header(path)
    if header.get("Modality") not in LABEL_KINDS:
        return as_case(path, *pixels_of(path), window)
    images = [file for file in dicom_files(path.parent) if read_header(file).get("Modality") not in LABEL_KINDS]
    if not images:
        raise InputError(f"{path}: is a {header.Modality} of another series; put that series' files beside it")
    return read_series(path, [*images, path], window)


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, sorted by name."""
    return [path for path in sorted(folder.iterdir()) if is_dicom(path)]


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its ending, or, if its name has none or only numbers, by "DICM" after 128 bytes."""
    if path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return path.is_file()
    if path.suffix.strip(".0123456789") or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: Path) -> pydicom.Dataset:
    """A DICOM file without its pixels. InputError if it can't be read."""
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
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
    if len(slices) == 1 and frames_of(headers[slices[0]]) > 1:
        values, dataset, affine = pixels_of(slices[0])
    else:
        slices, affine = sorted_slices(path, {file: headers[file] for file in slices})
        values, dataset = np.stack([rescaled(pydicom.dcmread(file), file) for file in slices]), headers[slices[0]]
    case = as_case(path, values, dataset, affine, window)
    if not labels:
        return case
    if affine is None:
        raise InputError(f"{path}: the series does not say where it lies, so {labels[0].name} can't be laid over it")
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
            sizes = f"is {header.Rows} x {header.Columns}, but {first_file.name} is {first.Rows} x {first.Columns}"
            raise InputError(f"{file}: {sizes}; a series has one size: sort the files into folders")
        if not np.allclose(header.ImageOrientationPatient, first.ImageOrientationPatient, atol=1e-3):
            raise InputError(f"{file}: is tilted against {first_file.name}; sort the directions into folders")
    normal = np.cross(*directions(first))
    depth = {file: float(np.dot(header.ImagePositionPatient, normal)) for file, header in headers.items()}
    files = sorted(depth, key=depth.get)
    step = normal * float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1)
    places = [np.array(headers[file].ImagePositionPatient, float) for file in (files[0], files[-1])]
    if len(files) > 1:
        gaps = np.diff([depth[file] for file in files])
        if gaps.min() <= 1e-3:
            twin = int(np.argmin(gaps))
            raise InputError(f"{files[twin + 1]}: lies where {files[twin].name} lies; sort the passes into folders")
        if gaps.max() > (1 + UNEVEN) * np.median(gaps):
            gap = int(np.argmax(gaps))
            between, usual = f"{files[gap].name} and {files[gap + 1].name}", f"elsewhere {np.median(gaps):.2f} mm"
            lie = f"{gaps[gap]:.2f} mm lie between {between}, {usual}"
            raise InputError(f"{path}: {lie}; a slice is missing: copy the whole series")
        step = (places[1] - places[0]) / (len(files) - 1)  # a tilted gantry moves the slices along more than the normal
    return files, affine_of(first, step, places[0], first.PixelSpacing)


def frames_of(header: pydicom.Dataset) -> int:
    """How many frames a file has."""
    return int(header.get("NumberOfFrames", 1))


def pixels_of(path: Path) -> tuple[np.ndarray, pydicom.Dataset, np.ndarray | None]:
    """A file by itself: its values, the file, and if it is a volume that says where it lies its affine (RAS+).

    An enhanced multi-frame file names the slope for each frame or for all, and where each frame lies.
    In a film frames follow each other in time: it has no affine.
    """
    dataset = pydicom.dcmread(path)
    frames, shared = (dataset.get(f"{which}FunctionalGroupsSequence") for which in ("PerFrame", "Shared"))
    if frames_of(dataset) > 1 and (groups := shared or frames) and "PixelValueTransformationSequence" in groups[0]:
        transform = groups[0].PixelValueTransformationSequence[0]
        dataset.RescaleSlope, dataset.RescaleIntercept = transform.RescaleSlope, transform.RescaleIntercept
    values = rescaled(dataset, path)
    if frames_of(dataset) == 1 or not frames or "PlanePositionSequence" not in frames[0]:
        return values, dataset, None
    orientation, measures = (
        first_of(frames[0], (shared or [{}])[0], f"{what}Sequence") for what in ("PlaneOrientation", "PixelMeasures")
    )
    places = [np.array(f.PlanePositionSequence[0].ImagePositionPatient, float) for f in (frames[0], frames[-1])]
    step = (places[1] - places[0]) / max(1, len(frames) - 1)
    if not step.any():
        step = np.cross(*directions(orientation)) * float(measures.get("SliceThickness", 1))
    return values, dataset, affine_of(orientation, step, places[0], measures.PixelSpacing)


def rescaled(dataset: pydicom.Dataset, path: Path) -> np.ndarray:
    """Pixels of one file: (H, W), colour (H, W, 3), or frames before these; values as the slope and intercept say."""
    try:
        pixels = dataset.pixel_array  # YBR becomes RGB on the way
    except (RuntimeError, NotImplementedError) as error:
        name = dataset.file_meta.TransferSyntaxUID.name
        needs = "what decodes them is not installed; run: pip install -r requirements-formats.txt"
        raise InputError(f"{path}: its pixels are compressed ({name}), and {needs}") from error
    except (AttributeError, ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{path}: has no pixels that can be read ({why(error)}); copy or export it again") from error
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    if slope == 1 and intercept == 0:
        return pixels
    return (pixels * np.float32(slope) + np.float32(intercept)).astype(np.float32)


def own_window(dataset: pydicom.Dataset) -> Window | None:
    """The first window that a file names, None if it names none. Its unit is that of the rescaled values."""
    try:
        width, level = (float(np.ravel(dataset.get(key))[0]) for key in ("WindowWidth", "WindowCenter"))
    except (TypeError, ValueError, IndexError):  # none, or no numbers
        return None
    return Window(width, level) if width > 0 else None


def as_case(path: Path, values: np.ndarray, dataset: pydicom.Dataset, affine: np.ndarray | None, window) -> Case:
    """Values (H, W), (H, W, 3) or (D, H, W) as a case, turned if there is an affine."""
    colour = int(dataset.get("SamplesPerPixel", 1)) > 1
    if colour and values.ndim == 4:
        raise InputError(f"{path}: holds {len(values)} colour frames; save the frame to use as a picture")
    window = window or own_window(dataset) or (WINDOWS["soft"] if dataset.get("Modality") == "CT" else None)
    spacing, is_3d = None, values.ndim == 3 and not colour
    if affine is not None:
        values, spacing, affine = turned(values.transpose(2, 1, 0), affine)
    case = gray_case(path, values, None if colour else window, is_3d, spacing, affine)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        return replace(case, image=255 - case.image)
    return case


def directions(header: pydicom.Dataset) -> np.ndarray:
    """(2, 3): where the columns of a row, and the rows of a column, follow each other in the patient."""
    return np.array(header.ImageOrientationPatient, float).reshape(2, 3)


def affine_of(header: pydicom.Dataset, step: np.ndarray, origin: np.ndarray, pixel_spacing) -> np.ndarray:
    """DICOM's own terms -> affine (RAS+) of voxels (column, row, slice).   pixel_spacing: of rows, of columns, mm"""
    along_row, along_column = directions(header)
    row_mm, column_mm = map(float, pixel_spacing)
    affine = np.eye(4)
    affine[:3] = np.stack([along_row * column_mm, along_column * row_mm, step, origin], 1)
    return LPS_TO_RAS @ affine


def first_of(groups, shared, key: str):
    """The item of a sequence of a frame, or if the frame lacks it, of all frames. None if both lack it."""
    where = groups if key in groups else shared
    return where[key][0] if key in where else None


# ---------------------------------------------------------------- labels of a series


def read_label_objects(files: list[Path], shape: tuple, affine: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
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
    """Each structure of an RTSTRUCT: (name, mask (D, H, W)). A pixel is inside if its centre is.

    A second outline on a slice cuts a hole.
    """
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
        sizes = f"its frames are {dataset.Rows} x {dataset.Columns}, the series' slices {shape[1]} x {shape[2]}"
        raise InputError(f"{file}: {sizes}; resample it to the series")
    frames = rescaled(dataset, file).reshape(-1, dataset.Rows, dataset.Columns)
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
            segment = first_of(groups, shared, "SegmentIdentificationSequence")
            masks[int(segment.ReferencedSegmentNumber)][z] |= frame > 0
    named = {int(one.SegmentNumber): str(one.SegmentLabel) for one in dataset.SegmentSequence}
    for number, mask in sorted(masks.items()):
        yield named.get(number, f"segment {number}"), mask


def _slice_of(file: Path, groups, shared, to_voxels: np.ndarray, depth: int) -> int | None:
    """The slice on which a frame lies; None if that is beside the series. InputError if it lies between two."""
    origin = first_of(groups, shared, "PlanePositionSequence").ImagePositionPatient
    column, row, z = (to_voxels @ [*map(float, origin), 1.0])[:3]
    if orientation := first_of(groups, shared, "PlaneOrientationSequence"):
        steps = directions(orientation) @ to_voxels[:3, :3].T  # one pixel along the frame's rows and columns, in voxels
        if steps[0] @ [1, 0, 0] <= 0 or steps[1] @ [0, 1, 0] <= 0 or np.abs(steps[:, 2]).max() > 0.01:
            raise InputError(f"{file}: its frames are turned against the series' slices; resample it to the series")
    if max(abs(column), abs(row)) > 0.5 or abs(z - round(z)) > 0.25:
        raise InputError(f"{file}: its frames lie between the series' slices or beside them; resample it to the series")
    return round(z) if 0 <= round(z) < depth else None
