"""How fast the run-length encoder is, next to the released Python loop, on the same masks in the same run. [P 2.1]

    python benchmarks/run_length.py                                     30 s; writes results/runlength.csv

Both encoders take turns, so that whatever else the machine does slows both; the best of many turns counts, because
everything that disturbs a measurement makes it longer. "pickled" is what a cache needs: the code, as bytes of a file.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import encode_runs  # noqa: E402
from files.writing import csv_text, save_text  # noqa: E402

COLUMNS = ("mask", "runs", "what", "released_us", "ours_us", "times_as_fast", "released_bytes", "ours_bytes")


def released_loop(mask: np.ndarray) -> list[tuple]:
    """What the paper's development code does, operation for operation: (start from 1, length, value), background too.

    Like there, the runs before the first and after the last change are left out: outside lies background.
    """
    pixels = np.concatenate([[0], mask.flatten(), [0]])
    edges = np.where(np.diff(pixels) != 0)[0] + 1
    return [(edges[i], edges[i + 1] - edges[i], pixels[edges[i]]) for i in range(len(edges) - 1)]


def masks() -> dict[str, np.ndarray]:
    """The golden mask of tests/golden (256, 256), and a busy one: 324 squares of 9 x 9 pixels; uint16."""
    squares = np.zeros((256, 256), np.uint16)
    for i in range(324):
        y, x = divmod(i, 18)
        squares[2 + 14 * y : 11 + 14 * y, 2 + 14 * x : 11 + 14 * x] = i + 1
    golden = np.load(ROOT / "tests" / "golden" / "released_rle_mask_decoded.npz")["mask"]
    return {"golden, 4 objects": golden, "324 squares": squares}


def best_seconds(encoders: list, mask: np.ndarray, turns: int) -> list[float]:
    """Least seconds of one call of each encoder; in every turn each is called ten times, after one call to warm up."""
    best = [float("inf")] * len(encoders)
    for _ in range(turns):
        for i, encode in enumerate(encoders):
            encode(mask)
            start = time.perf_counter()
            for _ in range(10):
                encode(mask)
            best[i] = min(best[i], (time.perf_counter() - start) / 10)
    return best


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of the table."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--turns", type=int, default=60, help="turns of each encoder, of which the best counts")
    p.add_argument("-o", "--out", type=Path, default=ROOT / "results" / "runlength.csv", help="table to write")
    args = p.parse_args(argv)
    if args.turns < 1:
        p.error("--turns must be 1 or more")
    pairs = {
        "encode": (released_loop, encode_runs),
        "encode, pickled": (
            lambda mask: pickle.dumps(released_loop(mask)),
            lambda mask: pickle.dumps(encode_runs(mask), protocol=4),
        ),
    }
    rows = []
    for name, mask in masks().items():
        for what, encoders in pairs.items():
            released, ours = best_seconds(encoders, mask, args.turns)
            sizes = [len(encode(mask)) for encode in pairs["encode, pickled"]]
            found = (name, len(released_loop(mask)), what, released * 1e6, ours * 1e6, released / ours, *sizes)
            rows.append(dict(zip(COLUMNS, found, strict=True)))
            print(f"{name}, {what}: released {found[3]:.1f} us, ours {found[4]:.1f} us, {found[5]:.1f} times")
    save_text(args.out, csv_text(rows, COLUMNS))
    print(f"run_length.py: wrote {args.out}")
    return rows


if __name__ == "__main__":
    main()
