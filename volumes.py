"""How a 3D box prompt becomes a box on every slice, three ways. [P 2.2; PAPER_VS_CODE.md #40-43, #47]

`published_loop` walks from the middle slice outwards and takes each slice's box from the mask before it:
as the paper's release does it, faults included, or with the faults mended, as in LiteMedSAM. `prompted` is ours.
Volumes are (D, H, W); boxes (x_min, y_min, z_min, x_max, y_max, z_max), original voxels, all inclusive.
`segment_objects` is the one entry for images and volumes, `segment_case` its label map alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from files.case import Case, check_boxes
from grid import (
    GRID,
    boxes_to_grid,
    crop_to_box,
    grid_pixels_for,
    logits_to_original,
    mask_box,
    pad_to_square,
    resize_to_grid,
)
from segment import Segmenter

# Constants of `prompted`, chosen with our checkpoint on training volumes and synthetic ones; what each is worth:
# results/propagation, made by benchmarks/accuracy.py.
GROWTH = 0.03  # largest growth from slice to slice on each side, as a share of the box's size
LOGIT_LIMIT = 3.0  # logits are cut to this range, so that large ones do not always outweigh the prior (`with_prior`)
PRIOR_WEIGHT = 40.0  # the prior, an ellipsoid's depth, counts 40 (1 - IoU)^2 logits: 0.4 at IoU 0.9, 6.4 at 0.6

Progress = Callable[[Iterable], Iterable]
EMBEDDINGS_KEPT = (
    64  # slices whose embeddings, 4.2 MB each, are kept for other objects; others are encoded again when needed
)
BOX_SHIFT = 3  # the published loops grow the box of the mask before by this many grid pixels (#47)


class Found(NamedTuple):
    """What was found for the N boxes of a case."""

    labels: np.ndarray  # (H, W) or (D, H, W) uint16, original frame, object i + 1 for box i, 0 background
    iou: np.ndarray  # (N,) float64, predicted intersection over union; in a volume the mean of the object's slices
    own: np.ndarray  # (N,) int64, pixels of each object's own mask, also where another object covers it


def segment_case(segmenter: Segmenter, case: Case) -> np.ndarray:
    """Label map of a case with boxes: `segment_objects(...).labels`."""
    return segment_objects(segmenter, case).labels


def segment_objects(segmenter: Segmenter, case: Case, progress: Progress = list) -> Found:
    """The objects of a case with boxes, 2D or 3D.

    progress: takes the slices of a volume and gives them back one after the other, as tqdm does.
    Raises InputError, one sentence, for boxes that cannot be used.
    """
    if not case.is_3d:
        found = segmenter.masks(segmenter.embed(case.image), case.boxes, case.image.shape[:2])
        own = [np.count_nonzero(values > 0) for values, _, _ in found.patches]
        return Found(found.labels, found.iou.astype(np.float64), np.array(own, np.int64))
    boxes = check_boxes(case.boxes, case.image.shape, case.name, flat=True)
    tally = Tally(len(boxes))
    if segmenter.preset.propagation == "prompted":
        labels = prompted(segmenter, case.image, boxes, tally, progress)
    else:
        mended = segmenter.preset.propagation == "mended"
        labels = published_loop(segmenter, case.image, boxes, mended, tally, progress)
    return Found(labels, tally.iou / np.maximum(tally.slices, 1), tally.own)


class Tally:
    """Adds up, slice by slice, what `Found` says of each object."""

    def __init__(self, objects: int) -> None:
        self.iou, self.slices, self.own = np.zeros(objects), np.zeros(objects, np.int64), np.zeros(objects, np.int64)

    def add(self, i: int, iou: float, values: np.ndarray) -> None:
        """One slice of object i: its predicted IoU, and the logits of its mask."""
        self.iou[i] += iou
        self.slices[i] += 1
        self.own[i] += np.count_nonzero(values > 0)


class Embeddings:
    """Embeddings of a volume's slices, each computed once (D8) as long as EMBEDDINGS_KEPT suffices: memory has a bound."""

    def __init__(self, segmenter: Segmenter, volume: np.ndarray) -> None:
        self.segmenter, self.volume, self.kept = segmenter, volume, {}

    def of(self, z: int, again: bool):
        """Embedding (1, 256, 64, 64) of slice z.   again: whether it will be asked for once more."""
        embedding = self.kept.pop(z, None)
        if embedding is None:
            embedding = self.segmenter.embed(self.volume[z])
        if (
            again and len(self.kept) < EMBEDDINGS_KEPT
        ):  # the earliest are kept: later passes visit the slices in the same order
            self.kept[z] = embedding
        return embedding


