"""How a 3D box prompt becomes a box on every slice, three ways; and how a box of one slice does. [P 2.2; PAPER_VS_CODE.md #40-43, #47]

`published_loop` walks from the middle slice outwards and takes each slice's box from the mask before
it: as the paper's release does it, faults included, or with the faults mended, as in LiteMedSAM.
`prompted` is ours, and the preset `fixed` uses it. `follow` is for the page, where boxes are drawn on slices.
Volumes are (D, H, W); boxes (x_min, y_min, z_min, x_max, y_max, z_max), original voxels, inclusive.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from formats.case import Case, check_boxes
from grid import GRID, MaskPatch, boxes_to_grid, crop_to_box, logits_to_original, mask_box, resize_to_grid
from segment import FOLLOWED, Segmenter

# Constants of `prompted`, chosen with our checkpoint on training volumes and synthetic ones; what each
# is worth: results/propagation, made by benchmarks/accuracy.py.
# From one slice to the next a box grows on each side by at most this share of the prompt's size.
GROWTH = 0.03
# The prior, an ellipsoid's depth, counts 10 (1 - IoU)^2 logits: 0.1 at IoU 0.9, 1.6 at 0.6.
PRIOR_WEIGHT = 10.0
# `follow` moves each side of a mask's box outwards by this share of its width or height. A smaller share loses an object
# slice by slice, and a larger one takes what lies beside it.
WIDENED = 0.08
# `follow` ends where a mask has at most this share of the pixels of the mask that it began with.
OVER = 0.05

# Slices whose embeddings, 4.2 MB each, are kept for other objects; the others are encoded again.
EMBEDDINGS_KEPT = 64
# The published loops grow the box of the mask before by this many grid pixels (#47).
BOX_SHIFT = 3
Progress = Callable[[Iterable], Iterable]


class Found(NamedTuple):
    """What was found for the N boxes of a case."""

    labels: np.ndarray  # (H, W) or (D, H, W) uint16, original frame, object i + 1 for box i, 0 background
    iou: np.ndarray  # (N,) float64, predicted intersection over union; in a volume the mean of the object's slices
    own: np.ndarray  # (N,) int64, pixels of each object's own mask, also where another object covers it
    parts: tuple = ()  # of a volume that lies in a patient: (object 0.., slice, MaskPatch of bool) of these masks


def segment_case(segmenter: Segmenter, case: Case) -> np.ndarray:
    """Label map of a case with boxes, 2D or 3D: (H, W) or (D, H, W) uint16."""
    if not case.is_3d:
        return segmenter.segment_image(case.image, case.boxes, case.boxes_are)
    return segment_volume(segmenter, case).labels


def segment_volume(segmenter: Segmenter, case: Case, progress: Progress = list) -> Found:
    """The objects of a volume with boxes (N, 6), by the loop that the preset names. InputError for bad boxes.

    progress: takes what is worked through, slices or objects, and gives it back one by one, as tqdm does."""
    boxes, loop = check_boxes(case.boxes, case.image.shape, case.name, flat=True), segmenter.preset.propagation
    tally = Tally(len(boxes), keep=case.affine is not None)
    if loop == "prompted":
        labels = prompted(segmenter, case.image, boxes, tally, progress, case.boxes_are)
    else:
        labels = published_loop(segmenter, case.image, boxes, loop == "mended", tally, progress, case.boxes_are)
    return Found(labels, tally.iou / np.maximum(tally.slices, 1), tally.own, tuple(tally.parts))


class Tally:
    """Adds up, slice by slice, what `Found` says of each object.   keep: whether its masks are kept, too."""

    def __init__(self, objects: int, keep: bool = False) -> None:
        self.keep, self.parts = keep, []
        self.iou, self.slices, self.own = np.zeros(objects), np.zeros(objects, np.int64), np.zeros(objects, np.int64)

    def add(self, i: int, iou: float, mask: MaskPatch, z: int) -> None:
        """Slice z of object i: its predicted IoU, and the logits of its mask."""
        self.iou[i] += iou
        self.slices[i] += 1
        inside = mask.values > 0
        self.own[i] += np.count_nonzero(inside)
        if self.keep:
            self.parts.append((i, z, mask._replace(values=inside)))


class Embeddings:
    """Embeddings of a volume's slices, each computed once (D8: once a slice) while EMBEDDINGS_KEPT suffices."""

    def __init__(self, segmenter: Segmenter, volume: np.ndarray) -> None:
        self.segmenter, self.volume, self.kept = segmenter, volume, {}

    def of(self, z: int, again: bool):
        """Embedding (1, 256, 64, 64) of slice z.   again: whether it will be needed once more.

        The earliest ones are kept: later passes visit the slices in the same order."""
        embedding = self.kept.pop(z, None)
        if embedding is None:
            embedding = self.segmenter.embed(self.volume[z])
        if again and len(self.kept) < EMBEDDINGS_KEPT:
            self.kept[z] = embedding
        return embedding


