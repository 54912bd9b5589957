"""The progress bar: a bar on a terminal and in a Jupyter page, nothing in a log."""

import io
from types import SimpleNamespace

import pytest

from formats.writing import progress


class Terminal(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_a_bar_and_a_log_nothing(monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stderr", Terminal(is_terminal))
    import sys

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
