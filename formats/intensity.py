"""Intensities of any range to grey levels, 0..255, as the challenge's files have them.

CT is cut to a window in Hounsfield units (HU). Everything else has no unit: its 0.5 and 99.5
percentiles become 0 and 255. Data that are 8 bit already stay as they are.
Source: JunMa11/MedSAM, branch LiteMedSAM, `pre_CT_MR.py`; the formulas only.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats import InputError, modality_of
from formats.case import Case, check_contrast
from formats.writing import tell

PERCENTILES = (0.5, 99.5)
AIR = -500  # HU. Values below it stand for air: only CT has them


class Window(NamedTuple):
    """Values of level - width / 2 become 0, of level + width / 2 become 255. A width of 0 stands for percentiles."""

    width: float
    level: float


WINDOWS = {  # HU
    "soft": Window(400, 40),  # soft tissue, the challenge's and the paper's
    "lung": Window(1500, -600),
    "brain": Window(80, 40),
    "bone": Window(1800, 400),
    "percentile": Window(0, 0),
}


def parse_window(text: str) -> Window:
    """A window by its name in WINDOWS, or by numbers, "350/50". InputError for anything else."""
    if text in WINDOWS:
        return WINDOWS[text]
    try:
        width, level = map(float, text.split("/"))
    except ValueError:
        width = level = float("nan")
    if not (np.isfinite(level) and 0 < width < np.inf):
        raise InputError(f"window {text!r} is not known; give {', '.join(WINDOWS)}, or WIDTH/LEVEL such as 400/40")
    return Window(width, level)


def gray_case(
    path: Path, values: np.ndarray, window: Window | None, is_3d: bool, spacing: tuple | None = None, affine=None,
    modality: str = "",
) -> Case:  # fmt: skip
    """Values of any number type, (H, W), (H, W, 3), or if `is_3d` (D, H, W), as a case; one slice becomes a picture.

    window: see `to_grey_levels`.   modality: of MODALITIES; "": the file's name says it.
    """
    modality = modality or modality_of(path.name)
    levels, window, source_range = to_grey_levels(values, path, window, modality)
    if is_3d and len(levels) == 1:
        levels, is_3d, spacing = levels[0], False, None
    return Case(path.name, levels, None, None, spacing, is_3d, None, affine, window, source_range, modality=modality)


def to_grey_levels(
    values: np.ndarray, path: Path | str, window: Window | None = None, modality: str = "Other"
) -> tuple:
    """An image or volume of any number type -> (grey levels uint8, the window that was cut, lowest and highest value)

    window: as asked for, or as the file says. Without one, CT (by `modality`, or values below AIR) is cut to soft
    tissue, the rest to percentiles. 8 bits stay as they are, and have no window and no range.
    InputError for values that are not finite, constant, or nearly all saturated.
    """
    if values.size == 0 or values.dtype.kind not in "biuf":
        raise InputError(f"{path}: holds {values.dtype} data of shape {values.shape}; give an image of numbers")
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = np.count_nonzero(~np.isfinite(values))
        raise InputError(f"{path}: {bad} of its {values.size} values are NaN or infinite; replace them by numbers")
    check_contrast(values, path)
    if values.dtype == np.uint8:
        return values, None, None
    if window is None:
        window = ct_window(values, path) if modality == "CT" or low < AIR else WINDOWS["percentile"]
    levels = window_to_uint8(values, *window) if window.width else percentile_to_uint8(values, path)
    if levels.min() == levels.max():
        one = f"all become {levels.min()} in the window {window.width:g}/{window.level:g} (width/level)"
        raise InputError(f"{path}: its values, {low:g} to {high:g}, {one}; choose another one with --read window=NAME")
    return levels, window, (float(low), float(high))


def ct_window(values: np.ndarray, path: Path | str) -> Window:
    """The window of soft tissue, in the unit of the values. What holds no HU is told.

    Scanners store HU plus 1024: then tissue lies round 1024 and, but for a filling as -2000, nothing lies
    where HU have air, lung and fat. The window is moved then.
    """
    low, high, soft = float(values.min()), float(values.max()), WINDOWS["soft"]
    some = values.ravel()[:: 1 + values.size // 2**20]
    dense, has_fat = some[some > 500], np.mean((some > -900) & (some < -40)) > 1e-3
    is_air = -1100 < low < -200
    if not (has_fat or is_air) and dense.size > some.size / 100 and 900 < np.median(dense) < 1250:
        soft, how = Window(soft.width, soft.level + 1024), "as HU plus 1024"
    elif low < 0 and high - low > 100:
        return soft
    elif high - low <= 255:
        soft, how = WINDOWS["percentile"], "from their lowest to their highest"
    else:
        how = "as if they were"
    found = f"{path}: a CT, but its values, {low:g} to {high:g}, are no Hounsfield units; they are shown {how}"
    tell(f"{found}. Look at it, and give --read window=WIDTH/LEVEL in its own values", error=True)
    return soft


def window_to_uint8(values: np.ndarray, width: float = 400, level: float = 40) -> np.ndarray:
    """Cut to a window.   values: any shape, HU or the unit of width and level.   -> uint8, same shape

    >>> window_to_uint8(np.array([[-1000.0, 40.0, 3000.0]]))
    array([[  0, 127, 255]], dtype=uint8)
    """
    return _stretch(values, level - width / 2, width)


def percentile_to_uint8(values: np.ndarray, path: Path | str = "image") -> np.ndarray:
    """The challenge's scaling of all but CT: percentiles of the non-zero values become 0 and 255. -> uint8, same shape

    InputError if both percentiles are one value: a saturated image.
    """
    low, high = np.percentile(values[values != 0], PERCENTILES)
    if low == high:
        told = f"99 % of its non-zero values are {low:g}: saturated, or no image; export it again with its full range"
        raise InputError(f"{path}: {told}")
    return _stretch(values, low, high - low)


def _stretch(values: np.ndarray, low: float, width: float) -> np.ndarray:
    """low becomes 0, low + width 255, rounded down. Plane by plane: floats take eight bytes each."""
    levels = np.empty(values.shape, np.uint8)
    for i in range(len(values)):
        levels[i] = np.clip((values[i] - low) / width * 255, 0, 255)
    return levels
