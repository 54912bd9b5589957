"""The rules of the house, checked: finishable files, one definition of each thing, imports that go one way."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from presets import CHOICES, PRESETS, Preset, override, table
from readers import InputError

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "benchmarks").glob("*.py"))
SCRIPTS = [
    path
    for path in SOURCES
    if path.name[0].isdigit() or path.name in ("table4.py", "table5.py", "stages.py", "choices.py", "run_length.py")
]
# a module may import only those before it
ORDER = [
    "metrics", "tables", "intervals", "readers", "int8_report", "scoring", "writers", "presets", "enhance", "efficientvit",
    "model", "losses", "data",
    "runlength", "cache", "dataset", "baseline", "weights", "quantize", "fused", "fast_decoder", "openvino_engine", "volumes", "segment", "static_int8",
    "resident", "demo_images", "phantoms_3d", "phantoms_2d", "phantoms", "figures", "teacher", "trainer", "table4_report",
    "table5_cases", "table5_work", "table5_report", "memory",
]  # fmt: skip


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_every_file_and_function_can_be_read_in_one_sitting(path):
    limit = 250 if path in SCRIPTS else 400
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_every_file_and_public_function_says_what_it_is(path):
    module = tree(path)
    assert ast.get_docstring(module)
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if path in SCRIPTS or node.name == "main":
                continue
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_each_thing_is_defined_once():
    seen = {}
    for path in SOURCES:
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("main", "parse", "run"):
                assert node.name not in seen, f"{node.name} is defined in {seen[node.name]} and in {path.name}"
                seen[node.name] = path.name


# benchmarks/runlength.py is a program, named after the module that it measures
@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p not in SCRIPTS and p != ROOT / "benchmarks" / "runlength.py"], ids=lambda p: p.name
)
def test_modules_import_downwards_only(path):
    below = ORDER[: ORDER.index(path.stem)]
    for node in tree(path).body:  # imports under TYPE_CHECKING name types only
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            assert name not in ORDER or name in below, f"{path.name} must not import {name}"


def test_nothing_is_read_unsafely():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "allow_pickle=True" not in text and "weights_only=False" not in text


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "phantoms.py", ROOT / "figures.py"], ids=lambda p: p.name)
def test_help_works_and_every_flag_explains_itself(path, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(path.stem).main(["--help"])
    assert stop.value.code == 0 and "--help" in capsys.readouterr().out
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            assert any(keyword.arg == "help" for keyword in node.keywords), ast.unparse(node)


def test_presets_cite_differences_that_exist():
    listed = {int(n) for n in re.findall(r"^\| #?(\d+) \|", (ROOT / "PAPER_VS_CODE.md").read_text(), re.MULTILINE)}
    assert listed >= set(range(1, 51))
    for path in SOURCES:
        for cited in re.findall(r"#(\d+)\b", re.sub(r"#\d+\.png", "", path.read_text(encoding="utf-8"))):
            assert 1 <= int(cited) <= 50, f"{path.name} cites #{cited}"


def test_presets_are_frozen_valid_and_override_checks_names_and_values():
    for preset in PRESETS.values():
        assert all(getattr(preset, field) in values for field, values in CHOICES.items())
        with pytest.raises(AttributeError):
            preset.kappa = 1.0
    assert override(PRESETS["fixed"], ["kappa=12.5", "overlap=last"]) == Preset(kappa=12.5, overlap="last")
    for bad, message in (
        ("kapa=1", "no such field"),
        ("overlap=first", "one of logit, last"),
        ("kappa=x", "number"),
        ("gamma=0.3", "lie in"),
    ):
        with pytest.raises(InputError, match=message):
            override(PRESETS["fixed"], [bad])
    assert table().count("\n") == 1 + len(vars(Preset())) - 1


def test_readme_shows_the_preset_table():
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8"), "run: python presets.py"
