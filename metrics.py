"""DSC and NSD (normalized surface Dice) of label maps, from scratch, and the two reference masks. No PyTorch.

Read top to bottom: overlap (`dsc`) -> how large one surface element is (`element_sizes`) -> which elements lie
within the tolerance of the other surface (`nsd`) -> the table of metrics (`METRICS`) -> one case under either protocol
(`case_scores`) -> what a box alone already scores (`filled_box`, `inscribed_ellipse`).

A new metric is one function here and one row of METRICS. Step 5 then shows it in every table.

Axis order is the array's: masks (H, W) or (D, H, W), spacing (dy, dx) or (dz, dy, dx) in mm. Sources:
[P 3.1] names the two scores; NSD: Nikolov et al. 2021, doi:10.2196/26151; the challenge's protocol: CVPR 2024
"Segment Anything in Medical Images on Laptop", evaluation/compute_metrics.py of its public baseline.

Conventions. Every row is a test in tests/test_metrics.py, computed by hand, in 2D and in 3D with unequal spacing.

| situation | dsc, nsd of the label | strict (default) | challenge |
| --- | --- | --- | --- |
| truth and prediction empty | nan, nan | label left out | label counts: the case mean becomes nan |
| truth empty, prediction not | 0, 0 | label left out | 0, if an id below the largest true one, else left out |
| prediction empty, truth not | 0, 0 | 0, 0 | 0, 0 |
| no label at all in the truth | - | means nan, nan | means nan, 0 |
| mean DSC of the case not above 0.2 | as computed | NSD as computed | NSD of the case is 0 |
| mask touches the image's border | the border counts as surface | same | same |
| element exactly at the tolerance | inside | same | same |
| 2D image | - | contour elements, 2 px | slab one voxel thick: its two flat faces count as well |
| 3D spacing (z, y, x) | - | as given | reversed: files store x, y, z and the evaluator never turned it |
| mean | - | over labels in the truth | over 1 .. largest true label |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from grid import label_bounds

TOLERANCE = 2.0  # mm in 3D, pixels in 2D: the challenge's one tolerance for every organ and modality
PROTOCOLS = ("strict", "challenge")  # ours (D10), and what the challenge's evaluator computes
CHALLENGE_NSD_FROM = 0.2  # the challenge computes NSD only for cases whose mean DSC is above this

# The corners of a 2x2x2 neighbourhood as (z, y, x). A neighbourhood's code has bit 7 - i set if corner i is inside.
CORNERS = tuple(itertools.product((0, 1), repeat=3))


def dsc(pred: np.ndarray, gt: np.ndarray) -> float:
    """Dice similarity 2|A and B| / (|A| + |B|) of two bool masks of one shape, in 0..1. [P 3.1]

    Both empty -> nan (nothing to agree on); one empty -> 0. Raises ValueError if shapes differ or one is not bool.
    >>> dsc(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    _check_masks(pred, gt)
    total = np.count_nonzero(pred) + np.count_nonzero(gt)
    return float(2 * np.count_nonzero(pred & gt) / total) if total else math.nan


# How large is one surface element? ---------------------------------------------------------------------------------


def _patch_outlines(code: int) -> list[list[tuple[int, int, int]]]:
    """Closed outlines of the surface inside one 2x2x2 neighbourhood, as marching cubes draws them.

    code: 0..255, see CORNERS. Returns loops of points (z, y, x) in half voxels: all lie on the midpoint of an edge.
    On a face whose corners alternate in, out, in, out the surface may cut off either pair. Here it cuts off the
    pair that is rarer in the whole neighbourhood (inside, if they tie): a code and its complement look alike.
    """
    inside = {corner: bool(code >> (7 - i) & 1) for i, corner in enumerate(CORNERS)}
    cut_off = sum(inside.values()) <= 4
    neighbours: dict[tuple, list[tuple]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        ring = [(0, 0), (0, 1), (1, 1), (1, 0)]  # once around the face, so that neighbours in the list share an edge
        ring = [(*pair[:axis], side, *pair[axis:]) for pair in ring]
        middles = [
            tuple(a + b for a, b in zip(ring[i], ring[i - 3], strict=True)) for i in range(4)
        ]  # of the edge i, i + 1
        crossed = [m for i, m in enumerate(middles) if inside[ring[i]] != inside[ring[i - 3]]]
        segments = [crossed] if len(crossed) == 2 else []
        if len(crossed) == 4:
            segments = [(middles[i - 1], middles[i]) for i in range(4) if inside[ring[i]] == cut_off]
        for a, b in segments:
            neighbours.setdefault(a, []).append(b)
            neighbours.setdefault(b, []).append(a)
    loops = []
    while neighbours:  # every midpoint has two neighbours, so walking on always comes back to the start
        loop = [next(iter(neighbours))]
        while step := [p for p in neighbours.pop(loop[-1]) if p in neighbours]:
            loop.append(step[0])
        loops.append(loop)
    return loops


def _fan_normals(loop: list[tuple[int, int, int]], start: int) -> list[tuple[float, float, float]]:
    """Normals (z, y, x) of the triangles that join loop[start] to every other edge; their length is the area."""
    (z, y, x), *rest = loop[start:] + loop[:start]
    normals = []
    for p, q in itertools.pairwise(rest):
        a, b = (p[0] - z, p[1] - y, p[2] - x), (q[0] - z, q[1] - y, q[2] - x)
        cross = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
        normals.append(tuple(c / 8 for c in cross))  # 1/2: triangle, not parallelogram; 1/4: half voxels to voxels
    return normals


@lru_cache(maxsize=1)
def _patch_normals() -> np.ndarray:
    """(256, 4, 3): for each code the normals (z, y, x) of at most four triangles, voxels², padded with zeros.

    An outline of five or six points need not be flat, so its area depends on how it is cut into triangles. Of the
    fans, the one with the largest area on a cubic grid is taken: that single rule gives the areas of the table which
    the published NSD uses (google-deepmind/surface-distance, lookup_tables.py), in all 256 codes and at any spacing.
    """
    table = np.zeros((256, 4, 3))
    for code in range(1, 255):
        triangles = []
        for loop in _patch_outlines(code):
            fans = (_fan_normals(loop, start) for start in range(len(loop)))
            # rounded, so that fans of equal area rank by position, not by the last bit of a float
            triangles += max(fans, key=lambda fan: round(sum(math.hypot(*normal) for normal in fan), 9))
        table[code, : len(triangles)] = triangles
    return table


def element_sizes(spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Size of the surface element of every neighbourhood code: (16,) lengths in mm in 2D, (256,) areas in mm² in 3D.

    spacing_mm: (dy, dx) or (dz, dy, dx). Codes: bit 3 - i (2D) or 7 - i (3D) is corner i, counted in array order.
    >>> element_sizes((3.0, 4.0))[[0b0011, 0b0101, 0b0001, 0b0110]]  # flat, upright, one corner, two corners
    array([4. , 3. , 2.5, 5. ])
    """
    if len(spacing_mm) == 2:
        dy, dx = spacing_mm
        a, b, c, d = (np.arange(16) >> shift & 1 for shift in (3, 2, 1, 0))  # corners: a b above c d
        along_x, along_y = (a ^ b) + (c ^ d), (a ^ c) + (b ^ d)  # how many edges of that direction are crossed
        corners = np.minimum(along_x, along_y)  # a line from an x edge to a y edge cuts off one corner
        upright, flat = along_x - corners, along_y - corners  # the line between two x edges runs along y
        return corners * math.hypot(dy, dx) / 2 + upright * dy / 2 + flat * dx / 2
    dz, dy, dx = spacing_mm
    # a patch's shadow along z is measured in dy * dx, and so on: stretching the grid scales a normal per component
    return np.linalg.norm(_patch_normals() * (dy * dx, dz * dx, dz * dy), axis=2).sum(axis=1)


# Which elements lie within the tolerance? --------------------------------------------------------------------------


def _ball_rows(spacing_mm: tuple[float, ...], tolerance_mm: float, extent: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The tolerance ball as rows along x, nearest row first.

    extent: number of grid points along each axis; no offset reaches further, however large the tolerance is.
    Returns offsets (n, ndim - 1) of the rows, in grid points; reach (n,): x offsets -reach..reach of that row are in
    the ball; and margin (ndim,), the largest offset along each axis.
    """
    # one more than the quotient: rounding may have lowered it, the comparison below decides
    margin = [min(int(min(tolerance_mm / step, n)) + 1, n) for step, n in zip(spacing_mm, extent, strict=True)]
    axes = [np.arange(-m, m + 1) for m in margin[:-1]]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))  # (n, ndim - 1)
    squares = ((offsets * np.asarray(spacing_mm[:-1])) ** 2).sum(axis=1)
    squares_x = (np.arange(margin[-1] + 1) * spacing_mm[-1]) ** 2
    reach = (np.sqrt(squares[:, None] + squares_x) <= tolerance_mm).sum(axis=1) - 1  # -1: the row misses the ball
    order = np.argsort(squares, kind="stable")
    order = order[reach[order] >= 0]
    return offsets[order], reach[order], np.array(margin)


def _element_codes(mask: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Codes of all 2x2(x2) neighbourhoods of a bool mask, uint8; shape: mask's + 1 + 2 * margin, zeros around it."""
    codes = np.pad(mask, [(m + 1, m + 1) for m in margin]).view(np.uint8)
    for axis in reversed(range(mask.ndim)):
        before = codes[(slice(None),) * axis + (slice(None, -1),)]
        after = codes[(slice(None),) * axis + (slice(1, None),)]
        codes = before << 2 ** (mask.ndim - 1 - axis) | after  # the earlier corner gets the higher bits
    return codes


def _unreached(of: np.ndarray, other: np.ndarray, offsets: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Flat indices of the points of one surface with no point of the other surface in the ball around them.

    of, other: bool grids of one shape with an empty margin as wide as the ball; offsets, reach: see `_ball_rows`.
    """
    todo = np.flatnonzero(of > other)  # points on both surfaces are at distance 0
    if not todo.size:
        return todo
    # near_x: steps along x to the nearest point of the other surface, longest + 1 if further. One look-up in it
    # answers for a whole row of the ball. Written from far to near, so that the nearest is what stays.
    longest = int(reach[0])
    near_x = np.full(other.size, longest + 1, np.uint8 if longest < 255 else np.uint32)
    points = np.flatnonzero(other)
    for step in range(longest, 0, -1):
        near_x[points + step] = step
        near_x[points - step] = step
    near_x[points] = 0
    strides = np.cumprod((1, *of.shape[:0:-1]))[:0:-1]  # flat steps of the axes before x
    for shift, row_reach in zip((offsets @ strides).tolist(), reach.tolist(), strict=True):
        todo = todo[near_x[todo + shift] > row_reach]
        if not todo.size:
            break
    return todo


def nsd(pred: np.ndarray, gt: np.ndarray, spacing_mm: tuple[float, ...], tolerance_mm: float = TOLERANCE) -> float:
    """Normalized surface Dice: the share of both surfaces that lies within a tolerance of the other one. [P 3.1]

    pred, gt: (H, W) or (D, H, W) bool. spacing_mm: (dy, dx) or (dz, dy, dx), array-axis order, not x, y, z.
    A surface element is a 2x2(x2) neighbourhood that holds both inside and outside; it weighs its contour length
    (2D) or patch area (3D), and its place is the neighbourhood's centre. Both empty -> nan; one empty -> 0.
    No distance map is built: "within the tolerance" only asks whether a ball holds an element of the other surface.
    Raises ValueError for masks that are not bool or differ in shape, a wrong spacing, or a negative tolerance.
    Source: Nikolov et al. 2021, doi:10.2196/26151; equal to google-deepmind/surface-distance to rounding.
    """
    _check_masks(pred, gt)
    spacing_mm = _check_spacing(spacing_mm, gt.ndim)
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"tolerance must be a finite number of mm, 0 or more, found {tolerance_mm}")
    either = pred | gt
    crop = []
    for axis in range(gt.ndim):
        used = np.flatnonzero(either.any(axis=tuple(a for a in range(gt.ndim) if a != axis)))
        crop.append(slice(used[0], used[-1] + 1) if used.size else slice(0, 0))
    pred, gt = pred[tuple(crop)], gt[tuple(crop)]
    if not pred.any() or not gt.any():
        return 0.0 if pred.any() or gt.any() else math.nan
    offsets, reach, margin = _ball_rows(spacing_mm, tolerance_mm, tuple(n + 1 for n in gt.shape))
    codes = [_element_codes(mask, margin) for mask in (pred, gt)]
    full = 2 ** (2**gt.ndim) - 1
    surfaces = [(code != 0) & (code != full) for code in codes]
    sizes = element_sizes(spacing_mm)
    total, missed = 0.0, 0.0
    for code, of, other in ((codes[0], *surfaces), (codes[1], *reversed(surfaces))):
        total += np.bincount(code[of], minlength=len(sizes)) @ sizes
        missed += np.bincount(code.ravel()[_unreached(of, other, offsets, reach)], minlength=len(sizes)) @ sizes
    return float((total - missed) / total)


# Name -> function(pred, gt, spacing_mm) of one label. pred, gt: bool masks (H, W) or (D, H, W), cropped to what either
# covers; spacing_mm: one number an axis, (1, 1) in 2D. The challenge's 2D masks are slabs (1, H, W).
# It returns a score in 0..1. With nan, which stands for no score, the case has no mean.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray, tuple[float, ...]], float]] = {
    "dsc": lambda pred, gt, spacing_mm: dsc(pred, gt),
    "nsd": nsd,
}


# One case under a protocol -----------------------------------------------------------------------------------------


class CaseScores(NamedTuple):
    """Scores of one case, 0..1 or nan, by the names in METRICS. The means follow the protocol's conventions."""

    labels: tuple[int, ...]
    scores: dict[str, np.ndarray]  # each (n,) float64, one number a label
    means: dict[str, float]


def case_scores(
    segs: np.ndarray, gts: np.ndarray, spacing_mm: tuple[float, ...] | None, protocol: str = "strict"
) -> CaseScores:
    """Every metric of every label of a case, and the means. Conventions: the table in the module header.

    segs, gts: (H, W) or (D, H, W) integer label maps, 0 is background. spacing_mm: (z, y, x) in 3D, None in 2D.
    protocol: "strict", or "challenge" for what the challenge's evaluator computes, its faults included. There the
    DSC rule sets the case's mean NSD to 0; the NSD of its labels is given all the same.
    Raises ValueError, one sentence, for label maps, a spacing or a protocol that cannot be used.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, found {protocol!r}")
    _check_labels(segs, gts)
    if (spacing_mm is None) != (gts.ndim == 2):
        raise ValueError(
            f"spacing must be given for volumes and be None for images, found {spacing_mm} for {gts.ndim}D"
        )
    spacing_mm = (1.0, 1.0) if spacing_mm is None else _check_spacing(spacing_mm, gts.ndim)
    pred_bounds, gt_bounds = label_bounds(segs), label_bounds(gts)
    ids = sorted(gt_bounds)
    if protocol == "challenge":
        ids = range(1, max(gt_bounds, default=0) + 1)  # Python ints: a uint8 255 + 1 would be 0
        # the slab's thin axis goes first, not last as there: the areas do not depend on it and rows stay long
        spacing_mm = (1.0, 1.0, 1.0) if gts.ndim == 2 else spacing_mm[::-1]
    scores = np.full((len(ids), len(METRICS)), np.nan)
    for row, label in zip(scores, ids, strict=True):
        bounds = [b[label] for b in (pred_bounds, gt_bounds) if label in b]
        if not bounds:
            continue
        low, high = np.min([b[0] for b in bounds], axis=0), np.max([b[1] for b in bounds], axis=0)
        crop = tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))
        pred, gt = segs[crop] == label, gts[crop] == label
        if len(spacing_mm) > gt.ndim:
            pred, gt = pred[None], gt[None]
        row[:] = [metric(pred, gt, spacing_mm) for metric in METRICS.values()]
    averages = scores.mean(axis=0).tolist() if len(scores) else [math.nan] * len(METRICS)
    means = dict(zip(METRICS, averages, strict=True))
    if protocol == "challenge" and not means["dsc"] > CHALLENGE_NSD_FROM:  # nan is not above it either
        means["nsd"] = 0.0
    return CaseScores(tuple(ids), dict(zip(METRICS, scores.T, strict=True)), means)


# What a box alone already scores (D11) -----------------------------------------------------------------------------


def filled_box(boxes_xyxy: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Label map of filled boxes: box i paints i + 1, later boxes over earlier ones.

    boxes_xyxy: (N, 4) x_min y_min x_max y_max or (N, 6) x_min y_min z_min x_max y_max z_max, pixels, both ends
    inclusive. shape: (H, W) or (D, H, W). Returns uint16 of that shape. Raises ValueError for boxes of another width,
    more than 65,535 of them, or a minimum above its maximum. What lies outside the image is left out.
    >>> filled_box(np.array([[1, 0, 2, 0]]), (2, 4)).tolist()
    [[0, 1, 1, 0], [0, 0, 0, 0]]
    """
    return _paint(boxes_xyxy, shape, ellipse=False)


def inscribed_ellipse(boxes_xyxy: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Label map of the ellipses (3D: ellipsoids) inscribed in boxes; arguments, result and errors as `filled_box`.

    A box covers its outermost pixels whole, so the semi-axis is (max - min + 1) / 2; a pixel is in if its centre is.
    Objects that overlap lose to later ones here, as in any label map; painted one at a time they score a little more.
    """
    return _paint(boxes_xyxy, shape, ellipse=True)


def _paint(boxes_xyxy: np.ndarray, shape: tuple[int, ...], ellipse: bool) -> np.ndarray:
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    ndim = len(shape)
    if boxes.ndim != 2 or boxes.shape[1] != 2 * ndim or len(boxes) > np.iinfo(np.uint16).max:
        raise ValueError(f"need at most 65535 boxes of {2 * ndim} numbers for shape {shape}, found shape {boxes.shape}")
    low, high = boxes[:, :ndim][:, ::-1], boxes[:, ndim:][:, ::-1]  # (N, ndim), now in array-axis order
    if not (np.isfinite(boxes).all() and (low <= high).all()):
        raise ValueError("boxes must hold finite numbers, minima not above maxima; correct the boxes")
    labels = np.zeros(shape, np.uint16)
    first = np.clip(np.ceil(low), 0, shape).astype(int)
    stop = np.clip(np.floor(high) + 1, 0, shape).astype(int)
    for i, (a, b) in enumerate(zip(first, stop, strict=True)):
        window = labels[tuple(map(slice, a, b))]
        radius2 = np.zeros(window.shape)
        for axis in range(ndim if ellipse else 0):
            along = (np.arange(a[axis], b[axis]) - (low[i, axis] + high[i, axis]) / 2) / ((high - low)[i, axis] + 1) * 2
            radius2 += np.expand_dims(along**2, tuple(k for k in range(ndim) if k != axis))
        window[radius2 <= 1] = i + 1
    return labels


# Checks ------------------------------------------------------------------------------------------------------------


def _check_masks(pred: np.ndarray, gt: np.ndarray) -> None:
    if pred.shape != gt.shape or pred.dtype != bool or gt.dtype != bool:
        raise ValueError(
            f"need two bool masks of one shape, found {pred.dtype} {pred.shape} and {gt.dtype} {gt.shape}; "
            "make a mask with: labels == label"
        )


def _check_spacing(spacing_mm: tuple[float, ...], ndim: int) -> tuple[float, ...]:
    spacing = tuple(float(s) for s in spacing_mm)
    if ndim not in (2, 3) or len(spacing) != ndim or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"a {ndim}D mask needs 2 or 3 axes and one positive spacing (mm) an axis, found {spacing}")
    return spacing


def _check_labels(segs: np.ndarray, gts: np.ndarray) -> None:
    for name, labels in (("segs", segs), ("gts", gts)):
        if labels.dtype.kind not in "ui":
            raise ValueError(f"{name} must be an integer label map, found {labels.dtype}; convert it")
        if labels.ndim not in (2, 3) or not labels.size:
            raise ValueError(f"{name} must be (H, W) or (D, H, W), found shape {labels.shape}; reshape it")
        if labels.dtype.kind == "i" and labels.min() < 0:
            raise ValueError(f"{name} holds the negative label {labels.min()}; labels start at 0, the background")
    if segs.shape != gts.shape:
        raise ValueError(f"segs has shape {segs.shape} but gts has {gts.shape}; they must agree")
