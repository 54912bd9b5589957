"""A fork for CVPR 2025, "Foundation Models for Interactive 3D Biomedical Image Segmentation": a box, then five clicks.

python -m examples.interactive -i FOLDER -o out/interactive    .npz with imgs (D, H, W), gts, spacing (x, y, z)
python -m examples.interactive --smoke                         a tiny drawn volume

The program plays the organisers, in six runs of each case. Each run reads the file alone that a container would find: `imgs`,
`spacing`; `boxes`, a dict an object: a box on its middle slice, and its slices; later `clicks`, {"fg": [[z, y, x], ...],
"bg": [...]} an object, and `prev_pred`. Our network knows boxes alone, so a click makes a box: `correct`. scores.csv has a
row a run: mean DSC and NSD of the objects, seconds. The AUC is the area under the scores of the five clicks, 0 to 4. More
than 90 s an object: scores of 0.
"""

import argparse
import json
import pickle
import time
import zipfile
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt
from skimage.measure import label

import segment
from demo_data import tiny_case
from formats import InputError
from formats.case import check_image, check_labels, paint, spacing_zyx, told_in_a_sentence
from formats.npz import write_training_case
from formats.readers import list_cases
from formats.writing import csv_text, save_npz, save_text, script
from grid import label_ids
from metrics import case_scores
from volumes import follow

CLICKS, SECONDS = 5, 90
KEYS = ("z_min", "z_max", "z_mid", "z_mid_x_min", "z_mid_y_min", "z_mid_x_max", "z_mid_y_max")  # of a box
GROWTH = 2  # pixels: how much larger than a mask the box is that asks for it again
DISK = 3  # pixels round a click on an object that become object whatever the network says


