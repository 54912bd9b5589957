"""The cache that step 1 writes, and what step 2 draws from it. [P 2.1, 3.2]

    cache/imgs/NAME.png    (256, 256) or (256, 256, 3) uint8: the 256 grid, zero padded, before enhancement
    cache/masks/NAME.pkl   run-length code of the (256, 256) uint16 label map
    cache/index.csv        one row an image: a `CacheEntry`, see formats/cache.py

A volume becomes one image for each slice that holds an object, NAME-zzz. Read top to bottom:
run-length masks -> the PKL file -> what an epoch draws -> what one item of a batch is.
Frame: the 256 grid; boxes x0 y0 x1 y1, pixels, inclusive.
"""

import io
import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np

from enhance import grid_input
from formats import MAX_LABEL, VOLUME_MODALITIES, InputError
from formats.cache import SPLITS, CacheEntry, read_index
from formats.pictures import read_image
from formats.writing import save_bytes
from grid import GRID, boxes_from_labels, grid_size, move_box
from presets import Preset

GROUP_SIZE = 1000  # images an epoch draws from each group [P 3.2]


# ---------------------------------------------------------------- run-length masks


def encode_runs(mask: np.ndarray) -> np.ndarray:
    """Run-length code of a label map. [P 2.1]

    mask : (H, W) integers, 0 is background.
    Returns (n, 3) int32, rows (start, length, value): `length` pixels of `value` from the `start`-th pixel on,
    counted from 0 along the rows. Runs go on from row to row; background is left out.
    >>> encode_runs(np.array([[0, 5, 5], [5, 0, 7]])).tolist()
    [[1, 3, 5], [5, 1, 7]]
    """
    flat = mask.ravel()
    starts_run = np.empty(flat.size + 1, bool)  # whether a run starts at this pixel; one more entry closes the last run
    starts_run[0] = starts_run[-1] = True
    np.not_equal(flat[1:], flat[:-1], out=starts_run[1:-1])
    edges = starts_run.nonzero()[0]
    values = flat[edges[:-1]]
    kept = values.nonzero()[0]  # background is dropped now: half of the runs need no further work
    starts = edges[kept]
    return np.array((starts, edges[1:][kept] - starts, values[kept]), np.int32).T


def decode_runs(runs: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The label map of a run-length code: the inverse of `encode_runs` -> (H, W) uint16.

    InputError if a run leaves the map, overlaps the one before it, or has a value outside 1..65535."""
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
        what = f"leave the {height} x {width} mask, or hold labels outside 1 to {MAX_LABEL}"
        raise InputError(f"its runs overlap, {what}")
    pieces = np.stack([gaps, length], axis=1).ravel()  # background, object, background, object, ...
    colors = np.stack([np.zeros_like(value), value], axis=1).ravel().astype(np.uint16)
    flat = np.zeros(size, np.uint16)
    flat[: pieces.sum()] = np.repeat(colors, pieces)
    return flat.reshape(shape)


# ---------------------------------------------------------------- the PKL file


def save_mask(path: Path, runs: np.ndarray, shape: tuple[int, int]) -> int:
    """Write a run-length code and its mask's shape as a pickle, the paper's PKL. -> bytes written [P 2.1]

    A run is three int32, little-endian. The pickle holds numbers and bytes alone, and names no class or function."""
    return save_bytes(path, pickle.dumps((shape, runs.astype("<i4").tobytes()), protocol=4))


def load_mask(path: Path, shape: tuple[int, int] = (GRID, GRID)) -> np.ndarray:
    """Read a run-length mask -> (H, W) uint16. InputError for a hostile, cut, damaged or wrong file.

    Reads our layout and the released one: a list of (start, length, value), counted from 1, background included."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; run first: python 01_preprocess.py")
    try:
        stored = _MaskUnpickler(io.BytesIO(path.read_bytes())).load()
        if isinstance(stored, list):  # the released layout
            runs = [(int(start) - 1, int(length), int(value)) for start, length, value in stored]
            return decode_runs(np.array([run for run in runs if run[2]], np.int64).reshape(-1, 3), shape)
        found, content = stored
        if found != shape or len(content) % 12:
            raise ValueError(f"its shape is {found} and its runs take {len(content)} bytes, not {shape} and 12 a run")
        return decode_runs(np.frombuffer(content, "<i4").reshape(-1, 3), shape)
    except Exception as error:  # bytes from outside can make an unpickler raise anything
        why = " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(f"{path}: not a run-length mask ({why}); run 01_preprocess.py again") from error


