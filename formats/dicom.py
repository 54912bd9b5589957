"""DICOM: a single image, a multi-frame file, or the folder of a series, read by pydicom; segmentations out by highdicom.

A `Frame` is one slice: a file of its own, or a frame of an enhanced file. Frames are sorted by their
position along the series' normal, never by name or number, and must lie on a straight line, evenly.
Each frame's values are rescaled as it says itself (HU in CT). One window serves the whole series: the
one that is asked for, else the file's own if all frames agree. MONOCHROME1 is turned over.
Outlines (RTSTRUCT) and segmentations (SEG) that lie in the folder become labels. Label i + 1 is the
i-th structure that has pixels here, in the order of the file. The smaller covers the larger.
"""

import io
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

from formats import VOLUME_MODALITIES, InputError
from formats.case import Case, paint, why
from formats.intensity import WINDOWS, Window, gray_case
from formats.scans import LPS_TO_RAS, turn, turn_back, turned, view_of
from formats.writing import save_bytes, tell
from grid import boxes_from_labels, label_ids

LABEL_KINDS = ("RTSTRUCT", "SEG")
NO_IMAGES = ("RTDOSE", "RTPLAN", "RTRECORD", "PR", "SR", "KO", "REG", "RWV", "FID", "DOC")
MODALITY_TAGS = {
    "CT": "CT", "MR": "MR", "PT": "PET", "US": "US", "IVUS": "US", "MG": "Mammography", "ES": "Endoscopy",
    "DMS": "Dermoscopy", "OP": "Fundus", "OPT": "OCT", "OCT": "OCT", "SM": "Microscopy", "GM": "Microscopy",
    **dict.fromkeys(("CR", "DX", "RG", "XA", "RF", "IO", "PX"), "X-Ray"),
}  # fmt: skip
SOFTWARE = "Gray's Anatomy SAM"
# What the standard demands of every image, empty if it is not known.
PATIENT_AND_STUDY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
TURNED = np.sin(np.radians(1))  # an outline that rises by more of its length does not lie in a slice
UNEVEN = 0.05  # of the distance between slices: how far a slice may lie beside its even place
# What may tell two slices at one place apart.
DIFFERENCES = (
    "EffectiveEchoTime", "EchoTime", "EchoNumbers", "TemporalPositionIndex", "TemporalPositionIdentifier",
    "NominalCardiacTriggerDelayTime", "TriggerTime", "DiffusionBValue", "ComplexImageComponent", "FrameType",
    "ImageType", "StackID", "AcquisitionNumber", "AcquisitionTime", "SOPInstanceUID",
)  # fmt: skip


class Frame(NamedTuple):
    """One slice of a series, or all frames of a film."""

    path: Path
    number: int  # of the frame in an enhanced file, from 0; else -1
    header: pydicom.Dataset  # what holds for it, its functional groups laid open

    @property
    def name(self) -> str:
        return self.path.name if self.number < 0 else f"frame {self.number + 1} of {self.path.name}"


def read_dicom(path: Path, window: Window | None = None) -> Case:
    """A DICOM file, or the folder of one series, as a case without boxes; with labels where the folder has them.

    A file of outlines or a segmentation is read as the series that lies beside it, with its labels.
    InputError, one sentence, for no image, several series, uneven slices, colour volumes, or pixels that can't be decoded.
    """
    frames, affine, labels = slices_of(path)
    case = as_case(path, frames, affine, window)
    if not labels:
        return case
    if affine is None:
        raise InputError(f"{path}: the series does not say where it lies, so {labels[0].name} can't be laid over it")
    names, boxes, view = [], [], view_of(affine)
    first, shape = frames[0].header, (len(frames), frames[0].header.Rows, frames[0].header.Columns)

    def masks() -> Iterator[np.ndarray]:
        empty = []
        for name, mask in label_objects(labels, first, shape, np.linalg.inv(LPS_TO_RAS @ affine)):
            if not mask.any():
                empty.append(name)
                continue
            mask = turn(mask.transpose(2, 1, 0), view)
            mask = mask if case.is_3d else mask[0]
            names.append(name)
            boxes.append(boxes_from_labels(mask.astype(np.uint8))[1][0])
            yield mask
        if not names:
            raise InputError(f"{labels[0]}: outlines nothing in this series; is it of another one?")
        if empty:
            tell(f"{path}: left out, as they have no pixel in this series: {', '.join(empty)}", error=True)

    painted, told = paint(masks(), names)
    for text in told:
        tell(f"{path}: {text}", error=True)
    return replace(case, labels=painted, label_names=tuple(names), boxes=np.array(boxes))


