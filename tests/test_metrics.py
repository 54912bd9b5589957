"""metrics.py: by hand, slow against fast, against stored outputs of the challenge's code, against its package."""

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as any_
from metric_rows import DISTANCE, OF_CASE, PAPER, use

from grid import label_bounds
from metrics import (
    METRICS,
    Metric,
    _patch_outlines,
    case_scores,
    contour_nsd,
    dsc,
    element_sizes,
    filled_box,
    inscribed_ellipse,
    nsd,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics_golden.npz")
# A pair of shapes and spacings for every claim that must hold in 2D and in 3D with unequal spacing
GRIDS = {"2D": ((9, 12), None), "3D": ((5, 9, 12), (5.0, 1.0, 2.0))}
both_dimensions = pytest.mark.parametrize("shape, spacing", GRIDS.values(), ids=GRIDS)


@pytest.fixture(autouse=True)
def only_the_papers_metrics(monkeypatch):
    """The numbers below are of DSC and NSD, whatever rows a fork adds or deletes."""
    use(monkeypatch, PAPER)


def mask_of(shape, *points):
    """bool mask that is True at the given (y, x); in 3D in slice 2 only."""
    mask = np.zeros(shape, bool)
    for y, x in points:
        mask[(2,) * (len(shape) - 2) + (y, x)] = True
    return mask


def labels_of(shape, points):
    """uint8 label map: {label: [(y, x), ...]}."""
    return sum((label * mask_of(shape, *where) for label, where in points.items()), np.zeros(shape, int)).astype(
        np.uint8
    )


def brute_force_nsd(pred, gt, spacing, tolerance):
    """Every neighbourhood in a Python loop, every pair of elements, no crop: slow but obvious."""
    sizes = element_sizes(spacing)
    places, weights = [], []
    for mask in (pred, gt):
        padded = np.pad(mask, 1)
        found = []
        for place in itertools.product(*(range(n - 1) for n in padded.shape)):
            corners = padded[tuple(slice(i, i + 2) for i in place)].ravel()
            code = int("".join(str(int(c)) for c in corners), 2)
            if 0 < code < len(sizes) - 1:
                found.append((*place, sizes[code]))
        found = np.array(found)
        places.append(found[:, :-1])
        weights.append(found[:, -1])
    distances = np.sqrt((((places[0][:, None] - places[1][None]) * np.array(spacing)) ** 2).sum(axis=-1))
    near = [distances.min(axis=1) <= tolerance, distances.min(axis=0) <= tolerance]
    return sum(w[n].sum() for w, n in zip(weights, near, strict=True)) / sum(w.sum() for w in weights)


def blobs(rng, shape, density=0.4):
    """Two overlapping random masks that are neither smooth nor empty: many different neighbourhoods."""
    noise = rng.random(shape)
    pred, gt = noise < density, rng.random(shape) * 0.3 + noise < density + 0.1
    pred.flat[0] = gt.flat[-1] = True  # never empty, and on the border
    return pred, gt


# Conventions: one test for each row of the table in the module header ----------------------------------------------


@both_dimensions
def test_both_empty_is_nan_left_out_by_strict_and_poison_for_the_challenge(shape, spacing):
    empty = np.zeros(shape, bool)
    assert math.isnan(dsc(empty, empty))
    assert math.isnan(nsd(empty, empty, spacing or (1, 1)))
    gts = labels_of(shape, {1: [(3, 3)], 3: [(6, 6)]})  # nobody has label 2
    strict, challenge = (case_scores(gts, gts, spacing, protocol) for protocol in ("strict", "challenge"))
    assert strict.labels == (1, 3)
    assert (strict.means["dsc"], strict.means["nsd"]) == (1, 1)
    assert challenge.labels == (1, 2, 3)
    np.testing.assert_array_equal(challenge.scores["dsc"], [1, math.nan, 1])
    assert math.isnan(challenge.means["dsc"])
    assert challenge.means["nsd"] == 0  # nan is not above 0.2, so the evaluator never starts on NSD


@both_dimensions
def test_a_label_only_in_the_prediction_counts_for_the_challenge_below_the_largest_true_one(shape, spacing):
    gts = labels_of(shape, {1: [(3, 3)], 3: [(6, 6)]})
    segs = labels_of(shape, {1: [(3, 3)], 2: [(1, 1)], 3: [(6, 6)], 4: [(7, 1)]})
    assert dsc(segs == 2, gts == 2) == 0
    assert nsd(segs == 2, gts == 2, spacing or (1, 1)) == 0
    assert case_scores(segs, gts, spacing).labels == (1, 3)
    challenge = case_scores(segs, gts, spacing, "challenge")
    assert challenge.labels == (1, 2, 3)  # 2 is a miss of 0, 4 is never looked at
    assert challenge.means["dsc"] == pytest.approx(2 / 3)
    assert challenge.means["nsd"] == pytest.approx(2 / 3)


@both_dimensions
@pytest.mark.parametrize("protocol", ["strict", "challenge"])
def test_a_missed_label_scores_zero(shape, spacing, protocol):
    gts, segs = labels_of(shape, {1: [(3, 3)], 2: [(6, 6)]}), labels_of(shape, {2: [(6, 6)]})
    found = case_scores(segs, gts, spacing, protocol)
    np.testing.assert_array_equal([found.scores["dsc"], found.scores["nsd"]], [[0, 1], [0, 1]])
    assert (found.means["dsc"], found.means["nsd"]) == (0.5, 0.5)


@both_dimensions
def test_a_truth_without_labels_has_no_mean(shape, spacing):
    gts, segs = labels_of(shape, {}), labels_of(shape, {1: [(3, 3)]})
    strict, challenge = (case_scores(segs, gts, spacing, protocol) for protocol in ("strict", "challenge"))
    assert strict.labels == challenge.labels == ()
    assert math.isnan(strict.means["dsc"]) and math.isnan(strict.means["nsd"]) and math.isnan(challenge.means["dsc"])
    assert challenge.means["nsd"] == 0


@both_dimensions
def test_the_challenge_gives_no_nsd_unless_the_mean_dsc_is_above_a_fifth(shape, spacing):
    line = [(4, x) for x in range(1, 10)]  # 9 pixels; one of them predicted: DSC 2 / 10, not above 0.2
    gts = labels_of(shape, {1: line})
    for segs, gated in ((labels_of(shape, {1: line[:1]}), True), (labels_of(shape, {1: line[:2]}), False)):
        strict, challenge = (case_scores(segs, gts, spacing, protocol) for protocol in ("strict", "challenge"))
        assert strict.means["dsc"] == challenge.means["dsc"] == pytest.approx(0.2 if gated else 4 / 11)
        assert strict.means["nsd"] > 0
        assert challenge.scores["nsd"][0] > 0
        assert challenge.means["nsd"] == (0 if gated else challenge.scores["nsd"][0])


@both_dimensions
def test_the_image_border_counts_as_surface(shape, spacing):
    spacing = spacing or (1.0, 1.0)
    full = np.ones(shape, bool)
    assert nsd(full, full, spacing) == 1  # nan if the border were no surface
    a, b = mask_of(shape, (0, 0)), mask_of(shape, (0, 3))
    assert nsd(a, b, spacing) == nsd(np.pad(a, 3), np.pad(b, 3), spacing)


@pytest.mark.parametrize(
    "spacing, axis, shift, want",
    [
        # A lone pixel has an element at each of its 4 (3D: 8) corners, equal in size. The far half lies `shift` pixels
        # from the other pixel's near half, the near half one less.
        ((1.0, 1.0), 1, 2, 1.0),  # far half at 2 px, exactly the tolerance
        ((1.0, 1.0), 1, 3, 0.5),
        ((1.0, 1.0), 1, 4, 0.0),
        ((1.0, 2.0), 1, 1, 1.0),
        ((1.0, 2.0), 1, 2, 0.5),
        ((1.0, 2.0), 0, 2, 1.0),
        ((5.0, 1.0, 2.0), 0, 1, 0.5),  # neighbouring slices share the corners between them; the rest is 5 mm off
        ((5.0, 1.0, 2.0), 0, 2, 0.0),
        ((5.0, 1.0, 2.0), 1, 2, 1.0),
        ((5.0, 1.0, 2.0), 2, 1, 1.0),
        ((5.0, 1.0, 2.0), 2, 2, 0.5),
        ((5.0, 1.0, 2.000001), 2, 2, 0.0),  # a trifle over the tolerance
    ],
)
def test_an_element_exactly_at_the_tolerance_is_inside(spacing, axis, shift, want):
    a = np.zeros((8,) * len(spacing), bool)
    a[(1,) * a.ndim] = True
    assert nsd(a, np.roll(a, shift, axis), spacing, 2.0) == pytest.approx(want)


def test_2d_contour_against_the_slab_of_the_challenge_by_hand():
    gts, segs = np.zeros((2, 11, 11), np.uint8)
    gts[1:10, 1:10] = 1  # 9 x 9
    segs[3:8, 3:8] = 1  # 5 x 5 in its middle: the contours run 2 px apart
    # Contours: 8 and 4 elements of 1 px on each side, and 4 corners of sqrt(1/2). Beyond 2 px lie only the truth's
    # corners and the first and last element of each of its sides.
    gt, pred = 4 * 8 + 4 * math.sqrt(0.5), 4 * 4 + 4 * math.sqrt(0.5)
    strict = case_scores(segs, gts, None)
    assert strict.means["dsc"] == pytest.approx(2 * 25 / (25 + 81))
    assert strict.means["nsd"] == pytest.approx(1 - (8 + 4 * math.sqrt(0.5)) / (gt + pred))
    # Slab: the same elements twice, as bevels of the rim, and two flat faces of 8 x 8 and 4 x 4 elements of area 1.
    # A bevel along a side has area sqrt(1/2), one at a corner sqrt(3)/8.
    rim, corner = math.sqrt(0.5), math.sqrt(3) / 8
    gt, pred = 2 * (64 + 32 * rim + 4 * corner), 2 * (16 + 16 * rim + 4 * corner)
    challenge = case_scores(segs, gts, None, "challenge")
    assert challenge.means["nsd"] == pytest.approx(1 - 2 * (8 * rim + 4 * corner) / (gt + pred))


def test_the_challenge_reads_the_spacing_in_reverse_by_hand():
    gts = np.zeros((7, 5, 5), np.uint8)
    gts[1:4, 2, 2] = 1  # a column of 3 voxels, predicted one slice too high
    segs = np.roll(gts, 1, axis=0)
    spacing = (5.0, 1.0, 1.0)
    # Each column: 4 corners at either end, and 2 x 4 strips on its long edges. Only the outer end of each is 5 mm off.
    # shadows dy dx, dz dx, dz dy, an eighth each
    corner = 0.125 * math.sqrt((1 * 1) ** 2 + (5 * 1) ** 2 + (5 * 1) ** 2)
    strip = 5 * math.sqrt(0.5)
    strict = case_scores(segs, gts, spacing)
    assert strict.means["dsc"] == pytest.approx(2 / 3)
    assert strict.means["nsd"] == pytest.approx(1 - 4 * corner / (8 * corner + 8 * strip))
    assert case_scores(segs, gts, spacing, "challenge").means["nsd"] == 1  # takes the slices to be 1 mm apart
    assert case_scores(segs, gts, spacing[::-1]).means["nsd"] == 1


def test_labels_up_to_255_in_uint8_do_not_wrap():
    gts = np.zeros((16, 16), np.uint8)
    gts.flat[1:] = np.arange(1, 256)
    found = case_scores(gts, gts, None, "challenge")  # range(1, uint8 255 + 1) would be empty
    assert found.labels == tuple(range(1, 256))
    assert (found.means["dsc"], found.means["nsd"]) == (1, 1)
    more = gts.astype(np.uint16) * 2  # labels that a uint8 prediction cannot hold are missed, not an error
    assert case_scores(gts, more, None).means["dsc"] < 0.5


# Sizes of surface elements -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, want",
    [
        (0b0000_0000, 0),
        (0b1111_1111, 0),
        (0b0000_1111, 2 * 3),  # a wall across z: dy dx
        (0b0011_0011, 5 * 3),  # across y: dz dx
        (0b0101_0101, 5 * 2),  # across x: dz dy
        (0b0000_0001, math.sqrt(6**2 + 15**2 + 10**2) / 8),  # one corner cut off
        (0b0000_0011, 3 * math.hypot(5, 2) / 2),  # an edge along x: its length times half a diagonal
        (0b1000_0001, math.sqrt(6**2 + 15**2 + 10**2) / 4),  # two opposite corners, each cut off
        (0b0001_0111, 3 / 4 * math.sqrt(6**2 + 15**2 + 10**2)),  # a corner and its three neighbours: a flat hexagon
    ],
)
def test_areas_by_hand_at_unequal_spacing(code, want):
    areas = element_sizes((5.0, 2.0, 3.0))
    assert areas[code] == pytest.approx(want)
    assert areas[255 - code] == pytest.approx(want)  # swapping inside and outside leaves the surface


