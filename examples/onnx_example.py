"""Segment examples/retina.jpg with the ONNX files alone, without PyTorch: python examples/onnx_example.py onnx

Needs numpy, opencv and onnxruntime. The files: python -m engines onnx -o onnx
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parent.parent))
from enhance import network_input
from formats.pictures import read_image
from grid import boxes_to_grid, logits_to_original
from presets import PRESETS


def main(folder: Path) -> None:
    """folder: of encoder.onnx and decoder-drawn.onnx."""
    box = [44, 200, 112, 274]  # x_min y_min x_max y_max, pixels, drawn by hand
    image = read_image(Path(__file__).parent / "retina.jpg")  # (H, W, 3)
    height, width = image.shape[:2]
    channels = network_input(
        image, PRESETS["fixed"], enhanced=True
    )  # (3, 256, 256): the grid, and of a gray image three channels
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder-drawn"))
    (embedding,) = encoder.run(None, {"image": channels[None]})
    on_grid = boxes_to_grid(np.array([box], float), height, width).astype(np.float32)
    logits, iou = decoder.run(None, {"embedding": embedding, "boxes": on_grid})
    mask = logits_to_original(logits[0, 0], height, width).values > 0  # (H, W)
    print(mask.sum(), "pixels; predicted IoU", iou[0, 0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
