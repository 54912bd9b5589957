"""Step 0, check the environment: Python, packages, LiteMedSAM's weights. Prints what is missing and how to get it.

python 00_check.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent
OLDEST_PYTHON = (3, 11)
DISK_GB = 1  # the demo's files and room to spare


def check_python() -> tuple[bool, str]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= OLDEST_PYTHON
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return good, f"Python {version}" + ("" if good else f": too old, install Python {oldest} or newer")


def check_package(requirement: str) -> tuple[bool, str]:
    """requirement: "name==version", as in requirements.txt"""
    name, wanted = requirement.split("==")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False, f"{name}: not installed; run: python -m pip install -r requirements.txt"
    if found.split("+")[0] != wanted:  # "+cpu" only names the build
        return False, f"{name} {found}: tested with {wanted}; run: python -m pip install -r requirements.txt"
    return True, f"{name} {found}"


def check_weights() -> tuple[bool, str]:
    try:
        import cv2  # noqa: F401  its shared libraries are the ones that bare systems lack
        import torch  # noqa: F401

        from files.checkpoints import lite_medsam_path

        lite_medsam_path()
    except (ImportError, OSError) as error:
        return (
            False,
            f"a package does not load ({error}); run: python -m pip install --force-reinstall -r requirements.txt",
        )
    except ValueError as error:
        return False, str(error)
    return True, "LiteMedSAM weights, sha256 as published"


def check_disk() -> tuple[bool, str]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    good = free >= DISK_GB
    return good, f"{free:.0f} GB free on disk" + ("" if good else f": the demo needs {DISK_GB} GB, free some")


def main(argv: list[str] | None = None) -> int:
    """Returns the number of failed checks, which is also the exit code's sign."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [match.group() for line in lines if (match := re.match(r"[\w.-]+==[\w.]+", line))]
    checks = [check_python(), *(check_package(r) for r in requirements)]
    if all(good for good, _ in checks):
        checks.append(check_weights())
    else:
        checks.append((False, "LiteMedSAM weights: not looked at, install the packages first"))
    checks.append(check_disk())
    for good, text in checks:
        print("[OK]  " if good else "[FAIL]", text)
    failed = sum(not good for good, _ in checks)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"00_check.py: {cores} CPU cores, " + (f"{failed} to mend, see above." if failed else "ready. Next: make demo")
    )
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
