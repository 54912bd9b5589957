"""An unpickler for run-length masks that cannot run code.

The paper stores masks as pickles. A pickle is a program: it names functions and calls them, so reading one from a stranger can
run anything. This one knows a few names, those with which NumPy writes arrays of whole numbers, and refuses every other.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import numpy as np

from files import InputError


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


def read_runs(path: Path) -> np.ndarray:
    """Read a pickled run-length code -> (n, 3) whole numbers, rows (start, length, value), counted from 0.

    Reads our layout, and the released one: a list of (start, length, value), counted from 1, background included.
    It can't run code, whatever the file holds. InputError for a hostile, cut, damaged or wrong file.
    """
    try:
        stored = _MaskUnpickler(io.BytesIO(path.read_bytes())).load()
        if isinstance(stored, list):  # the released layout
            runs = np.array([[int(number) for number in row] for row in stored], np.int64).reshape(-1, 3)
            return runs[runs[:, 2] != 0] - [1, 0, 0]
        return stored.values
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
