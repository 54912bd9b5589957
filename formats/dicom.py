"""DICOM: a single image, a multi-frame file, or the folder of a series, read by pydicom.

A `Frame` is one slice: a file of its own, or a frame of an enhanced file. Frames are sorted by their position along
the series' normal, never by name or number, and must lie evenly on a straight line. Each is rescaled as it says itself
(HU in CT); one window serves the whole series.
Outlines (RTSTRUCT) and segmentations (SEG) in the folder become labels. Label i + 1 is the i-th structure that has
pixels here, in the order of the file. The smaller covers the larger.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from formats import DICOM_ENDINGS, VOLUME_MODALITIES, InputError
from formats.case import Case, paint, told_in_a_sentence
from formats.intensity import WINDOWS, Window, gray_case
from formats.scans import LPS_TO_RAS, crc_of_unpacked, turn, turned, view_of
from formats.writing import tell

LABEL_KINDS = ("RTSTRUCT", "SEG")
NO_IMAGES = ("RTDOSE", "RTPLAN", "RTRECORD", "PR", "SR", "KO", "REG", "RWV", "FID", "DOC", *LABEL_KINDS)
MODALITY_TAGS = {
    "CT": "CT", "MR": "MR", "PT": "PET", "US": "US", "IVUS": "US", "MG": "Mammography", "ES": "Endoscopy",
    "DMS": "Dermoscopy", "OP": "Fundus", "OPT": "OCT", "OCT": "OCT", "SM": "Microscopy", "GM": "Microscopy",
    **dict.fromkeys(("CR", "DX", "RG", "XA", "RF", "IO", "PX"), "X-Ray"),
}  # fmt: skip
TURNED = 1  # degrees: an outline that is turned by more does not lie in a slice
# Of a slice's place: how many numbers each element has
PLACE = {"Rows": 1, "Columns": 1, "ImageOrientationPatient": 6, "PixelSpacing": 2, "ImagePositionPatient": 3}
UNEVEN = 0.05  # of the distance between slices: how far a slice may lie beside its even place


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
    InputError for no image, several series, uneven slices, colour volumes, or pixels that can't be decoded.
    """
    frames, affine, labels = slices_of(path)
    case = as_case(path, frames, affine, window)
    if not labels:
        return case
    if affine is None:
        raise InputError(f"{path}: the series does not say where it lies, so {labels[0].name} can't be laid over it")
    names, empty, view, first = [], [], view_of(affine), frames[0].header

    def masks() -> Iterator[np.ndarray]:  # one by one: each is as large as the volume
        shape = (len(frames), first.Rows, first.Columns)
        for name, mask in label_objects(labels, first, shape, np.linalg.inv(LPS_TO_RAS @ affine)):
            (names if mask.any() else empty).append(name)
            if mask.any():
                mask = turn(mask.transpose(2, 1, 0), view)
                yield mask if case.is_3d else mask[0]
        if not names:
            raise InputError(f"{labels[0]}: outlines nothing in this series; is it of another one?")

    painted, boxes = paint(masks(), names, path)
    if empty:
        tell(f"{path}: left out, as they have no pixel in this series: {', '.join(empty)}", error=True)
    return replace(case, labels=painted, label_names=tuple(names), boxes=boxes)


# ---------------------------------------------------------------- files and frames


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, sorted by name, without a CD's list of contents."""
    return [path for path in sorted(folder.iterdir()) if is_dicom(path) and path.name != "DICOMDIR"]


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its ending, or, if its name has none or only numbers, by how it begins.

    That is "DICM" after 128 bytes, or, where these are missing, a first element of group 2 or 8.
    """
    if path.name.startswith(".") or not path.is_file():
        return False
    if (ending := path.suffix.lower()) in DICOM_ENDINGS or ending.strip(".0123456789"):
        return ending in DICOM_ENDINGS
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or (len(head) == 132 and head[:2] in (b"\2\0", b"\10\0") and head[3] == 0)


def read_header(path: Path, pixels: bool = False) -> pydicom.Dataset:
    """A DICOM file, also one without preamble; without its pixels unless they are asked for. InputError if it can't be read."""
    with told_in_a_sentence(path, "not a DICOM file that can be read", "copy or export it again"):
        with path.open("rb") as file:
            head = file.read(1024)
        if DeflatedExplicitVRLittleEndian.encode() in head:  # pydicom unpacks all of it at once
            crc_of_unpacked(path, 144 + int.from_bytes(head[140:144], "little"), -15)
        dataset = pydicom.dcmread(path, stop_before_pixels=not pixels, force=True)
        if dataset.preamble is None and "SOPClassUID" not in dataset:
            raise ValueError("no DICOM header")
        if "TransferSyntaxUID" not in dataset.file_meta:  # no preamble
            implicit = dataset.original_encoding[0]
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset


