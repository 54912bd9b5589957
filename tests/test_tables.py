"""tables.py: paired differences and bootstrap intervals, known answers, coverage, and means by hand.

What the tables show of scored files is tested in test_evaluate.py.
"""

import math

import numpy as np
import pytest
from metric_rows import DISTANCE, OF_CASE, PAPER, use

from tables import (
    aligned,
    bootstrap_interval,
    difference_table,
    markdown_table,
    paired_differences,
    paper_scores,
    read_truth,
    score_names,
    summarize,
    summary_cells,
    terminal_table,
    units,
)

ROW = {"modality": "{modality}", "cases": "{cases}"}
SCORES = ("dsc_strict", "nsd_strict", "dsc_challenge", "nsd_challenge")


@pytest.fixture(autouse=True)
def only_the_papers_metrics(monkeypatch):
    """The numbers below are of DSC and NSD, whatever rows a fork adds or deletes."""
    use(monkeypatch, PAPER)


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

    lines = difference_table(list(found.values()), ROW, {"DSC": SCORES[0], "NSD": SCORES[1]}).splitlines()
    assert lines[0] == "| modality | cases | DSC | NSD |"
    assert lines[2] == "| CT | 2 | +10.00 [-30.00, +50.00] | +10.00 [-30.00, +50.00] |"
    assert lines[3] == "| US | 1 | +10.00 | +10.00 |"


def test_cases_without_a_score_or_a_partner_do_not_count():
    rows = rows_of("ours", [0.9, math.nan, 0.5]) + rows_of("theirs", [0.8, 0.1])
    (line,) = [found for found in paired_differences(rows, [("ours", "theirs")]) if found["score"] == SCORES[0]][:1]
    assert (line["cases"], line["difference"]) == (1, pytest.approx(0.1))
    assert paired_differences(rows, [("ours", "nobody")]) == []


def test_the_names_of_scores_follow_the_table_of_metrics(monkeypatch):
    assert score_names() == SCORES
    use(monkeypatch, PAPER | OF_CASE)
    assert score_names()[2] == "found_strict" and score_names()[-1] == "found_challenge"
    assert score_names(of_objects=True) == SCORES


def test_units_stand_in_titles_and_notes_and_only_shares_are_per_cent(monkeypatch):
    use(monkeypatch, PAPER | DISTANCE)
    assert units() == "DSC and NSD in per cent, SHIFT in mm (less is better)"
    rows = [row | {"objects": 1} for row in rows_of("ours", [0.5]) + rows_of("theirs", [0.25])]
    rows = [row | {"shift_strict": 3.0 * row["dsc_strict"]} for row in rows]
    table = markdown_table(summarize(rows), ("strict",))
    assert (
        "| ours: DSC strict | ours: NSD strict | ours: SHIFT strict, mm | ours: NSD challenge | th"
        in table.splitlines()[0]
    )
    assert "| CT | 1 | 50.00 | 50.00 | 1.50 | 50.00 | 25.00 | 25.00 | 0.75 | 25.00 |" in table and units() in table
    above, titles, ct, _ = terminal_table(summarize(rows), "strict").splitlines()
    assert above.split() == ["ours", "theirs"] and titles.split()[2:6] == ["DSC", "NSD", "SHIFT,", "mm"]
    assert ct.split() == ["CT", "1", "50.0", "50.0", "1.5", "25.0", "25.0", "0.8"]
    lines = paired_differences(rows, [("ours", "theirs")])
    assert "| CT | 1 | +25.00 | +0.75 |" in difference_table(lines, ROW, {"DSC": "dsc_strict", "shift": "shift_strict"})


def test_rows_of_metrics_that_are_no_longer_there_are_still_averaged(monkeypatch):
    """Tables that were measured and kept name DSC; they stay readable in a fork that has no such row."""
    use(monkeypatch, {"nsd": PAPER["nsd"]})
    rows = [row | {"objects": 1} for row in rows_of("ours", [0.5, 0.7])]
    assert summarize(rows)["ours", "CT"]["dsc_strict"] == pytest.approx(0.6)
    table = summary_cells(summarize(rows), {"DSC": ("ours", "dsc_strict")})
    assert table[1] == ["CT", "2", "60.00"]


def test_a_group_stands_above_its_columns_and_widens_them():
    rows = [["", "n", "ours: a", "ours: b", "a long name indeed: a"], ["first", "1", "2.0", "3.0", "4.0"]]
    assert aligned(rows).splitlines() == [
        "                ours          a long name indeed",
        "           n      a      b                     a",
        "first      1    2.0    3.0                   4.0",
    ]


def test_the_papers_columns_have_the_printed_averages():
    for column in paper_scores((False, True)).values():  # a typing error would show against the printed average
        *scores, average = column.values()
        assert len(scores) == 9 and sum(scores) / 9 == pytest.approx(average, abs=0.011)


def test_the_truth_of_a_case_knows_its_modality(tmp_path):
    gts = np.zeros((4, 5), np.uint8)
    gts[1:3, 1:4] = 2
    np.savez(tmp_path / "2DBox_CXR_a.npz", gts=gts)
    truth = read_truth(tmp_path / "2DBox_CXR_a.npz")
    assert (truth.about["modality"], truth.spacing_mm, truth.ids.tolist()) == ("X-Ray", None, [2])
    assert truth.boxes.tolist() == [[1, 1, 3, 2]]