def published_loop(
    segmenter: Segmenter, volume: np.ndarray, boxes: np.ndarray, mended: bool, tally: Tally | None = None,
    progress: Progress = list, boxes_are: str = "exact",
) -> np.ndarray:  # fmt: skip
    """The released 3D loop, or that loop with its faults mended. The arguments and the result are those of `prompted`.

    Released (#40): each slice's box comes from the *finished* label map, which does not hold the object that
    is being segmented: the first object never propagates, later ones follow earlier ones.
    Released (#41): the last slice upwards and the first slice downwards are never visited.
    Mended: the box comes from the object's own mask, and both end slices are visited."""
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
            asked_as = boxes_are if before is None else FOLLOWED
            logits, iou = segmenter.decode(embeddings.of(z, again=label < len(boxes)), prompt, None, asked_as)
            with segmenter.stage("upsample"):
                mask = logits_to_original(logits[0], *volume.shape[1:])
            values, rows, columns = mask
            tally.add(label - 1, float(iou[0]), mask, z)
            own[z, rows, columns][values > 0] = label
        labels[own > 0] = label
    return labels


def box_of_previous(mask: np.ndarray | None) -> np.ndarray | None:
    """Box (1, 4) on the grid round a label slice (H, W), grown by BOX_SHIFT; None if there is no mask.

    Like the original it resizes label values as if they were grey levels, so a thin mask can vanish
    (#42). The original then crashes; we answer None."""
    y, x = np.nonzero(resize_to_grid(mask)) if mask is not None else ((), ())
    if len(x) == 0:
        return None
    low = np.maximum([x.min() - BOX_SHIFT, y.min() - BOX_SHIFT], 0)
    high = np.minimum([x.max() + BOX_SHIFT, y.max() + BOX_SHIFT], GRID)
    return np.concatenate([low, high])[None].astype(np.float32)