def test_areas_follow_when_the_axes_are_swapped():
    spacing = np.array([5.0, 2.0, 3.0])
    corners = np.arange(256)[:, None] >> np.arange(7, -1, -1) & 1  # (256, 8)
    for axes in itertools.permutations(range(3)):
        swapped = corners.reshape(-1, 2, 2, 2).transpose(0, *(a + 1 for a in axes)).reshape(-1, 8)
        codes = swapped @ (1 << np.arange(7, -1, -1))
        np.testing.assert_allclose(element_sizes(spacing[list(axes)])[codes], element_sizes(spacing), rtol=1e-12)


def test_every_outline_is_closed_and_uses_every_crossed_edge_once():
    for code in range(256):
        inside = np.array([code >> (7 - i) & 1 for i in range(8)]).reshape(2, 2, 2)
        crossed = sum(int(np.abs(np.diff(inside, axis=axis)).sum()) for axis in range(3))
        points = [point for loop in _patch_outlines(code) for point in loop]
        assert len(points) == len(set(points)) == crossed


# Slow against fast, stored outputs, the package --------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, spacing, tolerance",
    [
        ((17, 23), (1.0, 1.0), 2.0),
        ((17, 23), (0.7, 1.9), 2.0),
        ((23, 17), (0.1, 0.3), 0.6),  # 6 * 0.1 and 2 * 0.3 round to the tolerance or just above
        ((17, 23), (1.0, 1.0), 0.0),
        ((17, 23), (1.0, 1.0), 1000.0),
        ((5, 9, 8), (1.0, 1.0, 1.0), 1.0),
        ((6, 9, 8), (2.5, 0.8, 0.8), 2.0),
        ((6, 9, 8), (0.3, 1.1, 2.0), 2.0),
        ((1, 9, 8), (5.0, 0.4, 0.5), 2.0),
    ],
)
@pytest.mark.parametrize("density", [0.02, 0.4, 0.9])
def test_fast_nsd_equals_all_pairs_of_elements(shape, spacing, tolerance, density):
    pred, gt = blobs(np.random.default_rng(0), shape, density)
    want = brute_force_nsd(pred, gt, spacing, tolerance)
    assert nsd(pred, gt, spacing, tolerance) == pytest.approx(want, abs=1e-12)


