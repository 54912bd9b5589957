"""Files of truth and of predictions -> scores of one case, for every system and for the two that never look. [P 3.1]

Means are plain, over a case's labels. Protocols and conventions: see metrics.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from metrics import case_scores, label_bounds
from readers import InputError, boxes_from_labels, check_boxes, check_labels, load_npz, modality_of, spacing_zyx
from tables import REFERENCES


def read_labels(path: Path, key: str, shape: tuple[int, ...] | None = None) -> tuple[np.ndarray, dict]:
    """Label map `key` of an .npz as uint16, of the given shape if any, and all that the file holds. Or InputError."""
    stored = load_npz(path)
    if key not in stored:
        raise InputError(f"{path}: has no key '{key}' (found {sorted(stored)}); name the right folder or save '{key}'")
    return check_labels(stored[key], shape or stored[key].shape, path), stored


def read_truth(path: Path) -> tuple[np.ndarray, tuple[float, ...] | None, np.ndarray, np.ndarray]:
    """Ground truth of a case: labels uint16, spacing_mm (z, y, x) or None in 2D, ids (N,) and boxes (N, 4 or 6).

    ids[i] is the label that box i asks for: i + 1 if the file has `boxes`, else each label with its exact box.
    Raises ValueError, one sentence, if a key is missing or unusable.
    """
    gts, stored = read_labels(path, "gts")
    if gts.ndim not in (2, 3) or not gts.any():
        raise InputError(f"{path}: 'gts', shape {gts.shape}, must be a (H, W) or (D, H, W) label map with an object")
    if gts.ndim == 3 and "spacing" not in stored:
        raise InputError(f"{path}: has no key 'spacing', and a 3D NSD is in mm; save (x, y, z) in mm as 'spacing'")
    spacing_mm = spacing_zyx(stored["spacing"]) if gts.ndim == 3 else None
    if "boxes" not in stored:
        return gts, spacing_mm, *boxes_from_labels(gts)
    boxes = check_boxes(stored["boxes"], gts.shape, path)
    return gts, spacing_mm, np.arange(1, len(boxes) + 1), boxes


def score_case(truth: Path, systems: dict[str, Path], protocols: tuple[str, ...]) -> tuple[list[dict], list[str]]:
    """Score one case for every system and both references. Returns (rows, problems in one sentence each)."""
    try:
        gts, spacing_mm, ids, boxes = read_truth(truth)
    except ValueError as error:
        return [], [str(error) if isinstance(error, InputError) else f"{truth}: {error}"]
    label_of = np.append(0, ids).astype(np.uint16)  # the references paint box i as i + 1; its label is ids[i]
    maps, problems = {name: label_of[paint(boxes, gts.shape)] for name, paint in REFERENCES.items()}, []
    for system, folder in systems.items():
        try:
            if not (folder / truth.name).is_file():
                raise InputError(
                    f"{folder / truth.name}: no prediction for this case; run python 04_infer.py on it first"
                )
            maps[system] = read_labels(folder / truth.name, "segs", gts.shape)[0]
        except InputError as error:
            problems.append(str(error))
    rows, modality, objects = [], modality_of(truth.stem), len(label_bounds(gts))
    for system, segs in maps.items():
        row = {"system": system, "case": truth.name, "modality": modality, "objects": objects, "labels": {}}
        for protocol in protocols:
            found = case_scores(segs, gts, spacing_mm, protocol)
            row |= {f"dsc_{protocol}": found.mean_dsc, f"nsd_{protocol}": found.mean_nsd}
            for label, dsc, nsd in zip(found.labels, found.dsc.tolist(), found.nsd.tolist(), strict=True):
                if not math.isnan(dsc):  # nan: an id that neither truth nor prediction has
                    row["labels"].setdefault(label, {}).update({f"dsc_{protocol}": dsc, f"nsd_{protocol}": nsd})
        rows.append(row)
    return rows, problems
