"""LiteMedSAM's own masks as labels: what it finds where our data sets have no label. (D25)

A CT slice shows dozens of organs and our labels are of a few, while LiteMedSAM was trained on all of
them. So it is asked for random boxes. A mask is kept if LiteMedSAM is sure of it, and if the mask's
own exact box gives the same mask back: then it is an object, and no accident of the box. Masks that
overlap are dropped, so that the rest is a label map like any other.

Writes CACHE/own/NAME.pkl, as data.save_mask does; `python -m recipe --stage masks`.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data import encode_runs, load_entry, mask_path, network_images, save_mask
from formats.cache import CacheEntry
from formats.writing import progress
from grid import GRID, case_rng, grid_size
from presets import Preset
from segment import BOX_CHUNK, load

MODALITIES = ("CT",)  # where it is asked: of the others our labels hold most of what is to be seen
BOXES = 60  # random boxes an image
SIDES = 16, 130  # pixels of the 256 grid
SURE, SURE_AGAIN, SAME = 0.8, 0.85, 0.88  # least predicted IoU of the two answers, and least Dice of one with the other
OVERLAP = 0.02  # of the smaller mask: more of it on a mask that was kept, and it is dropped
SMALLEST = 60  # pixels


def own_path(cache: Path, entry: CacheEntry) -> Path:
    """Where an entry's label map of LiteMedSAM's own masks is."""
    return cache / "own" / mask_path(cache, entry.name).name


def write_own_masks(cache: Path, entries: list[CacheEntry], preset: Preset, boxes: int = BOXES) -> int:
    """The label map of each entry that has none yet. -> number of objects in all that were written

    boxes: random ones that are asked for, an image.
    """
    # OpenVINO asks four times as fast, where it is installed
    network, count = load("baseline", engine="openvino" if find_spec("openvino") else "torch").engine, 0
    for entry in progress([e for e in entries if e.modality in MODALITIES], "masks"):
        path = own_path(cache, entry)
        if not path.is_file():
            raw = network_images(load_entry(cache, entry)[0], entry, preset)[1]
            labels = own_masks(network, raw, grid_size(entry.height, entry.width), case_rng(entry.name), boxes)
            save_mask(path, encode_runs(labels), labels.shape)
            count += int(labels.max())
    return count


def own_masks(
    network, raw: np.ndarray, size: tuple[int, int], rng: np.random.Generator, boxes: int = BOXES
) -> np.ndarray:
    """raw (3, 256, 256), of which height and width are image -> label map (256, 256) uint16 of what was kept

    network: an engine, with `encode` and `decode`.
    """
    height, width = size
    side = rng.uniform(*SIDES, (boxes, 2)).clip(max=(width - 1, height - 1))
    low = rng.uniform(0, 1, (boxes, 2)) * (np.array([width, height]) - 1 - side)
    embedding = network.encode(raw)
    masks, sure = teacher_answers(network, embedding, np.concatenate([low, low + side], axis=1))
    good = [i for i in range(boxes) if sure[i] >= SURE and masks[i].sum() >= SMALLEST]
    exact = [[x.min(), y.min(), x.max(), y.max()] for y, x in (np.nonzero(masks[i]) for i in good)]
    again, sure_again = teacher_answers(network, embedding, np.array(exact, float).reshape(-1, 4))
    labels, count = np.zeros((GRID, GRID), np.uint16), 0
    for i, mask, iou in zip(good, again, sure_again, strict=True):
        same = 2 * (mask & masks[i]).sum() >= SAME * (mask.sum() + masks[i].sum())
        if same and iou >= SURE_AGAIN and (labels[mask] > 0).mean() <= OVERLAP:
            count += 1
            labels[mask & (labels == 0)] = count
    return labels


def teacher_answers(network, embedding, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """boxes (N, 4) on the grid -> masks (N, 256, 256) bool, predicted IoU (N,)"""
    masks, sure = [np.zeros((0, GRID, GRID), bool)], [np.zeros(0)]
    for first in range(0, len(boxes), BOX_CHUNK):
        logits, iou = network.decode(embedding, boxes[first : first + BOX_CHUNK])
        masks.append(logits > 0)
        sure.append(iou)
    return np.concatenate(masks), np.concatenate(sure)