# ---------------------------------------------------------------- files and frames


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, sorted by name, without a CD's list of contents."""
    return [path for path in sorted(folder.iterdir()) if is_dicom(path) and path.name != "DICOMDIR"]


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its ending, or, if its name has none or only numbers, by how it begins.

    That is "DICM" after 128 bytes, or, where these are missing, a first element of group 2 or 8. Files
    that begin with a dot are a Mac's notes.
    """
    if path.name.startswith(".") or not path.is_file():
        return False
    if path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return True
    if path.suffix.strip(".0123456789"):
        return False
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or (len(head) == 132 and head[:2] in (b"\2\0", b"\10\0") and head[3] == 0)


def read_header(path: Path) -> pydicom.Dataset:
    """A DICOM file without its pixels. InputError if it can't be read."""
    return _read(path, stop_before_pixels=True)


def _read(path: Path, **options) -> pydicom.Dataset:
    """A DICOM file, also one without preamble. InputError if it can't be read."""
    try:
        try:
            dataset = pydicom.dcmread(path, **options)
        except InvalidDicomError:
            dataset = pydicom.dcmread(path, force=True, **options)
            if "SOPClassUID" not in dataset:
                raise
        if "TransferSyntaxUID" not in dataset.file_meta:  # no preamble: DICOM's default, or as the VR shows
            explicit = "ExplicitVRLittleEndian" if dataset.original_encoding[0] is False else "ImplicitVRLittleEndian"
            dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, explicit)
        return dataset
    except Exception as error:  # pydicom raises many kinds for files from outside
        raise InputError(f"{path}: not a DICOM file that can be read; copy or export it again") from error


def slices_of(path: Path) -> tuple[list[Frame], np.ndarray | None, list[Path]]:
    """What a file or folder holds: (frames in their order in space, affine (RAS+) or None, files of labels).

    The affine takes voxels (column, row, slice) to mm. A film, whose frames follow each other in time,
    and a single image have none.
    InputError if there is no image, or if it is not clear which series is meant.
    """
    named = [path] if path.is_file() else dicom_files(path)
    if path.is_file() and read_header(path).get("Modality") in LABEL_KINDS:
        named += [file for file in dicom_files(path.parent) if read_header(file).get("Modality") not in LABEL_KINDS]
    headers = {file: read_header(file) for file in named}
    labels = [file for file, header in headers.items() if header.get("Modality") in LABEL_KINDS]
    kept = {f: h for f, h in headers.items() if "Rows" in h and h.get("Modality") not in (*LABEL_KINDS, *NO_IMAGES)}
    kept = {f: h for f, h in kept.items() if "LOCALIZER" not in (h.get("ImageType") or ())} or kept
    series = defaultdict(list)
    for file, header in kept.items():
        series[str(header.get("SeriesInstanceUID", ""))] += frames_in(file, header)
    if not series and path in labels:
        raise InputError(f"{path}: is a {headers[path].Modality} of another series; put that series' files beside it")
    if not series:
        kinds = sorted({str(header.get("Modality") or "no modality") for header in headers.values()} - {*LABEL_KINDS})
        found = f" ({', '.join(kinds)})" if kinds else ""
        raise InputError(f"{path}: holds no DICOM image{found}; name the folder of a series")
    # the series that the labels name, else the only scan: radiographs and screenshots may lie beside it
    of_labels = {uid for uid in series for file in labels if uid in _series_named_by(headers[file])}
    chosen = list(of_labels) if len(of_labels) == 1 else [uid for uid in series if is_scan(series[uid][0])]
    if len(series) > 1 and len(chosen) != 1:
        counts = ", ".join(f"{len(group)} of {group[0].path.name}'s series" for group in series.values())
        raise InputError(f"{path}: holds {len(series)} series ({counts}); put each into a folder of its own")
    frames = series[chosen[0]] if len(series) > 1 else next(iter(series.values()))
    if others := sorted({*headers} - {*labels} - {frame.path for frame in frames}):
        kinds = ", ".join(f"{file.name} ({headers[file].get('Modality')})" for file in others[:5])
        tell(f"{path}: left out {len(others)} files beside the series, such as {kinds}", error=True)
    placed = all("ImagePositionPatient" in frame.header for frame in frames)
    if len({frame.path for frame in frames}) > 1 or (placed and (len(frames) > 1 or labels)):
        return *sorted_frames(path, frames), labels
    return frames, None, labels


