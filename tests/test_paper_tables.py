"""notebooks/paper_tables.py: what the paper prints appears in each table, beside numbers of ours."""

import math
import re

import pytest
from metric_rows import TABLES as METRIC_TABLES
from metric_rows import use

from notebooks import paper_tables
from notebooks.paper_tables import CARD, drops, mean_score, measured_scores, network_counts, score_rows
from tables import PAPER_TABLES, paper_scores, read_rows

TABLES = {number: getattr(paper_tables, f"table{number}") for number in range(1, 7)}


def cells_of(text):
    """Rows of cells of a Markdown table, without the line of dashes."""
    text = text.replace(paper_tables.NARROW, " ")
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


@pytest.mark.parametrize("number", TABLES)
def test_what_the_paper_prints_is_there_and_no_table_is_wide(number):
    text = TABLES[number]()
    rows = cells_of(text)
    assert len({len(row) for row in rows}) == 1 and len(rows[0]) <= 5
    plain = text.replace(" x ", ", ")
    for row in read_rows(PAPER_TABLES / f"table{number}.csv"):
        for column, value in row.items():
            if not (number == 4 and column.startswith("Quantized")):
                value = re.sub("^[23]DBox_", "", value.strip("()")).replace("_", " ")
                shown = value in plain or (re.fullmatch(r"[\d.]+", value) and f"{float(value):.2f}" in plain)
                assert shown, f"{column}: {value}"


def test_table4_shows_the_quantized_columns_too_and_ours_are_numbers():
    rows = {row[0]: row[1:] for row in cells_of(paper_tables.table4(quantized=True))}
    for target in ("CT", "Average"):
        for title, i in (("Baseline", 0), ("Proposed", 2)):
            columns = [column for name, column in paper_scores((True,)).items() if f"Quantized {title}" in name]
            assert rows[target][i] == " / ".join(f"{column[target]:.2f}" for column in columns)
        assert all(0 < float(score) <= 100 for i in (1, 3) for score in rows[target][i].split(" / "))
    assert rows["OCT"][0] == "-" and rows["OCT"][1] != "-"


def test_tables_5_and_6_have_numbers_of_ours_in_every_row_that_has_some():
    for row in cells_of(paper_tables.table5())[1:]:
        assert all(float(seconds) > 0 for seconds in row[3].split(" / ")) and len(row[3].split(" / ")) == 3
    ours = [row for row in cells_of(paper_tables.table6())[1:] if row[3] != "-"]
    assert len(ours) >= 6 and all(0 <= float(score) <= 100 for row in ours for score in row[3].split(" / "))


def test_what_is_said_of_our_training_stands_on_the_model_card():
    card = re.sub(r"\s+", " ", CARD.read_text(encoding="utf-8"))
    for row in cells_of(paper_tables.table1())[1:]:
        assert row[2] == "no"
        for name in re.split(r", | \(", row[3].removesuffix(" is MR)").replace("none (", "none, ")):
            assert name == "none" or name in card, name
    for fact in ("after 2,300 of", "1,660 steps", "one cycle", "0.05", "0.5 h on the GPU", "5.6 h", "0.17 kg"):
        assert fact in card, fact
    parameters, macs = network_counts()
    assert f"{parameters / 1e6:.2f}M" == "34.79M" and 32 * macs == pytest.approx(602, rel=0.01)


@pytest.mark.parametrize("metrics", METRIC_TABLES.values(), ids=METRIC_TABLES)
def test_rows_means_and_drops_by_hand(tmp_path, monkeypatch, metrics):
    use(monkeypatch, metrics)  # what was measured stays readable, whatever rows METRICS has now
    scores = ("dsc_strict", "nsd_strict", "dsc_challenge", "nsd_challenge")
    header = ",".join(("boxes", "system", "case", "modality", "objects", *scores))
    lines = [
        "exact,a,1,CT,2,0.5,0.25,1,1",
        "exact,a,2,CT,1,1.0,0.75,1,",
        "moved,a,2,CT,1,0,0,0,0",
        "exact,a,3,US,1,0,1,0,0",
    ]
    (tmp_path / "cases.csv").write_text("\n".join([header, *lines]))
    rows = score_rows(tmp_path / "cases.csv", boxes="exact")
    assert [row["objects"] for row in rows] == [2, 1, 1] and math.isnan(rows[1]["nsd_challenge"])
    scores = measured_scores(rows, "a")
    assert scores == {"CT": (75, 50), "US": (0, 100), "Average": (37.5, 75)}
    assert mean_score(scores, ["CT"]) == (75, 50) and drops(scores, {"US": (1, 60), "MR": (0, 0)}) == {"US": (-1, 40)}