def slices_of(path: Path, quiet: bool = False) -> tuple[list[Frame], np.ndarray | None, list[Path]]:
    """What a file or folder holds: (frames in their order in space, affine (RAS+) or None, files of labels).

    The affine takes voxels (column, row, slice) to mm. A film, whose frames follow each other in time, and a
    single image have none. What is left out is told, unless `quiet`. InputError if no image or no series is clear.
    """
    headers = {file: read_header(file) for file in ([path] if path.is_file() else dicom_files(path))}
    kinds = {file: str(one.get("Modality") or "no modality") for file, one in headers.items()}
    labels = [file for file, kind in kinds.items() if kind in LABEL_KINDS]
    if path in labels:  # of the series that lies beside it
        beside = {file: read_header(file) for file in dicom_files(path.parent)}
        headers |= {file: one for file, one in beside.items() if one.get("Modality") not in LABEL_KINDS}
    images = {file: one for file, one in headers.items() if "Rows" in one and one.get("Modality") not in NO_IMAGES}
    images = {file: one for file, one in images.items() if "LOCALIZER" not in (one.get("ImageType") or ())} or images
    series = defaultdict(list)
    for file, header in images.items():
        series[str(header.get("SeriesInstanceUID", ""))] += frames_in(file, header)
    if not series:
        found = ", ".join(sorted(set(kinds.values()))) or "no file"
        raise InputError(f"{path}: holds no DICOM image; name the folder of a series (found: {found})")
    if len(series) > 1:
        # the one that the labels name, else the only scan: radiographs and screenshots may lie beside it
        keys = ("ReferencedFrameOfReferenceSequence", "ReferencedSeriesSequence")
        items = [item for file in labels for key in keys for item in headers[file].get(key) or []]
        chosen = {str(e.value) for item in items for e in item.iterall() if e.keyword == "SeriesInstanceUID"}
        chosen = chosen & series.keys() or {uid for uid, frames in series.items() if is_scan(frames[0].header)}
        if len(chosen) != 1:
            counts = ", ".join(f"{len(group)} of {group[0].path.name}'s series" for group in series.values())
            raise InputError(f"{path}: holds {len(series)} series ({counts}); put each into a folder of its own")
        series = {uid: series[uid] for uid in chosen}
    (frames,) = series.values()
    files = {frame.path for frame in frames}
    if (others := sorted({*headers} - {*labels} - files)) and not quiet:
        some = ", ".join(f"{file.name} ({headers[file].get('Modality')})" for file in others[:5])
        tell(f"{path}: left out {len(others)} files beside the series, such as {some}", error=True)
    films = [frame for frame in frames if frame.number < 0 and (numbers(frame, "NumberOfFrames") or [1])[0] > 1]
    if films and len(frames) > 1:
        raise InputError(f"{path}: holds {len(frames)} files, and {films[0].path.name} is a film; name one of them")
    is_placed = not films and any(numbers(frame, "ImagePositionPatient", 3) for frame in frames)
    if len(files) > 1 or is_placed and (len(frames) > 1 or labels):
        return *sorted_frames(path, frames), labels
    return frames, None, labels


def is_scan(header: pydicom.Dataset) -> bool:
    """Whether an image is one of many slices, by its modality."""
    return MODALITY_TAGS.get(header.get("Modality")) in VOLUME_MODALITIES


def frames_in(path: Path, header: pydicom.Dataset) -> list[Frame]:
    """The frames of a file, their functional groups laid open as in a single slice; one for a slice or a film."""
    frames, shared = [], header.get("SharedFunctionalGroupsSequence") or []
    top = {element.tag: element for element in header if not element.keyword.endswith("FunctionalGroupsSequence")}
    for number, own in enumerate(header.get("PerFrameFunctionalGroupsSequence") or []):
        frames.append(Frame(path, number, pydicom.Dataset()))
        frames[-1].header.update(top)
        for group in (group for groups in (*shared, own) for group in groups if group.VR == "SQ" and group.value):
            frames[-1].header.update(group.value[0])
    return frames or [Frame(path, -1, header)]