def published_loop(
    segmenter: Segmenter,
    volume: np.ndarray,
    boxes: np.ndarray,
    mended: bool,
    tally: Tally | None = None,
    progress: Progress = list,
) -> np.ndarray:
    """The released 3D loop, or the same after its faults were mended. -> (D, H, W) uint16. tally, progress: see `prompted`

    Released (#40): each slice's box comes from the *finished* label map, which does not hold the object that
    is being segmented: the first object never propagates, later ones follow earlier ones.
    Released (#41): the last slice upwards and the first slice downwards are never visited.
    Mended: the box comes from the object's own mask, and both end slices are visited.
    """
    tally = tally or Tally(len(boxes))
    labels = np.zeros(volume.shape, dtype=np.uint16)
    embeddings = Embeddings(segmenter, volume)
    for label, box in enumerate(progress(boxes.astype(int)), start=1):
        own = np.zeros(volume.shape, dtype=np.uint16)
        z_min, z_max = box[2], box[5]
        middle = (z_min + z_max) // 2
        upwards = range(middle, z_max + 1 if mended else z_max)
        downwards = range(middle - 1, z_min - 1 if mended else z_min, -1)
        for z, step in [(z, 1) for z in upwards] + [(z, -1) for z in downwards]:
            before = (own if mended else labels)[z - step] if z != middle else None
            prompt = box_of_previous(before)
            if prompt is None:  # nothing to follow: the prompt itself
                # the released code rounds this box on the way up, but not on the way down
                rounding = "float" if step < 0 and not mended else segmenter.preset.box_rounding
                prompt = boxes_to_grid(box[None, [0, 1, 3, 4]], *volume.shape[1:], rounding)
            logits, iou = segmenter.decode(embeddings.of(z, again=label < len(boxes)), prompt)
            with segmenter.stage("upsample"):
                values, rows, columns = logits_to_original(logits[0], *volume.shape[1:])
            tally.add(label - 1, float(iou[0]), values)
            own[z, rows, columns][values > 0] = label
        labels[own > 0] = label
    return labels


def box_of_previous(mask: np.ndarray | None) -> np.ndarray | None:
    """Box (1, 4) on the grid round a label slice (H, W), grown by BOX_SHIFT; None if there is no mask.

    Like the original it resizes label values as if they were grey levels, so a thin mask can vanish (#42). The original then
    crashes; we answer None.
    """
    if mask is None or not mask.any():
        return None
    y, x = np.nonzero(pad_to_square(resize_to_grid(mask), GRID))
    if len(x) == 0:
        return None
    low = np.maximum([x.min() - BOX_SHIFT, y.min() - BOX_SHIFT], 0)
    high = np.minimum([x.max() + BOX_SHIFT, y.max() + BOX_SHIFT], GRID)
    return np.concatenate([low, high])[None].astype(np.float32)


def prompted(
    segmenter: Segmenter, volume: np.ndarray, boxes: np.ndarray, tally: Tally | None = None, progress: Progress = list
) -> np.ndarray:
    """Ours (D6): slice by slice from the middle outwards, between two limits, the prompt and its inscribed ellipsoid.

    An object lies inside its 3D box and touches its six faces. So towards both ends its cross-section shrinks, usually no
    faster than that of the ellipsoid inscribed in the box. Therefore:
    1. The middle slice is prompted with the box itself.
    2. Every other slice is prompted with the box of the object's mask on the slice before, grown by 3 %.
    3. That box is never smaller than the ellipsoid's section, so the object cannot die out, and never larger than the
       prompt, so it cannot drift off.
    4. Where the network is unsure (low predicted IoU), the ellipsoid's depth is added to the logits.
    All objects of a slice are decoded together; a slice is encoded once as long as EMBEDDINGS_KEPT suffices (D8).
    tally: told each object's mask on each slice.   progress: see `segment_objects`.
    -> (D, H, W) uint16
    """
    tally = tally or Tally(len(boxes))
    labels = np.zeros(volume.shape, dtype=np.uint16)
    height, width = volume.shape[1:]
    middle = (boxes[:, 2] + boxes[:, 5]) // 2
    upwards = [(z, np.flatnonzero((middle <= z) & (z <= boxes[:, 5]))) for z in range(len(volume))]
    downwards = [(z, np.flatnonzero((boxes[:, 2] <= z) & (z < middle))) for z in reversed(range(len(volume)))]
    visited_twice = {z for z, objects in upwards if len(objects)} & {z for z, objects in downwards if len(objects)}
    embeddings, canvases = Embeddings(segmenter, volume), {}  # canvases: of slices that are visited on both ways
    followed = {}  # object -> box (4,) of its mask on the slice before, or None if that was empty
    from_middle = {}
    for z, objects in progress([(z, objects) for z, objects in upwards + downwards if len(objects)]):
        embedding = embeddings.of(z, again=z in visited_twice)
        canvas = canvases.pop(z, None) or segmenter.new_canvas(labels[z], len(boxes))
        for index in objects[middle[objects] == z + 1]:
            followed[index] = from_middle[index]  # the way down starts from the mask of the middle slice
        asked = np.array([slice_box(boxes[i], z, followed.get(i), middle[i]) for i in objects])
        found = ask(segmenter, embedding, asked, boxes[objects], z, height, width)
        for index, (mask, iou) in zip(objects, found, strict=True):
            tally.add(index, iou, mask.values)
            canvas.paint(index + 1, mask)
            followed[index] = mask_box(mask)
            if z == middle[index]:
                from_middle[index] = followed[index]
        if z in visited_twice:
            visited_twice.remove(z)
            canvases[z] = canvas
    return labels


