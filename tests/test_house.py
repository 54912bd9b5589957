"""The rules of the house, checked for whatever files there are: imports go down, each thing is defined once."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from formats import InputError
from presets import CHOICES, PRESETS, Preset, override, table

ROOT = Path(__file__).parent.parent
FORMATS = "formats"  # the side room that every module may import
SIDE_ROOMS = (
    "engines",
    "recipe",
    "page",
    "demo_data",
    "benchmarks",
    "notebooks",
    "examples",
)  # what no taught module imports
SOURCES = {  # module -> file
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] != "tests" and not path.relative_to(ROOT).parts[0].startswith(".")
}
# Each module may import those of earlier levels, and its own level without a circle. A file that is not named here:
# a root module belongs to the level of `segment`, a script comes last, a room's file has its room's level.
LEVELS = (
    (FORMATS,),
    ("grid",),
    ("metrics", "presets", f"{FORMATS}.*"),
    ("enhance", "efficientvit"),
    ("model",),
    ("baseline", "quantize", "data"),
    ("segment", "*"),
    ("volumes", "tables", "figures", "training"),
    tuple(f"{room}.*" for room in SIDE_ROOMS),
    ("scripts",),
)
WITHOUT_TORCH = (
    "grid",
    "enhance",
    "volumes",
    "metrics",
    "tables",
    "figures",
    "presets",
    "segment",
    "data",
    f"{FORMATS}.*",
)


OWN_IN_EACH = ("main", "parse", "run")  # what each script has of its own


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(module: str) -> set[str]:
    """Our modules that a module imports, imports inside functions included."""
    found = set()
    for node in ast.walk(tree(SOURCES[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(SOURCES) - {module}


def level_of(module: str) -> int:
    names = [module, f"{module.split('.')[0]}.*"] if "." in module or module in SIDE_ROOMS else [module]
    if module[0].isdigit():
        names = ["scripts"]
    for name in [*names, "*"]:
        for level, members in enumerate(LEVELS):
            if name in members:
                return level
    raise AssertionError(module)


def test_every_file_and_public_function_says_what_it_is():
    for module, path in SOURCES.items():
        assert ast.get_docstring(tree(path)), path
        script = module[0].isdigit() or path.parent.name == "benchmarks" or path.name == "__main__.py"
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not script:
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_each_thing_is_defined_once():
    seen = {}
    for path in SOURCES.values():
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in OWN_IN_EACH:
                assert node.name not in seen, f"{node.name} is defined in {seen[node.name]} and in {path}"
                seen[node.name] = path


def test_imports_go_down_and_in_no_circle():
    graph = {module: imports_of(module) for module in SOURCES}
    for module, found in graph.items():
        taught = "." not in module and not module[0].isdigit() and module not in SIDE_ROOMS
        for other in found:
            assert level_of(other) <= level_of(module), f"{module} must not import {other}, which lies above it"
            assert not other[0].isdigit(), f"{module} imports the script {other}"
            if taught:
                assert other.split(".")[0] not in SIDE_ROOMS, f"{module} is taught, and imports {other} of a side room"
    done, open_ = set(), []

    def walk(module):
        assert module not in open_, f"circle: {' -> '.join([*open_, module])}"
        if module not in done:
            open_.append(module)
            for other in sorted(graph[module]):
                walk(other)
            done.add(open_.pop())

    for module in SOURCES:
        walk(module)


def test_nothing_below_a_script_takes_its_arguments_or_stops_the_program():
    for module, path in SOURCES.items():
        script = module[0].isdigit() or path.parent.name == "benchmarks" or path.name in ("__main__.py", "presets.py")
        if not script:
            text = path.read_text(encoding="utf-8")
            if module == f"{FORMATS}.writing":  # `script`, what scripts run in, ends them, and nothing else does
                assert (
                    text.count("sys.exit") == 1 and "sys.exit" in text.partition("def script(")[2].partition("def ")[0]
                )
                text = text.replace("sys.exit", "")
            assert "argparse" not in text and "sys.exit" not in text and "SystemExit" not in text, path


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.splitlines()[-1].split())


def test_modules_that_need_no_pytorch_load_none():
    names = [m for m in SOURCES if m in WITHOUT_TORCH or f"{m.split('.')[0]}.*" in WITHOUT_TORCH]
    assert len(names) > len(WITHOUT_TORCH)
    assert not {"torch", "matplotlib"} & loaded_by(f"import {', '.join(names)}")


def files_loaded(code: str) -> list[str]:
    """Our files that a run loads, without __init__ and scripts."""
    return sorted(
        m for m in loaded_by(code) & set(SOURCES) if SOURCES[m].name != "__init__.py" and not m[0].isdigit()
    )  # fmt: skip


def test_a_picture_loads_at_most_16_of_our_files(tmp_path):
    from demo_data import tiny_case
    from formats.writing import save_image

    save_image(tmp_path / "scan.png", tiny_case().image)
    arguments = ["-i", "scan.png", "-o", "out", "--box", "10", "8", "45", "40", "--model", "baseline"]
    arguments = [str(tmp_path / a) if a in ("scan.png", "out") else a for a in arguments]
    found = files_loaded(f"import importlib; importlib.import_module('04_infer').main({arguments})")
    assert "model" in found and len(found) <= 16, found


def test_training_loads_at_most_16_of_our_files():
    code = "import importlib; importlib.import_module('02_train'); import baseline"  # the decoder's donor
    found = files_loaded(code)
    assert "training" in found and len(found) <= 16, found


def test_a_picture_visits_at_most_nine_files_on_its_way_to_the_mask(tmp_path):
    """Counted by the functions of ours that run between `read_case` and the label map."""
    from demo_data import tiny_case
    from formats.readers import read_case
    from formats.writing import save_npz
    from segment import load
    from volumes import segment_case

    case = tiny_case()
    save_npz(tmp_path / "2DBox_US_a.npz", imgs=case.image, boxes=[[10, 8, 45, 40]])
    segmenter, visited = load("baseline"), set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path in SOURCES.values():
            visited.add(path.name)

    sys.setprofile(note)
    try:
        segment_case(segmenter, read_case(tmp_path / "2DBox_US_a.npz"))
    finally:
        sys.setprofile(None)
    # the 256 grid, checks and the network's own files; __init__.py knows modalities by their names
    assert {"segment.py", "volumes.py", "grid.py", "enhance.py", "model.py"} <= visited
    visited = visited - {"__init__.py", "baseline.py"} | {"efficientvit.py"}
    assert len(visited) <= 9, visited


def test_nothing_is_read_unsafely():
    for path in SOURCES.values():
        text = path.read_text(encoding="utf-8")
        assert "allow_pickle=True" not in text and "weights_only=False" not in text


PROGRAMS = [
    (path.parent.name if path.parent != ROOT else "", module)
    for module, path in SOURCES.items()
    if module[0].isdigit()
    or path.name == "__main__.py"
    or (path.parent.name == "benchmarks" and "def main" in path.read_text("utf-8"))
]


@pytest.mark.parametrize("folder, module", PROGRAMS, ids=lambda name: name or ".")
def test_help_works_and_every_flag_explains_itself(folder, module, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module.removeprefix("benchmarks.")).main(["--help"])
    assert stop.value.code == 0 and "--help" in capsys.readouterr().out
    flags = [
        node
        for node in ast.walk(tree(SOURCES[module]))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
    ]
    for node in flags:
        assert any(keyword.arg == "help" for keyword in node.keywords), ast.unparse(node)
    if module[0].isdigit():  # flags are for what a reader of the paper would vary
        assert len(flags) <= (12 if module.startswith("02") else 10), f"{module} has {len(flags)} flags"


# ---------------------------------------------------------------- paper, code, ours


def test_differences_that_are_cited_exist():
    listed = {
        int(n) for n in re.findall(r"^\| #?(\d+) \|", (ROOT / "PAPER_VS_CODE.md").read_text("utf-8"), re.MULTILINE)
    }
    assert listed >= set(range(1, 51))
    for path in SOURCES.values():
        for cited in re.findall(r"#(\d+)\b", re.sub(r"#\d+\.png", "", path.read_text(encoding="utf-8"))):
            assert 1 <= int(cited) <= 50, f"{path.name} cites #{cited}"


def test_our_departures_stand_in_the_list_and_at_their_line():
    rows = re.findall(r"^\| (D\d+) \|.*\| ([^|]*) \|$", (ROOT / "PAPER_VS_CODE.md").read_text("utf-8"), re.MULTILINE)
    listed = {number: re.findall(r"`([\w/]+\.py)`", where) for number, where in rows}
    assert list(listed) == [f"D{i}" for i in range(1, len(listed) + 1)] and all(listed.values())
    for number, files in listed.items():
        for name in files:
            assert re.search(rf"\b{number}\b", (ROOT / name).read_text("utf-8")), f"{name} does not say {number}"
    for path in SOURCES.values():
        for number in set(re.findall(r"(?<![\w#])D\d{1,2}\b(?! =)", path.read_text("utf-8"))):
            assert number in listed, f"{path.name} names {number}, which PAPER_VS_CODE.md does not list"


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


def test_the_page_shows_the_preset_table():
    assert table() in (ROOT / "docs" / "presets.md").read_text(encoding="utf-8"), "run: python presets.py"


# What could run code of a file, or of its name, when it is read
UNSAFE = (
    r"\bpickle\.loads?\(", r"\bcPickle\b|\bdill\b|\bjoblib\.load", r"torch\.load\((?!.*weights_only=True)",
    r"allow_pickle\s*=\s*True", r"yaml\.(?!safe_load)\w*load", r"(?<![\w.])eval\(", r"(?<![\w.])exec\(",
    r"shell\s*=\s*True", r"os\.(system|popen)\(", r"\bmarshal\.loads?\(", r"\bshelve\b", r"extractall\(",
    r"xml\.(etree|dom|sax)", r"weights_only\s*=\s*False",
)  # fmt: skip


def test_nothing_is_read_in_a_way_that_could_run_code():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES.values()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if any(re.search(pattern, line) for pattern in UNSAFE)
    ]
    assert not found, found
    assert re.search(UNSAFE[2], "torch.load(path)") and not re.search(UNSAFE[2], "torch.load(path, weights_only=True)")