def numbers(frame: Frame, key: str, count: int = 1) -> list[float] | None:
    """The first numbers of an element, None if it is missing or empty. InputError for what is no number."""
    with told_in_a_sentence(frame.path, f"its {key} is no number", "correct it, or export again"):
        texts = [str(one) for one in np.ravel(frame.header.get(key))[:count] if one is not None]
        found = [float(text) for text in texts if text.strip()]
        if not np.isfinite(found).all():
            raise ValueError(f"it is {found}")
    return found if len(found) == count else None


def sorted_frames(path: Path, frames: list[Frame]) -> tuple[list[Frame], np.ndarray]:
    """The frames from first to last along their normal, and the affine (RAS+) of voxels (column, row, slice).

    InputError if they differ in size or direction, lie at one place, or not evenly on a straight line.
    """
    first = frames[0]
    for frame in frames:
        for key, count in PLACE.items():
            value, its = numbers(frame, key, count), numbers(first, key, count)
            if value is None:
                lacks = f"so its place in the series is not known; read {frame.path.name} by itself"
                raise InputError(f"{path}: {frame.name} has no {key}, {lacks}")
            near = {"rtol": 0, "atol": 1e-3} if count == 6 else {"rtol": 1e-3}
            if count != 3 and not np.allclose(value, its, **near):
                told = f"{frame.name} has {key} {frame.header.get(key)}, but {first.name} {first.header.get(key)}"
                raise InputError(f"{path}: {told}; a series has one size and direction: sort the files into folders")
    spacing, axes = numbers(first, "PixelSpacing", 2), directions(first)
    if min(spacing) <= 0:
        raise InputError(f"{path}: {first.name} has pixels of {spacing} mm; correct its PixelSpacing")
    places = np.array([numbers(frame, "ImagePositionPatient", 3) for frame in frames])
    order = np.argsort(places @ axes[2], kind="stable")
    frames, places = [frames[i] for i in order], places[order]
    if len(frames) > 1:
        step, origin = _even(path, frames, places, axes)
    else:
        thickness = numbers(first, "SpacingBetweenSlices") or numbers(first, "SliceThickness") or [1]
        step, origin = axes[2] * thickness[0], places[0]
    affine = np.eye(4)
    affine[:3] = np.stack([axes[0] * spacing[1], axes[1] * spacing[0], step, origin], 1)
    return frames, LPS_TO_RAS @ affine


