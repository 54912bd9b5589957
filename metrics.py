"""DSC and NSD (normalized surface Dice) of label maps, from scratch, and the two reference masks. No PyTorch. [P 3.1]

With P the pixels of a predicted object, G those of the true one, S_P and S_G their surfaces (in 2D: contours), t a
tolerance, and |.| the number of pixels, or the length or area of a surface:

    DSC = 2 |P and G| / (|P| + |G|)
    NSD = (|S_P within t of S_G| + |S_G within t of S_P|) / (|S_P| + |S_G|)

Read top to bottom: `dsc` -> `contour_nsd`, the second equation in ten lines -> the exact `nsd`, element by element ->
`METRICS` -> one case (`case_scores`) -> what a box alone already scores (`filled_box`, `inscribed_ellipse`).
To add a metric, add one function and one row of METRICS. Step 5 then shows it in every table.

Axis order is the array's: masks (H, W) or (D, H, W), spacing (dy, dx) or (dz, dy, dx) in mm. Sources: NSD: Nikolov et
al. 2021, doi:10.2196/26151; the challenge's protocol: CVPR 2024 "Segment Anything in Medical Images on Laptop",
evaluation/compute_metrics.py of its public baseline.

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

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from formats import MAX_LABEL
from grid import label_bounds

TOLERANCE = 2.0  # mm in 3D, pixels in 2D: the challenge's one tolerance for every organ and modality
PROTOCOLS = ("strict", "challenge")  # ours (D10), and what the challenge's evaluator computes
CHALLENGE_NSD_FROM = 0.2  # the challenge computes NSD only for cases whose mean DSC is above this

# The corners of a 2x2x2 neighbourhood as (z, y, x). A neighbourhood's code has bit 7 - i set if corner i is inside.
CORNERS = tuple(itertools.product((0, 1), repeat=3))


def dsc(pred: np.ndarray, gt: np.ndarray) -> float:
    """Dice similarity of two bool masks of one shape, in 0..1. [P 3.1]

    Both empty -> nan (nothing to agree on); one empty -> 0. Raises ValueError if shapes differ or one is not bool.
    >>> dsc(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    _check_masks(pred, gt)
    total = np.count_nonzero(pred) + np.count_nonzero(gt)  # |P| + |G|
    return float(2 * np.count_nonzero(pred & gt) / total) if total else math.nan


def contour_nsd(
    pred: np.ndarray, gt: np.ndarray, spacing_mm: tuple[float, ...], tolerance_mm: float = TOLERANCE
) -> float:
    """What NSD means, to read. Step 5 uses the exact `nsd` below; arguments as there, both masks hold a pixel.

    The surface is all pixels with a neighbour outside, corners included, and each counts 1, where the exact score
    weighs lengths and areas. On smooth shapes the two differ by about 0.02."""
    surfaces = []
    for mask in (pred, gt):
        padded = np.pad(mask, 1)
        inner = padded.copy()
        for step in itertools.product((-1, 0, 1), repeat=mask.ndim):
            inner &= np.roll(padded, step, axis=range(mask.ndim))
        surfaces.append(np.argwhere(padded & ~inner) * np.asarray(spacing_mm))  # (n, ndim) mm
    p, g = surfaces
    distances = np.linalg.norm(p[:, None] - g[None], axis=-1)  # (n_p, n_g) mm
    near_p, near_g = (distances.min(axis=axis) <= tolerance_mm for axis in (1, 0))  # (n_p,), (n_g,)
    return float((near_p.sum() + near_g.sum()) / (len(p) + len(g)))


# The exact NSD: how large is one surface element? ------------------------------------------------------------------


def _patch_outlines(code: int) -> list[list[tuple[int, int, int]]]:
    """Closed outlines of the surface inside one 2x2x2 neighbourhood, as marching cubes draws them.

    code: 0..255, see CORNERS. Returns loops of points (z, y, x) in half voxels: all lie on the midpoint of an edge.
    On a face whose corners alternate in, out, in, out the surface may cut off either pair. Here it cuts off the
    pair that is rarer in the whole neighbourhood (inside, if they tie): a code and its complement look alike."""
    inside = {corner: bool(code >> (7 - i) & 1) for i, corner in enumerate(CORNERS)}
    cut_off = sum(inside.values()) <= 4
    neighbours: dict[tuple, list[tuple]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        ring = [(0, 0), (0, 1), (1, 1), (1, 0)]  # once around the face, so that neighbours in the list share an edge
        ring = [(*pair[:axis], side, *pair[axis:]) for pair in ring]
        # middle i lies on the edge from ring[i] to ring[i + 1]
        middles = [tuple(a + b for a, b in zip(ring[i], ring[i - 3], strict=True)) for i in range(4)]
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


def _fan_normals(loop: list[tuple[int, int, int]], start: int) -> np.ndarray:
    """(n, 3) normals (z, y, x) of the triangles that join loop[start] to every other edge; their length is the area."""
    corners = np.array(loop[start:] + loop[:start])
    spokes = corners[1:] - corners[0]
    # 1/2: a triangle, not a parallelogram; 1/4: half voxels to voxels
    return np.cross(spokes[:-1], spokes[1:]) / 8


@lru_cache(maxsize=1)
def _patch_normals() -> np.ndarray:
    """(256, 4, 3): for each code the normals (z, y, x) of at most four triangles, voxels², padded with zeros.

    An outline of five or six points need not be flat, so its area depends on how it is cut into triangles. Of the
    fans, the one with the largest area on a cubic grid is taken: that single rule gives the areas of the table which
    the published NSD uses (google-deepmind/surface-distance, lookup_tables.py), in all 256 codes and at any spacing.
    """
    table = np.zeros((256, 4, 3))
    for code in range(1, 255):
        triangles: list[np.ndarray] = []
        for loop in _patch_outlines(code):
            fans = (_fan_normals(loop, start) for start in range(len(loop)))
            # rounded, so that fans of equal area rank by position, not by the last bit of a float
            triangles += [*max(fans, key=lambda fan: round(float(np.linalg.norm(fan, axis=1).sum()), 9))]
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


_sizes_of = lru_cache(maxsize=64)(element_sizes)  # a case may have 65,535 objects, and one spacing


# Which elements lie within the tolerance? --------------------------------------------------------------------------


def _element_codes(mask: np.ndarray) -> np.ndarray:
    """Codes of all 2x2(x2) neighbourhoods of a bool mask with a pixel of background around it: uint8, mask's shape + 1."""
    codes = np.pad(mask, 1).astype(np.uint8)
    for axis in reversed(range(mask.ndim)):
        before = codes[(slice(None),) * axis + (slice(None, -1),)]
        after = codes[(slice(None),) * axis + (slice(1, None),)]
        codes = before << 2 ** (mask.ndim - 1 - axis) | after  # the earlier corner gets the higher bits
    return codes


def _far(of: np.ndarray, other: np.ndarray, spacing_mm: tuple[float, ...], tolerance_mm: float) -> np.ndarray:
    """Flat indices of the elements of one surface that lie further than the tolerance from the other surface.

    of, other: where the elements are, bool, of one shape. A search tree finds each element's nearest one."""
    from scipy.spatial import KDTree  # comes with scikit-image; importing it takes long

    of = of & ~other  # where they coincide, the distance is 0
    points, others, spacing = np.argwhere(of), np.argwhere(other), np.asarray(spacing_mm)
    nearest = KDTree(others * spacing).query(points * spacing)[1]
    distances = np.sqrt((((points - others[nearest]) * spacing) ** 2).sum(axis=1))  # (n,) mm
    return np.flatnonzero(of)[distances > tolerance_mm]


def nsd(pred: np.ndarray, gt: np.ndarray, spacing_mm: tuple[float, ...], tolerance_mm: float = TOLERANCE) -> float:
    """Normalized surface Dice: the share of both surfaces that lies within a tolerance of the other one. [P 3.1]

    pred, gt: (H, W) or (D, H, W) bool. spacing_mm: (dy, dx) or (dz, dy, dx), array-axis order, not x, y, z.
    A surface element is a 2x2(x2) neighbourhood that holds both inside and outside; it weighs its contour length
    (2D) or patch area (3D), and its place is the neighbourhood's centre. Both empty -> nan; one empty -> 0.
    Raises ValueError for masks that are not bool or differ in shape, a wrong spacing, or a negative tolerance."""
    _check_masks(pred, gt)
    spacing_mm = _check_spacing(spacing_mm, gt.ndim)
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"tolerance must be a finite number of mm, 0 or more, found {tolerance_mm}")
    if not pred.any() or not gt.any():
        return 0.0 if pred.any() or gt.any() else math.nan
    low, high = label_bounds(pred | gt)[1]
    crop = tuple(map(slice, low, high + 1))
    codes = [_element_codes(mask[crop]) for mask in (pred, gt)]
    full = 2 ** (2**gt.ndim) - 1
    surfaces = [(code != 0) & (code != full) for code in codes]
    sizes = _sizes_of(spacing_mm)
    total, missed = 0.0, 0.0  # |S_P| + |S_G|, and what of it is further than t from the other
    for code, of, other in ((codes[0], *surfaces), (codes[1], *reversed(surfaces))):
        total += np.bincount(code[of], minlength=len(sizes)) @ sizes
        far = code.ravel()[_far(of, other, spacing_mm, tolerance_mm)]
        missed += np.bincount(far, minlength=len(sizes)) @ sizes
    return float((total - missed) / total)


# The metrics, and one case under a protocol -------------------------------------------------------------------------


class Metric(NamedTuple):
    """A row of METRICS: a function, and what step 5 must know to average its scores and to print them.

    function: (pred, gt, spacing_mm) -> score; nan means that there is none, and then the case has no mean.
        pred, gt: an object's bool masks, (H, W) or (D, H, W), cropped to what either covers; if of_case, the label
        maps of the case. Neither is empty, unless `missed` is None. spacing_mm: one number an axis, (1, 1) in 2D. In
        the challenge's protocol an image comes as a slab (1, H, W).
    unit: "%" for a share 0..1, which tables show times 100; else the unit that they print: "mm", "px", ...
    missed: the score if only one of the two has a pixel; None: the function says it. It must be a bad one: if a miss
        had no score, a system would gain by every object that it does not find. math.inf is the distance to nothing,
        but has no mean; in its place stands the image's diagonal, than which no distance in the image is larger.
    """

    function: Callable[[np.ndarray, np.ndarray, tuple[float, ...]], float]
    unit: str = "%"
    more_is_better: bool = True
    missed: float | None = 0.0
    of_case: bool = False


# Where one number must do, as for the worst cases, the first row is taken. A distance would be, for example,
# Metric(hausdorff, "mm", more_is_better=False, missed=math.inf).
METRICS: dict[str, Metric] = {
    "dsc": Metric(lambda pred, gt, spacing_mm: dsc(pred, gt)),
    "nsd": Metric(nsd),
}


class CaseScores(NamedTuple):
    """Scores of one case by the names in METRICS; nan: none. The means follow the protocol's conventions."""

    labels: tuple[int, ...]
    scores: dict[str, np.ndarray]  # of objects: each (n,) float64, one number a label
    means: dict[str, float]  # over the labels; for a metric of the case its one score


def case_scores(
    segs: np.ndarray, gts: np.ndarray, spacing_mm: tuple[float, ...] | None, protocol: str = "strict"
) -> CaseScores:
    """Every metric of every label of a case, and the means. Conventions: the table in the module header.

    segs, gts: (H, W) or (D, H, W) integer label maps, 0 is background. spacing_mm: (z, y, x) in 3D, None in 2D.
    protocol: "strict", or "challenge" for what the challenge's evaluator computes, its faults included. There the
    DSC rule sets the case's mean NSD to 0; the NSD of its labels is given all the same.
    Raises ValueError, one sentence, for label maps, a spacing or a protocol that cannot be used."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, found {protocol!r}")
    _check_labels(segs, gts)
    if (spacing_mm is None) != (gts.ndim == 2):
        raise ValueError(f"spacing is given for volumes and None for images, found {spacing_mm} for {gts.ndim}D")
    spacing_mm = _check_spacing((1.0, 1.0) if spacing_mm is None else spacing_mm, gts.ndim)
    challenge = protocol == "challenge"
    if challenge and gts.ndim == 2:
        # the slab's thin axis goes first, not last as there: the areas do not depend on it and rows stay long
        segs, gts, spacing_mm = segs[None], gts[None], (1.0, 1.0, 1.0)
    elif challenge:
        spacing_mm = spacing_mm[::-1]
    diagonal = math.hypot(*(n * step for n, step in zip(gts.shape, spacing_mm, strict=True)))

    def score(metric: Metric, pred: np.ndarray, gt: np.ndarray) -> float:
        asked = metric.missed is None or pred.any() and gt.any()
        found = metric.function(pred, gt, spacing_mm) if asked else metric.missed
        return diagonal if found == math.inf else found

    pred_bounds, gt_bounds = label_bounds(segs), label_bounds(gts)
    ids = sorted(gt_bounds)
    if challenge:
        ids = range(1, max(gt_bounds, default=0) + 1)  # Python ints: a uint8 255 + 1 would be 0
    of_objects = {name: metric for name, metric in METRICS.items() if not metric.of_case}
    scores, overlaps = np.full((len(ids), len(of_objects)), np.nan), [math.nan] * len(ids)
    for i, label in enumerate(ids):
        bounds = [b[label] for b in (pred_bounds, gt_bounds) if label in b]
        if not bounds:
            continue
        low, high = np.min([b[0] for b in bounds], axis=0), np.max([b[1] for b in bounds], axis=0)
        crop = tuple(map(slice, low, high + 1))
        pred, gt = segs[crop] == label, gts[crop] == label
        scores[i] = [score(metric, pred, gt) for metric in of_objects.values()]
        overlaps[i] = dsc(pred, gt) if challenge else math.nan
    means = dict.fromkeys(METRICS, math.nan)
    if ids:
        means |= dict(zip(of_objects, scores.mean(axis=0).tolist(), strict=True))
        means |= {name: score(metric, segs, gts) for name, metric in METRICS.items() if metric.of_case}
    # nan is not above it either: a label number that nobody has makes the case's DSC nan
    if challenge and "nsd" in means and not (ids and sum(overlaps) / len(ids) > CHALLENGE_NSD_FROM):
        means["nsd"] = 0.0
    return CaseScores(tuple(ids), dict(zip(of_objects, scores.T, strict=True)), means)


# What a box alone already scores (D11) -----------------------------------------------------------------------------


def inscribed_ellipse(boxes_xyxy: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Label map of the ellipses (3D: ellipsoids) inscribed in boxes; arguments, result and errors as `filled_box`.

    A box covers its outermost pixels whole, so the semi-axis is (max - min + 1) / 2; a pixel is in if its centre is.
    """
    return filled_box(boxes_xyxy, shape, ellipse=True)


def filled_box(boxes_xyxy: np.ndarray, shape: tuple[int, ...], ellipse: bool = False) -> np.ndarray:
    """Label map, uint16, of filled boxes: box i paints i + 1, later boxes over earlier ones.

    boxes_xyxy: (N, 4) x_min y_min x_max y_max or (N, 6) x_min y_min z_min x_max y_max z_max, pixels, both ends
    inclusive. shape: (H, W) or (D, H, W). Raises ValueError for boxes of another width, more than 65,535 of them, or a
    minimum above its maximum.
    >>> filled_box(np.array([[1, 0, 2, 0]]), (2, 4)).tolist()
    [[0, 1, 1, 0], [0, 0, 0, 0]]
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    ndim = len(shape)
    if boxes.ndim != 2 or boxes.shape[1] != 2 * ndim or len(boxes) > MAX_LABEL:
        raise ValueError(f"{boxes.shape}: need at most {MAX_LABEL} boxes of {2 * ndim} numbers for shape {shape}")
    low, high = boxes[:, :ndim][:, ::-1], boxes[:, ndim:][:, ::-1]  # (N, ndim), now in array-axis order
    if not (np.isfinite(boxes).all() and (low <= high).all()):
        raise ValueError("boxes must hold finite numbers, minima not above maxima; correct the boxes")
    labels = np.zeros(shape, np.uint16)
    first = np.clip(np.ceil(low), 0, shape).astype(int)
    stop = np.clip(np.floor(high) + 1, 0, shape).astype(int)
    centres, radii = (low + high) / 2, (high - low + 1) / 2
    for i, (a, b) in enumerate(zip(first, stop, strict=True)):
        window = tuple(map(slice, a, b))
        axes = zip(np.ogrid[window], centres[i], radii[i], strict=True)
        labels[window][sum(((x - c) / r) ** 2 for x, c, r in axes) <= 1 if ellipse else ...] = i + 1
    return labels


# Checks ----------------------------------------------------------------------------------------------


def _check_masks(pred: np.ndarray, gt: np.ndarray) -> None:
    if pred.shape != gt.shape or pred.dtype != bool or gt.dtype != bool:
        found = f"{pred.dtype} {pred.shape} and {gt.dtype} {gt.shape}"
        raise ValueError(f"need two bool masks of one shape, found {found}; make a mask with: labels == label")


def _check_spacing(spacing_mm: tuple[float, ...], ndim: int) -> tuple[float, ...]:
    spacing = tuple(float(s) for s in spacing_mm)
    # squares of larger ones overflow
    if ndim not in (2, 3) or len(spacing) != ndim or not all(0 < s < 1e100 for s in spacing):
        raise ValueError(f"a {ndim}D mask needs 2 or 3 axes and one positive spacing (mm) an axis, found {spacing}")
    return spacing


def _check_labels(segs: np.ndarray, gts: np.ndarray) -> None:
    for name, labels in (("segs", segs), ("gts", gts)):
        if labels.dtype.kind not in "ui" or labels.min(initial=0) < 0:
            raise ValueError(f"{name} must be an integer label map without negative labels, found {labels.dtype}")
    if segs.shape != gts.shape:
        raise ValueError(f"segs has shape {segs.shape} but gts has {gts.shape}; they must agree")