def ellipse(shape, radii, centre):
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    return sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii, strict=True)) <= 1


@pytest.mark.parametrize(
    "shape, spacing, radii",
    [
        ((90, 120), (1.0, 1.0), (30, 42)),
        ((20, 44, 44), (2.0, 1.0, 1.0), (7, 15, 15)),
        ((40,) * 3, (1.0,) * 3, (15,) * 3),
    ],
)
def test_ten_lines_that_count_contour_pixels_are_near_the_exact_nsd_on_smooth_shapes(shape, spacing, radii):
    middle, found, exact = [n / 2 for n in shape], [], []
    for tolerance, move in itertools.product((1, 2, 4), [(0, 0, 0), (0, 2, 0), (1, 0, 3), (2, 1, 1), (0, 0, 5)]):
        moved = [place + step for place, step in zip(middle, move[-len(shape) :], strict=True)]
        pred, gt = ellipse(shape, radii, moved), ellipse(shape, radii, middle)
        found.append(contour_nsd(pred, gt, spacing, tolerance))
        exact.append(nsd(pred, gt, spacing, tolerance))
    assert min(exact) < 0.4 and np.abs(np.subtract(found, exact)).mean() < 0.02
    assert found == pytest.approx(exact, abs=0.06)


def test_the_ten_lines_by_hand():
    square, inner = np.zeros((2, 11, 11), bool)
    square[1:10, 1:10], inner[3:8, 3:8] = True, True  # contours of 32 and 16 pixels
    # all 16 are 2 px from the larger contour; of each of its sides, the five pixels beside the inner square
    assert contour_nsd(inner, square, (1.0, 1.0), 2.0) == (16 + 4 * 5) / (16 + 32)
    assert contour_nsd(square, square, (1.0, 1.0), 0.0) == 1
    assert contour_nsd(square, inner, (9.0, 9.0), 2.0) == 0


