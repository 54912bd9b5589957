"""`python -m engines onnx`: files that ONNX Runtime answers with as model.py does, and one sentence where it cannot."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import segment
from formats.pictures import read_image

ROOT = Path(__file__).parent.parent
BOX = [44, 200, 112, 274]  # of examples/onnx_example.py


def test_a_missing_package_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit, match="onnxruntime.*requirements-onnx.txt"):
        importlib.import_module("engines.__main__").main(["onnx", "-o", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_files_give_the_masks_of_pytorch_without_pytorch(tmp_path):
    pytest.importorskip("onnxruntime")
    importlib.import_module("engines.__main__").main(["onnx", "-o", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "decoder-drawn.onnx",
        "decoder-exact.onnx",
        "decoder-followed.onnx",
        "encoder.onnx",
    ]
    code = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, ROOT / "examples" / "onnx_example.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    segmenter, image = segment.load("proposed"), read_image(ROOT / "examples" / "retina.jpg")
    found = segmenter.masks(segmenter.embed(image), np.array([BOX]), image.shape[:2], "drawn")
    assert abs(int(done.stdout.split()[0]) - int(found.own(0).sum())) <= 2
    assert float(done.stdout.split()[-1]) == pytest.approx(float(found.iou[0]), abs=1e-3)