class _MaskUnpickler(pickle._Unpickler):
    """A pickle is a program: it names functions and calls them. Here names are refused: nothing can run.

    The unpickler in Python, not in C: that one makes a table as long as a file's 5 bytes claim, of any size.

    The released layout needs two, because its numbers are NumPy's: scalar(dtype, bytes). Both get a
    stand-in that makes whole numbers and nothing else, so that NumPy never sees the file."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("numpy", "dtype"):
            return _WholeNumber
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":  # of NumPy 1, of NumPy 2
            return lambda dtype, content: dtype.read(content)
        raise pickle.UnpicklingError(f"it names what could run code; refused, nothing was run: {module}.{name}")


class _WholeNumber:
    """Stands for numpy.dtype("i8", False, True), which is followed by its state (version, byte order, ...)."""

    def __init__(self, code: str, *_) -> None:
        if code[0] not in "iu":
            raise pickle.UnpicklingError(f"it holds {code!r} data in place of whole numbers")
        self.signed = code[0] == "i"

    def __setstate__(self, state: tuple) -> None:
        self.order = "big" if state[1] == ">" else "little"

    def read(self, content: bytes) -> int:
        """The number in a scalar's bytes."""
        return int.from_bytes(content, self.order, signed=self.signed)


# ---------------------------------------------------------------- the cache


def image_path(folder: Path, name: str) -> Path:
    """Where an entry's image is."""
    return folder / "imgs" / f"{name}.png"


def mask_path(folder: Path, name: str) -> Path:
    """Where an entry's mask is."""
    return folder / "masks" / f"{name}.pkl"


def load_entry(folder: Path, entry: CacheEntry) -> tuple[np.ndarray, np.ndarray]:
    """Image (256, 256) or (256, 256, 3) RGB uint8, and label map (256, 256) uint16, both on the padded grid."""
    path = image_path(folder, entry.name)
    image = read_image(path)
    if image.shape[:2] != (GRID, GRID):
        raise InputError(f"{path}: is {image.shape[:2]}, expected {GRID} x {GRID}; run 01_preprocess.py again")
    return image, load_mask(mask_path(folder, entry.name))


def read_split(folder: Path) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """The training and the validation entries of a cache. InputError if there are none of either."""
    entries = read_index(folder)
    training, validation = ([entry for entry in entries if entry.split == split] for split in SPLITS)
    if not training or not validation:
        raise InputError(f"{folder}: {len(training)} training and {len(validation)} validation images; both are needed")
    return training, validation


# ---------------------------------------------------------------- what training draws