def prompted(
    segmenter: Segmenter, volume: np.ndarray, boxes: np.ndarray, tally: Tally | None = None,
    progress: Progress = list, boxes_are: str = "exact",
) -> np.ndarray:  # fmt: skip
    """Ours (D6: two limits): from the middle outwards, between the prompt and the ellipsoid inscribed in it.

    An object lies inside its 3D box and touches its six faces. So towards both ends its cross-section
    shrinks, usually no faster than that of the ellipsoid inscribed in the box. For one object with the
    prompt (x0, y0, z0, x1, y1, z1):

    1. The middle slice is m = floor((z0 + z1) / 2). It is asked with the prompt's box (x0, y0, x1, y1).
    2. Then the slices m + 1, m + 2, ... z1, each with a box that is made of the object's mask on the
       slice before (`slice_box`): that mask's box, grown by GROWTH, 3 % of the prompt's, but never smaller
       than the ellipsoid's section, so that the object cannot die out, and never larger than the prompt,
       so that it cannot drift off. If the mask before is empty, the box is the ellipsoid's section.
    3. Then the slices m - 1, m - 2, ... z0 in the same way. They start from the mask of slice m, not
       from where the way up ended.
    4. A slice's mask (`ask`). The decoder gives logits (256, 256) and a predicted IoU. The ellipsoid's depth
       is added to the logits, the more, the less sure the network is (`with_prior`), on all slices, m
       among them. The result is upsampled to the slice, cut to the pixels that (x0, y0, x1, y1) touches,
       and the mask is where it is above 0. The next slice's box comes from this mask, also where another
       object covers it.

    Objects do not follow one another; they meet only in the label map. Where masks overlap, the preset's
    `overlap` decides ("logit": the object with the larger value of `with_prior`, upsampled; "last":
    the higher number), in whatever order they are painted.

    The order of work is by slice, so that a slice is encoded once (D8: once a slice) while
    EMBEDDINGS_KEPT suffices: z = 0 .. D - 1 for all objects with m <= z <= z1, then z = D - 1 .. 0 for
    all with z0 <= z < m. Of a slice, the objects whose middle it is are decoded first, then the others.
    tally: adds up each object's mask and predicted IoU on each slice.   progress: see `segment_volume`.
    boxes_are: their kind (segment.BOX_KINDS), as which the middle slice is asked; the others as FOLLOWED,
    whose decoder is a mean of those of drawn and of exact boxes (segment.py).
    -> (D, H, W) uint16, box i paints i + 1"""
    tally = tally or Tally(len(boxes))
    labels = np.zeros(volume.shape, dtype=np.uint16)
    middle = (boxes[:, 2] + boxes[:, 5]) // 2
    upwards = [(z, np.flatnonzero((middle <= z) & (z <= boxes[:, 5]))) for z in range(len(volume))]
    downwards = [(z, np.flatnonzero((boxes[:, 2] <= z) & (z < middle))) for z in reversed(range(len(volume)))]
    visited_twice = {z for z, objects in upwards if len(objects)} & {z for z, objects in downwards if len(objects)}
    # canvases: of slices that are visited on both ways. The other two: object -> box (4,) of its mask on
    # the slice before, and on the middle slice; None if that mask was empty
    embeddings, canvases, followed, from_middle = Embeddings(segmenter, volume), {}, {}, {}
    for z, objects in progress([(z, objects) for z, objects in upwards + downwards if len(objects)]):
        embedding = embeddings.of(z, again=z in visited_twice)
        canvas = canvases.pop(z, None) or segmenter.new_canvas(labels[z], len(boxes))
        for index in objects[middle[objects] == z + 1]:
            # the way down starts from the mask of the middle slice
            followed[index] = from_middle[index]
        starts = middle[objects] == z
        for kind, group in ((boxes_are, objects[starts]), (FOLLOWED, objects[~starts])):
            asked = np.array([slice_box(boxes[i], z, followed.get(i), middle[i]) for i in group])
            found = ask(segmenter, embedding, asked, boxes[group], z, labels.shape[1:], kind)
            for index, (mask, iou) in zip(group, found, strict=True):
                tally.add(index, iou, mask, z)
                canvas.paint(index + 1, mask)
                followed[index] = mask_box(mask)
                if z == middle[index]:
                    from_middle[index] = followed[index]
        if z in visited_twice:
            visited_twice.remove(z)
            canvases[z] = canvas
    return labels


def follow(
    segmenter: Segmenter,
    volume: np.ndarray,
    boxes: dict[int, Sequence[float] | None],
    boxes_are: str = "drawn",
    embed: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, MaskPatch, float]]:
    """One object from boxes on any slices, between any limits, where no 3D box is known: yields (slice, mask, IoU).

    A slice with a box is asked with that box. From there the walk goes up, then down. Each further slice is asked with
    the box of the mask on the slice before, each side moved outwards by WIDENED of its width or height (D24: it asks as
    FOLLOWED). A mask ends near the box that asked for it (D18). A walk ends where a mask has no more than
    OVER of the pixels of the mask that it began with. A slice between two boxes belongs to the walk from the nearer
    one, of two equally near the lower one. The box that was given last is walked from first.

    boxes: slice -> (4,) x0 y0 x1 y1, original pixels, inclusive; None: the object is not on this slice, so that no
    walk goes there or beyond.   boxes_are: their kind.   embed: slice -> its embedding (default: made anew).
    """
    size, given = np.array(volume.shape[2:0:-1]), sorted(boxes)
    for z in [z for z in reversed(boxes) if boxes[z] is not None]:
        below, above = max((o for o in given if o < z), default=None), min((o for o in given if o > z), default=None)
        low = 0 if below is None else below + 1 if boxes[below] is None else (below + z) // 2 + 1
        high = len(volume) - 1 if above is None else above - 1 if boxes[above] is None else (z + above) // 2
        box, start = np.asarray(boxes[z], float), None
        for slices in ([z], range(z + 1, high + 1), range(z - 1, low - 1, -1)):
            # both ways begin with the mask of slice z
            mask = start
            for at in slices:
                asked, kind = box, boxes_are
                if mask is not None:
                    if np.count_nonzero(mask.values > 0) <= OVER * np.count_nonzero(start.values > 0):
                        break
                    followed, kind = mask_box(mask), FOLLOWED
                    margin = WIDENED * np.tile(followed[2:] - followed[:2], 2) * [-1, -1, 1, 1]
                    asked = np.clip(followed + margin, 0, np.tile(size, 2))
                embedding = embed(at) if embed else segmenter.embed(volume[at])
                ((mask, iou),) = segmenter.decode_boxes(embedding, asked[None], volume.shape[1:3], kind)
                start = start or mask
                yield at, mask, iou


