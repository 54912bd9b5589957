"""The fourteen cases of the paper's Table 5, drawn, and one measurement of them; table5.py starts each. [P 4.3]

The files may not be redistributed. Time depends on size, number of objects, colour, and in 3D on how many slices an object
spans (SECONDS_A_SLICE), hardly on what an image shows. Each object is an ellipsoid in a cell of its own: boxes are exact.
A system is named "PRESET MODEL ENGINE". Our code gives the masks of preset `released` with less work than the published
one, so with this preset `released_algorithm` does all of its work.
"""

import math
import statistics
import tempfile
import time
import timeit
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from processes_child import peak_mb

from efficientvit import EMBED_GRID
from fast import engines
from fast.cells import cell_range
from files import InputError
from files.case import Case
from files.npz import read_npz
from files.writing import save_npz
from grid import GRID, boxes_to_grid, grid_pixels_for, grid_size, reach_of
from metrics import TOLERANCE, nsd
from presets import Preset
from segment import Segmenter
from volumes import box_of_previous, segment_case

STAGES = ("read", "enhance", "encode", "decode", "upsample", "other", "write")
SPACING_MM = (2.5, 0.8, 0.8)  # (z, y, x) of all volumes
PARTS = ("peak", "encoder", "nsd")  # measured apart from any case
PEAK_SIDE, CALLS, NSD_SHAPE = 2048, 9, (256, 512, 512)  # CALLS of peak and encoder
# The NSD's phantom: centre and half axes (z, y, x) in fractions of the volume
ORGANS = (  # sizes as of liver, spleen, two kidneys, stomach, pancreas
    ((0.45, 0.45, 0.32), (0.15, 0.19, 0.20)),
    ((0.50, 0.60, 0.76), (0.10, 0.09, 0.08)),
    ((0.60, 0.68, 0.38), (0.11, 0.07, 0.07)),
    ((0.60, 0.68, 0.62), (0.11, 0.07, 0.07)),
    ((0.42, 0.38, 0.62), (0.11, 0.11, 0.10)),
    ((0.52, 0.52, 0.52), (0.04, 0.05, 0.12)),
)
SECONDS_A_SLICE = 0.40  # of the paper's baseline, by 2DBox_US_0525: its 3D loop encodes each slice of each object anew


class TimedCase(NamedTuple):
    """One row of Table 5, or a case of ours that the paper has no seconds for."""

    name: str
    shape: tuple[int, ...]  # (H, W, 3), or (D, H, W) if the name starts with 3D
    objects: int
    paper_baseline_s: float | None = None
    paper_proposed_s: float | None = None
    color: bool = False  # False: three equal channels, as the challenge stores gray images

    @property
    def is_3d(self) -> bool:
        return self.name.startswith("3D")


TABLE5 = (
    TimedCase("3DBox_CT_0566", (287, 512, 512), 6, 210.98, 51.85),
    TimedCase("3DBox_CT_0888", (237, 512, 512), 6, 53.35, 11.22),
    TimedCase("3DBox_CT_0860", (246, 512, 512), 1, 7.50, 2.51),
    TimedCase("3DBox_MR_0621", (115, 400, 400), 6, 83.16, 16.92),
    TimedCase("3DBox_MR_0121", (64, 290, 320), 6, 51.20, 9.84),
    TimedCase("3DBox_MR_0179", (84, 512, 512), 1, 6.92, 1.6),
    TimedCase("3DBox_PET_0001", (264, 200, 200), 1, 3.50, 0.78),
    TimedCase("2DBox_US_0525", (256, 256, 3), 1, 0.40, 0.11),
    TimedCase("2DBox_X-Ray_0053", (320, 640, 3), 34, 0.90, 0.72),
    TimedCase("2DBox_Dermoscopy_0003", (3024, 4032, 3), 1, 1.41, 2.09, color=True),
    TimedCase("2DBox_Endoscopy_0086", (480, 560, 3), 1, 0.43, 0.09, color=True),
    TimedCase("2DBox_Fundus_0003", (2048, 2048, 3), 1, 0.72, 0.38, color=True),
    TimedCase("2DBox_Microscope_0008", (1536, 2040, 3), 19, 1.05, 0.66, color=True),
    TimedCase("2DBox_Microscope_0016", (1920, 2560, 3), 241, 6.27, 6.19, color=True),
)
SIX_OBJECTS = TimedCase("3DBox_CT_six-objects", (24, 512, 512), 6)  # all six in every slice
TINY = (TimedCase("2DBox_US_tiny", (64, 80, 3), 2), TimedCase("3DBox_CT_tiny", (5, 48, 40), 2))
BY_NAME = {case.name: case for case in (*TABLE5, SIX_OBJECTS, *TINY)}


