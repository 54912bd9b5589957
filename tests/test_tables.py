"""tables.py: paired differences and bootstrap intervals, known answers, coverage, and means by hand.

What the tables show of scored files is tested in test_evaluate.py.
"""

import math

import numpy as np
import pytest

from metrics import METRICS
from tables import bootstrap_interval, difference_table, paired_differences, score_names, score_table, summarize

SCORES = score_names()


def rows_of(system, scores, modality="CT"):
    """One row a case with all four scores alike."""
    return [
        {"system": system, "case": f"{modality}_{i}.npz", "modality": modality} | dict.fromkeys(SCORES, score)
        for i, score in enumerate(scores)
    ]


def test_equal_differences_give_an_interval_without_width():
    assert bootstrap_interval([np.full(7, 0.25), np.full(2, 0.75)]) == (0.5, 0.5)


def test_two_values_give_what_can_be_counted():
    # of 0 and 1, both draws are 0 in a quarter of all cases, so 60 % of the means reach from 0 to 1, 40 % are 1/2
    assert bootstrap_interval([np.array([0.0, 1.0])], level=0.6) == (0.0, 1.0)
    assert bootstrap_interval([np.array([0.0, 1.0])], level=0.4) == (0.5, 0.5)


def test_modalities_count_alike_whatever_their_number_of_cases():
    rng = np.random.default_rng(1)
    low, high = bootstrap_interval([rng.normal(0, 0.01, 400), rng.normal(1, 0.01, 40)])
    assert low < 0.5 < high and high - low < 0.005


def test_the_same_seed_gives_the_same_interval_and_another_nearly_the_same():
    values = [np.random.default_rng(2).normal(size=30)]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) == pytest.approx(bootstrap_interval(values), abs=0.03)


def test_the_interval_holds_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(3)
    groups = [(0.2, 1.0, 40), (-0.1, 2.0, 60), (0.5, 0.5, 30)]  # mean, standard deviation, cases
    hits = 0
    for seed in range(400):
        low, high = bootstrap_interval([rng.normal(m, s, n) for m, s, n in groups], draws=1000, seed=seed)
        hits += low <= 0.2 <= high
    assert 0.92 < hits / 400 < 0.98


def test_differences_are_paired_by_case_and_averaged_over_modalities():
    ours = rows_of("ours", [0.9, 0.5]) + rows_of("ours", [0.8], "US")
    theirs = rows_of("theirs", [0.4, 0.8])[::-1] + rows_of("theirs", [0.7], "US")  # another order
    found = {
        (line["modality"], line["score"]): line for line in paired_differences(ours + theirs, [("ours", "theirs")])
    }
    assert [key for key in found if key[1] == SCORES[0]] == [
        ("CT", SCORES[0]),
        ("US", SCORES[0]),
        ("Average", SCORES[0]),
    ]
    ct, us, average = (found[modality, SCORES[0]] for modality in ("CT", "US", "Average"))
    assert ct["difference"] == pytest.approx((0.5 - 0.3) / 2) and (ct["cases"], us["cases"], average["cases"]) == (
        2,
        1,
        3,
    )
    assert (ct["low"], ct["high"]) == pytest.approx((-0.3, 0.5))
    assert us["difference"] == pytest.approx(0.1) and math.isnan(us["low"])  # one case: nothing to draw from
    assert average["difference"] == pytest.approx((0.1 + 0.1) / 2)
    assert (average["low"], average["high"]) == pytest.approx((-0.1, 0.3))  # CT's half, since US cannot vary

    lines = difference_table(list(found.values()), {"DSC": SCORES[0], "NSD": SCORES[1]}).splitlines()
    assert lines[0] == "| modality | cases | DSC | NSD |"
    assert lines[2] == "| CT | 2 | +10.00 [-30.00, +50.00] | +10.00 [-30.00, +50.00] |"
    assert lines[3] == "| US | 1 | +10.00 | +10.00 |"


def test_cases_without_a_score_or_a_partner_do_not_count():
    rows = rows_of("ours", [0.9, math.nan, 0.5]) + rows_of("theirs", [0.8, 0.1])
    (line,) = [found for found in paired_differences(rows, [("ours", "theirs")]) if found["score"] == SCORES[0]][:1]
    assert (line["cases"], line["difference"]) == (1, pytest.approx(0.1))
    assert paired_differences(rows, [("ours", "nobody")]) == []


def test_the_names_of_scores_follow_the_table_of_metrics(monkeypatch):
    assert SCORES == ("dsc_strict", "nsd_strict", "dsc_challenge", "nsd_challenge")
    monkeypatch.setitem(METRICS, "iou", None)
    assert score_names()[2] == "iou_strict" and score_names()[-1] == "iou_challenge"


def test_a_score_stands_beside_the_papers_numbers_of_the_same_metric():
    rows = [row | {"objects": 2} for row in rows_of("ours", [0.5, 1.0]) + rows_of("ours", [0.25], "OCT")]
    header, _, ct, oct, mean = score_table(summarize(rows), "nsd_strict").splitlines()
    assert header.startswith(
        "| modality | cases | objects | ours | paper's Baseline on its own split | paper's Quantized"
    )
    assert ct == "| CT | 2 | 4 | 75.00 | 88.49 | 89.15 | 97.74 | 98.05 |"
    assert oct == "| OCT | 1 | 2 | 25.00 | - | - | - | - |"
    assert mean == "| Average | 3 | 6 | 50.00 | 95.20 | 95.32 | 98.05 | 98.28 |"
