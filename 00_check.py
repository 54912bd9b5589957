"""Step 0, check the environment: Python, packages, LiteMedSAM's weights.

python 00_check.py prints what is missing, and how to get it.
"""

import argparse
import importlib
import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

from formats import usable_cores

OLDEST_PYTHON = (3, 11)
DISK_GB = 1  # the demo's files and room to spare
INSTALL = "run: python -m pip install -r requirements.txt"


def check_package(name: str, wanted: str) -> tuple[bool, str]:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False, f"{name}: not installed; {INSTALL}"
    good = found.split("+")[0] == wanted  # "+cpu" only names the build
    return good, f"{name} {found}" + f": tested with {wanted}; {INSTALL}" * (not good)


def check_weights() -> tuple[bool, str]:
    try:
        for name in ("cv2", "torch"):  # their shared libraries are the ones that bare systems lack
            importlib.import_module(name)
        importlib.import_module("formats.checkpoints").lite_medsam_path()
    except (ImportError, OSError) as error:
        return False, f"a package does not load ({error}); {INSTALL} --force-reinstall"
    except ValueError as error:
        return False, str(error)
    return True, "LiteMedSAM weights, sha256 as published"


def main(argv: list[str] | None = None) -> int:
    """Returns the number of failed checks, which is also the exit code's sign."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    lines = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").splitlines()
    python, oldest = (".".join(map(str, numbers)) for numbers in (sys.version_info[:3], OLDEST_PYTHON))
    new = sys.version_info >= OLDEST_PYTHON
    checks = [(new, f"Python {python}" + f": too old, install Python {oldest} or newer" * (not new))]
    checks += [check_package(*match.groups()) for line in lines if (match := re.match(r"([\w.-]+)==([\w.]+)", line))]
    installed = all(good for good, _ in checks)
    checks.append(check_weights() if installed else (False, "LiteMedSAM weights: install the packages first"))
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    checks.append((free >= DISK_GB, f"{free:.0f} GB free on disk; the demo needs {DISK_GB} GB"))
    for good, text in checks:
        print("[OK]  " if good else "[FAIL]", text)
    failed = sum(not good for good, _ in checks)
    advice = f"{failed} to mend, see above." if failed else "ready. Next: make demo"
    print(f"00_check.py: {usable_cores()} CPU cores, {advice}")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
