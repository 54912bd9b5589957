"""What one training step sees: which images an epoch draws, which object of each, and how its box moves. [P 3.2]

Everything is drawn from (seed, epoch) or (seed, step, place in the batch), never from a running state, so that a
resumed run sees exactly what an uninterrupted one would have. Frame: the 256 grid; boxes x0 y0 x1 y1, pixels.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache import CacheEntry, load_entry
from data import grid_input, grid_size
from model import GRID
from presets import Preset
from readers import boxes_from_labels

GROUP_SIZE = 1000  # images an epoch draws from each group [P 3.2]
BOX_JITTER = 5  # pixels on the grid that a side of a box moves at most (#18)
JITTER_SHARE = 0.1  # jitter "scaled": at most this share of the object's width or height too
VOLUME_MODALITIES = ("CT", "MR", "PET")  # grouped by sub-modality, the others by modality [P 3.2]


def epoch_entries(entries: list[CacheEntry], sampling: str, seed: int, epoch: int) -> list[CacheEntry]:
    """The training entries of one epoch, shuffled; the same for the same (seed, epoch). [P 3.2]

    "equal": every modality gives as many, at most GROUP_SIZE; a small one repeats, each image as often as another.
    "without", "with": at most GROUP_SIZE from each 2D modality and each 3D sub-modality, without or with repeats.
    """
    rng = np.random.default_rng((seed, epoch))
    groups: dict[str, list[CacheEntry]] = defaultdict(list)
    for entry in entries:
        by_modality = sampling == "equal" or entry.modality not in VOLUME_MODALITIES
        groups[entry.modality if by_modality else entry.submodality].append(entry)
    quota = min(GROUP_SIZE, max(len(group) for group in groups.values())) if sampling == "equal" else GROUP_SIZE
    drawn: list[CacheEntry] = []
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


def steps_of_epoch(entries: list[CacheEntry], sampling: str, batch: int) -> int:
    """Steps that an epoch has: the images that it draws over those of a batch, at least 1."""
    return max(1, len(epoch_entries(entries, sampling, seed=0, epoch=0)) // batch)


def move_box(box: np.ndarray, jitter: str, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Move each side of a box (4,) by up to BOX_JITTER pixels. (#18)

    jitter : "both", whole pixels in or out; "outward", whole pixels, never in; "scaled", in or out by at most a share
    of the object, and each box by its own part of that: 5 pixels say much about a lung and nothing about a nucleus.
    A box keeps at least one pixel of width and height and stays on the image of size (height, width).
    """
    if jitter == "scaled":
        sides = np.tile(box[2:] - box[:2], 2)
        moves = np.clip(JITTER_SHARE * sides, 1, BOX_JITTER) * rng.random() * rng.uniform(-1, 1, size=4)
    else:
        moves = rng.integers(0 if jitter == "outward" else -BOX_JITTER, BOX_JITTER + 1, size=4)
    moved = box + moves * np.array([-1, -1, 1, 1])  # a positive move goes outward
    moved = np.clip(moved, 0, [width, height, width, height])
    for low, high in ((0, 2), (1, 3)):
        if moved[high] - moved[low] < 1:  # a small box turned inside out: leave those sides where they were
            moved[[low, high]] = box[[low, high]]
    return moved


class SliceDataset(torch.utils.data.Dataset):
    """Item (step, place): image and raw (3, 256, 256) float32, masks (K, 256, 256) float32 of 0 and 1, boxes (K, 4).

    `image` is the proposed model's three channels, `raw` what the teacher takes. K = objects, drawn with repeats if
    the image has fewer. The batch of a step depends on (seed, step) alone.
    """

    def __init__(
        self, folder: Path, entries: list[CacheEntry], preset: Preset, batch: int, objects: int, seed: int
    ) -> None:
        self.folder, self.entries, self.preset = folder, entries, preset
        self.batch, self.objects, self.seed = batch, objects, seed
        self.epoch_cached: tuple[int, list[CacheEntry]] = (-1, [])
        self.steps_per_epoch = steps_of_epoch(entries, preset.sampling, batch)

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Tensor]:
        step, place = at
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if self.epoch_cached[0] != epoch:
            self.epoch_cached = epoch, epoch_entries(self.entries, self.preset.sampling, self.seed, epoch)
        drawn = self.epoch_cached[1]
        entry = drawn[(step_of_epoch * self.batch + place) % len(drawn)]
        rng = np.random.default_rng((self.seed, step, place))
        return training_item(self.folder, entry, self.preset, self.objects, rng)


def training_item(folder: Path, entry: CacheEntry, preset: Preset, objects: int, rng) -> dict[str, Tensor]:
    """One cached image with `objects` of its objects, boxes moved, perhaps mirrored. See SliceDataset."""
    image, labels = load_entry(folder, entry)
    if preset.flips == "on":
        for axis in (0, 1):
            if rng.random() < 0.5:
                image, labels = np.flip(image, axis).copy(), np.flip(labels, axis).copy()
    ids, boxes = boxes_from_labels(labels)
    chosen = rng.permutation(len(ids))[:objects]
    chosen = np.concatenate([chosen, rng.integers(len(ids), size=objects - len(chosen))]).astype(int)
    size = (GRID, GRID) if preset.flips == "on" else grid_size(entry.height, entry.width)
    moved = [move_box(boxes[i], preset.jitter, rng, *size) for i in chosen]
    return item(image, labels, ids[chosen], np.array(moved), entry, preset)


def validation_item(folder: Path, entry: CacheEntry, preset: Preset) -> dict[str, Tensor]:
    """One cached image with all its objects and exact boxes: nothing is drawn, so two evaluations agree (#19)."""
    image, labels = load_entry(folder, entry)
    ids, boxes = boxes_from_labels(labels)
    return item(image, labels, ids, boxes, entry, preset)


def item(image, labels, ids, boxes, entry: CacheEntry, preset: Preset) -> dict[str, Tensor]:
    """Arrays of the 256 grid as the tensors of one item."""
    enhanced, raw = network_images(image, entry, preset)
    return {
        "image": enhanced,
        "raw": raw,
        "masks": torch.from_numpy((labels[None] == ids[:, None, None]).astype(np.float32)),
        "boxes": torch.from_numpy(boxes.astype(np.float32)),
    }


def network_images(image: np.ndarray, entry: CacheEntry, preset: Preset) -> tuple[Tensor, Tensor]:
    """A cached image as the proposed model and as the teacher take it: two of (3, 256, 256) float32."""
    height, width = grid_size(entry.height, entry.width)
    # `fixed` enhances the image alone; the text and the release enhance the padded square (flips moved its padding)
    padded = preset.pad == "before" or preset.enhance_at == "original" or preset.flips == "on"
    inside = image if padded else image[:height, :width]
    enhanced, raw = (torch.from_numpy(grid_input(inside, preset, enhanced=flag)) for flag in (True, False))
    return enhanced, raw