@pytest.mark.parametrize("name", [key.removesuffix("_shape") for key in GOLDEN.files if key.endswith("_shape")])
def test_masks_score_what_the_challenge_code_gave(name):
    shape = tuple(GOLDEN[f"{name}_shape"])
    pred, gt = (
        np.unpackbits(GOLDEN[f"{name}_{kind}"], count=math.prod(shape)).reshape(shape).astype(bool)
        for kind in ("seg", "gt")
    )
    found = nsd(pred, gt, GOLDEN[f"{name}_spacing"], float(GOLDEN[f"{name}_tolerance"]))
    assert found == pytest.approx(float(GOLDEN[f"{name}_nsd"]), abs=1e-9, nan_ok=True)
    assert dsc(pred, gt) == pytest.approx(float(GOLDEN[f"{name}_dsc"]), abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("name, spacing", [("multi2d", None), ("absent_label", (1.0, 1.0, 1.0))])
def test_label_maps_score_what_the_challenge_code_gave(name, spacing):
    found = case_scores(GOLDEN[f"{name}_seg"], GOLDEN[f"{name}_gt"], spacing, "challenge")
    assert found.means["dsc"] == pytest.approx(float(GOLDEN[f"{name}_dsc"]), abs=1e-9, nan_ok=True)
    assert found.scores["nsd"].mean() == pytest.approx(float(GOLDEN[f"{name}_nsd"]), abs=1e-9, nan_ok=True)


def test_sizes_and_nsd_equal_the_published_package(monkeypatch):
    package = pytest.importorskip("surface_distance")
    from surface_distance import lookup_tables

    monkeypatch.setattr(np, "Inf", np.inf, raising=False)  # the package was written for numpy 1
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # and for an older scipy
        for spacing in ((1.0, 1.0, 1.0), (5.0, 0.8, 0.7), (0.3, 2.0, 7.0)):
            areas = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
            np.testing.assert_allclose(element_sizes(spacing), areas, atol=1e-12)
            lengths = lookup_tables.create_table_neighbour_code_to_contour_length(spacing[:2])
            np.testing.assert_allclose(element_sizes(spacing[:2]), lengths, atol=1e-12)
            for shape in ((40, 50), (12, 20, 24)):
                pred, gt = blobs(rng, shape, density=0.05)
                distances = package.compute_surface_distances(gt, pred, spacing[: len(shape)])
                want = package.compute_surface_dice_at_tolerance(distances, 2.0)
                assert nsd(pred, gt, spacing[: len(shape)]) == pytest.approx(want, abs=1e-9)


# Cases, bounds, reference masks, errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["strict", "challenge"])
def test_cropping_per_label_changes_nothing(protocol):
    rng = np.random.default_rng(1)
    gts, segs = rng.integers(0, 4, (2, 7, 12, 10)).astype(np.uint16)
    spacing = (3.0, 0.9, 0.7)
    found = case_scores(segs, gts, spacing, protocol)
    used = spacing if protocol == "strict" else spacing[::-1]
    np.testing.assert_allclose(found.scores["dsc"], [dsc(segs == i, gts == i) for i in (1, 2, 3)])
    np.testing.assert_allclose(found.scores["nsd"], [nsd(segs == i, gts == i, used) for i in (1, 2, 3)])


def test_a_row_of_the_table_is_a_metric_of_every_label_and_of_the_case(monkeypatch):
    seen = []

    def agreement(pred, gt, spacing_mm):
        seen.append((pred.shape, pred.dtype, spacing_mm))
        return float((pred == gt).mean())

    monkeypatch.setitem(METRICS, "agreement", Metric(agreement))
    gts, segs = np.zeros((2, 6, 9, 12), np.uint8)
    gts[1:3, 2:6, 3:8], segs[1:3, 2:4, 3:8] = 1, 1  # half of it; the crop is the truth's own box
    gts[4:, 8:, 9:] = segs[4:, 8:, 9:] = 2
    found = case_scores(segs, gts, (5.0, 1.0, 2.0))
    assert list(found.scores) == list(found.means) == ["dsc", "nsd", "agreement"]
    assert found.scores["agreement"].tolist() == [0.5, 1] and found.means["agreement"] == 0.75
    assert seen[0] == ((2, 4, 5), np.bool_, (5.0, 1.0, 2.0))
    assert case_scores(segs, gts, (5.0, 1.0, 2.0), "challenge").means["agreement"] == 0.75
    case_scores(segs[1], gts[1], None, "challenge")
    assert seen[-1] == ((1, 4, 5), np.bool_, (1.0, 1.0, 1.0))  # a slab


@both_dimensions
@pytest.mark.parametrize("protocol", ["strict", "challenge"])
def test_a_missed_object_costs_what_its_metric_says(shape, spacing, protocol, monkeypatch):
    """Were it left out, the mean would be that of the object that was found."""
    use(monkeypatch, PAPER | DISTANCE | {"lost": Metric(lambda pred, gt, spacing_mm: 0.0, "px", False, missed=7.0)})
    gts = labels_of(shape, {1: [(3, 3)], 2: [(6, 6), (6, 7)]})
    found = case_scores(labels_of(shape, {2: [(6, 6)]}), gts, spacing, protocol)
    # half a pixel along x, and the image's diagonal: the larger no distance in it can be
    steps = {"strict": spacing or (1, 1), "challenge": (1, 1, 1) if spacing is None else spacing[::-1]}[protocol]
    sides = (1, *shape) if spacing is None and protocol == "challenge" else shape
    diagonal = math.sqrt(sum((n * step) ** 2 for n, step in zip(sides, steps, strict=True)))
    assert found.scores["shift"] == pytest.approx([diagonal, 0.5 * steps[-1]])
    assert found.means["shift"] == pytest.approx((diagonal + 0.5 * steps[-1]) / 2)
    assert found.scores["lost"].tolist() == [7, 0] and found.means["lost"] == 3.5


@pytest.mark.parametrize("of_case", [False, True])
def test_without_missed_the_function_says_what_an_empty_mask_scores(of_case, monkeypatch):
    count = Metric(lambda pred, gt, spacing_mm: float(np.abs(pred.astype(int) - gt).sum()), "px", False, None, of_case)
    use(monkeypatch, {"count": count})
    gts = labels_of((9, 12), {1: [(3, 3), (3, 4)]})
    assert case_scores(0 * gts, gts, None).means["count"] == 2


def test_a_function_that_returns_infinity_gets_the_diagonal_and_nan_stays_nan(monkeypatch):
    use(monkeypatch, {"far": Metric(lambda *masks: math.inf, "px", False), "none": Metric(lambda *masks: math.nan)})
    labels = labels_of((3, 4), {1: [(1, 1)]})
    found = case_scores(labels, labels, None)
    assert found.means["far"] == 5 and math.isnan(found.means["none"])


@pytest.mark.parametrize("protocol", ["strict", "challenge"])
def test_a_metric_of_the_case_gets_both_label_maps_and_has_no_score_of_objects(protocol, monkeypatch):
    use(monkeypatch, PAPER | OF_CASE)
    gts = labels_of((9, 12), {1: [(3, 3)], 2: [(6, 6)], 3: [(1, 1)]})
    found = case_scores(labels_of((9, 12), {2: [(6, 6)], 3: [(8, 8)]}), gts, None, protocol)
    assert found.means["found"] == pytest.approx(2 / 3) and list(found.scores) == ["dsc", "nsd"]
    assert case_scores(0 * gts, gts, None, protocol).means["found"] == 0  # `missed`: the function is not asked
    assert math.isnan(case_scores(gts, 0 * gts, None, protocol).means["found"])


@both_dimensions
def test_the_rule_of_the_challenge_computes_dsc_whether_or_not_it_is_a_row(shape, spacing, monkeypatch):
    line = [(4, x) for x in range(1, 10)]
    gts, poor, better = (labels_of(shape, {1: line[:n]}) for n in (9, 1, 2))
    want = [case_scores(segs, gts, spacing, "challenge").means["nsd"] for segs in (poor, better)]
    use(monkeypatch, {"nsd": PAPER["nsd"]})
    assert [case_scores(segs, gts, spacing, "challenge").means["nsd"] for segs in (poor, better)] == want
    assert want[0] == 0 < want[1]
    use(monkeypatch, {"dsc": PAPER["dsc"]})
    assert list(case_scores(poor, gts, spacing, "challenge").means) == ["dsc"]


@pytest.mark.parametrize("shape", [(30, 41), (9, 30, 41), (1, 1, 1)])
def test_label_bounds_equal_the_extent_of_each_label(shape):
    labels = np.random.default_rng(0).choice([0, 0, 0, 0, 2, 3, 300], shape).astype(np.uint16)
    labels[..., -1] = 7  # runs that would join over the end of a row
    bounds = label_bounds(labels)
    assert sorted(bounds) == np.unique(labels[labels > 0]).tolist()
    for label, (low, high) in bounds.items():
        points = np.argwhere(labels == label)
        np.testing.assert_array_equal([low, high], [points.min(axis=0), points.max(axis=0)])


def test_label_bounds_of_nothing_are_empty():
    assert label_bounds(np.zeros((4, 5), np.uint8)) == {}


def test_filled_boxes_include_both_ends_and_later_ones_paint_over():
    boxes = np.array([[0, 1, 2, 2], [2, 2, 9, 2]])  # x_min y_min x_max y_max; the second leaves the image
    assert filled_box(boxes, (4, 5)).tolist() == [[0] * 5, [1, 1, 1, 0, 0], [1, 1, 2, 2, 2], [0] * 5]
    volume = filled_box(np.array([[1, 0, 2, 1, 1, 3]]), (5, 3, 2))  # x 1..1, y 0..1, z 2..3
    assert volume.dtype == np.uint16
    assert np.argwhere(volume).tolist() == [[2, 0, 1], [2, 1, 1], [3, 0, 1], [3, 1, 1]]


def test_inscribed_ellipse_by_hand():
    # box 5 x 3: centre (2, 1), semi-axes 2.5 and 1.5. Row 0: (1/1.5)² + (dx/2.5)² <= 1 up to |dx| 1.86
    assert inscribed_ellipse(np.array([[0, 0, 4, 2]]), (3, 5)).tolist() == [
        [0, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
        [0, 1, 1, 1, 0],
    ]
    ball = inscribed_ellipse(np.array([[0, 0, 0, 2, 2, 2]]), (3, 3, 3))  # radius 1.5: all but the corners at sqrt(3)
    assert np.argwhere(ball == 0).tolist() == [list(corner) for corner in itertools.product((0, 2), repeat=3)]


@pytest.mark.parametrize("shape", [(100, 80), (30, 100, 80)])
def test_inscribed_ellipse_touches_its_box_and_has_its_share_of_the_area(shape):
    low, high = [n // 5 for n in shape[::-1]], [n // 5 * 4 for n in shape[::-1]]
    mask = inscribed_ellipse(np.array([low + high]), shape)
    bounds = label_bounds(mask)[1]
    np.testing.assert_array_equal(bounds, [low[::-1], high[::-1]])
    share = mask.sum() / filled_box(np.array([low + high]), shape).sum()
    assert share == pytest.approx(math.pi / 4 if len(shape) == 2 else math.pi / 6, rel=0.01)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: dsc(m, m[1:]), "one shape"),
        (lambda m: dsc(m.astype(np.uint8), m), "bool"),
        (lambda m: nsd(m, m.astype(float), (1, 1)), "bool"),
        (lambda m: nsd(m, m, (1, 1, 1)), "2D mask"),
        (lambda m: nsd(m, m, (1, 0)), "positive spacing"),
        (lambda m: nsd(m, m, (1, 1), -1.0), "tolerance"),
        (lambda m: nsd(m[0], m[0], (1,)), "2 or 3 axes"),
        (
            lambda m: case_scores(m.astype(float), m.astype(int), None),
            "segs must be an integer label map without negative labels, found float64",
        ),
        (
            lambda m: case_scores(m.astype(int), m.astype(int)[1:], None),
            r"segs has shape \(4, 5\) but gts has \(3, 5\)",
        ),
        (lambda m: case_scores(m.astype(int), -m.astype(int) - 1, None), "negative label"),
        (lambda m: case_scores(m.astype(int), m.astype(int), (1, 1, 1)), "None for images"),
        (lambda m: case_scores(m.astype(int), m.astype(int), (0.5, 0.5)), "None for images"),
        (lambda m: case_scores(m[None].astype(int), m[None].astype(int), None), "given for volumes"),
        (lambda m: case_scores(m[0].astype(int), m[0].astype(int), (1,)), "2 or 3 axes"),
        (lambda m: case_scores(m[0].astype(int), m[0].astype(int), None), "given for volumes .* for 1D"),
        (lambda m: case_scores(m.astype(int), m.astype(int), None, "loose"), "strict, challenge"),
        (lambda m: filled_box(np.zeros((1, 6)), m.shape), "4 numbers"),
        (lambda m: filled_box(np.zeros((65_536, 4)), m.shape), "at most 65535 boxes"),
        (lambda m: inscribed_ellipse(np.array([[3, 0, 1, 1]]), m.shape), "minima"),
        (lambda m: inscribed_ellipse(np.array([[0, 0, np.nan, 1]]), m.shape), "finite"),
    ],
)
def test_bad_arguments_are_named_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(np.zeros((4, 5), bool))
    assert "\n" not in str(error.value)


