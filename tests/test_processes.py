"""benchmarks/processes.py: what a stage's clock books, by hand; the table's ratios, by hand; and real processes."""

import json

import numpy as np
import processes
import processes_child
import pytest
from processes import STAGES, draw_stages, median, table_text
from table5_work import BY_NAME


@pytest.fixture
def hands(monkeypatch):
    """A clock that moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(processes_child.time, "perf_counter", lambda: now[0])
    return now


def test_time_counts_for_the_inner_stage(hands):
    clock = processes_child.Clock()

    def moves(seconds):
        hands[0] += seconds

    def outer():
        moves(3)
        inner()
        moves(4)

    inner = clock.timed("inner", lambda: moves(5))
    moves(1)
    clock.timed("outer", outer)()
    inner()
    moves(2)
    clock.switch()
    assert clock.seconds == {"other": 3, "outer": 7, "inner": 10}

    def fails():
        moves(6)
        raise ValueError

    with pytest.raises(ValueError):
        clock.timed("inner", fails)()
    moves(1)
    clock.switch()
    assert clock.seconds == {"other": 4, "outer": 7, "inner": 16}


CASE = "2DBox_US_0525"
SETTINGS = {"processor": "A processor", "cores": 2, "bfloat16": "none", "float32 G/s": 62.4, "int8": "avx_vnni"}


def rows_by_hand():
    rows = []
    for engine, beside, seconds in (
        ("torch", "nothing", (4, 2, 3)),
        ("openvino", "nothing", (1.0, 2.0, 1.5)),
        ("openvino", "competitor", (3.0, 3.5, 4.0)),
    ):
        for repeat, total in enumerate(seconds, start=1):
            row = {"case": CASE, "engine": engine, "beside": beside, "repeat": repeat, "seconds": float(total)}
            row |= {"cpu_s": 2.0 * total, "peak_mb": 500.0, "differ": 1e-5}
            rows.append(row | {f"{stage} s": total / len(STAGES) for stage in STAGES})
    return rows


def test_the_table_has_medians_and_ratios():
    rows = rows_by_hand()
    assert median(rows, "seconds", engine="torch", beside="nothing") == 3
    assert np.isnan(median(rows, "seconds", engine="fast"))
    text = table_text(rows, SETTINGS)
    assert (
        "62 G multiply-adds a second in float32 products; instructions for int8: avx_vnni, for bfloat16: none." in text
    )
    assert "Medians of 3 runs" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| openvino |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["openvino", "1.5", "2", "3", "500", "1.0e-05"]
    assert cells[-2:] == ["3.5", "2.33"]


def test_the_figure_has_a_bar_of_every_stage_for_each_engine():
    ax = draw_stages(rows_by_hand(), CASE).axes[0]
    assert len(ax.patches) == 2 * len(STAGES)
    ends = {round(bar.get_y() + bar.get_height() / 2): bar.get_x() + bar.get_width() for bar in ax.patches}
    assert ends == pytest.approx({0: 3.0, 1: 1.5})
    assert [text.get_text().strip() for text in ax.texts] == ["3.00 s", "1.50 s"]


@pytest.mark.long  # whole processes of step 4, with PyTorch
def test_real_processes_are_timed_by_stage_and_compared(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(processes, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(processes, "DRAWN", tmp_path / "drawn" / "imgs")
    case = "3DBox_CT_tiny"
    arguments = ["--cases", case, "--busy", case, "--engines", "torch", "openvino", "--repeats", "1"]
    rows = processes.main([*arguments, "--engine-cache", str(tmp_path / "graphs"), "-o", str(tmp_path / "out")])
    assert [(row["engine"], row["beside"]) for row in rows] == [
        ("torch", "nothing"), ("openvino", "nothing"), ("torch", "competitor"), ("openvino", "competitor"),
    ]  # fmt: skip
    for row in rows:
        assert sum(row[f"{stage} s"] for stage in STAGES) == pytest.approx(row["seconds"], abs=0.05)
        assert row["segment s"] > 0 and row["imports s"] > 0 and row["peak_mb"] > 100 and row["differ"] < 1e-3
        assert (row["load graphs s"] > 0) == (row["engine"] == "openvino")
        assert (row["build network s"] > 0) == (row["engine"] == "torch")
    assert BY_NAME[case].objects == 2 and (tmp_path / "out" / "stages.png").is_file()
    assert json.loads((tmp_path / "out" / "settings.json").read_text("utf-8"))["cores"] > 0
    again = processes.main(["--table", "-o", str(tmp_path / "out")])
    assert [row["engine"] for row in again] == [row["engine"] for row in rows]
