"""The notebooks keep the form that README promises. CI runs them: `python -m notebooks --check`."""

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest

from notebooks.__main__ import FOLDER, SOLUTION, blank, is_check, list_solved, with_blanks

NAMES = [
    "01_preprocess", "02_network", "03_training", "04_quantize", "05_infer", "06_loose_boxes", "07_metrics", "08_tables",
    "09_fork",
]  # fmt: skip
SOLVED = {path.stem: nbformat.read(path, as_version=4) for path in list_solved([])}
LARGEST = 1_000_000  # bytes of a notebook with its outputs, so that it reads well where it is hosted
WORDS, PICTURES, SECTIONS = 1500, 10, 8  # what an afternoon holds: of one notebook, at most


def to_be_worked_through(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_of(book) -> list:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def text_of(book) -> str:
    return "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")


def plain_python(cell) -> ast.Module:
    return ast.parse(re.sub(r"^[%!].*$", "", cell.source, flags=re.MULTILINE))  # without Jupyter's own commands


def test_there_is_one_for_each_part():
    assert list(SOLVED) == NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_was_made_from_the_solved_one(name):
    made, source = to_be_worked_through(name), SOLVED[name]
    assert [cell.source for cell in made.cells] == [blank(cell).source for cell in source.cells], (
        f"python -m notebooks {name[:2]}"
    )
    assert not any(cell.get("outputs") for cell in source.cells), "the source is kept without outputs"
    shown = [cell for cell in code_of(made) if cell.execution_count]
    assert len(shown) > 5 and not any(out.output_type == "error" for cell in shown for out in cell.outputs)
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_finished_and_has_three_exercises_with_checks(name):
    book = to_be_worked_through(name)
    text, first = text_of(book), book.cells[0].source
    pictures = [
        kind for cell in code_of(book) for out in cell.outputs for kind in out.get("data", {}) if "image/" in kind
    ]
    assert len(text.split()) <= WORDS and len(pictures) <= PICTURES
    assert 3 <= len(re.findall(r"^## ", text, re.MULTILINE)) <= SECTIONS
    assert "minutes" in first and "**Before**" in first, "how long it takes, and what to know before"
    assert "SMALL = False" in code_of(book)[0].source
    assert len([cell for cell in book.cells if is_check(cell)]) == 3
    assert len([cell for cell in SOLVED[name].cells if SOLUTION.search(cell.source)]) == 3
    guesses = [i for i, cell in enumerate(book.cells) if cell.source.startswith("my_guess = ")]
    assert len(guesses) >= 3 and all(len(book.cells[i].source.splitlines()) == 1 for i in guesses), "a cell of its own"
    assert sum("off_by(" in cell.source for cell in code_of(book)) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_code_cells_are_short_and_define_nothing_that_a_module_has(name):
    defined = {
        node.name
        for path in Path(FOLDER.parent).glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for cell in code_of(SOLVED[name]):
        assert len(cell.source.splitlines()) <= 20, cell.source
        found = {node.name for node in ast.walk(plain_python(cell)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not found & defined, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_has_a_text_for_those_who_cannot_see_it(name):
    for cell in code_of(to_be_worked_through(name)):
        for output in cell.outputs:
            kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
            assert all(len(output.metadata.get(kind, {}).get("alt", "")) > 20 for kind in kinds), cell.source


@pytest.mark.parametrize("name", NAMES)
def test_no_assertion_reads_a_committed_table_alone(name):
    """A number of results/ was measured elsewhere: it is shown with its command, and cannot fail here."""
    for cell in code_of(SOLVED[name]):
        if "results/" in cell.source:
            assert not any(isinstance(node, ast.Assert) for node in ast.walk(plain_python(cell))), cell.source


@pytest.mark.parametrize("name", NAMES)
def test_no_output_holds_a_place_on_a_computer(name):
    for cell in code_of(to_be_worked_through(name)):
        for output in cell.outputs:
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"(^|[\s'\"(=])(/[\w.-]+){2,}|[A-Z]:\\", text), text  # an absolute path


def test_a_solution_is_left_out_and_its_check_runs_on_the_blank_first():
    new = nbformat.v4.new_code_cell
    exercise = new("def half(x):\n    # begin solution\n    return x / 2\n    # end solution")
    check = new("# Check 1\nassert half(4) == 2")
    assert blank(exercise).source == "def half(x):\n    ...  # your code"
    run = with_blanks([new("x = 1"), exercise, nbformat.v4.new_markdown_cell("words"), check])
    assert [cell.source.split("\n")[-1].strip() for cell in run] == [
        "x = 1", "...  # your code", "assert half(4) == 2", "# end solution", "words", "assert half(4) == 2",
    ]  # fmt: skip
    assert [bool(cell.metadata.get("trial")) for cell in run] == [False, True, True, False, False, False]


def test_the_page_of_figures_and_tables_names_what_there_is():
    text = (FOLDER.parent / "docs" / "figures_and_tables.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:Figure|Table) \d) \|[^|]*\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == [f"Figure {i}" for i in range(1, 4)] + [f"Table {i}" for i in range(1, 7)]
    for name, functions, books in rows:
        for dotted in re.findall(r"`([\w.]+)`", functions):
            module, _, function = dotted.rpartition(".")
            assert callable(getattr(importlib.import_module(module), function)), dotted
        drawn = re.search(r"`[\w.]*?(\w+)`", functions)[1]
        for book in re.findall(r"\[(\w+)\]", books):
            assert any(f"{drawn}(" in cell.source for cell in code_of(SOLVED[book])), (name, book)
    kept = {path.name for path in (FOLDER.parent / "results").iterdir() if path.is_dir()} - {"paper"}
    assert kept <= set(re.findall(r"^\| `(\w+)` \| `python", text, re.MULTILINE)), "each with the command that made it"