def epoch_entries(entries: list[CacheEntry], sampling: str, seed: int, epoch: int) -> list[CacheEntry]:
    """The training entries of one epoch, shuffled; the same for the same (seed, epoch). [P 3.2]

    "equal": every modality gives the same number, at most GROUP_SIZE; a small one repeats its images
    evenly. "without", "with": at most GROUP_SIZE from each 2D modality and each 3D sub-modality,
    without or with repeats."""
    rng = np.random.default_rng((seed, epoch))
    groups, drawn = defaultdict(list), []
    for entry in entries:
        by_modality = sampling == "equal" or entry.modality not in VOLUME_MODALITIES
        groups[entry.modality if by_modality else entry.submodality].append(entry)
    quota = min(GROUP_SIZE, max(len(group) for group in groups.values())) if sampling == "equal" else GROUP_SIZE
    for _, group in sorted(groups.items()):
        if sampling == "with":
            chosen = rng.integers(len(group), size=min(quota, len(group)))
        elif sampling == "without":
            chosen = rng.permutation(len(group))[:quota]
        else:
            rounds = -(-quota // len(group))  # rounded up
            chosen = np.concatenate([rng.permutation(len(group)) for _ in range(rounds)])[:quota]
        drawn += [group[i] for i in chosen]
    return [drawn[i] for i in rng.permutation(len(drawn))]


class SliceDataset:
    """Item (step, place): image and raw (3, 256, 256) float32 in 0..1; masks (K, 256, 256) float32, 0
    or 1; boxes (K, 4). K objects per image, repeated if it has fewer.

    place : position in the batch of a step. What is drawn depends on (seed, step, place) alone.
    `image` holds the paper's three channels, `raw` the gray or colour image without enhancement."""

    def __init__(self, folder: Path, entries: list[CacheEntry], preset: Preset, batch: int, seed: int) -> None:
        self.folder, self.entries, self.preset, self.batch, self.seed = folder, entries, preset, batch, seed
        self.drawn = -1, []  # an epoch, and its entries
        self.steps_per_epoch = max(1, len(epoch_entries(entries, preset.sampling, seed=0, epoch=0)) // batch)

    def __getitem__(self, at: tuple[int, int]) -> dict[str, np.ndarray]:
        step, place = at
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if self.drawn[0] != epoch:
            self.drawn = epoch, epoch_entries(self.entries, self.preset.sampling, self.seed, epoch)
        drawn = self.drawn[1]
        entry = drawn[(step_of_epoch * self.batch + place) % len(drawn)]
        return training_item(self.folder, entry, self.preset, np.random.default_rng((self.seed, step, place)))


def training_item(folder: Path, entry: CacheEntry, preset: Preset, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One cached image with some of its objects, their boxes moved, perhaps mirrored. See SliceDataset."""
    image, labels = load_entry(folder, entry)
    if preset.flips == "on":
        for axis in (0, 1):
            if rng.random() < 0.5:
                image, labels = np.flip(image, axis).copy(), np.flip(labels, axis).copy()
    ids, boxes = boxes_from_labels(labels)
    chosen = rng.permutation(len(ids))[: preset.objects]
    chosen = np.concatenate([chosen, rng.integers(len(ids), size=preset.objects - len(chosen))]).astype(int)
    size = (GRID, GRID) if preset.flips == "on" else grid_size(entry.height, entry.width)
    # [P 3.2] nothing but the boxes' position and size is varied
    moved = [move_box(boxes[i], preset.jitter, (0.0, 0.0), rng, *size) for i in chosen]
    return item(image, labels, ids[chosen], np.array(moved), entry, preset)


def validation_item(folder: Path, entry: CacheEntry, preset: Preset) -> dict[str, np.ndarray]:
    """One cached image with all its objects and exact boxes: two evaluations agree (#19)."""
    image, labels = load_entry(folder, entry)
    return item(image, labels, *boxes_from_labels(labels), entry, preset)


def item(image, labels, ids, boxes, entry: CacheEntry, preset: Preset) -> dict[str, np.ndarray]:
    """The arrays of one item, see SliceDataset."""
    enhanced, raw = network_images(image, entry, preset)
    masks = (labels[None] == ids[:, None, None]).astype(np.float32)
    return {"image": enhanced, "raw": raw, "masks": masks, "boxes": boxes.astype(np.float32)}


def network_images(image: np.ndarray, entry: CacheEntry, preset: Preset) -> tuple[np.ndarray, np.ndarray]:
    """A cached image as the paper's three channels, and raw: two of (3, 256, 256) float32 in 0..1."""
    height, width = grid_size(entry.height, entry.width)
    # These presets enhance the padded square. After a flip the padding lies on any side: it can't be cut off
    padded = preset.pad == "before" or preset.enhance_at == "original" or preset.flips == "on"
    inside = image if padded else image[:height, :width]
    return grid_input(inside, preset, enhanced=True), grid_input(inside, preset, enhanced=False)
