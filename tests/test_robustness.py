"""A small part of `make robustness`: bad inputs as commands, changed files for every reader, kills, two runs at once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def attack(tmp_path, *arguments):
    """Run the attack; its page, once nothing was answered badly."""
    command = [sys.executable, "tests/robustness.py", "--jobs", "2", "--out", tmp_path / "page.md", *arguments]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return (tmp_path / "page.md").read_text()


def test_a_sample_of_the_attack_is_answered_well(tmp_path):
    page = attack(tmp_path, "--share", "0.0015", "--kills", "1", "--every", "60")
    assert "| good cases lost | 0 |" in page and "| wrong without a word | 0 |" in page and "None." in page


@pytest.mark.long
def test_a_tenth_of_the_attack_is_answered_well(tmp_path):
    page = attack(tmp_path, "--share", "0.1", "--kills", "5", "--every", "10")
    assert "| good cases lost | 0 |" in page and "| wrong without a word | 0 |" in page and "None." in page


def test_the_catalogue_has_250_rows_or_more_and_each_its_own_name(tmp_path):
    done = subprocess.run([sys.executable, "tests/robustness.py", "--list"], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.splitlines()
    assert len(names) == len(set(names)) >= 250, done.stderr
    assert all(any(name.startswith(f"step {step}: ") for name in names) for step in "12345")
