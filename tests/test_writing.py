"""What a run writes: one run at a time in a folder, tables that run nothing; a bar on a terminal, nothing in a log."""

import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import tables
from formats import InputError
from formats.cache import CacheEntry, read_index, write_index
from formats.writing import csv_text, one_run, progress, someone_is_there, tell

ROOT = Path(__file__).parent.parent


class Terminal(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_a_bar_and_a_log_nothing(monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stderr", Terminal(is_terminal))
    assert list(progress(range(3), "slices", unit="slice")) == [0, 1, 2]
    told = sys.stderr.getvalue()
    assert ("slices: 100%" in told and "slice/s" in told) if is_terminal else told == ""


def test_in_jupyter_a_page_gets_a_widget_and_a_program_nothing(monkeypatch):
    made = []
    monkeypatch.setattr("sys.stderr", Terminal(False))
    monkeypatch.setattr("tqdm.notebook.tqdm", lambda iterable, **options: made.append(options) or iterable)
    for answers in (True, False):
        kernel = SimpleNamespace(get_parent=lambda channel, answers=answers: {"content": {"allow_stdin": answers}})
        monkeypatch.setattr("IPython.get_ipython", lambda kernel=kernel: SimpleNamespace(kernel=kernel))
        assert list(progress([1, 2], "cases")) == [1, 2]
    assert [options["desc"] for options in made] == ["cases"]


# ---------------------------------------------------------------- one run at a time

HOLD = """
import sys, time
from pathlib import Path
from formats.writing import one_run
with one_run(Path(sys.argv[1]), file=sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """Starts processes that hold a folder, or files in it; all are ended."""
    started = []

    def hold(folder, file=""):
        command = [sys.executable, "-c", HOLD, str(folder), file]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_folder_is_one_runs_and_a_dead_ones_is_taken_over_with_its_temporary_files(tmp_path, holder):
    first, names = holder(tmp_path / "out"), ["a.png.0123abcd.tmp", "sub/b.0123abcd.tmp", "of_others.tmp", "a.png"]
    (tmp_path / "out" / "sub").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text("half")
    with pytest.raises(InputError, match=f"process {first.pid} of .* is writing here; wait for it"):
        with one_run(tmp_path / "out", "sub"):
            pass
    assert all((tmp_path / "out" / name).exists() for name in names), "they may be the other's"
    first.kill()
    first.wait()
    with one_run(tmp_path / "out", "sub", "missing"):
        assert [(tmp_path / "out" / name).exists() for name in names] == [False, False, True, True]
        assert str(os.getpid()) in (tmp_path / "out" / ".lock").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "of_others.tmp", "sub"]


def test_two_runs_may_write_other_files_of_one_folder(tmp_path, holder):
    holder(tmp_path, "a.dynamic")
    (tmp_path / "a.dynamic.pt.0123abcd.tmp").write_text("half")
    with one_run(tmp_path, file="b.dynamic"):
        assert (tmp_path / "a.dynamic.pt.0123abcd.tmp").exists()
    with pytest.raises(InputError, match="is writing here"), one_run(tmp_path, file="a.dynamic"):
        pass


def test_a_run_that_fails_leaves_no_folder_behind(tmp_path):
    with pytest.raises(InputError), one_run(tmp_path / "new"):
        raise InputError("nothing to do")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file, so no folder can be made there"):
        with one_run(tmp_path / "file" / "out"):
            pass


def test_of_many_that_begin_at_once_one_holds_the_folder(tmp_path):
    code = HOLD.replace("time.sleep(60)", "time.sleep(1)")
    command = [sys.executable, "-c", code, str(tmp_path / "out"), ""]
    each = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    told = [process.communicate() for process in each]
    held = sum(out == b"held\n" for out, _ in told)
    refused = sum(b"is writing here" in error for _, error in told)
    assert held >= 1 and held + refused == 4


# ---------------------------------------------------------------- text that a program would run

HOSTILE = ("=cmd|' C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'quoted", "a,b", "-5", "1e-5", "", "a\nb")


def test_no_cell_of_a_table_is_a_formula_and_names_come_back(tmp_path):
    rows = [{"name": name, "score": -0.5, "count": -3} for name in HOSTILE]
    (tmp_path / "a.csv").write_text(csv_text(rows, ("name", "score", "count")), newline="")
    with (tmp_path / "a.csv").open(newline="") as file:
        cells = [row[0] for row in csv.reader(file)][1:]
    assert [cell for cell in cells if cell[:1] in tuple("=+-@\t\r")] == ["-5"], "a number runs nothing"
    found = tables.read_rows(tmp_path / "a.csv")
    assert [row["name"] for row in found] == list(HOSTILE)
    assert {row["score"] for row in found} == {"-0.500000"} and {row["count"] for row in found} == {"-3"}


def test_a_name_that_is_a_formula_is_in_the_index_and_comes_back(tmp_path):
    names = [f"{name}_{i}" for i, name in enumerate((*HOSTILE, "\udcff"))]
    entries = [CacheEntry(name, "US", "US", name, "=1.png", 8, 8, "train", 1) for name in names]
    write_index(tmp_path, entries)
    assert sorted(entry.name for entry in read_index(tmp_path)) == sorted(names)
    assert b",=1.png" not in (tmp_path / "index.csv").read_bytes()


def test_a_markdown_table_runs_no_script_and_keeps_its_columns():
    text = tables.pipe_table([["a|b", "<script>alert(1)</script>"], ["x\n|y", "2"]])
    assert "<script" not in text and len(text.splitlines()) == 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()} == {3}


def test_what_is_told_moves_no_cursor(capsys):
    tell("a\x1b[2Jb\udcff\x9b1m\rc\nd")
    tell("\x1b]0;title\x07\u202egpj", error=True)
    assert capsys.readouterr() == ("a\\x1b[2Jb\\udcff\\x9b1m\\rc\nd\n", "\\x1b]0;title\\x07\\u202egpj\n")


@pytest.mark.parametrize("message, want", [({}, False), ({"content": {"allow_stdin": False}}, False), ({"content": {"allow_stdin": True}}, True)])  # fmt: skip
def test_a_runner_of_notebooks_is_told_from_a_page_by_whether_it_can_answer_questions(monkeypatch, message, want):
    kernel = SimpleNamespace(get_parent=lambda channel: message)
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=kernel))
    assert someone_is_there() is want
