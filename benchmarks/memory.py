"""Peak memory and time of one large volume, 287x512x512 with 6 objects on different slices: python benchmarks/memory.py

Prints one line. The volume is a drawing; what counts is its size. 1.5 GB is the limit that volumes.py is written for.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

from table5_work import peak_megabytes

from readers import Case, InputError
from segment import ENGINES, MODELS, load_segmenter

SHAPE = (287, 512, 512)


def large_volume() -> Case:
    """Six bright balls in noise, their middles spread so that most slices are visited on both ways."""
    volume = np.random.default_rng(0).integers(20, 60, SHAPE, dtype=np.uint8)
    boxes = []
    for i, middle in enumerate(np.linspace(80, 206, 6).astype(int)):
        y, x, radius = 130 + 250 * (i // 3), 90 + 165 * (i % 3), 70
        z0, z1 = max(0, middle - radius), min(SHAPE[0] - 1, middle + radius)
        for z in range(z0, z1 + 1):
            side = int((radius**2 - (z - middle) ** 2) ** 0.5)
            volume[z, y - side : y + side + 1, x - side : x + side + 1] += 120
        boxes.append([x - radius, y - radius, z0, x + radius, y + radius, z1])
    return Case("3DBox_CT_large", volume, np.array(boxes, float), None, None, True)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", choices=MODELS, default="proposed", help="the network")
    p.add_argument("--weights", type=Path, help="checkpoint, or NAME.static.xml (default: the model's)")
    p.add_argument("--engine", choices=ENGINES, default="torch", help="what runs it")
    args = p.parse_args(argv)
    case = large_volume()
    try:
        segmenter = load_segmenter(args.model, args.weights, engine=args.engine)
        start = time.perf_counter()
        labels = segmenter.segment(case)
    except InputError as error:
        sys.exit(f"memory.py: {error}")
    seconds, peak = time.perf_counter() - start, peak_megabytes() / 1e3
    stages = ", ".join(f"{name} {took:.0f} s" for name, took in segmenter.seconds.items())
    print(f"{args.model}, {args.engine}: {seconds:.0f} s ({stages}), peak {peak:.2f} GB, {labels.max()} objects")


if __name__ == "__main__":
    main()