def spans(case: TimedCase, rng: np.random.Generator) -> list[tuple[int, int]]:
    """First and last slice of each object of a volume: overlapping, as organs of one region do, of unequal length."""
    depth = case.shape[0]
    if case.paper_baseline_s is None:
        return [(0, depth - 1)] * case.objects
    mean = case.paper_baseline_s / SECONDS_A_SLICE / case.objects + 2  # the released loop leaves both end slices out
    found = []
    for share in np.linspace(0.5, 1.5, case.objects) if case.objects > 1 else (1.0,):
        length = min(max(round(mean * share), 3), depth)
        first = min(max(round((depth - length) / 2 + rng.uniform(-0.25, 0.25) * mean), 0), depth - length)
        found.append((first, first + length - 1))
    return found


def cells(count: int, height: int, width: int, rng: np.random.Generator) -> list[list[tuple[int, int]]]:
    """Boxes [(y0, y1), (x0, x1)], inclusive, one in each cell of a grid that has room for `count`."""
    columns = math.ceil(math.sqrt(count * width / height))
    found = [[] for _ in range(count)]
    for i, sides in enumerate(found):
        for cell, room in ((i // columns, height / math.ceil(count / columns)), (i % columns, width / columns)):
            size = max(round(room * rng.uniform(0.4, 0.8)), 4)
            first = math.ceil(cell * room + rng.uniform(0, 1) * (room - size - 1))
            sides.append((first, first + size - 1))
    return found


def draw(case: TimedCase, seed: int = 0) -> Case:
    """A case with its truth: the same for the same seed."""
    rng = np.random.default_rng((seed, list(BY_NAME).index(case.name)))
    grid = case.shape if case.is_3d else case.shape[:2]
    in_depth = spans(case, rng) if case.is_3d else []
    image = rng.integers(40, 56, size=grid, dtype=np.uint8)
    labels = np.zeros(grid, np.uint16)
    for i, sides in enumerate(cells(case.objects, *grid[-2:], rng)):
        bounds = [*in_depth[i : i + 1], *sides]
        where = tuple(slice(first, last + 1) for first, last in bounds)
        axes = [(((np.arange(z - a + 1) + 0.5) * 2 / (z - a + 1) - 1).astype(np.float32)) ** 2 for a, z in bounds]
        mask = sum(np.ix_(*axes)) <= 1  # touches each of the box's faces
        image[where][mask] += np.uint8(80 + 20 * (i % 5))
        labels[where][mask] = i + 1
    if not case.is_3d:
        shades = np.float32((1.0, 0.8, 0.7) if case.color else (1.0, 1.0, 1.0))
        image = np.stack([(image * shade).astype(np.uint8) for shade in shades], axis=-1)
    return Case(case.name, image, None, labels, SPACING_MM if case.is_3d else None, case.is_3d)


def work(case: Case, preset: Preset, shared: bool) -> tuple[int, int, int]:
    """How many images are encoded, boxes decoded and cells of 4x4 grid pixels upscaled for a case.

    shared: a slice is encoded once for all objects; of cells only those that a mask may reach (FastDecoder; model.py's
    decoder upscales all). not shared, as published: a slice once for each object, all cells.
    """
    height, width = case.image.shape[1 if case.is_3d else 0 :][:2]
    reach = case.boxes[:, [0, 1, 3, 4]] if case.is_3d else reach_of(case.boxes, height, width)
    ranges = [cell_range(list(region)) for region in grid_pixels_for(reach, height, width)]
    cells = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in ranges]
    if not case.is_3d:
        return 1, len(case.boxes), sum(cells) if shared else EMBED_GRID**2 * len(case.boxes)
    ends = preset.propagation == "released"  # #41: it leaves the first and the last slice out, but for the middle one
    visited = [
        range(min(low + ends, (low + high) // 2), high + 1 - ends) for low, high in case.boxes[:, [2, 5]].astype(int)
    ]
    boxes = sum(map(len, visited))
    some = sum(n * len(slices) for n, slices in zip(cells, visited, strict=True))
    return (len(set().union(*visited)), boxes, some) if shared else (boxes, boxes, EMBED_GRID**2 * boxes)


def object_slices(boxes: np.ndarray) -> int:
    """Number of slices that hold an object at all; boxes (N, 6)."""
    return len({z for low, high in boxes[:, [2, 5]].astype(int) for z in range(low, high + 1)})


def thinner(boxes: np.ndarray, limit: int) -> np.ndarray:
    """3D boxes (N, 6), squeezed in depth by one factor to `limit` slices in all; each keeps the 3 that the loop needs."""
    low, high = boxes[:, 2], boxes[:, 5]
    span = high.max() - low.min() + 1
    if object_slices(boxes) <= limit or span <= limit:
        return boxes
    factor = limit / span
    squeezed = boxes.copy()
    squeezed[:, 2] = low.min() + np.minimum(np.floor((low - low.min()) * factor), max(limit - 3, 0))
    squeezed[:, 5] = squeezed[:, 2] + np.maximum(np.floor((high - low + 1) * factor), 3) - 1
    return squeezed


def released_algorithm(segmenter: Segmenter, case: Case) -> np.ndarray:
    """Masks of preset `released`, with the work of the released code (#7, #44, #45). -> the label map

    It enhances at original size, encodes each slice once for each object, decodes box by box, and upsamples each mask
    to the whole image. Its float64 and its copies between are left out: the real one is slower, if anything.
    """
    if case.is_3d:
        return _released_volume(segmenter, case.image, case.boxes)
    height, width = case.image.shape[:2]
    labels, embedding = np.zeros((height, width), np.uint16), segmenter.embed(case.image)
    for label, box in enumerate(case.boxes, start=1):
        prompt = boxes_to_grid(box[None], height, width, segmenter.preset.box_rounding)
        labels[_whole_mask(segmenter, embedding, prompt, height, width)] = label
    return labels


def _released_volume(segmenter: Segmenter, volume: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """volumes.published_loop as released, without its memory of embeddings."""
    height, width = volume.shape[1:]
    labels = np.zeros(volume.shape, np.uint16)
    for label, box in enumerate(boxes.astype(int), start=1):
        own = np.zeros(volume.shape, np.uint16)
        middle = (box[2] + box[5]) // 2
        for z, step in [(z, 1) for z in range(middle, box[5])] + [(z, -1) for z in range(middle - 1, box[2], -1)]:
            embedding = segmenter.embed(volume[z])
            with segmenter.stage("upsample"):  # masks to the grid: the way back, counted with it
                prompt = box_of_previous(labels[z - step] if z != middle else None)
            if prompt is None:
                rounding = "float" if step < 0 else segmenter.preset.box_rounding
                prompt = boxes_to_grid(box[None, [0, 1, 3, 4]], height, width, rounding)
            own[z][_whole_mask(segmenter, embedding, prompt, height, width)] = label
        labels[own > 0] = label
    return labels


def _whole_mask(segmenter: Segmenter, embedding, prompt: np.ndarray, height: int, width: int) -> np.ndarray:
    """Decode one box (1, 4) and upsample all of it, wherever the mask is. -> (H, W) bool"""
    (logits, _), (h, w) = segmenter.decode(embedding, prompt), grid_size(height, width)
    with segmenter.stage("upsample"):
        small = torch.from_numpy(logits)[None, :, :h, :w]
        full = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
        return torch.sigmoid(full)[0, 0].numpy() > 0.5


def segmenter_of(preset: str, model: str, engine: str, static: Path | None = None) -> Segmenter:
    """A system's segmenter. static: weights for engine openvino-int8, if not its own."""
    static = static if engine == "openvino-int8" else None
    return engines.load(model, static, preset, engine, force=True)  # weights of another preset: the time is the same


def measure_case(job: dict) -> dict:
    """Read, segment and write one case: seconds of each stage, what was timed, and what the whole case would be."""
    segmenter = segmenter_of(*job["system"].split(), job["static"])
    start = time.perf_counter()
    case = read_npz(job["path"])
    seconds = {"read": time.perf_counter() - start}
    published, timed = job["system"].startswith("released"), case
    if published and case.is_3d and job["slices"]:
        timed = replace(case, boxes=thinner(case.boxes, job["slices"]))
    boxes = np.array([[10.0, 10, 90, 90]] * len(case.boxes[: segmenter.box_chunk]))
    segmenter.decode(segmenter.embed(np.zeros((64, 64), np.uint8)), boxes)  # warms up
    segmenter.seconds.clear()

    start = time.perf_counter()
    labels = released_algorithm(segmenter, timed) if published else segment_case(segmenter, timed)
    segmented_s = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        save_npz(Path(folder) / "segs.npz", segs=labels.astype(np.uint8) if labels.max() <= 255 else labels)
        seconds["write"] = time.perf_counter() - start
    inside = {stage: segmenter.seconds[stage] for stage in STAGES[1:5]}
    seconds |= inside | {"other": segmented_s - sum(inside.values())}
    row = {f"{stage}_s": value for stage, value in seconds.items()}
    for ending, one in (("", timed), ("_of", case)):  # what was timed, and the whole case
        counts = work(one, segmenter.preset, shared=not published)
        row |= dict(zip((f"encoded{ending}", f"decoded{ending}", f"cells{ending}"), counts, strict=True))
        row[f"slices{ending}"] = object_slices(one.boxes) if case.is_3d else 1
    return row | {"seconds": sum(scaled(row).values())}


def scaled(row: dict) -> dict[str, float]:
    """Seconds of each stage for the whole case, of a row that may have timed a part of its slices.

    Images encoded and boxes decoded are multiplied up. Reading, writing and label volumes do not depend on slices.
    """
    per_image, per_box = row["encoded_of"] / row["encoded"], row["decoded_of"] / row["decoded"]
    factors = {"enhance": per_image, "encode": per_image, "decode": per_box, "upsample": per_box}
    return {stage: row[f"{stage}_s"] * factors.get(stage, 1.0) for stage in STAGES}


def measure_encoder(job: dict) -> dict:
    """Seconds of one image in the proposed model's encoder, by the engine that the job names."""
    segmenter = segmenter_of("fixed", "proposed", job["system"], job["static"])
    image = np.random.default_rng(0).random((3, GRID, GRID), np.float32)
    seconds = timeit.repeat(lambda: segmenter.engine.encode(image), "gc.enable()", number=1, repeat=CALLS + 1)
    return {"seconds": statistics.median(seconds[1:])}  # the first warms up


def measure_peak(job: dict) -> dict:
    """Seconds of a thousand million multiply-adds in a product of large matrices, "float32" or "int8": the machine's peak."""
    n, int8 = PEAK_SIDE, job["system"] == "int8"
    a, b = torch.randint(-128, 128, (2, n, n), dtype=torch.int8) if int8 else torch.rand(2, n, n)
    product = torch._int_mm if int8 else torch.matmul
    seconds = timeit.repeat(lambda: product(a, b.mT), "gc.enable()", number=1, repeat=CALLS + 1)
    return {"seconds": min(seconds[1:]) / (n**3 / 1e9)}  # a peak is the best


def organ_pair(number: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Reference and prediction (D, H, W) bool of one organ of the NSD's phantom: moved by two voxels and 4 % larger."""
    centre, half = (np.array(values) * shape for values in ORGANS[number])
    grid = [np.arange(n, dtype=np.float32) for n in shape]

    def mask(move: float, grow: float) -> np.ndarray:
        axes = [((g - c - move) / (h * grow)) ** 2 for g, c, h in zip(grid, centre, half, strict=True)]
        return sum(np.ix_(*axes)) <= 1

    return mask(0, 1.0), mask(2, 1.04)


def package_nsd(pred: np.ndarray, gt: np.ndarray, spacing_mm: tuple[float, ...]) -> float:
    """The NSD of the pip package surface-distance. InputError if it is not installed."""
    try:
        import surface_distance
    except ImportError as error:
        raise InputError("surface-distance is not installed; run: pip install -r requirements-dev.txt") from error
    np.Inf = np.inf  # the package was written for NumPy 1
    distances = surface_distance.compute_surface_distances(gt, pred, spacing_mm)
    return surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE)


def measure_nsd(job: dict) -> dict:
    """Seconds of the NSD of all six organs by "ours" or "surface-distance", and the six values."""
    score = nsd if job["system"] == "ours" else package_nsd
    score(*organ_pair(5, (16, 32, 32)), SPACING_MM)  # imports, tables
    seconds, values = 0.0, []
    for number in range(len(ORGANS)):
        gt, pred = organ_pair(number, NSD_SHAPE)
        start = time.perf_counter()
        values.append(score(pred, gt, SPACING_MM))
        seconds += time.perf_counter() - start
    return {"seconds": seconds, "values": " ".join(f"{value:.12f}" for value in values)}


def measure(job: dict) -> dict:
    """Do one job and say what it took: a row of times.csv. peak_mb: the most memory that this process ever held."""
    torch.set_num_threads(job["threads"])
    cv2.setNumThreads(job["threads"])
    parts = {"peak": measure_peak, "encoder": measure_encoder, "nsd": measure_nsd}  # PARTS
    row = parts.get(job["case"], measure_case)(job)
    return {key: job[key] for key in ("case", "system", "repeat")} | row | {"peak_mb": peak_mb()}
