"""The notebooks keep the form that README promises. CI runs them: `python -m notebooks --check`."""

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest

from notebooks.__main__ import FOLDER, LARGEST, list_notebooks

NOTEBOOKS = {path.relative_to(FOLDER).as_posix(): nbformat.read(path, as_version=4) for path in list_notebooks([])}
COMPANIONS = {name: book for name, book in NOTEBOOKS.items() if "/" not in name}


def code_of(book) -> list:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_there_is_one_for_each_stage_with_solutions():
    stages = ["01_preprocess", "02_train", "03_quantize", "04_infer", "05_evaluate", "06_paper_vs_code", "07_fork"]
    assert list(NOTEBOOKS) == [f"{stage}.ipynb" for stage in stages] + [f"solutions/{stage}.ipynb" for stage in stages]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_starts_alike_and_has_its_outputs(name):
    cells, first = NOTEBOOKS[name].cells, code_of(next(iter(NOTEBOOKS.values())))[0]
    assert cells[0].cell_type == "markdown" and code_of(NOTEBOOKS[name])[0].source == first.source
    assert "SMALL = False" in first.source
    assert [cell.execution_count for cell in code_of(NOTEBOOKS[name])] == list(
        range(1, len(code_of(NOTEBOOKS[name])) + 1)
    )
    assert not any(output.output_type == "error" for cell in code_of(NOTEBOOKS[name]) for output in cell.outputs)
    assert (FOLDER / name).stat().st_size <= LARGEST


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_code_cells_are_short_and_define_nothing_that_a_module_has(name):
    defined = {
        node.name
        for path in Path(FOLDER.parent).glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for cell in code_of(NOTEBOOKS[name]):
        assert len(cell.source.splitlines()) <= 15, cell.source
        code = re.sub(r"^%.*$", "", cell.source, flags=re.MULTILINE)  # Jupyter's own commands
        found = {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not found & defined, cell.source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_picture_has_a_text_for_those_who_cannot_see_it(name):
    pictures = 0
    for cell in code_of(NOTEBOOKS[name]):
        for output in cell.outputs:
            kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
            pictures += len(kinds)
            assert all(len(output.metadata.get(kind, {}).get("alt", "")) > 20 for kind in kinds), cell.source
    assert pictures >= (3 if name in COMPANIONS else 0)


@pytest.mark.parametrize("name", COMPANIONS)
def test_each_section_asks_observes_and_checks(name):
    text = "\n".join(cell.source for cell in COMPANIONS[name].cells if cell.cell_type == "markdown")
    first = COMPANIONS[name].cells[0].source
    assert "minutes" in first and "SMALL" in first and "must have run" in first
    assert text.count("**Predict") >= 4 and text.count("**Observe.**") >= 4
    assert re.search(r"^## Exercises", text, re.MULTILINE) and f"solutions/{name}" in text
    asserts = sum(
        isinstance(node, ast.Assert)
        for cell in code_of(COMPANIONS[name])
        for node in ast.walk(ast.parse(re.sub(r"^%.*$", "", cell.source, flags=re.MULTILINE)))
    )
    sections = len(re.findall(r"^## \d", text, re.MULTILINE))
    assert sections >= 5 and asserts >= sections, "every section ends with a check of what it claimed"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_output_holds_a_place_on_a_computer(name):
    for cell in code_of(NOTEBOOKS[name]):
        for output in cell.outputs:
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"(^|[\s'\"(=])(/[\w.-]+){2,}|[A-Z]:\\", text), text  # an absolute path


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
            assert any(f"{drawn}(" in cell.source for cell in code_of(NOTEBOOKS[f"{book}.ipynb"])), (name, book)
    kept = {path.name for path in (FOLDER.parent / "results").iterdir() if path.is_dir()} - {"paper"}
    assert kept <= set(re.findall(r"^\| `(\w+)` \| `python", text, re.MULTILINE)), "each with the command that made it"