def ask(segmenter: Segmenter, embedding, asked: np.ndarray, boxes: np.ndarray, z: int, height: int, width: int):
    """Decode slice boxes `asked` (N, 4) of objects with 3D boxes (N, 6); yields each object's mask, cut to its box, and its predicted IoU."""
    for first in range(0, len(asked), segmenter.box_chunk):
        chunk = slice(first, first + segmenter.box_chunk)
        on_grid = boxes_to_grid(asked[chunk], height, width, segmenter.preset.box_rounding)
        whole = boxes[chunk][:, [0, 1, 3, 4]]
        logits, iou = segmenter.decode(embedding, on_grid, grid_pixels_for(whole, height, width))
        for i, (one, sure) in enumerate(zip(logits, iou, strict=True)):
            with segmenter.stage("upsample"):
                one = with_prior(one, float(sure), ellipsoid_depth(boxes[chunk][i], z, height, width))
                mask = crop_to_box(logits_to_original(one, height, width), whole[i])
            yield mask, float(sure)


def slice_box(box: np.ndarray, z: int, followed: np.ndarray | None, middle: float) -> np.ndarray:
    """The box (4,) to ask for on slice z, original pixels.

    box: the 3D prompt (6,).   followed: box (4,) of the object's mask on the slice before, None if it was empty.
    """
    whole = box[[0, 1, 3, 4]]
    if z == middle:
        return whole
    section = ellipsoid_section(box, z)
    if followed is None:
        return section
    margin = GROWTH * (whole[2:] - whole[:2])
    low = np.maximum(np.minimum(followed[:2] - margin, section[:2]), whole[:2])
    high = np.minimum(np.maximum(followed[2:] + margin, section[2:]), whole[2:])
    return np.concatenate([low, high])


def ellipsoid_section(box: np.ndarray, z: int) -> np.ndarray:
    """Box (4,) round the cross-section at slice z of the ellipsoid inscribed in a 3D box (6,)."""
    centre, radius = (box[:3] + box[3:]) / 2, (box[3:] - box[:3] + 1) / 2  # it fills the box's outermost voxels
    shrink = np.sqrt(max(1 - ((z - centre[2]) / radius[2]) ** 2, 0))
    return np.concatenate([centre[:2] - shrink * radius[:2], centre[:2] + shrink * radius[:2]])


def ellipsoid_depth(box: np.ndarray, z: int, height: int, width: int) -> np.ndarray:
    """1 at the centre of the inscribed ellipsoid, 0 on its surface, negative outside, linear in between.

    box: (6,), original voxels. Returns (256, 256) float32: slice z, sampled at the pixels of the grid.
    """
    centre, radius = (box[:3] + box[3:]) / 2, (box[3:] - box[:3] + 1) / 2
    position = (np.arange(GRID) + 0.5) * (max(height, width) / GRID) - 0.5  # grid pixel centres in original pixels
    x, y = (position - centre[0]) / radius[0], (position - centre[1]) / radius[1]
    distance = np.sqrt(x[None, :] ** 2 + y[:, None] ** 2 + ((z - centre[2]) / radius[2]) ** 2)
    return (1 - distance).astype(np.float32)


def with_prior(logits: np.ndarray, iou: float, depth: np.ndarray) -> np.ndarray:
    """Mask logits (256, 256) plus the ellipsoid's depth (256, 256), weighted by (1 - IoU)^2. -> (256, 256), of the same sign

    The sum is divided by the largest value that it can take, so that where objects overlap the surer one wins and
    not the one with the stronger prior.
    """
    doubt = 1 - min(max(iou, 0.0), 1.0)
    weight = np.float32(PRIOR_WEIGHT * doubt**2)
    return (logits.clip(-LOGIT_LIMIT, LOGIT_LIMIT) + weight * depth) / (LOGIT_LIMIT + weight)
