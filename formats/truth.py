"""The files that step 5 reads: ground truth, and label maps of step 4."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats import InputError, is_drawn, modality_of
from formats.case import Case, check_boxes, check_labels, spacing_zyx, told_in_a_sentence
from formats.npz import load_npz
from formats.readers import read_case
from grid import boxes_from_labels, drawn_boxes, label_ids

WHITE = (255, 65_535)  # what pictures and many tools write for the one object of a mask


class Truth(NamedTuple):
    """Ground truth of a case. ids[i] is the label that box i asks for."""

    labels: np.ndarray  # (H, W) or (D, H, W) uint16
    spacing_mm: tuple[float, ...] | None  # (z, y, x); None in 2D
    ids: np.ndarray  # (N,)
    boxes: np.ndarray  # (N, 4) or (N, 6)
    about: dict  # what a row of cases.csv says of the case: case, modality, drawn, objects

    def labels_of(self, painted: np.ndarray) -> np.ndarray:
        """A label map that has i + 1 where box i's mask is, with the label that box i asks for in its place."""
        return np.append(0, self.ids).astype(np.uint16)[painted]


def read_labels(path: Path, key: str, shape: tuple[int, ...] | None = None) -> tuple[np.ndarray, dict]:
    """Label map `key` of an .npz as uint16, of the given shape if any, and all that the file holds. Or InputError."""
    stored = load_npz(path)
    if key not in stored:
        raise InputError(f"{path}: has no key '{key}' (found {sorted(stored)}); name the right folder or save '{key}'")
    return check_labels(stored[key], shape or stored[key].shape, path), stored


def of_one_object(labels: np.ndarray, label: int) -> np.ndarray:
    """A label map whose one object is white, 255, with that object as `label`; any other as it is."""
    return (labels > 0) * np.uint16(label) if labels.max() in WHITE and len(label_ids(labels)) == 1 else labels


def read_truth(path: Path, looseness: float = 0.0) -> Truth:
    """Ground truth of a case, with the boxes of the file if it has `boxes`, else each label's exact one.

    looseness: of the boxes that step 4 asked with.   InputError; ValueError for a spacing that is none."""
    labels, stored = read_labels(path, "gts")
    if labels.ndim not in (2, 3) or not labels.any():
        raise InputError(f"{path}: 'gts', shape {labels.shape}, must be a (H, W) or (D, H, W) label map with an object")
    labels = of_one_object(labels, 1)
    if labels.ndim == 3 and "spacing" not in stored:
        raise InputError(f"{path}: has no key 'spacing', and a 3D NSD is in mm; save (x, y, z) in mm as 'spacing'")
    spacing_mm = spacing_zyx(stored["spacing"]) if labels.ndim == 3 else None
    ids, boxes = boxes_from_labels(labels)
    if "boxes" in stored:
        boxes = check_boxes(stored["boxes"], labels.shape, path)
        ids = np.arange(1, len(boxes) + 1)
    about = {"case": path.name, "modality": modality_of(path.stem), "drawn": "yes" * is_drawn(path.stem)}
    boxes = drawn_boxes(path.stem, boxes, looseness, labels.shape)
    return Truth(labels, spacing_mm, ids, boxes, about | {"objects": len(label_ids(labels))})


def read_prediction(path: Path, truth: Truth) -> np.ndarray:
    """A label map of step 4, (H, W) or (D, H, W) uint16. InputError for one without any label of the truth: other
    numbers for the same objects would score 0 and look like misses."""
    wanted, labels = label_ids(truth.labels), read_labels(path, "segs", truth.labels.shape)[0]
    labels = of_one_object(labels, wanted[0]) if len(wanted) == 1 else labels
    if labels.any() and not np.isin(label_ids(labels), wanted).any():
        theirs, ours = (" ".join(map(str, ids[:5])) for ids in (label_ids(labels), wanted))
        raise InputError(f"{path}: has labels {theirs}, and the truth {ours}: none in common; renumber")
    return labels


def read_scored(path: Path) -> tuple[Case, Truth]:
    """A case with boxes and its truth, which lies in ../gts unless the case holds it. Or InputError."""
    case = read_case(path)
    file = path if case.labels is not None else path.parent.parent / "gts" / path.name
    with told_in_a_sentence(file):
        truth = read_truth(file)
    check_labels(truth.labels, case.grid_shape, file)
    if case.boxes is not None:
        truth = truth._replace(ids=np.arange(1, len(case.boxes) + 1), boxes=case.boxes)
    return replace(case, boxes=truth.boxes), truth
