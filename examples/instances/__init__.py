"""A fork for instances: pictures whose objects are polygons in JSON, scored by the mean precision over IoU thresholds.

Two things that the house does not know, and the row for each (`add_rows`): a layout of JSON, and a metric of a case.
The program that uses them: python -m examples.instances --help
"""

import json
from pathlib import Path

import cv2
import numpy as np

from figures import outlines
from formats import MAX_LABEL, InputError
from formats.annotations import LAYOUTS, Boxed, boxed_objects
from formats.writing import save_json
from metrics import METRICS, Metric

THRESHOLDS = np.arange(0.5, 1, 0.05)  # of IoU


def add_rows() -> None:
    """What a fork writes into formats/annotations.py and metrics.py."""
    LAYOUTS["polygons"] = read_polygons
    METRICS["map"] = Metric(mean_precision, of_case=True)


def read_polygons(path: Path, shape: tuple[int, int]) -> Boxed:
    """NAME.json of NAME.png: {"polygons": [{"label": "nucleus", "points": [[x, y], ...]}, ...]}.

    Points are centres of pixels, x to the right, y down; pixels on the polygon belong to the object. An object may have
    several polygons: then "points" holds a list of them. InputError for a file that is none, or an empty object.
    """
    masks, names = [], []
    try:
        for one in json.loads(path.read_text("utf-8"))["polygons"]:
            parts = one["points"] if np.ndim(one["points"][0][0]) else [one["points"]]
            corners = [np.array(part, float).reshape(-1, 2).round().astype(np.int32) for part in parts]
            masks.append(cv2.fillPoly(np.zeros(shape, np.uint8), corners, 1).astype(bool))
            names.append(str(one.get("label", "")))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, cv2.error) as error:
        raise InputError(f"{path}: polygon {len(masks) + 1} is not understood ({error!r}); correct it") from error
    empty = [str(i) for i, mask in enumerate(masks, start=1) if not mask.any()]
    if empty or not 0 < len(masks) <= MAX_LABEL:
        what = f"polygon {', '.join(empty)} lies outside the picture" if empty else f"holds {len(masks)} polygons"
        raise InputError(f"{path}: {what}; give 1 to {MAX_LABEL} inside it, or leave the picture out")
    return boxed_objects(path, masks, tuple(names))


def write_polygons(path: Path, labels: np.ndarray, names: dict[int, str]) -> None:
    """The objects of a label map (H, W) in the layout that `read_polygons` reads, without their holes.

    names: of labels; an object without one is called "".
    """
    objects = []
    for i in range(1, int(labels.max()) + 1):
        if parts := [part.tolist() for part in outlines(labels == i)]:
            objects.append({"label": names.get(i, ""), "points": parts})
    save_json(path, {"polygons": objects})


def mean_precision(pred: np.ndarray, gt: np.ndarray, spacing_mm: tuple[float, ...] = ()) -> float:
    """Mean over THRESHOLDS of TP / (TP + FP + FN), the score of the 2018 Data Science Bowl. 0..1

    pred, gt: label maps of one shape, 0 is background; numbers need not agree. A true object is found (TP) if a
    predicted one has an IoU above the threshold with it. From 0.5 on there is at most one such pair for each object.
    >>> round(mean_precision(np.array([7, 7, 0, 0, 4]), np.array([1, 1, 0, 2, 0])), 6)  # a pair, one more, one missed
    0.333333
    """
    (ids_p, p), (ids_g, g) = (np.unique(labels.ravel(), return_inverse=True) for labels in (pred, gt))
    shared = np.bincount(p * len(ids_g) + g, minlength=len(ids_p) * len(ids_g)).reshape(len(ids_p), len(ids_g))
    areas_p, areas_g = shared.sum(axis=1, keepdims=True), shared.sum(axis=0, keepdims=True)
    iou = (shared / (areas_p + areas_g - shared))[ids_p > 0][:, ids_g > 0]
    if not iou.size:
        return 0.0
    found = [np.count_nonzero(iou.max(axis=0) > threshold) for threshold in THRESHOLDS]
    return float(np.mean([tp / (sum(iou.shape) - tp) for tp in found]))  # TP + FP + FN = predicted + true - TP
