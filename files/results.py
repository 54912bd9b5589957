"""What step 4 found of one case, in the formats that viewers open.

NAME.npz         `segs`, the label map, as the challenge has it
NAME.nii.gz      the same on the input's own grid, for a case that says where it lies (NIfTI, DICOM, NRRD, MHA)
NAME_mask.png    for pictures: indexed, so that objects have a colour each and the value of a pixel is its object's number;
                 16 bit gray above 255 objects; a .tif of pages for a TIFF of pages
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from files import InputError
from files.case import Case
from files.formats import name_of
from files.writing import save_bytes, save_image, save_npz

STAGES = ("enhance", "encode", "decode", "upsample")
COLUMNS = ("case", "modality", "shape", "objects", "read_s", *(f"{stage}_s" for stage in STAGES), "write_s", "total_s")
OBJECT_COLUMNS = ("case", "label", "name", "box", "pixels", "mm3", "predicted_iou", "seconds", "note")
RESULT_ENDINGS = (".npz", ".nii.gz", "_mask.png", "_mask.tif")  # of a case's label map
COVERED = 0.5  # share of an object that others hide, from which on it is told


class Done(NamedTuple):
    """What became of one case."""

    row: dict  # of efficiency.csv
    objects: list[dict]  # rows of objects.csv
    files: list[str]  # that were written


def check_output(folder: Path, source: Path, files: list[Path]) -> None:
    """InputError if results of these files can't be written to a folder without replacing something.   source: what was named."""
    if folder.resolve() in (source.resolve(), files[0].parent.resolve()):
        raise InputError(
            f"{folder}: input and output are the same folder; the results would replace files of yours, name another"
        )
    if in_the_way := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise InputError(f"{folder}: {in_the_way} is a file, so no folder can be made there; name another")
    name, count = Counter(map(name_of, files)).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{source}: holds {name} in {count} formats, and each would give {name}.npz; rename or move one"
        )


def efficiency_row(case: Case, spent: dict[str, float], read_s: float, write_s: float, total_s: float) -> dict:
    """A row of COLUMNS, times in seconds.   spent: by stage."""
    return {
        "case": f"{case.name}.npz",
        "modality": case.modality,
        "shape": "x".join(map(str, case.image.shape)),
        "objects": len(case.boxes),
        "read_s": read_s,
        **{f"{stage}_s": spent[stage] for stage in STAGES},
        "write_s": write_s,
        "total_s": total_s,
    }


def save_label_map(folder: Path, case: Case, labels: np.ndarray, source: Path, palette: np.ndarray) -> list[str]:
    """Write the label map of a case. -> names of the files

    labels: (H, W) or (D, H, W) uint16.   source: the file of the case.   palette: (n, 3) RGB, the colours of labels 1, 2, ...
    """
    # 8 bits where they hold every label, as the challenge's own files; 16 above 255 objects (D9)
    small = labels.astype(np.uint8) if labels.max() <= 255 else labels
    save_npz(folder / f"{case.name}.npz", segs=small)
    names = [f"{case.name}.npz"]
    if source.suffix == ".npz":  # the challenge asks for nothing else, and its clock is running
        return names
    if case.affine is not None:
        from files.nifti import save_nifti_labels  # only here: most cases have no affine

        is_nifti = source.name.lower().endswith((".nii", ".nii.gz"))
        save_nifti_labels(folder / f"{case.name}.nii.gz", labels, case.affine, source if is_nifti else None)
        return [*names, f"{case.name}.nii.gz"]
    if case.is_3d:
        save_bytes(folder / f"{case.name}_mask.tif", cv2.imencodemulti(".tif", list(small))[1].tobytes())
        return [*names, f"{case.name}_mask.tif"]
    if small.dtype == np.uint8:
        save_bytes(folder / f"{case.name}_mask.png", _indexed_png(small, palette))
    else:
        save_image(folder / f"{case.name}_mask.png", small)
    return [*names, f"{case.name}_mask.png"]


def object_rows(
    case: Case, labels: np.ndarray, numbers: np.ndarray, iou: np.ndarray, own: np.ndarray, seconds: float | None
) -> list[dict]:
    """A row of OBJECT_COLUMNS for each box of a case.

    labels: the label map.   numbers: (N,) the label that each box painted.   iou, own: as volumes.Found has them.
    seconds: of the whole case. Each object is given an equal share: embedding a slice serves them all. None: not measured.
    pixels (in a volume: voxels) and mm3 count what an object has in the label map; what another one covers is not its own.
    """
    most = max(int(numbers.max()), int(labels.max())) + 1
    planes = labels if labels.ndim == 3 else labels[None]  # one by one: bincount takes 8 bytes a pixel
    visible = sum(np.bincount(plane.ravel(), minlength=most) for plane in planes)
    voxel_mm3 = float(np.prod(case.spacing_mm)) if case.spacing_mm else None
    rows = []
    for i, label in enumerate(numbers.tolist()):
        named = case.label_names[label - 1] if case.label_names and label <= len(case.label_names) else ""
        pixels, covered = int(visible[label]), 1 - visible[label] / max(1, own[i])
        note = "empty" if own[i] == 0 else f"{100 * covered:.0f} % covered by others" if covered > 0.005 else ""
        rows.append({
            "case": f"{case.name}.npz", "label": label, "name": named,
            "box": " ".join(f"{value:g}" for value in case.boxes[i]), "pixels": pixels,
            "mm3": "" if voxel_mm3 is None else f"{pixels * voxel_mm3:.1f}",
            "predicted_iou": f"{iou[i]:.3f}", "seconds": "" if seconds is None else f"{seconds / len(numbers):.4f}", "note": note,
            "told": own[i] == 0 or covered >= COVERED,
        })  # fmt: skip
    return rows


def objects_told(rows: list[dict]) -> str | None:
    """One sentence on the objects of a case that came out empty or that others cover; None if there is none."""
    told = [f"{row['label']} ({row['note']})" for row in rows if row["told"]]
    if not told:
        return None
    more = f" and {len(told) - 5} more" if len(told) > 5 else ""
    return f"{rows[0]['case']}: look at object {', '.join(told[:5])}{more}; move their boxes, or give fewer"


def _indexed_png(labels: np.ndarray, palette: np.ndarray) -> bytes:
    """(H, W) uint8 as a PNG with a palette: 0 is black, label i has colour i - 1, over and over."""
    from PIL import Image  # OpenCV writes no palettes

    colours = palette[np.arange(255) % len(palette)]
    picture = Image.fromarray(labels)
    picture.putpalette(np.concatenate([[[0, 0, 0]], colours]).astype(np.uint8).tobytes())
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