def is_scan(frame: Frame) -> bool:
    """Whether an image is one of many slices by its kind."""
    return MODALITY_TAGS.get(frame.header.get("Modality")) in VOLUME_MODALITIES


def _series_named_by(header: pydicom.Dataset) -> set[str]:
    """The SeriesInstanceUIDs that a file of labels names as its own images'."""
    return {str(item.value) for item in header.iterall() if item.keyword == "SeriesInstanceUID"} - {
        str(header.get("SeriesInstanceUID"))
    }


def frames_in(path: Path, header: pydicom.Dataset) -> list[Frame]:
    """The frames of a file: one if it has no functional groups, be it a slice or a film."""
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    if not groups:
        return [Frame(path, -1, header)]
    top = pydicom.Dataset()
    top.update({e.tag: e for e in header if not e.keyword.endswith("FunctionalGroupsSequence")})
    for items in header.get("SharedFunctionalGroupsSequence") or []:
        _lay_open(top, items)
    frames = []
    for number, items in enumerate(groups):
        frames.append(Frame(path, number, pydicom.Dataset()))
        frames[-1].header.update(top)
        _lay_open(frames[-1].header, items)
    return frames


def _lay_open(header: pydicom.Dataset, items: pydicom.Dataset) -> None:
    """Elements of functional groups become those of the header, as a single slice has them."""
    for group in items:
        if group.VR == "SQ" and group.value:
            header.update(group.value[0])


def numbers(frame: Frame, key: str, count: int = 1) -> list[float] | None:
    """The first numbers of an element, None if it is missing or empty. InputError for what is no number."""
    try:
        value = frame.header.get(key)
        found = [float(one) for one in np.ravel(value)[:count] if one is not None and str(one).strip()]
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{frame.path}: its {key} is no number ({why(error)}); correct it, or export it again"
        ) from error
    if not np.isfinite(found).all():
        raise InputError(f"{frame.path}: its {key} is {found}, no number; correct it, or export it again")
    return found if len(found) == count else None


def sorted_frames(path: Path, frames: list[Frame]) -> tuple[list[Frame], np.ndarray]:
    """The frames from first to last along their normal, and the affine (RAS+) of voxels (column, row, slice).

    InputError if they differ in size or direction, lie at one place, or not evenly on a straight line.
    """
    first, places = frames[0], []
    for frame in frames:
        lacks = f"so its place in the series is not known; read {frame.path.name} by itself"
        for key, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
            if numbers(frame, key, count) is None:
                raise InputError(f"{path}: {frame.name} has no {key}, {lacks}")
        places.append(numbers(frame, "ImagePositionPatient", 3))
        size, its = ((one.header.Rows, one.header.Columns) for one in (frame, first))
        if size != its:
            raise InputError(
                f"{path}: {frame.name} is {size[0]} x {size[1]}, but {first.name} is {its[0]} x {its[1]}; "
                "a series has one size: sort the files into folders"
            )
        if not np.allclose(*(numbers(one, "PixelSpacing", 2) for one in (frame, first)), rtol=1e-3):
            raise InputError(f"{path}: {frame.name} has other pixels than {first.name}; sort them into folders")
        if not np.allclose(directions(frame), directions(first), atol=1e-3):
            raise InputError(f"{path}: {frame.name} is tilted against {first.name}; sort the directions into folders")
    spacing, (along_row, along_column) = numbers(first, "PixelSpacing", 2), directions(first)
    if min(spacing) <= 0:
        raise InputError(f"{path}: {first.name} has pixels of {spacing} mm; correct its PixelSpacing")
    normal = np.cross(along_row, along_column)
    order = np.argsort(np.array(places) @ normal, kind="stable")
    frames, places = [frames[i] for i in order], np.array(places)[order]
    step = normal * ((numbers(first, "SpacingBetweenSlices") or numbers(first, "SliceThickness") or [0])[0] or 1)
    origin = places[0]
    if len(frames) > 1:
        step, origin = _even(path, frames, places, np.stack([along_row, along_column, normal]))
    affine = np.eye(4)
    affine[:3] = np.stack([along_row * spacing[1], along_column * spacing[0], step, origin], 1)
    return frames, LPS_TO_RAS @ affine


