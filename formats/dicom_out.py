"""DICOM SEG out, by highdicom: what step 4 finds in a DICOM series, on the slices of that series."""

import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from formats.case import Case, why
from formats.dicom import read_header, slices_of
from formats.scans import turn_back, view_of
from formats.writing import save_bytes, tell
from grid import label_ids

SOFTWARE = "Gray's Anatomy SAM"
# What the standard demands of every image, empty if it is not known.
DEMANDED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


def save_segmentation(path: Path, case: Case, labels: np.ndarray, source: Path, parts=()) -> list[str]:
    """Write the objects of a series as DICOM SEG, each a segment of its own, so that they may overlap. -> names of files

    labels: (D, H, W) or (H, W).   source: what the case was read from.   parts: (label, slice, MaskPatch) of the
    objects' own masks. If highdicom is missing, or refuses the series, a sentence says so and no file is written.
    """
    try:
        import highdicom  # only here: it takes a second to load

        content = io.BytesIO()
        with warnings.catch_warnings():  # of how names of patients are written
            warnings.simplefilter("ignore")
            _segmentation(highdicom, case, labels, source, parts).save_as(content)
    except Exception as error:  # highdicom asks of a series what only the standard's letter demands
        what = f"highdicom refuses it ({type(error).__name__}: {why(error)})"
        if isinstance(error, ImportError):
            what = "it needs highdicom; run: pip install -r requirements-formats.txt"
        tell(f"{path}: not written, {what}", error=True)
        return []
    save_bytes(path, content.getvalue())
    return [path.name]


def _segmentation(highdicom, case: Case, labels: np.ndarray, source: Path, parts) -> pydicom.Dataset:
    """The file of `save_segmentation`. Segment k is the k-th label that has pixels."""
    frames, affine, _ = slices_of(source, quiet=True)
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
        if not image.get("SpecificCharacterSet"):  # empty is not allowed, none is
            image.pop("SpecificCharacterSet", None)
        for key in DEMANDED:
            image.setdefault(key, "")
        image.setdefault("StudyInstanceUID", generate_uid(entropy_srcs=[str(source)]))
        image.setdefault("FrameOfReferenceUID", generate_uid(entropy_srcs=[str(source), "frame"]))
        image.setdefault("SliceThickness", f"{case.spacing_mm[0] if case.spacing_mm else 1:.6g}")
    # of the content, so that the same input gives the same file but for its date
    what = [str(images[0].get("SeriesInstanceUID")), str(zlib.crc32(masks.tobytes())), *map(str, shown)]
    series, instance = (generate_uid(entropy_srcs=[*what, kind]) for kind in ("series", "instance"))
    by = highdicom.AlgorithmIdentificationSequence(SOFTWARE, codes.DCM.ArtificialIntelligence, "1")
    kind = codes.SCT.AnatomicalStructure
    names = [(case.label_names or ())[number - 1 : number] or [""] for number in shown]
    segments = [
        highdicom.seg.SegmentDescription(k, name or f"object {number}", kind, kind, "SEMIAUTOMATIC", by)
        for k, (number, (name,)) in enumerate(zip(shown, names, strict=True), start=1)
    ]
    return highdicom.seg.Segmentation(
        images, masks.astype(np.uint8 if masks.ndim == 4 else np.uint16), "BINARY", segments, series, 1, instance, 1,
        SOFTWARE, SOFTWARE, "1", "1",
    )  # fmt: skip