class Plain(pickle.Unpickler):
    """A pickle is a program that calls what it names. Here it may name what makes NumPy's arrays, and nothing else."""

    def find_class(self, module: str, name: str):
        known = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        if known and name in ("_reconstruct", "ndarray", "dtype", "scalar"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def read_objects(path: Path, key: str) -> list[dict]:
    """An array of dicts in an .npz, without running what a pickle could; [] if there is none. Or InputError.

    Only dicts, lists, texts and plain numbers come out: by way of JSON."""
    told = told_in_a_sentence(path, f"'{key}' is not understood", "save an array of plain dictionaries")
    with told, zipfile.ZipFile(path) as stored:
        if f"{key}.npy" not in stored.namelist():
            return []
        with stored.open(f"{key}.npy") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            found = np.ravel(Plain(file).load())
        return [dict(json.loads(json.dumps(one, default=lambda array: array.tolist()))) for one in found]


def read_volume(path: Path) -> dict:
    """imgs (D, H, W), spacing (z, y, x) mm; gts and prev_pred (D, H, W), or None. Or InputError."""
    with told_in_a_sentence(path, "no volume with imgs and spacing", "copy it again"), np.load(path) as file:
        found = {"imgs": check_image(file["imgs"], True, path), "spacing": spacing_zyx(file["spacing"])}
        for key in ("gts", "prev_pred"):
            found[key] = check_labels(file[key], found["imgs"].shape, path) if key in file.files else None
    return found


def read_request(path: Path) -> dict:
    """`read_volume`, and lists of the boxes (dict, or None) and the clicks of each object. Or InputError."""
    found, boxes, clicks = read_volume(path), read_objects(path, "boxes"), read_objects(path, "clicks")
    count, shape = len(boxes or clicks), found["imgs"].shape
    if not count or count != len(clicks or boxes):
        raise InputError(f"{path}: has {len(boxes)} boxes, and clicks for {len(clicks)} objects; give one of each")
    size = np.array(shape)[[0, 0, 0, 2, 1, 2, 1]] - [0, 0, 1, 0, 0, 0, 0]  # the middle slice is asked
    for box in boxes:
        # what is no number, or missing, is none in the image either
        numbers = np.array([n if isinstance(n := box.get(key), int | float) else -1 for key in KEYS])
        if not ((0 <= numbers) & (numbers <= size)).all():
            raise InputError(f"{path}: {box} is no box in {shape} (D, H, W); it needs {', '.join(KEYS)}")
    for one in clicks:
        points = np.array([*one.get("fg", ()), *one.get("bg", ())], float).reshape(-1, 3)
        if not ((points >= 0) & (points < shape)).all():
            raise InputError(f"{path}: {one} has clicks outside {shape} (z, y, x); correct them")
    return found | {"boxes": boxes or [None] * count, "clicks": clicks or [{}] * count}


def bounds(mask: np.ndarray, grow: float) -> np.ndarray:
    """Box (4,) x0 y0 x1 y1 round a mask (H, W) bool that holds a pixel, inclusive, grown, and cut to the slice."""
    y, x = np.nonzero(mask)
    low, high = [x.min() - grow, y.min() - grow], [x.max() + grow, y.max() + grow]
    return np.clip([*low, *high], 0, np.tile(mask.shape[::-1], 2) - 1).astype(float)


def correct(ask, mask: np.ndarray, click: tuple[int, int, int], wanted: bool) -> np.ndarray:
    """A mask (D, H, W) after a click (z, y, x) on what is missing (wanted) or too much.

    On slice z the box is that of the mask and the click, or of what is left when the clicked part, or, of a mask in one
    part, the side of the click is cut off. The slices above and below follow, each with a box made of the slice before,
    until the network says that y, x is right.
    ask: (slice, box (4,) x0 y0 x1 y1) -> mask (H, W) bool
    """
    z, y, x = click
    before, mask = mask, mask.copy()
    rows, columns = np.ogrid[: mask.shape[1], : mask.shape[2]]
    disk = (rows - y) ** 2 + (columns - x) ** 2 <= DISK**2
    parts = cv2.connectedComponents(mask[z].astype(np.uint8))[1]
    cuts = [mask[z] & side for side in (rows < y - 1, rows > y + 1, columns < x - 1, columns > x + 1)]
    left = mask[z] & (parts != parts[y, x])
    if 3 * np.count_nonzero(left) < np.count_nonzero(mask[z]):
        left = max(cuts, key=np.count_nonzero)
    for step, at in ((1, z), (-1, z - 1)):
        while 0 <= at < len(mask) and before[at, y, x] != wanted:
            near = mask[at - step] if at != z else left
            near = near | mask[at] | disk if wanted else near
            found = ask(at, bounds(near, GROWTH)) if near.any() else near
            if at == z:  # what a person clicked on is so, whatever the network says
                found = found | disk if wanted else found & near
            elif found[y, x] != wanted or not near.any():
                break
            mask[at] = mask[at] | found if wanted else mask[at] & found
            at += step
    return mask


def segment_request(segmenter: segment.Segmenter, request: dict) -> np.ndarray:
    """One run: the masks of the boxes, or `prev_pred` after each object's last click. -> (D, H, W) uint16"""
    volume, masks = request["imgs"], []
    embed = cache(lambda z: segmenter.embed(volume[z]))

    def ask(z: int, box: np.ndarray) -> np.ndarray:
        return segmenter.masks(embed(z), box[None], volume.shape[1:], "drawn").labels > 0

    for i, (box, clicks) in enumerate(zip(request["boxes"], request["clicks"], strict=True), start=1):
        mask = np.zeros(volume.shape, bool)
        if request["prev_pred"] is not None:
            mask = request["prev_pred"] == i
        elif box:
            first, last, middle, *drawn = (int(box[key]) for key in KEYS)
            # slices: not there, not there, this box
            boxes = {first - 1: None, min(last + 1, len(volume)): None, middle: drawn}
            for z, patch, _ in follow(segmenter, volume, boxes, "exact", embed):
                mask[z, patch.rows, patch.columns] = patch.values > 0
        for click, wanted in [(c, key == "fg") for key in ("fg", "bg") for c in clicks.get(key, ())]:
            z, y, x = map(int, click)
            if mask[z, y, x] != wanted:  # else an earlier run heard it
                mask = correct(ask, mask, (z, y, x), wanted)
        masks.append(mask)
    return paint(masks, [""] * len(masks), "the request")[0]


def box_of(mask: np.ndarray, rng: np.random.Generator) -> dict:
    """The organisers' box of an object (D, H, W) bool: that of its middle slice, up to 5 pixels of 256 larger, and its slices."""
    slices = np.flatnonzero(mask.any(axis=(1, 2))).tolist()
    middle, size = slices[len(slices) // 2], np.tile(mask.shape[:0:-1], 2)
    sides = bounds(mask[middle], 0) + rng.uniform(0, 5, 4) * size / 256 * [-1, -1, 1, 1]
    return dict(zip(KEYS, (slices[0], slices[-1], middle, *np.clip(sides, 0, size - 1).tolist()), strict=True))


def click_on(pred: np.ndarray, gt: np.ndarray) -> tuple[str, list[int]] | None:
    """The deepest voxel of the largest wrong part of a mask (D, H, W) bool: "fg" where it misses, "bg" where it is too much."""
    parts = label(pred != gt, connectivity=3)
    if not parts.any():
        return None
    largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    depth = distance_transform_edt(np.pad(largest, 1))[1:-1, 1:-1, 1:-1]
    click = np.unravel_index(depth.argmax(), depth.shape)
    return "fg" if gt[click] else "bg", [int(i) for i in click]


def play(segmenter: segment.Segmenter, path: Path, out: Path) -> tuple[list[dict], dict]:
    """-> a row for each run of a case, and what the case ends with"""
    volume, rng = read_volume(path), np.random.default_rng(42)
    if volume["gts"] is None or not volume["gts"].any():
        raise InputError(f"{path}: has no object in 'gts', which the clicks are made of; give training files")
    gts = np.searchsorted([0, *label_ids(volume["gts"])], volume["gts"]).astype(np.uint16)  # 1, 2, ... without gaps
    known = {"imgs": volume["imgs"], "spacing": volume["spacing"][::-1]}
    known["boxes"] = np.array([box_of(gts == i, rng) for i in range(1, gts.max() + 1)], object)
    clicks, rows, file = [{"fg": [], "bg": []} for _ in known["boxes"]], [], out / "inputs" / path.name
    for run in range(1 + CLICKS):
        save_npz(file, **known)
        start = time.perf_counter()
        segs = segment_request(segmenter, read_request(file))
        rows.append({"case": path.stem, "run": run, "seconds": time.perf_counter() - start})
        # the challenge's evaluator, for labels that exist (DSC, NSD at 2 mm, its order of the spacing)
        rows[-1] |= case_scores(segs, gts, volume["spacing"], "challenge").means
        for i, heard in enumerate(clicks, start=1):
            if wrong := click_on(segs == i, gts == i):
                heard[wrong[0]].append(wrong[1])
        known |= {"clicks": np.array(clicks, object), "prev_pred": segs}
    save_npz(out / "outputs" / path.name, segs=segs)
    in_time, ends = sum(row["seconds"] for row in rows) <= SECONDS * len(clicks), {"case": path.stem}
    for name in ("dsc", "nsd"):
        scores = np.array([row[name] for row in rows[1:]]) * in_time
        ends |= {f"{name}_auc": np.trapezoid(scores), f"{name}_final": scores[-1]}
    return rows, ends


def drawn_volume(args: argparse.Namespace, folder: Path) -> None:
    """For --smoke: a volume with two blobs."""
    args.input, args.output = folder / "cases", folder / "out"
    write_training_case(args.input, tiny_case(dims=3))


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns a row for each case: AUC and final scores."""
    p = argparse.ArgumentParser(prog="python -m examples.interactive", description=__doc__.splitlines()[0])
    p.add_argument("-i", "--input", type=Path, help="folder of .npz with imgs, gts and spacing")
    p.add_argument("-o", "--output", type=Path, default=Path("out/interactive"), help="default: out/interactive")
    p.add_argument("--model", default="proposed", help="as step 4 takes it (default: proposed)")
    p.add_argument("--smoke", action="store_true", help="a tiny drawn volume in place of --input")
    args = p.parse_args(argv)
    if not (args.input or args.smoke):
        p.error("give --input FOLDER, or --smoke")
    with script("examples.interactive", args, "examples.interactive.__main__:drawn_volume"):
        segmenter = segment.load(args.model)
        rows, ends = [], []
        for path in list_cases(args.input):
            runs, end = play(segmenter, path, args.output)
            rows += runs
            ends.append(end)
            print("examples.interactive: {case}: DSC AUC {dsc_auc:.3f}, NSD AUC {nsd_auc:.3f}".format(**end))
        save_text(args.output / "scores.csv", csv_text(rows, tuple(rows[0])))
        return ends


if __name__ == "__main__":
    main()
