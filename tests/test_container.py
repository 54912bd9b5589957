"""The container's steps without an engine for containers: docker/Dockerfile's files, a clean environment, predict.sh."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
STAGES = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").split("\nFROM ")[-2:]


def copy_as_written(stage: str, place: Path) -> None:
    """What the COPY lines of a stage bring from the repository."""
    for line in re.findall(r"^COPY (?!--from)(.+)$", stage, re.MULTILINE):
        *sources, target = line.split()
        for path in (path for source in sources for path in sorted(ROOT.glob(source))):
            if path.is_dir():
                shutil.copytree(path, place / target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, place / target)


@pytest.mark.long
def test_predict_sh_segments_in_a_clean_environment_without_pytorch_and_checkpoint(tmp_path):
    pytest.importorskip("openvino")
    place, kept = tmp_path / "workspace", tmp_path / "graphs"
    place.mkdir()
    copy_as_written(STAGES[0], place)
    command = re.search(r"^RUN (python 04_infer.+)$", STAGES[0], re.MULTILINE)[1].split()
    done = subprocess.run([sys.executable, *command[1:]], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.move(place / "graphs", kept)
    shutil.rmtree(place)
    place.mkdir()
    copy_as_written(STAGES[1], place)
    shutil.move(kept, place / "graphs")
    assert not (place / "checkpoints").exists()

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "clean"], check=True)
    install = [tmp_path / "clean" / "bin" / "python", "-m", "pip", "install", "-q", "-r", "requirements-infer.txt"]
    subprocess.run(install, cwd=place, check=True, capture_output=True)
    libraries = next((tmp_path / "clean").glob("lib/python*/site-packages/openvino/libs"))
    for pattern in re.search(r"rm -f (.+) \\$", STAGES[1], re.MULTILINE)[1].split():
        assert [path.unlink() for path in libraries.glob(pattern)], f"{pattern}: names no file any more"
    (place / "inputs").mkdir()
    image, boxes = np.full((64, 80), 30, np.uint8), np.array([[20, 10, 60, 50]])
    image[10:51, 20:61] = 200
    np.savez(place / "inputs" / "2DBox_US_square.npz", imgs=image, boxes=boxes)
    path = {"PATH": f"{tmp_path / 'clean' / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run(["sh", "predict.sh"], cwd=place, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mask = np.load(place / "outputs" / "2DBox_US_square.npz")["segs"] > 0
    assert mask.sum() > 0 and (mask & (image == 200)).sum() / (mask | (image == 200)).sum() > 0.9
