"""Run-length code of a label map, and a pickle of it that cannot run code. [P 2.1]

The paper stores masks run-length coded in pickles (PKL). A pickle is a program: it names functions and calls them, so
reading one from a stranger can run anything. Ours is read with a list of allowed names and no other.

Measured on the golden mask (4 objects, 277 runs): 1,821 bytes, 9 times less than the released layout, a pickled list of
numpy integers. Speed against the released Python loop: benchmarks/run_length.py measures it, README says what it found.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import numpy as np

from model import GRID
from readers import MAX_LABEL, InputError
from writers import save_bytes


def encode_runs(mask: np.ndarray) -> np.ndarray:
    """Run-length code of a label map. [P 2.1]

    mask : (H, W) integers, 0 is background.
    Returns (n, 3) int32, rows (start, length, value): `length` pixels of `value` from the `start`-th pixel on,
    counted from 0 along the rows. Runs go on from row to row; background is left out.
    >>> encode_runs(np.array([[0, 5, 5], [5, 0, 7]])).tolist()
    [[1, 3, 5], [5, 1, 7]]
    """
    flat = mask.ravel()
    starts_run = np.empty(flat.size + 1, bool)  # whether a run starts at this pixel; one past the end closes the last
    starts_run[0] = starts_run[-1] = True
    np.not_equal(flat[1:], flat[:-1], out=starts_run[1:-1])
    edges = starts_run.nonzero()[0]
    values = flat[edges[:-1]]
    kept = values.nonzero()[0]  # background goes first: half of the runs need no further work
    starts = edges[kept]
    return np.array((starts, edges[1:][kept] - starts, values[kept]), np.int32).T


def decode_runs(runs: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The label map of a run-length code: the inverse of `encode_runs` -> (H, W) uint16.

    InputError if a run leaves the map, overlaps the one before it, or has a value outside 1..65535.
    """
    runs = np.asarray(runs)
    if runs.ndim != 2 or runs.shape[1] != 3 or runs.dtype.kind not in "iu":
        raise InputError(f"a run-length code has shape (n, 3) and whole numbers, found {runs.shape} {runs.dtype}")
    height, width = shape
    size = height * width
    in_range = ((runs >= 0) & (runs <= max(size, MAX_LABEL))).all()  # so that the sums below cannot overflow
    start, length, value = (runs if in_range else np.full((1, 3), -1)).astype(np.int64).T
    gaps = start - np.concatenate(([0], (start + length)[:-1]))
    good = (gaps >= 0).all() and (length > 0).all() and (start + length <= size).all()
    if not good or (value < 1).any() or (value > MAX_LABEL).any():
        raise InputError(
            f"its runs overlap, leave the {height} x {width} mask, or hold labels outside 1 to {MAX_LABEL}"
        )
    pieces = np.stack([gaps, length], axis=1).ravel()  # background, object, background, object, ...
    colors = np.stack([np.zeros_like(value), value], axis=1).ravel().astype(np.uint16)
    flat = np.zeros(size, np.uint16)
    flat[: pieces.sum()] = np.repeat(colors, pieces)
    return flat.reshape(shape)


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Write the run-length code of a label map as a pickle, the paper's PKL. [P 2.1]"""
    save_bytes(path, pickle.dumps(encode_runs(mask), protocol=4))  # 4: the same bytes on every Python since 3.4


class _StandIn:
    """What a pickled numpy name becomes here. numpy itself never sees the file, so a crafted array header can't hurt."""

    def __setstate__(self, state) -> None:
        raise pickle.UnpicklingError("it sets the state of something that has none")


class _Dtype(_StandIn):
    """numpy.dtype("i4", align, copy), then its state (version, byte order, ...). Whole numbers only."""

    def __init__(self, code: str, *_) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def values(self, content: bytes, shape: tuple = (-1,), order: str = "C") -> np.ndarray:
        """The numbers in `content`."""
        if not re.fullmatch("[<>=|][iu][1248]", f"{self.order}{self.code}"):
            raise pickle.UnpicklingError(f"it holds {self.code!r} data in place of whole numbers")
        return np.frombuffer(content, np.dtype(f"{self.order}{self.code}")).reshape(shape, order=order)


class _Array(_StandIn):
    """_reconstruct(ndarray, (0,), b"b"), then its state (version, shape, dtype, column order?, bytes)."""

    values = None

    def __init__(self, *_) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, content = state
        self.values = dtype.values(content, shape, "F" if by_columns else "C")


class _Buffer(_Array):
    """_frombuffer(bytes, dtype, shape, order): an array in pickle protocol 5."""

    def __init__(self, content: bytes, dtype: _Dtype, shape: tuple, order: str) -> None:
        self.values = dtype.values(content, shape, order)


class _Scalar(_StandIn):
    """scalar(dtype, bytes): one numpy number."""

    def __init__(self, dtype: _Dtype, content: bytes) -> None:
        self.value = int(dtype.values(content)[0])

    def __int__(self) -> int:
        return self.value


# Every name that a pickle may use. numpy 2 renamed numpy.core to numpy._core.
ALLOWED_NAMES = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): "ndarray"}
for _core in ("numpy.core", "numpy._core"):
    ALLOWED_NAMES[f"{_core}.multiarray", "_reconstruct"] = _Array
    ALLOWED_NAMES[f"{_core}.multiarray", "scalar"] = _Scalar
    ALLOWED_NAMES[f"{_core}.numeric", "_frombuffer"] = _Buffer


class _Refused(Exception):
    """A pickle asked for a name that is not allowed."""


class _MaskUnpickler(pickle.Unpickler):
    """Unpickles numbers, lists, tuples and whole-number arrays; every other name is refused before anything runs."""

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED_NAMES:
            raise _Refused(f"{module!r}.{name!r}")
        return ALLOWED_NAMES[module, name]


def load_mask(path: Path, shape: tuple[int, int] = (GRID, GRID)) -> np.ndarray:
    """Read a pickled run-length mask -> (H, W) uint16. It can't run code, whatever the file holds.

    Reads our layout, and the released one: a list of (start, length, value), counted from 1, background included.
    InputError for a hostile, cut, damaged or wrong file.
    """
    try:
        stored = _MaskUnpickler(io.BytesIO(path.read_bytes())).load()
        if isinstance(stored, list):  # the released layout
            runs = np.array([[int(number) for number in row] for row in stored], np.int64).reshape(-1, 3)
            runs = runs[runs[:, 2] != 0] - [1, 0, 0]
        else:
            runs = stored.values
        return decode_runs(runs, shape)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; run first: python 01_preprocess.py") from error
    except _Refused as error:
        raise InputError(
            f"{path}: its pickle asks for {error}, which no mask needs and which could run code; "
            "refused, nothing was run: delete the file and run 01_preprocess.py again"
        ) from error
    except Exception as error:  # bytes from outside can make an unpickler raise anything
        why = " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(f"{path}: not a run-length mask ({why}); run 01_preprocess.py again") from error
