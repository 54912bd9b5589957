"""Training images that live on the device: drawn and augmented there, a batch at a time. (D14)

For a GPU, which learns from an image faster than a processor can prepare one. Batches are those of
data.SliceDataset, but for four choices of ours. Every modality has the same chance, in it every
data set, in it every file, in it every slice. Images are augmented. Boxes are taken afterwards, and
are of a kind (segment.BOX_KINDS). Where there are LiteMedSAM's own masks, some images have those.
Letters: B images a batch, K objects an image, S side of the 256 grid.
Everything depends on (seed, step) alone.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import CacheEntry, load_entry, load_mask, network_images
from enhance import is_gray
from formats import InputError, bare_name
from formats.writing import progress
from grid import GRID, move_box
from presets import Preset
from recipe.own_masks import own_path
from segment import BOX_KINDS

OWN_SHARE = 3 / 8  # of the images that have LiteMedSAM's own masks in place of their labels (own_masks.py)
MIN_AREA = 10  # pixels: what augmentation left of an object must have them to be asked for


def draw_weights(entries: list[CacheEntry]) -> Tensor:
    """Chance of each entry, (N,) float64, sum 1: equal by modality, then data set, file, slice."""
    levels = [(e.modality, "_".join(bare_name(e.name).split("_")[:2]), e.source, e.name) for e in entries]
    chance = np.ones(len(entries))
    for depth in range(4):
        members = {level[: depth + 1] for level in levels}
        siblings = Counter(member[:depth] for member in members)
        chance /= [siblings[level[:depth]] for level in levels]
    return torch.from_numpy(chance)


def load_slice(folder: Path, entry: CacheEntry, preset: Preset, own: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """image, raw (3, S, S) float16; labels (S, S) int16, 1..n; whether channel 3 is equalized"""
    image, labels = load_entry(folder, entry)
    labels = load_mask(own_path(folder, entry)) if own else labels
    numbered = np.unique(np.append(labels.ravel(), 0), return_inverse=True)[1][:-1].reshape(labels.shape)
    enhanced, raw = (torch.from_numpy(x).half() for x in network_images(image, entry, preset))
    gray = preset.color == "gray" or is_gray(image)
    return enhanced, raw, torch.from_numpy(numbered.astype(np.int16)), torch.tensor(gray)


class ResidentSlices:
    """`batch(step)`: image and raw (B, 3, S, S), masks (B, K, S, S), boxes (B, K, 4)."""

    def __init__(
        self, folder: Path, entries: list[CacheEntry], preset: Preset, batch: int, seed: int, device: torch.device,
        augment: bool = True,
    ) -> None:  # fmt: skip
        if preset.flips == "on":
            raise InputError("the preset's flips=on mirrors images a second time; add --set flips=off")
        self.preset, self.size, self.objects, self.seed = preset, batch, preset.objects, seed
        self.device, self.augment = device, augment
        own = [
            entry for entry in entries if own_path(folder, entry).is_file() and load_mask(own_path(folder, entry)).any()
        ]
        pairs = [(entry, False) for entry in entries] + [(entry, True) for entry in own]
        parts = zip(*(load_slice(folder, entry, preset, own) for entry, own in progress(pairs, "load")), strict=True)
        self.image, self.raw, self.labels, self.gray = (torch.stack(part).to(device) for part in parts)
        share = OWN_SHARE if own else 0.0
        self.weights = torch.cat([(1 - share) * draw_weights(entries), share * draw_weights(own)]).to(device)
        self.most = int(self.labels.max())  # objects of the fullest image

    def batch(self, step: int, kind: str = "exact") -> dict[str, Tensor]:
        """The batch of a step, with boxes of a kind; tensors on the device."""
        random = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
        rows = torch.multinomial(self.weights, self.size, replacement=True, generator=random)
        image, raw, labels = self.image[rows].float(), self.raw[rows].float(), self.labels[rows].long()
        if self.augment:
            image, raw, labels = self.warp(image, raw, labels, random)
            image, raw = self.shade(image, raw, self.gray[rows], random)
        chosen = self.choose(labels, random)
        masks = labels[:, None] == chosen[:, :, None, None]  # (B, K, S, S)
        exact = boxes_of(masks)
        return {"image": image, "raw": raw, "masks": masks.float(), "boxes": self.move(exact, step, kind)}

    def move(self, exact: Tensor, step: int, kind: str) -> Tensor:
        """Boxes (B, K, 4) moved or loosened by grid.move_box, as a kind of boxes is."""
        rng, jitter = np.random.default_rng((self.seed, step)), self.preset.jitter
        boxes = exact.double().flatten(0, 1).cpu().numpy()
        moved = np.array([move_box(box, jitter, BOX_KINDS[kind], rng, GRID, GRID) for box in boxes], np.float32)
        return torch.from_numpy(moved).reshape(exact.shape).to(self.device)

    def uniform(self, random: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
        """Uniform random numbers, one row an image."""
        return low + (high - low) * torch.rand(self.size, *shape, device=self.device, generator=random)

    def areas(self, labels: Tensor) -> Tensor:
        """(B, S, S) -> pixels of each label (B, most + 1), the background's set to 0."""
        count = torch.zeros(len(labels), self.most + 1, device=self.device)
        count.scatter_add_(1, labels.flatten(1), torch.ones_like(labels.flatten(1), dtype=count.dtype))
        count[:, 0] = 0
        return count

    def choose(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """K labels of each image (B, K), each once if there are enough; small ones last."""
        areas = self.areas(labels)
        large = areas >= MIN_AREA
        wanted = torch.where(large.any(dim=1, keepdim=True), large, areas > 0)
        order = (self.uniform(random, 0, 1, self.most + 1) + wanted).argsort(dim=1, descending=True)
        place = torch.arange(self.objects, device=self.device) % wanted.sum(dim=1, keepdim=True).clamp(min=1)
        return order.gather(1, place)

    def warp(self, image: Tensor, raw: Tensor, labels: Tensor, random: torch.Generator):
        """Mirror, turn, zoom, stretch, shift three images in four; none may lose all objects."""
        quarter = (self.uniform(random, 0, 4)).floor() * (math.pi / 2)
        angle = quarter + self.uniform(random, -0.5, 0.5) * (self.uniform(random, 0, 1) < 0.5)
        zoom = torch.exp2(self.uniform(random, -0.6, 0.6, 1) + self.uniform(random, -0.15, 0.15, 2))  # x and y
        mirror = (self.uniform(random, 0, 1, 2) < 0.5).float() * 2 - 1
        shift = self.uniform(random, -0.2, 0.2, 2)
        sine, cosine = angle.sin(), angle.cos()
        turn = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)  # (B, 2, 2)
        theta = torch.cat([turn * (zoom * mirror)[:, None], shift[:, :, None]], dim=2)
        still = torch.eye(2, 3, device=self.device).expand_as(theta)
        theta = torch.where((self.uniform(random, 0, 1) < 0.25)[:, None, None], still, theta)
        seen = self.areas(self.sample(labels[:, None].float(), theta, "nearest")[:, 0].long()).amax(dim=1) >= MIN_AREA
        theta = torch.where(seen[:, None, None], theta, still)
        both = self.sample(torch.cat([image, raw], dim=1), theta, "bilinear")
        return both[:, :3], both[:, 3:], self.sample(labels[:, None].float(), theta, "nearest")[:, 0].long()

    @staticmethod
    def sample(x: Tensor, theta: Tensor, mode: str) -> Tensor:
        """Images (B, C, S, S) under an affine map (B, 2, 3), zeros outside."""
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode=mode, align_corners=False)

    def shade(self, image: Tensor, raw: Tensor, gray: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Brightness curve and gain (of each colour apart), and noise, the same in image and raw.

        Equalization undoes any rising curve, so a gray image's equalized channel keeps its values.
        """
        changed = (self.uniform(random, 0, 1, 1, 1, 1) < 0.7).float()
        # one gray image in six as in a wide window, such as that of lungs: bright tissues nearly alike
        wide = gray[:, None, None, None] & (self.uniform(random, 0, 1, 1, 1, 1) < 1 / 6)
        power = torch.where(
            wide, self.uniform(random, -2, -0.6, 1, 1, 1), changed * self.uniform(random, -0.6, 0.6, 1, 1, 1)
        )
        power = torch.exp2(power)
        tint = torch.where(gray[:, None, None, None], 0.0, self.uniform(random, -0.2, 0.2, 3, 1, 1))
        gain = torch.exp2(changed * (tint + self.uniform(random, -0.3, 0.2, 1, 1, 1)))
        grain = self.uniform(random, 0, 0.04, 1, 1, 1) * (self.uniform(random, 0, 1, 1, 1, 1) < 0.3)
        noise = grain * torch.randn(self.size, 1, GRID, GRID, device=self.device, generator=random)
        noise = noise * (raw.amax(dim=1, keepdim=True) > 0)  # padding stays black

        def shaded(x: Tensor) -> Tensor:
            return (x.clamp(min=1e-6) ** power * gain + noise).clamp(0, 1) * (x > 0)

        equalized = gray[:, None, None, None] & (torch.arange(3, device=self.device) == 2)[:, None, None]
        return torch.where(equalized, image, shaded(image)), shaded(raw)


def boxes_of(masks: Tensor) -> Tensor:
    """Masks (B, K, S, S), bool -> exact boxes (B, K, 4), x0 y0 x1 y1, inclusive."""
    sides = []
    for used in (masks.any(dim=2), masks.any(dim=3)):  # columns, then rows: (B, K, S)
        used = used.to(torch.uint8)
        sides.append((used.argmax(dim=2), GRID - 1 - used.flip(2).argmax(dim=2)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=2).float()