def test_an_object_among_thousands_scores_as_it_does_alone():
    labels = np.arange(2500).reshape(50, 50).repeat(5, 0).repeat(5, 1).astype(np.uint16)
    labels[::5], labels[:, ::5] = 0, 0
    found = np.roll(labels, 3, axis=1)
    scores = case_scores(found, labels, None)
    for label in (1, 49, 1234, 2499):
        at = scores.labels.index(label)
        alone = nsd(found == label, labels == label, (1.0, 1.0)), dsc(found == label, labels == label)
        assert (scores.scores["nsd"][at], scores.scores["dsc"][at]) == alone
    assert len(scores.labels) == 2499 and 0 < scores.means["nsd"] < 1
    assert set(case_scores(labels, labels.copy(), None).scores["nsd"]) == {1.0}


# ---------------------------------------------------------------- any two masks


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=any_.lists(any_.integers(1, 7), min_size=2, max_size=3),
    seed=any_.integers(0, 999),
    densities=any_.tuples(any_.floats(0, 1), any_.floats(0, 1)),
    step=any_.floats(0.1, 5),
    tolerance=any_.floats(0, 6),
)
def test_scores_of_any_two_masks_lie_in_0_to_1_and_do_not_know_which_is_the_truth(
    shape, seed, densities, step, tolerance
):
    rng = np.random.default_rng(seed)
    a, b = (rng.random(shape) < density for density in densities)
    spacing = tuple(step * (1 + i) for i in range(len(shape)))
    for score in (dsc, lambda one, other: nsd(one, other, spacing, tolerance)):
        there, back = score(a, b), score(b, a)
        if not a.any() and not b.any():
            assert math.isnan(there) and math.isnan(back)
        else:
            assert 0 <= there <= 1 + 1e-12 and there == pytest.approx(back, abs=1e-9)
        assert not a.any() or score(a, a) == 1