def _even(path: Path, frames: list[Frame], places: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The straight line on which slices lie evenly: (step, place of the first), mm. InputError if they don't.

    places: (n, 3) mm, sorted.   axes: see `directions`. A tilted gantry moves the slices along more than the normal.
    """
    gaps, count = np.diff(places @ axes[2]), np.arange(len(places))
    if gaps.min() <= 1e-3:
        a, b = frames[int(np.argmin(gaps))], frames[int(np.argmin(gaps)) + 1]
        keys = [e.keyword for e in b.header if e.VR not in ("UI", "DA", "TM", "DT", "SQ") and e != a.header.get(e.tag)]
        key = next((key for key in keys if key and key != "InstanceNumber"), None)
        values = sorted({str(frame.header.get(key)) for frame in frames})[:4] if key else []
        differ = f"{key} ({', '.join(values)})" if key else "nothing that tells them apart"
        advice = "sort echoes, phases and passes into folders, or save one as a file of its own"
        raise InputError(f"{path}: {b.name} lies where {a.name} lies; they differ in {differ}; {advice}")
    step, origin = np.polyfit(count, places, 1) if len(places) > 2 else (places[1] - places[0], places[0])
    beside = (places - origin - count[:, None] * step) @ axes.T
    middle = (beside.max(0) + beside.min(0)) / 2
    off = np.abs(beside - middle).max(1)
    # the unit to which all positions may have been rounded: half of it is no fault of the slices
    unit = next((u for u in (1, 0.5, 0.1, 0.01) if np.allclose(places / u, np.rint(places / u), atol=1e-4)), 0)
    # but a missing slice is told: one of five slices or more lies 0.28 of the mean distance off then, one of three 0.17
    most = (0.22 if len(gaps) > 3 else 0.15) * gaps.mean()
    if off.max() > max(UNEVEN * gaps.min(), min(0.55 * unit, most)):
        lies = f"{frames[int(np.argmax(off))].name} lies {off.max():.2f} mm beside its even place"
        apart = f"distances of slices are {gaps.min():.2f} to {gaps.max():.2f} mm"
        advice = "a slice is missing, or the distance changes: copy the whole series, or resample it to even slices"
        raise InputError(f"{path}: {lies} ({apart}); {advice}")
    return step.round(9), (origin + middle @ axes).round(9)


def directions(frame: Frame) -> np.ndarray:
    """(3, 3) unit vectors (LPS+): where the columns of a row, the rows of a column, and slices follow each other."""
    row, column = found = np.reshape(numbers(frame, "ImageOrientationPatient", 6), (2, 3))
    if np.abs(found @ found.T - np.eye(2)).max() > 0.02:
        wrong = f"its ImageOrientationPatient, {found.ravel().tolist()}, is not two unit vectors at right angles"
        raise InputError(f"{frame.path}: {wrong}; correct it, or export again")
    row = row / np.linalg.norm(row)
    column = column - column @ row * row
    column = column / np.linalg.norm(column)
    return np.stack([row, column, np.cross(row, column)])


# ---------------------------------------------------------------- values


def as_case(path: Path, frames: list[Frame], affine: np.ndarray | None, window: Window | None) -> Case:
    """The values of frames as a case, turned if there is an affine."""
    first, luts = frames[0].header, [frame.header.get("VOILUTSequence") or None for frame in frames]
    lut = luts[0] if window is None else None
    if window is None and any(one != lut for one in luts):
        raise InputError(f"{path}: its slices have different VOI LUTs; choose a window with --read window=NAME")
    stored, values = {}, []
    for frame in frames:
        if frame.path not in stored:  # one file at a time: a series is as large as its values
            stored = {frame.path: pixels_of(frame.path)}
        is_one_of_many = frame.number >= 0 and int(frame.header.get("NumberOfFrames") or 1) > 1
        pixels = rescaled(stored[frame.path][frame.number] if is_one_of_many else stored[frame.path], frame)
        values.append(apply_voi_lut(pixels, frame.header) if lut else pixels)
    values = np.stack(values) if len(values) > 1 else values[0]
    is_gray = int(first.get("SamplesPerPixel") or 1) == 1 and first.get("PhotometricInterpretation") != "PALETTE COLOR"
    if not is_gray and values.ndim == 4 and (values == values[..., :1]).all():
        values, is_gray = values[..., 0], True
    if not is_gray and (values.ndim == 4 or affine is not None):
        raise InputError(f"{path}: holds {len(values)} colour frames; save the frame to use as a picture")
    modality = MODALITY_TAGS.get(first.get("Modality"), "")
    if is_gray and lut:
        # what is to be shown, in this many bits; some files hold fewer than they say
        top = 2.0 ** lut[0].LUTDescriptor[2] - 1
        top = top if values.max() > top / 4 else float(values.max())
        window = Window(top, top / 2)
    elif is_gray:
        window = window or window_for(path, frames, values, modality)
    is_3d, spacing = values.ndim == 3 and is_gray, None
    if affine is not None:
        values, (_, dy, dx), affine = turned(path, values.reshape(-1, *values.shape[-2:]).transpose(2, 1, 0), affine)
        # from plane to plane, not along a tilted gantry's way: so mm3 are right
        is_3d, spacing = True, (round(float(abs(np.linalg.det(affine[:3, :3]))) / dy / dx, 9), dy, dx)
    case = gray_case(path, values, window if is_gray else None, is_3d, spacing, affine, modality)
    return replace(case, image=255 - case.image) if first.get("PhotometricInterpretation") == "MONOCHROME1" else case


def window_for(path: Path, frames: list[Frame], values: np.ndarray, modality: str) -> Window | None:
    """The window of a series that none was asked for: its own if all frames agree on one, else that of its modality.

    None: the values decide. A window that shows most of a scan white, or HU where none are, is not taken.
    """
    windows, first = {own_window(frame) for frame in frames}, frames[0]
    own = windows.pop() if len(windows) == 1 else None
    is_shifted = (numbers(first, "RescaleIntercept") or [0])[0] < 0  # as HU are stored
    if own and modality in VOLUME_MODALITIES:
        low, high = own.level - own.width / 2, own.level + own.width / 2
        no_hu = modality == "CT" and not is_shifted and low < 0 and not ((values > -900) & (values < -40)).any()
        if no_hu or np.count_nonzero(values >= high) > values.size / 2:
            text = f"its window {own.width:g}/{own.level:g} does not fit its values, and is not taken"
            tell(f"{path}: {text}", error=True)
            own = None
    if own or modality not in ("", "CT") or (first.header.get("RescaleType") or "HU") not in ("HU", "US"):
        return own or WINDOWS["percentile"]  # US: unspecified
    return WINDOWS["soft"] if modality == "CT" and is_shifted else None


def own_window(frame: Frame) -> Window | None:
    """The first window that a frame names, None if it names none. Its unit is that of the rescaled values."""
    with suppress(InputError):
        width, level = numbers(frame, "WindowWidth"), numbers(frame, "WindowCenter")
        return Window(width[0], level[0]) if width and level and width[0] > 0 else None


def pixels_of(path: Path) -> np.ndarray:
    """The stored pixels of a file: (H, W), colour (H, W, 3), or frames before these. InputError if they can't be decoded."""
    dataset = read_header(path, pixels=True)
    with told_in_a_sentence(path, "has no pixels that can be read", "copy or export it again"):
        try:
            return dataset.pixel_array  # YBR becomes RGB on the way
        except (RuntimeError, NotImplementedError) as error:
            name = dataset.file_meta.TransferSyntaxUID.name
            needs = "what decodes them is not installed; run: pip install -r requirements-formats.txt"
            raise InputError(f"{path}: its pixels are compressed ({name}), and {needs}") from error


def rescaled(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    """Stored pixels -> values as the frame's slope, intercept or Modality LUT say; a palette's become colours, uint8."""
    if frame.header.get("PhotometricInterpretation") == "PALETTE COLOR":
        colours = apply_color_lut(pixels, frame.header)
        return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)
    if frame.header.get("ModalityLUTSequence"):
        return apply_modality_lut(pixels, frame.header)
    (slope,), (intercept,) = numbers(frame, "RescaleSlope") or [1], numbers(frame, "RescaleIntercept") or [0]
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
        dataset = read_header(file, pixels=True)
        rois = dataset.get("StructureSetROISequence") or []
        frames = {str(roi.get("ReferencedFrameOfReferenceUID") or "") for roi in rois} - {""}
        found = {key: {str(dataset.get(key) or "")} for key in ("PatientID", "FrameOfReferenceUID", "StudyInstanceUID")}
        found["FrameOfReferenceUID"] = frames or found["FrameOfReferenceUID"]
        if header.get("FrameOfReferenceUID") and found["FrameOfReferenceUID"] != {""}:
            del found["StudyInstanceUID"]
        for key, theirs in found.items():
            own = str(header.get(key) or "")
            if own and theirs != {""} and own not in theirs:
                told = f"is of another {key} ({', '.join(sorted(theirs))}) than the series ({own})"
                raise InputError(f"{file}: {told}; put labels that were made on this series beside it")
        masks = _outlined if dataset.Modality == "RTSTRUCT" else _segmented
        yield from masks(file, dataset, header, shape, to_voxels)


def _outlined(file: Path, dataset: pydicom.Dataset, header: pydicom.Dataset, shape: tuple, to_voxels: np.ndarray):
    """Each structure of an RTSTRUCT: (name, mask (D, H, W)). A pixel is inside if its centre is.

    In one plane a second outline cuts a hole. A slice takes the plane that is nearest, if that is within half a slice.
    """
    from skimage.draw import polygon2mask  # slow to import, and needed here only

    rois = {roi.ROINumber: roi for roi in dataset.get("StructureSetROISequence") or []}
    slice_mm = 1 / np.linalg.norm(to_voxels[2, :3])
    for contours in dataset.get("ROIContourSequence") or []:
        roi, planes = rois.get(contours.ReferencedROINumber, pydicom.Dataset()), {}
        name = str(roi.get("ROIName") or f"structure {contours.ReferencedROINumber}")
        frame, its = roi.get("ReferencedFrameOfReferenceUID"), header.get("FrameOfReferenceUID")
        for contour in contours.get("ContourSequence") or [] if not frame or frame == its or not its else []:
            count = len(np.ravel(contour.get("ContourData"))) // 3 * 3
            points = np.reshape(numbers(Frame(file, -1, contour), "ContourData", count) or [], (-1, 3))
            if len(points) < 3 or not str(contour.get("ContourGeometricType") or "CLOSED").startswith("CLOSED"):
                continue  # a point or a line
            column, row, z = (np.column_stack([points, np.ones(len(points))]) @ to_voxels.T)[:, :3].T
            normal = np.linalg.svd(points - points.mean(0), full_matrices=False)[2][2]
            turned_by = np.degrees(np.arccos(min(1, abs(normal @ to_voxels[2, :3]) * slice_mm)))
            if np.ptp(z) * slice_mm > 0.2 and (np.ptp(z) > 0.5 or turned_by > TURNED):
                told = f"an outline of {name} is turned by {turned_by:.0f} degrees against the slices"
                raise InputError(
                    f"{file}: {told}; save the structures as a segmentation on this series (3D Slicer does)"
                )
            at = next((plane for plane in planes if abs(plane - z.mean()) < 0.02), z.mean())
            planes.setdefault(at, np.zeros(shape[1:], bool))
            planes[at] ^= polygon2mask(shape[1:], np.column_stack([row, column]))
        yield name, _on_slices(file, name, planes, shape)


def _on_slices(file: Path, name: str, planes: dict[float, np.ndarray], shape: tuple) -> np.ndarray:
    """Outlined planes {place, counted in slices: mask (H, W)} -> mask (D, H, W), each slice that of the nearest plane."""
    mask, at = np.zeros(shape, bool), np.array(sorted(planes))
    gaps, is_even = np.diff(at), False
    if len(gaps) and gaps.min() > 1.5:
        is_even = len(gaps) > 1 and gaps.max() < 1.1 * gaps.min() < 5
        between = "take the nearest outline" if is_even else "stay empty"
        tell(f"{file}: {name} is outlined every {gaps.min():.1f} slices only; those between {between}", error=True)
    reach = max(gaps[gaps <= 1.01], default=1) / 2 + 1e-3  # an outline stands for half the way to its neighbours
    for k in range(shape[0] if len(at) else 0):
        nearest = at[np.argmin(np.abs(at - k))]
        if abs(nearest - k) <= reach or (is_even and at[0] < k < at[-1]):
            mask[k] = planes[nearest]
    return mask


def _segmented(file: Path, dataset: pydicom.Dataset, _header, shape: tuple, to_voxels: np.ndarray):
    """Each segment of a SEG: (name, mask (D, H, W)). Its frames must lie on the slices of the series."""
    if (dataset.Rows, dataset.Columns) != shape[1:]:
        told = f"its frames are {dataset.Rows} x {dataset.Columns}, the series' slices {shape[1]} x {shape[2]}"
        raise InputError(f"{file}: {told}; resample it to the series")
    pixels, kind = pixels_of(file).reshape(-1, *shape[1:]), dataset.get("SegmentationType")
    least = int(dataset.get("MaximumFractionalValue") or 255) / 2 if kind == "FRACTIONAL" else 1
    where = defaultdict(list)  # segment -> (slice, frame)
    for i, frame in enumerate(frames_in(file, dataset)):
        if (z := _slice_of(frame, to_voxels, shape)) is not None:
            segment = frame.header.get("ReferencedSegmentNumber", 1)
            for number in np.unique(pixels[i]) if kind == "LABELMAP" else [segment]:
                where[int(number)].append((z, i))
    for segment in dataset.SegmentSequence:
        number, mask = int(segment.SegmentNumber), np.zeros(shape, bool)
        for z, i in where[number]:
            mask[z] |= pixels[i] == number if kind == "LABELMAP" else pixels[i] >= least
        if number or kind != "LABELMAP":  # 0 is a label map's background
            yield str(segment.get("SegmentLabel") or f"segment {number}"), mask


def _slice_of(frame: Frame, to_voxels: np.ndarray, shape: tuple) -> int | None:
    """The slice on which a frame lies; None if that is beside the series. InputError if its corners lie elsewhere."""
    origin, spacing = numbers(frame, "ImagePositionPatient", 3), numbers(frame, "PixelSpacing", 2)
    if None in (origin, spacing, numbers(frame, "ImageOrientationPatient", 6)):
        raise InputError(f"{frame.path}: its frames do not say where they lie; export it again")
    corners, axes = np.array([(0, 0), (shape[2] - 1, 0), (0, shape[1] - 1)]), directions(frame)[:2]
    places = np.column_stack([origin + corners * spacing[::-1] @ axes, np.ones(3)]) @ to_voxels.T
    z = round(places[:, 2].mean())
    if np.abs(places[:, :2] - corners).max() > 0.5 or np.abs(places[:, 2] - z).max() > 0.25:
        raise InputError(f"{frame.path}: its frames do not lie on the slices of the series; resample it to the series")
    return z if 0 <= z < shape[0] else None
