"""How fast the run-length encoder is, next to the released Python loop, on the same masks in the same run. [P 2.1]

    python benchmarks/run_length.py                 30 s; writes results/runlength.csv

The encoders take turns, and the best of many turns counts: whatever disturbs a measurement makes it longer.
"""

import argparse
import gc
import pickle
import sys
from pathlib import Path
from timeit import timeit

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import encode_runs  # noqa: E402
from files.writing import csv_text, save_text  # noqa: E402


def released_loop(mask: np.ndarray) -> list[tuple]:
    """What the released code does, operation for operation: (start from 1, length, value), background between objects too."""
    pixels = np.concatenate([[0], mask.flatten(), [0]])
    edges = np.where(np.diff(pixels) != 0)[0] + 1
    return [(edges[i], edges[i + 1] - edges[i], pixels[edges[i]]) for i in range(len(edges) - 1)]


# Each pair: the released encoder, ours. A cache needs the code as bytes: pickled.
PICKLED = (lambda m: pickle.dumps(released_loop(m)), lambda m: pickle.dumps(encode_runs(m), protocol=4))
ENCODERS = {"encode": (released_loop, encode_runs), "encode, pickled": PICKLED}


def masks() -> dict[str, np.ndarray]:
    """The golden mask of tests/golden (256, 256), and a busy one: 324 squares of 9 x 9 pixels; uint16."""
    squares = np.zeros((256, 256), np.uint16)
    for i in range(324):
        y, x = divmod(i, 18)
        squares[2 + 14 * y : 11 + 14 * y, 2 + 14 * x : 11 + 14 * x] = i + 1
    golden = np.load(ROOT / "tests" / "golden" / "released_rle_mask_decoded.npz")["mask"]
    return {"golden, 4 objects": golden, "324 squares": squares}


def microseconds(encode, mask: np.ndarray) -> float:
    """A call's mean over ten, after one that warms up, with Python's garbage collection as in use."""
    return timeit(lambda: encode(mask), lambda: (gc.enable(), encode(mask)), number=10) * 1e5


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--turns", type=int, default=60, help="turns of each encoder, 1 or more")
    p.add_argument("-o", "--out", type=Path, default=ROOT / "results" / "runlength.csv", help="table to write")
    args, rows = p.parse_args(argv), []
    for name, mask in masks().items():
        sizes = [len(encode(mask)) for encode in PICKLED]
        for what, encoders in ENCODERS.items():
            turns = [[microseconds(encode, mask) for encode in encoders] for _ in range(args.turns)]
            released, ours = map(min, zip(*turns, strict=True))
            row = {"mask": name, "runs": len(released_loop(mask)), "what": what} | {
                "released_us": released,
                "ours_us": ours,
            }
            rows.append(row | {"times_as_fast": released / ours, "released_bytes": sizes[0], "ours_bytes": sizes[1]})
            print(f"{name}, {what}: released {released:.1f} us, ours {ours:.1f} us, {released / ours:.1f} times")
    save_text(args.out, csv_text(rows, tuple(rows[0])))
    return rows


if __name__ == "__main__":
    main()
