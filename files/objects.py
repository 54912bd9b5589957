"""Which labels of a case become objects: labels left out, connected parts made objects of their own, small ones dropped.

Everything happens at the original size, and in this order: a recipe's dropped labels, --instances, --smallest.
"""

from __future__ import annotations

import numpy as np

from files import MAX_LABEL


def without_labels(labels: np.ndarray, dropped: tuple[int, ...]) -> np.ndarray:
    """A copy of a uint16 label map in which the labels of `dropped` are background."""
    kept = np.arange(MAX_LABEL + 1, dtype=np.uint16)
    kept[list(dropped)] = 0
    return kept[labels]


def instances_of(labels: np.ndarray) -> np.ndarray:
    """Each connected part of each label as an object of its own, numbered 1, 2, ... in the order of its first pixel.

    labels : (H, W) or (D, H, W) uint16. Pixels that share a corner are connected: 8 neighbours in 2D, 26 in 3D.
    Returns uint16 of the same shape. ValueError if there are more than 65,535 parts.
    >>> instances_of(np.array([[3, 0, 3], [0, 3, 0], [0, 0, 0], [3, 0, 5]], np.uint16)).tolist()
    [[1, 0, 1], [0, 1, 0], [0, 0, 0], [2, 0, 3]]
    """
    from skimage.measure import label  # only here: slow to import

    inside = np.nonzero(labels.reshape(len(labels), -1).any(axis=1))[0]
    result = np.zeros(labels.shape, np.uint16)
    if inside.size == 0:
        return result
    rows = slice(inside[0], inside[-1] + 1)  # the search takes 8 bytes a pixel: only where there are objects
    parts, count = label(labels[rows], connectivity=labels.ndim, return_num=True, background=0)
    if count > MAX_LABEL:
        raise ValueError(f"has {count} connected parts, more than the {MAX_LABEL} labels that a mask can hold")
    result[rows] = parts
    return result


def without_small(labels: np.ndarray, smallest: int) -> tuple[np.ndarray, int]:
    """Objects of fewer than `smallest` pixels (2D) or voxels (3D) become background. -> (labels, objects dropped)

    >>> [found if isinstance(found, int) else found.tolist() for found in without_small(np.array([[1, 1, 2]], np.uint16), 2)]
    [[[1, 1, 0]], 1]
    """
    size = int(labels.max(initial=0)) + 1
    pixels = np.zeros(size, np.int64)
    for plane in labels.reshape(-1, *labels.shape[-2:]):  # all of a volume at once would take 8 bytes a voxel
        pixels += np.bincount(plane.ravel(), minlength=size)
    dropped = np.flatnonzero((pixels < smallest) & (pixels > 0))
    dropped = dropped[dropped != 0]
    return (without_labels(labels, tuple(dropped.tolist())), len(dropped)) if len(dropped) else (labels, 0)