def ask(segmenter: Segmenter, embedding, asked: np.ndarray, boxes: np.ndarray, z: int, shape: tuple, kind: str):
    """Step 4 of `prompted` for N objects of slice z: yields each one's mask, and its predicted IoU.

    asked: (N, 4) the boxes of this slice, and `kind` theirs.   boxes: (N, 6) the prompts.   shape: (H, W) of the slice."""
    whole = boxes[:, [0, 1, 3, 4]]
    for i, (logits, iou) in enumerate(segmenter.decode_all(embedding, asked, shape, whole, kind)):
        with segmenter.stage("upsample"):
            leaning = with_prior(logits, iou, ellipsoid_depth(boxes[i], z, *shape))
            mask = crop_to_box(logits_to_original(leaning, *shape), whole[i])
        yield mask, iou


def slice_box(box: np.ndarray, z: int, followed: np.ndarray | None, middle: float) -> np.ndarray:
    """The box (4,) to ask with on slice z, original pixels: on the middle slice the prompt's own.

    box: the 3D prompt (6,).   followed: box (4,) round the object's mask on the slice before, its
    outermost pixels; None if that mask is empty: then the answer is the ellipsoid's section."""
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
    """Box (4,) round the cross-section at slice z of the ellipsoid inscribed in a 3D box (6,).

    Along each axis the centre is (low + high) / 2 and the radius (high - low + 1) / 2: the ellipsoid
    fills the box's outermost voxels. With d = (z - centre_z) / radius_z the section is centre_x +- s
    radius_x and centre_y +- s radius_y, where s = sqrt(1 - d^2)."""
    centre, radius = (box[:3] + box[3:]) / 2, (box[3:] - box[:3] + 1) / 2
    shrink = np.sqrt(max(1 - ((z - centre[2]) / radius[2]) ** 2, 0))
    return np.concatenate([centre[:2] - shrink * radius[:2], centre[:2] + shrink * radius[:2]])


def ellipsoid_depth(box: np.ndarray, z: int, height: int, width: int) -> np.ndarray:
    """1 at the centre of the inscribed ellipsoid, 0 on its surface, negative outside, linear in between.

    depth(x, y, z) = 1 - sqrt(dx^2 + dy^2 + dz^2), with dx = (x - centre_x) / radius_x, and so on; centre
    and radius as in `ellipsoid_section`.   box: (6,), original voxels.
    Returns (256, 256) float32: slice z, sampled at the centres of the grid's pixels. Pixel i of the grid
    lies at (i + 0.5) max(height, width) / 256 - 0.5 original pixels."""
    centre, radius = (box[:3] + box[3:]) / 2, (box[3:] - box[:3] + 1) / 2
    position = (np.arange(GRID) + 0.5) * (max(height, width) / GRID) - 0.5
    x, y = (position - centre[0]) / radius[0], (position - centre[1]) / radius[1]
    distance = np.sqrt(x[None, :] ** 2 + y[:, None] ** 2 + ((z - centre[2]) / radius[2]) ** 2)
    return (1 - distance).astype(np.float32)


def with_prior(logits: np.ndarray, iou: float, depth: np.ndarray) -> np.ndarray:
    """Mask logits (256, 256) plus the ellipsoid's depth (256, 256), the more, the lower the predicted IoU.

        logits + w depth,   w = W (1 - IoU)^2,   W = PRIOR_WEIGHT = 10

    The IoU is first cut to 0..1. The mask is where the result is above 0."""
    doubt = 1 - min(max(iou, 0.0), 1.0)
    return logits + np.float32(PRIOR_WEIGHT * doubt**2) * depth
