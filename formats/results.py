"""What step 4 is asked for, and what it writes: label maps in the formats that viewers open, and tables.

NAME.npz         `segs`, the label map, as the challenge has it
NAME.nii.gz      on the input's own grid, for a case that says where it lies (NIfTI, DICOM, NRRD, MHA)
NAME_mask.png    for pictures: indexed, so that objects have a colour each and the value of a pixel is
                 its object's number; 16 bit gray above 255 objects; a .tif of pages for a TIFF of pages
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from formats import InputError
from formats.case import Case
from formats.readers import ending_of, list_cases, name_of, read_boxed
from formats.writing import csv_text, progress, save_bytes, save_image, save_json, save_npz, save_text, tell
from grid import boxes_from_labels

OBJECT_COLUMNS = ("case", "label", "name", "box", "pixels", "mm3", "predicted_iou", "seconds", "note")
RESULT_ENDINGS = (".npz", ".nii.gz", "_mask.png", "_mask.tif")  # of a case's label map
COVERED = 0.5  # an object of which others hide this share or more is named in a warning


def cases_to_do(
    source: Path, folder: Path, boxes: list[list[float]] | None, looseness: float | None, window: tuple | None
) -> tuple[list[Path], Iterator[tuple[Path, Case, float]]]:
    """The files to segment, and their cases as they are read: (path, case with boxes, seconds of reading).

    source: a file or a folder.   folder: of the results.   boxes, looseness, window: see `read_boxed`.
    A file of a folder that cannot be used is named on stderr and left out.
    InputError if nothing can be done, or results would replace something.
    """
    if looseness is not None and looseness < 0:
        raise InputError(f"--boxes-from-masks {looseness:g}: a looseness is 0 or more")
    files = files_to_do(source, folder, "--box" if boxes else "", with_boxes=not boxes and looseness is None)

    def cases() -> Iterator[tuple[Path, Case, float]]:
        for path in progress(files, "cases", unit="case"):
            start = time.perf_counter()
            try:
                case = read_boxed(path, boxes, looseness, window)
            except InputError as error:
                if path == source:
                    raise
                for ending in RESULT_ENDINGS:  # an earlier run's result would be taken for this one's
                    (folder / f"{name_of(path)}{ending}").unlink(missing_ok=True)
                tell(f"04_infer.py: left out: {error}", error=True)
                continue
            yield path, case, time.perf_counter() - start

    return files, cases()


def files_to_do(source: Path | None, folder: Path, one: str, with_boxes: bool) -> list[Path]:
    """The cases of a file or folder that was named. InputError if results in `folder` would replace something.

    one: the flag, "" for none, that asks for a single case.   with_boxes: see `list_cases`.
    """
    if source is None:
        raise InputError("name the input: -i FOLDER, or -i IMAGE --box X0 Y0 X1 Y1, or --smoke")
    alone = ending_of(source) and not source.is_dir()
    files = [source] if alone else list_cases(source, with_boxes)
    if one and len(files) > 1:
        raise InputError(f"{source}: {one} takes one image or volume; {len(files)} are here: name one")
    if folder.resolve() in (source.resolve(), files[0].parent.resolve()):
        raise InputError(
            f"{folder}: the same folder as the input's; results would replace files of yours: name another"
        )
    if in_the_way := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise InputError(f"{folder}: {in_the_way} is a file, so no folder can be made there; name another")
    name, count = Counter(map(name_of, files)).most_common(1)[0]
    if count > 1:
        raise InputError(f"{source}: holds {name} in {count} formats, and each would give {name}.npz; rename one")
    return files


def numbered(labels: np.ndarray, case: Case, from_masks: bool) -> tuple[np.ndarray, np.ndarray]:
    """-> (the label map, the label (N,) of each box). Box i painted i + 1.

    from_masks: box i is that of the i-th label which occurs in the case, and gets its number.
    """
    if not from_masks:
        return labels, np.arange(1, len(case.boxes) + 1)
    numbers = boxes_from_labels(case.labels)[0]
    return np.append(0, numbers).astype(np.uint16)[labels], numbers


def save_label_map(folder: Path, case: Case, labels: np.ndarray, source: Path, palette: np.ndarray) -> list[str]:
    """Write the label map of a case. -> names of the files

    labels: (H, W) or (D, H, W) uint16.   source: the file of the case.
    palette: (n, 3) RGB, the colours of labels 1, 2, ...
    """
    # 8 bits where they hold every label, as the challenge's own files; 16 above 255 objects (D9)
    small = labels.astype(np.uint8) if labels.max() <= 255 else labels
    save_npz(folder / f"{case.name}.npz", segs=small)
    if source.suffix == ".npz":  # the challenge asks for nothing else, and its clock is running
        return [f"{case.name}.npz"]
    if case.affine is not None:
        from formats.scans import save_nifti_labels  # only here: most cases have no affine

        name = f"{case.name}.nii.gz"
        is_nifti = source.name.lower().endswith((".nii", ".nii.gz"))
        save_nifti_labels(folder / name, labels, case.affine, source if is_nifti else None)
    elif case.is_3d:
        name = f"{case.name}_mask.tif"
        save_bytes(folder / name, cv2.imencodemulti(".tif", list(small))[1].tobytes())
    elif small.dtype == np.uint8:
        name = f"{case.name}_mask.png"
        save_bytes(folder / name, _indexed_png(small, palette))
    else:
        name = f"{case.name}_mask.png"
        save_image(folder / name, small)
    return [f"{case.name}.npz", name]


def efficiency_row(case: Case, seconds: dict[str, float]) -> dict:
    """A row of efficiency.csv."""
    shape = "x".join(map(str, case.image.shape))
    return {
        "case": f"{case.name}.npz", "modality": case.modality, "shape": shape, "objects": len(case.boxes), **seconds
    }  # fmt: skip


def object_rows(
    case: Case, labels: np.ndarray, numbers: np.ndarray, iou: np.ndarray, own: np.ndarray, seconds: float | None
) -> list[dict]:
    """A row of OBJECT_COLUMNS for each box of a case. A warning names those that came out empty or covered.

    labels: the label map.   numbers: (N,) the label that each box painted.   iou, own: see volumes.Found.
    seconds: of the whole case, None if not measured. Each object is given an equal share: embedding a
    slice serves them all.
    pixels (in a volume: voxels) and mm3 count what an object has in the label map; what another one
    covers is not its own.
    """
    most = max(int(numbers.max()), int(labels.max())) + 1
    planes = labels if labels.ndim == 3 else labels[None]  # one by one: bincount takes 8 bytes a pixel
    visible = sum(np.bincount(plane.ravel(), minlength=most) for plane in planes)
    voxel_mm3 = float(np.prod(case.spacing_mm)) if case.spacing_mm else None
    rows, told = [], []
    for i, label in enumerate(numbers.tolist()):
        named = case.label_names[label - 1] if case.label_names and label <= len(case.label_names) else ""
        pixels, covered = int(visible[label]), 1 - visible[label] / max(1, own[i])
        note = "empty" if own[i] == 0 else f"{100 * covered:.0f} % covered by others" if covered > 0.005 else ""
        rows.append({
            "case": f"{case.name}.npz", "label": label, "name": named,
            "box": " ".join(f"{value:g}" for value in case.boxes[i]), "pixels": pixels,
            "mm3": "" if voxel_mm3 is None else f"{pixels * voxel_mm3:.1f}",
            "predicted_iou": f"{iou[i]:.3f}", "seconds": "" if seconds is None else f"{seconds / len(numbers):.4f}", "note": note,
        })  # fmt: skip
        if own[i] == 0 or covered >= COVERED:
            told.append(f"{label} ({note})")
    if told:
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        text = f"{case.name}.npz: look at object {', '.join(told[:5])}{more}; move their boxes, or give fewer"
        tell(f"04_infer.py: {text}", error=True)
    return rows


def save_tables(folder: Path, rows: list[dict], objects: list[dict], arguments: dict) -> None:
    """Write efficiency.csv, objects.csv, and what was run as arguments.json."""
    save_text(folder / "efficiency.csv", csv_text(rows, tuple(rows[0]), number=".4f"))
    save_text(folder / "objects.csv", csv_text(objects, OBJECT_COLUMNS))
    save_json(folder / "arguments.json", arguments)


def last_line(
    source: Path, folder: Path, files: list[Path], rows: list[dict], objects: list[dict], names: list[str], smoke: bool
) -> str:
    """What was done and what comes next. InputError if cases were left out.   names: of the last case's files."""
    if len(rows) < len(files):
        raise InputError(f"{len(rows)} of {len(files)} cases done, {len(files) - len(rows)} left out as told above.")
    if files == [source]:
        found = (f"object {o['label']}: {o['pixels']} pixels, predicted IoU {o['predicted_iou']}" for o in objects)
        return f"04_infer.py: {', '.join(found)}; wrote {', '.join(names)} and objects.csv to {folder}"
    kept = f"wrote {folder}. Next: python 05_evaluate.py -s {folder} -g GROUND_TRUTH"
    told = "results removed again. Next: python 05_evaluate.py --smoke" if smoke else kept
    seconds = sum(row["total_s"] for row in rows)
    return f"04_infer.py: {len(rows)} cases, {len(objects)} objects in {seconds:.1f} s, {told}"


def _indexed_png(labels: np.ndarray, palette: np.ndarray) -> bytes:
    """(H, W) uint8 as a PNG with a palette: 0 is black, label i has colour i - 1, over and over."""
    from PIL import Image  # OpenCV writes no palettes

    colours = palette[np.arange(255) % len(palette)]
    picture = Image.fromarray(labels)
    picture.putpalette(np.concatenate([[[0, 0, 0]], colours]).astype(np.uint8).tobytes())
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
