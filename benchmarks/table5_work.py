"""One measurement of Table 5, in a process of its own, so that its peak of memory is its own. benchmarks/table5.py starts them.

A system is named "PRESET MODEL ENGINE". Preset `released` stands for the published algorithm, run as it was published:
our own code gives the same masks under that preset with less work, so `released_algorithm` below does all of it again,
with the engine "eager": the plain network in PyTorch float32, whatever our engine `torch` makes of it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from table5_cases import object_slices, thinner, work

import volumes
from data import boxes_to_grid, grid_size
from metrics import TOLERANCE, nsd
from model import GRID
from readers import Case, InputError, read_npz
from segment import Segmenter, load_segmenter
from writers import save_npz

STAGES = ("read", "enhance", "encode", "decode", "upsample", "other", "write")
NSD_SHAPE, NSD_SPACING_MM = (256, 512, 512), (2.5, 0.8, 0.8)
# the six ellipsoids of the NSD's phantom: centre and half axes (z, y, x) in fractions of the volume, sizes as of liver,
# spleen, two kidneys, stomach and pancreas
ORGANS = (
    ((0.45, 0.45, 0.32), (0.15, 0.19, 0.20)),
    ((0.50, 0.60, 0.76), (0.10, 0.09, 0.08)),
    ((0.60, 0.68, 0.38), (0.11, 0.07, 0.07)),
    ((0.60, 0.68, 0.62), (0.11, 0.07, 0.07)),
    ((0.42, 0.38, 0.62), (0.11, 0.11, 0.10)),
    ((0.52, 0.52, 0.52), (0.04, 0.05, 0.12)),
)


# ---------------------------------------------------------------- the algorithm as published


def released_algorithm(segmenter: Segmenter, case: Case) -> np.ndarray:
    """Masks of preset `released`, with the work of the released code (#7, #44, #45). -> the label map of `segment`

    It enhances at original size, encodes each slice once for each object, decodes box by box, and upsamples each mask
    to the whole image. Its float64 and its copies between are left out: the real one is slower, if anything.
    """
    if case.is_3d:
        return _released_volume(segmenter, case.image, case.boxes)
    height, width = case.image.shape[:2]
    labels = np.zeros((height, width), np.uint16)
    embedding = segmenter.embed(case.image)
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
        steps = [(z, 1) for z in range(middle, box[5])] + [(z, -1) for z in range(middle - 1, box[2], -1)]
        for z, step in steps:
            embedding = segmenter.embed(volume[z])
            with segmenter.stage("upsample"):  # masks to the grid: the way back, counted with it
                prompt = volumes._box_of_previous(labels[z - step] if z != middle else None)
            if prompt is None:
                rounding = "float" if step < 0 else segmenter.preset.box_rounding
                prompt = boxes_to_grid(box[None, [0, 1, 3, 4]], height, width, rounding)
            own[z][_whole_mask(segmenter, embedding, prompt, height, width)] = label
        labels[own > 0] = label
    return labels


def _whole_mask(segmenter: Segmenter, embedding, prompt: np.ndarray, height: int, width: int) -> np.ndarray:
    """Decode one box (1, 4) and upsample all of it, wherever the mask is. -> (H, W) bool"""
    logits, _ = segmenter.decode(embedding, prompt)
    h, w = grid_size(height, width)
    with segmenter.stage("upsample"):
        small = torch.from_numpy(logits)[None, :, :h, :w]
        full = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
        return torch.sigmoid(full)[0, 0].numpy() > 0.5


# ---------------------------------------------------------------- one case by one system


def segmenter_of(preset: str, model: str, engine: str, job: dict) -> Segmenter:
    """A system's segmenter, with the job's "weights" of the proposed model, or "static" ones for openvino-int8, if named."""
    named = job.get("static" if engine == "openvino-int8" else "weights") if model == "proposed" else None
    weights = Path(named) if named else None
    eager = engine == "eager"
    # `force`: with the weights of another preset the masks change, the time does not
    return load_segmenter(model, weights, preset, "torch" if eager else engine, force=True, plain=eager)


def measure_case(job: dict) -> dict:
    """Read, segment and write one case: seconds of each stage, what was timed, and what the whole case would be."""
    preset, model, engine = job["system"].split()
    segmenter = segmenter_of(preset, model, engine, job)
    start = time.perf_counter()
    case = read_npz(Path(job["path"]))
    read_s = time.perf_counter() - start
    published = preset == "released"
    timed = case
    if published and case.is_3d and job["slices"]:
        timed = replace(case, boxes=thinner(case.boxes, job["slices"]))
    boxes = np.array([[10.0, 10, 90, 90]] * len(case.boxes[: segmenter.box_chunk]))
    segmenter.decode(segmenter.embed(np.zeros((64, 64), np.uint8)), boxes)  # warms up
    segmenter.seconds.clear()

    start = time.perf_counter()
    labels = released_algorithm(segmenter, timed) if published else segmenter.segment(timed)
    segmented = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        writing = time.perf_counter()
        save_npz(Path(folder) / "segs.npz", segs=labels.astype(np.uint8) if labels.max() <= 255 else labels)
        write_s = time.perf_counter() - writing
    seconds = {stage: segmenter.seconds[stage] for stage in STAGES[1:5]}
    seconds["other"] = segmented - start - sum(seconds.values())
    encoded, decoded, _ = work(timed, segmenter.preset, shared=not published)
    encoded_of, decoded_of, cells_of = work(case, segmenter.preset, shared=not published)
    slices = (object_slices(timed.boxes), object_slices(case.boxes)) if case.is_3d else (1, 1)
    return {f"{stage}_s": value for stage, value in {"read": read_s, **seconds, "write": write_s}.items()} | {
        "encoded": encoded, "encoded_of": encoded_of, "decoded": decoded, "decoded_of": decoded_of,
        "slices": slices[0], "slices_of": slices[1], "cells_of": cells_of,
    }  # fmt: skip


def scaled(row: dict) -> dict[str, float]:
    """Seconds of each stage for the whole case, of a row that may have timed a part of its slices.

    Enhancing and encoding grow with the images encoded, decoding and upsampling with the boxes decoded. Files are
    always read and written whole, and what is left (mostly label volumes, one for each object) does not depend on slices.
    """
    per_image, per_box = row["encoded_of"] / row["encoded"], row["decoded_of"] / row["decoded"]
    factors = {"enhance": per_image, "encode": per_image, "decode": per_box, "upsample": per_box}
    return {stage: row[f"{stage}_s"] * factors.get(stage, 1.0) for stage in STAGES}


# ---------------------------------------------------------------- parts


def repeated(task: Callable, calls: int, pick: Callable = statistics.median) -> float:
    """Seconds of one call, picked from several, after one that warms up."""
    task()
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        task()
        found.append(time.perf_counter() - start)
    return pick(found)


def measure_encoder(job: dict) -> dict:
    """Seconds of one image in the proposed model's encoder, by the engine that the job names."""
    segmenter = segmenter_of("fixed", "proposed", job["system"], job)
    image = torch.rand(1, 3, GRID, GRID)
    with torch.inference_mode():
        return {"seconds": repeated(lambda: segmenter.model.image_encoder(image), job["calls"])}


def measure_peak(job: dict) -> dict:
    """Seconds of a thousand million multiply-adds in a product of large matrices, "float32" or "int8": the machine's peak."""
    n = job["side"]
    if job["system"] == "int8":
        if not hasattr(torch, "_int_mm"):
            raise InputError("this PyTorch has no torch._int_mm, so the int8 peak can't be measured")
        a, b = torch.randint(-128, 128, (2, n, n), dtype=torch.int8)
        product = partial(torch._int_mm, a, b.mT)
    else:
        a, b = torch.rand(2, n, n)
        product = partial(torch.matmul, a, b.mT)
    return {"seconds": repeated(product, job["calls"], min) / (n**3 / 1e9)}  # a peak is the best of them


def organ_pair(number: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Reference and prediction (D, H, W) bool of one organ of the NSD's phantom: moved by two voxels and 4 % larger."""
    centre, half = (np.array(values) * shape for values in ORGANS[number])
    grid = [np.arange(n, dtype=np.float32) for n in shape]
    pair = []
    for move, grow in ((0, 1.0), (2, 1.04)):
        axes = [((g - c - move) / (h * grow)) ** 2 for g, c, h in zip(grid, centre, half, strict=True)]
        pair.append(sum(np.ix_(*axes)) <= 1)
    return pair[0], pair[1]


def package_nsd(pred: np.ndarray, gt: np.ndarray, spacing_mm: tuple[float, ...]) -> float:
    """The NSD of the pip package surface-distance. InputError if it is not installed."""
    try:
        import surface_distance
    except ImportError as error:
        raise InputError("surface-distance is not installed; run: pip install -r requirements-dev.txt") from error
    np.Inf = np.inf  # the package was written for NumPy 1, and for an older SciPy, hence the warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distances = surface_distance.compute_surface_distances(gt, pred, spacing_mm)
        return surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE)


def measure_nsd(job: dict) -> dict:
    """Seconds of the NSD of all six organs by "ours" or "surface-distance", and the six values."""
    score = nsd if job["system"] == "ours" else package_nsd
    small = organ_pair(5, (16, 32, 32))
    score(*small, NSD_SPACING_MM)  # imports, tables
    seconds, values = 0.0, []
    for number in range(len(ORGANS)):
        gt, pred = organ_pair(number, tuple(job["shape"]))
        start = time.perf_counter()
        values.append(score(pred, gt, NSD_SPACING_MM))
        seconds += time.perf_counter() - start
    return {"seconds": seconds, "values": " ".join(f"{value:.12f}" for value in values)}


# ---------------------------------------------------------------- the process


def peak_megabytes() -> float:
    """Most memory that this process ever held, Python and its libraries included.

    On Linux from /proc: getrusage's number starts at that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on macOS


def measure(job: dict) -> dict:
    """Do one job and say what it took: a row of times.csv."""
    torch.set_num_threads(job["threads"])
    cv2.setNumThreads(job["threads"])
    special = {"encoder": measure_encoder, "peak": measure_peak, "nsd": measure_nsd}
    row = special.get(job["case"], measure_case)(job)
    if job["case"] not in special:
        row["seconds"] = sum(scaled(row).values())
    return {key: job[key] for key in ("case", "system", "repeat")} | row | {"peak_mb": peak_megabytes()}