def _even(path: Path, frames: list[Frame], places: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The straight line on which slices lie evenly: (step, place of the first), mm. InputError if they don't.

    places: (n, 3) mm, sorted.   axes: (3, 3) row, column, normal.
    A tilted gantry moves the slices along more than the normal. Files may have rounded the positions.
    """
    gaps, count = np.diff(places @ axes[2]), np.arange(len(places))
    if gaps.min() <= 1e-3:
        a, b = frames[int(np.argmin(gaps))], frames[int(np.argmin(gaps)) + 1]
        key = next((key for key in DIFFERENCES if a.header.get(key) != b.header.get(key)), "nothing that is known here")
        values = ", ".join(sorted({str(frame.header.get(key)) for frame in frames})[:4])
        raise InputError(
            f"{path}: {b.name} lies where {a.name} lies; they differ in {key} ({values}); sort the echoes, phases or "
            "passes into folders, or save one as a file of its own"
        )
    step, origin = np.polyfit(count, places, 1) if len(places) > 2 else (places[1] - places[0], places[0])
    beside = (places - origin - count[:, None] * step) @ axes.T
    middle = (beside.max(0) + beside.min(0)) / 2
    # the unit to which all positions may have been rounded: half of it is no fault of the slices
    unit = next((u for u in (1, 0.5, 0.1, 0.01) if np.allclose(places / u, np.rint(places / u), atol=1e-4)), 0)
    allowed = max(UNEVEN * gaps.min(), min(0.55 * unit, 0.2 * gaps.min()))
    off = np.abs(beside - middle).max(1)
    if off.max() > allowed:
        raise InputError(
            f"{path}: {frames[int(np.argmax(off))].name} lies {off.max():.2f} mm beside its even place (distances of "
            f"slices are {gaps.min():.2f} to {gaps.max():.2f} mm); a slice is missing, or the distance changes: copy the "
            "whole series, or resample it to even slices"
        )
    return step, origin + middle @ axes


def directions(frame: Frame) -> np.ndarray:
    """(2, 3): where the columns of a row, and the rows of a column, follow each other in the patient (LPS+)."""
    return np.reshape(numbers(frame, "ImageOrientationPatient", 6), (2, 3))


# ---------------------------------------------------------------- values


def as_case(path: Path, frames: list[Frame], affine: np.ndarray | None, window: Window | None) -> Case:
    """The values of frames as a case, turned if there is an affine."""
    first, stored, values = frames[0].header, {}, []
    lut = (window is None and first.get("VOILUTSequence")) or None
    if window is None and any((frame.header.get("VOILUTSequence") or None) != lut for frame in frames):
        raise InputError(f"{path}: its slices have different VOI LUTs; choose a window with --read window=NAME")
    for frame in frames:
        if frame.path not in stored:  # one file at a time: a series is as large as its values
            stored = {frame.path: pixels_of(frame.path)}
        pixels = stored[frame.path]
        is_one_of_many = frame.number >= 0 and int(frame.header.get("NumberOfFrames") or 1) > 1
        values.append(rescaled(pixels[frame.number] if is_one_of_many else pixels, frame))
        if lut:
            values[-1] = apply_voi_lut(values[-1], frame.header)
    values = np.stack(values) if len(values) > 1 else values[0]
    is_gray = int(first.get("SamplesPerPixel") or 1) == 1 and first.get("PhotometricInterpretation") != "PALETTE COLOR"
    if not is_gray and values.ndim == 4 and (values == values[..., :1]).all():
        values, is_gray = values[..., 0], True
    if not is_gray and (values.ndim == 4 or affine is not None):
        raise InputError(f"{path}: holds {len(values)} colour frames; save the frame to use as a picture")
    modality = MODALITY_TAGS.get(first.get("Modality"), "")
    if is_gray and lut:
        top = (
            2.0 ** lut[0].LUTDescriptor[2] - 1
        )  # a VOI LUT gives what is to be shown, of this many bits or, by error, fewer
        top = top if values.max() > top / 4 else float(values.max())
        window = Window(top, top / 2)
    elif is_gray and window is None:
        window = window_for(path, frames, values, modality)
    is_3d, spacing = values.ndim == 3 and is_gray, None
    if affine is not None:
        try:
            values = values if values.ndim == 3 else values[None]
            values, (_, dy, dx), affine = turned(values.transpose(2, 1, 0), affine)
        except ValueError as error:
            raise InputError(f"{path}: {error}; correct its header") from error
        is_3d, spacing = True, (abs(np.linalg.det(affine[:3, :3])) / dy / dx, dy, dx)  # a tilted gantry's mm3 are right
    case = gray_case(path, values, window if is_gray else None, is_3d, spacing, affine, modality)
    return replace(case, image=255 - case.image) if first.get("PhotometricInterpretation") == "MONOCHROME1" else case


def window_for(path: Path, frames: list[Frame], values: np.ndarray, modality: str) -> Window | None:
    """The window of a series that none was asked for: its own if all frames agree on one, else percentiles. None for CT.

    One that shows more than half of a scan white is none: the values are not in the unit that it is meant for.
    """
    windows = {own_window(frame) for frame in frames}
    own = windows.pop() if len(windows) == 1 else None
    if own and modality in VOLUME_MODALITIES:
        if np.count_nonzero(values >= own.level + own.width / 2) > values.size / 2:
            tell(
                f"{path}: its window {own.width:g}/{own.level:g} shows most of it white, so it is not taken", error=True
            )
            own = None
    has_no_hu = modality not in ("", "CT") or (frames[0].header.get("RescaleType") or "HU") not in ("HU", "US")
    return own or (WINDOWS["percentile"] if has_no_hu else None)  # US: unspecified


def own_window(frame: Frame) -> Window | None:
    """The first window that a frame names, None if it names none. Its unit is that of the rescaled values."""
    try:
        width, level = numbers(frame, "WindowWidth"), numbers(frame, "WindowCenter")
    except InputError:
        return None
    return Window(width[0], level[0]) if width and level and width[0] > 0 else None


def pixels_of(path: Path) -> np.ndarray:
    """The stored pixels of a file: (H, W), colour (H, W, 3), or frames before these. InputError if they can't be decoded."""
    dataset = _read(path)
    try:
        return dataset.pixel_array  # YBR becomes RGB on the way
    except (RuntimeError, NotImplementedError) as error:
        name = dataset.file_meta.TransferSyntaxUID.name
        needs = "what decodes them is not installed; run: pip install -r requirements-formats.txt"
        raise InputError(f"{path}: its pixels are compressed ({name}), and {needs}") from error
    except Exception as error:  # pydicom raises many kinds
        raise InputError(f"{path}: has no pixels that can be read ({why(error)}); copy or export it again") from error


def rescaled(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    """Stored pixels -> values as the frame's slope, intercept or Modality LUT say; a palette's become colours, uint8."""
    if frame.header.get("PhotometricInterpretation") == "PALETTE COLOR":
        colours = apply_color_lut(pixels, frame.header)
        return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)
    if frame.header.get("ModalityLUTSequence"):
        return apply_modality_lut(pixels, frame.header)
    slope, intercept = (
        (numbers(frame, f"Rescale{key}") or [default])[0] for key, default in (("Slope", 1), ("Intercept", 0))
    )
    if slope == 1 and intercept == 0:
        return pixels
    return (pixels * np.float32(slope) + np.float32(intercept)).astype(np.float32)


# ---------------------------------------------------------------- labels of a series


def label_objects(files: list[Path], header: pydicom.Dataset, shape: tuple, to_voxels: np.ndarray) -> Iterator[tuple]:
    """Each structure of files of labels: (name, mask (D, H, W) bool, which may be empty), in the order of the series.

    header: of a slice.   shape: (D, H, W) of the series.   to_voxels: from DICOM's own frame (LPS+) to (column, row, slice).
    InputError if a file is of another patient or frame of reference, or does not fit the slices.
    """
    for file in files:
        dataset = _read(file)
        frames = {
            str(roi.get("ReferencedFrameOfReferenceUID", "")) for roi in dataset.get("StructureSetROISequence") or []
        }
        frames = frames - {""} or {str(dataset.get("FrameOfReferenceUID") or "")}
        checks = {"PatientID": {str(dataset.get("PatientID") or "")}, "FrameOfReferenceUID": frames}
        if "" in frames or not header.get("FrameOfReferenceUID"):
            checks["StudyInstanceUID"] = {str(dataset.get("StudyInstanceUID") or "")}
        for key, found in checks.items():
            own = str(header.get(key) or "")
            if own and own not in found | {""} and found != {""}:
                raise InputError(
                    f"{file}: is of another {key} ({', '.join(sorted(found))}) than the series ({own}); put labels that were "
                    "made on this series beside it"
                )
        yield from (_outlined if dataset.Modality == "RTSTRUCT" else _segmented)(
            file, dataset, header, shape, to_voxels
        )


def _outlined(file: Path, dataset: pydicom.Dataset, header: pydicom.Dataset, shape: tuple, to_voxels: np.ndarray):
    """Each structure of an RTSTRUCT: (name, mask (D, H, W)). A pixel is inside if its centre is.

    In one plane a second outline cuts a hole. A slice takes the plane that is nearest, within half a slice.
    """
    from skimage.draw import polygon2mask  # slow to import, and needed here only

    rois = {roi.ROINumber: roi for roi in dataset.get("StructureSetROISequence") or []}
    slice_mm = 1 / np.linalg.norm(to_voxels[2, :3])
    for contours in dataset.get("ROIContourSequence") or []:
        roi, planes = rois.get(contours.ReferencedROINumber, pydicom.Dataset()), {}
        name = str(roi.get("ROIName") or f"structure {contours.ReferencedROINumber}")
        own = roi.get("ReferencedFrameOfReferenceUID") in (None, "", header.get("FrameOfReferenceUID"))
        for contour in contours.get("ContourSequence") or [] if own else []:
            points = np.reshape(numbers(Frame(file, -1, contour), "ContourData", 3 * _points(contour)) or [], (-1, 3))
            if len(points) < 3 or not str(contour.get("ContourGeometricType") or "CLOSED").startswith("CLOSED"):
                continue  # a point or a line
            column, row, z = (np.column_stack([points, np.ones(len(points))]) @ to_voxels.T)[:, :3].T
            rise = np.ptp(z) * slice_mm
            slope = rise / np.linalg.norm(np.ptp(points, axis=0))
            if rise > 0.2 and (np.ptp(z) > 0.5 or slope > TURNED):
                raise InputError(
                    f"{file}: an outline of {name} is turned by {np.degrees(np.arcsin(min(1, slope))):.0f} degrees against "
                    "the slices; save the structures as a segmentation on this series (3D Slicer does)"
                )
            at = next((plane for plane in planes if abs(plane - z.mean()) < 0.02), z.mean())
            planes.setdefault(at, np.zeros(shape[1:], bool))
            planes[at] ^= polygon2mask(shape[1:], np.column_stack([row, column]))
        yield name, _on_slices(file, name, planes, shape)


def _points(contour: pydicom.Dataset) -> int:
    """How many whole points an outline has."""
    return len(np.ravel(contour.get("ContourData"))) // 3


def _on_slices(file: Path, name: str, planes: dict[float, np.ndarray], shape: tuple) -> np.ndarray:
    """Outlined planes {place, counted in slices: mask (H, W)} -> mask (D, H, W), each slice that of the nearest plane."""
    mask, at, reach = np.zeros(shape, bool), np.array(sorted(planes)), 0.5
    gaps = np.diff(at)
    if len(gaps) and gaps.min() > 1.5:
        even = len(gaps) > 1 and gaps.max() < 1.1 * gaps.min() < 5
        reach = gaps.min() / 2 if even else reach
        between = "take the nearest outline" if even else "stay empty"
        tell(f"{file}: {name} is outlined every {gaps.min():.1f} slices only; those between {between}", error=True)
    for k in range(shape[0]):
        apart = np.round(at - k, 3)
        near = np.flatnonzero((-reach < apart) & (apart <= reach))  # half open: a plane between two slices is of one
        if len(near):
            mask[k] = planes[at[near[np.argmin(np.abs(apart[near]))]]]
    return mask


def _segmented(file: Path, dataset: pydicom.Dataset, _header, shape: tuple, to_voxels: np.ndarray):
    """Each segment of a SEG: (name, mask (D, H, W)). Its frames must lie on the slices of the series."""
    if (dataset.Rows, dataset.Columns) != shape[1:]:
        raise InputError(
            f"{file}: its frames are {dataset.Rows} x {dataset.Columns}, the series' slices {shape[1]} x {shape[2]}; "
            "resample it to the series"
        )
    pixels, kind = pixels_of(file).reshape(-1, *shape[1:]), dataset.get("SegmentationType")
    least = int(dataset.get("MaximumFractionalValue") or 255) / 2 if kind == "FRACTIONAL" else 1
    where = defaultdict(list)  # segment -> (slice, frame)
    for i, frame in enumerate(frames_in(file, dataset)):
        if (z := _slice_of(frame, to_voxels, shape[0])) is not None:
            of_labelmap = (
                np.unique(pixels[i]) if kind == "LABELMAP" else [frame.header.get("ReferencedSegmentNumber", 1)]
            )
            for number in of_labelmap:
                where[int(number)].append((z, i))
    for segment in dataset.SegmentSequence:
        number, mask = int(segment.SegmentNumber), np.zeros(shape, bool)
        for z, i in where[number]:
            mask[z] |= pixels[i] == number if kind == "LABELMAP" else pixels[i] >= least
        if number or kind != "LABELMAP":  # 0 is a label map's background
            yield str(segment.get("SegmentLabel") or f"segment {number}"), mask


def _slice_of(frame: Frame, to_voxels: np.ndarray, depth: int) -> int | None:
    """The slice on which a frame lies; None if that is beside the series. InputError if it lies between two."""
    if (origin := numbers(frame, "ImagePositionPatient", 3)) is None:
        raise InputError(f"{frame.path}: its frames do not say where they lie; export it again")
    column, row, z = (to_voxels @ [*origin, 1.0])[:3]
    if numbers(frame, "ImageOrientationPatient", 6):
        steps = directions(frame) @ to_voxels[:3, :3].T  # one mm along the frame's rows and columns, in voxels
        if steps[0] @ [1, 0, 0] <= 0 or steps[1] @ [0, 1, 0] <= 0 or np.abs(steps[:, 2]).max() > 0.01:
            raise InputError(
                f"{frame.path}: its frames are turned against the series' slices; resample it to the series"
            )
    if max(abs(column), abs(row)) > 0.5 or abs(z - round(z)) > 0.25:
        raise InputError(
            f"{frame.path}: its frames lie between the series' slices or beside them; resample it to the series"
        )
    return round(z) if 0 <= round(z) < depth else None


# ---------------------------------------------------------------- segmentations out


def save_segmentation(path: Path, case: Case, labels: np.ndarray, source: Path, parts=()) -> list[str]:
    """Write the objects of a series as DICOM SEG, each a segment of its own, so that they may overlap. -> names of files

    labels: (D, H, W) or (H, W).   source: what the case was read from.
    parts: (label, slice, MaskPatch) of the objects' own masks, also where the label map shows another one.
    If highdicom is missing, or refuses the series, a sentence says so and no file is written.
    """
    try:
        import highdicom  # only here: it takes a second to load

        content = io.BytesIO()
        _segmentation(highdicom, case, labels, source, parts).save_as(content)
    except ImportError:
        tell(f"{path}: not written, it needs highdicom; run: pip install -r requirements-formats.txt", error=True)
        return []
    except Exception as error:  # highdicom asks of a series what only the standard's letter demands
        tell(f"{path}: not written, highdicom refuses it ({type(error).__name__}: {why(error)})", error=True)
        return []
    save_bytes(path, content.getvalue())
    return [path.name]


def _segmentation(highdicom, case: Case, labels: np.ndarray, source: Path, parts) -> pydicom.Dataset:
    """The file of `save_segmentation`. Segment k is the k-th label that has pixels."""
    frames, affine, _ = slices_of(source)
    volume = labels if labels.ndim == 3 else labels[None]
    parts = [part for part in parts if part[2].values.any()]
    shown = sorted({*label_ids(labels).tolist(), *(int(number) for number, _, _ in parts)})
    if sum(np.count_nonzero(mask.values) for _, _, mask in parts) > np.count_nonzero(labels):
        masks = np.zeros((*volume.shape, len(shown)), bool)
        for number, z, (values, rows, columns) in parts:
            masks[z, rows, columns, shown.index(number)] |= values
    else:  # nothing overlaps: the label map says all, in less memory
        numbers = np.zeros(max([*shown, 0]) + 1, np.uint16)
        numbers[shown] = np.arange(1, len(shown) + 1)
        masks = numbers[volume]
    masks = turn_back(masks, view_of(affine)).swapaxes(0, 2)  # (slice, row, column), and with overlap the segment
    if frames[0].number < 0:
        used = np.flatnonzero(masks.reshape(len(masks), -1).any(1))
        masks, files = masks[used], [frames[i].path for i in used]
    else:  # of a multi-frame file all frames, in its own order
        masks, files = masks[np.argsort([frame.number for frame in frames])], sorted({frame.path for frame in frames})
    images = [read_header(file) for file in files]
    for image in images:
        for key in PATIENT_AND_STUDY:
            image.setdefault(key, "")
        image.setdefault("StudyInstanceUID", pydicom.uid.generate_uid(entropy_srcs=[str(source)]))
        image.setdefault("FrameOfReferenceUID", pydicom.uid.generate_uid(entropy_srcs=[str(source), "frame"]))
        image.setdefault("SliceThickness", f"{case.spacing_mm[0] if case.spacing_mm else 1:.6g}")
    code, uid = (
        pydicom.sr.codedict.codes,
        pydicom.uid.generate_uid(entropy_srcs=[str(source), str(zlib.crc32(masks.tobytes()))]),
    )
    by = highdicom.AlgorithmIdentificationSequence(SOFTWARE, code.DCM.ArtificialIntelligence, "1")
    names = [(case.label_names or ())[number - 1 : number] or [""] for number in shown]
    segments = [
        highdicom.seg.SegmentDescription(
            k,
            name or f"object {number}",
            code.SCT.AnatomicalStructure,
            code.SCT.AnatomicalStructure,
            "SEMIAUTOMATIC",
            by,
        )
        for k, (number, (name,)) in enumerate(zip(shown, names, strict=True), start=1)
    ]
    return highdicom.seg.Segmentation(
        images, masks.astype(np.uint8 if masks.ndim == 4 else np.uint16), "BINARY", segments, f"{uid}.1"[:64], 1,
        f"{uid}.2"[:64], 1, SOFTWARE, SOFTWARE, "1", "1",
    )  # fmt: skip
