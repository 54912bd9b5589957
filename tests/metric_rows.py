"""Rows of METRICS for tests: the paper's two, and what a fork might add. Step 5 and its tables must take any of them."""

import numpy as np

from metrics import METRICS, Metric, dsc, nsd

PAPER = {"dsc": Metric(lambda pred, gt, spacing_mm: dsc(pred, gt)), "nsd": Metric(nsd)}


def centre_distance(pred, gt, spacing_mm):
    """Distance between the centres of two masks in mm."""
    centres = [np.argwhere(mask).mean(axis=0) * np.asarray(spacing_mm) for mask in (pred, gt)]
    return float(np.linalg.norm(centres[0] - centres[1]))


def objects_found(segs, gts, spacing_mm):
    """Share of the true objects whose label the prediction has: a score of a case, like mAP or PQ."""
    return float(np.isin(np.unique(gts[gts > 0]), segs).mean())


DISTANCE = {"shift": Metric(centre_distance, "mm", more_is_better=False, missed=np.inf)}
OF_CASE = {"found": Metric(objects_found, of_case=True)}
TABLES = {
    "the paper's": PAPER,
    "a distance more": PAPER | DISTANCE,
    "a score of the case more": PAPER | OF_CASE,
    "without dsc": {"nsd": PAPER["nsd"]},
    "without nsd": {"dsc": PAPER["dsc"]},
    "all others": OF_CASE | DISTANCE,
}


def use(monkeypatch, rows):
    """METRICS has these rows until the test ends."""
    for name in [*reversed(METRICS)]:  # the last comes back first
        monkeypatch.delitem(METRICS, name)
    for name, row in rows.items():
        monkeypatch.setitem(METRICS, name, row)
