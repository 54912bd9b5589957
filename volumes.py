"""How a 3D box prompt becomes a box on every slice, three ways. [P 2.2; PAPER_VS_CODE.md #40-43, #47]

`published_loop` walks from the middle slice outwards and takes each slice's box from the mask before it:
as the paper's release does it, faults included, or mended as LiteMedSAM mended it. `prompted` is ours.
Volumes are (D, H, W); boxes (x_min, y_min, z_min, x_max, y_max, z_max), original voxels, all inclusive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data import boxes_to_grid, logits_to_original, pad_to_square, resize_to_grid
from model import GRID

if TYPE_CHECKING:
    from segment import Segmenter

BOX_SHIFT = 3  # the published loops grow the box of the mask before by this many grid pixels (#47)


def published_loop(segmenter: Segmenter, volume: np.ndarray, boxes: np.ndarray, mended: bool) -> np.ndarray:
    """The released 3D loop, or the same after its faults were mended. -> (D, H, W) uint16

    Released (#40): each slice's box comes from the *finished* label map, which does not hold the object that
    is being segmented: the first object never propagates, later ones follow earlier ones.
    Released (#41): the last slice upwards and the first slice downwards are never visited.
    Mended: the box comes from the object's own mask, and both end slices are visited.
    """
    labels = np.zeros(volume.shape, dtype=np.uint16)
    embeddings: dict = {}  # z -> embedding: once a slice, for all objects
    for label, box in enumerate(boxes.astype(int), start=1):
        own = np.zeros(volume.shape, dtype=np.uint16)
        z_min, z_max = box[2], box[5]
        middle = (z_min + z_max) // 2
        upwards = range(middle, z_max + 1 if mended else z_max)
        downwards = range(middle - 1, z_min - 1 if mended else z_min, -1)
        for z, step in [(z, 1) for z in upwards] + [(z, -1) for z in downwards]:
            before = (own if mended else labels)[z - step] if z != middle else None
            prompt = _box_of_previous(before)
            if prompt is None:  # nothing to follow: the prompt itself
                # the released downward branch alone forgets to round it
                rounding = "float" if step < 0 and not mended else segmenter.preset.box_rounding
                prompt = boxes_to_grid(box[None, [0, 1, 3, 4]], *volume.shape[1:], rounding)
            if z not in embeddings:
                embeddings[z] = segmenter.embed(volume[z])
            logits, _ = segmenter.decode(embeddings[z], prompt)
            mask = logits_to_original(logits[0], *volume.shape[1:])
            if mask is not None:
                values, rows, columns = mask
                own[z, rows, columns][values > 0] = label
        labels[own > 0] = label
    return labels


def _box_of_previous(mask: np.ndarray | None) -> np.ndarray | None:
    """Box (1, 4) on the grid round a label slice (H, W), grown by BOX_SHIFT; None if there is no mask.

    Like the original it resizes label values as if they were grey levels. Where that loses a thin mask (#42), which
    crashes the original, we answer None.
    """
    if mask is None or not mask.any():
        return None
    y, x = np.nonzero(pad_to_square(resize_to_grid(mask.astype(np.uint8)), GRID))
    if len(x) == 0:
        return None
    low = np.maximum([x.min() - BOX_SHIFT, y.min() - BOX_SHIFT], 0)
    high = np.minimum([x.max() + BOX_SHIFT, y.max() + BOX_SHIFT], GRID)
    return np.concatenate([low, high])[None].astype(np.float32)
