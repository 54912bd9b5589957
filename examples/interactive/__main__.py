"""Six runs of each case, as the organisers do them: a box, then five clicks: python -m examples.interactive

python -m examples.interactive -i FOLDER -o out/interactive    .npz with imgs (D, H, W), gts, spacing (x, y, z)
python -m examples.interactive --smoke                         a tiny drawn volume

Each run reads the file alone that a container would find, and writes its segs. scores.csv has a row a run: mean DSC and NSD of
the objects, seconds. The AUC is the area under the scores of the five clicks, 0 to 4. More than 90 s an object: scores of 0.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt
from skimage.measure import label

import segment
from demo_data import tiny_case
from examples.interactive import KEYS, bounds, read_request, read_volume, segment_request
from formats import InputError
from formats.npz import write_training_case
from formats.readers import list_cases
from formats.writing import csv_text, save_npz, save_text, script
from metrics import case_scores

CLICKS, SECONDS = 5, 90


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


def play(segmenter, path: Path, out: Path) -> tuple[list[dict], dict]:
    """-> a row for each run of a case, and what the case ends with"""
    volume, rng = read_volume(path), np.random.default_rng(42)
    if volume["gts"] is None or not volume["gts"].any():
        raise InputError(f"{path}: has no object in 'gts', which the clicks are made of; give training files")
    ids, flat = np.unique(volume["gts"], return_inverse=True)
    gts = flat.reshape(volume["gts"].shape).astype(np.uint16) + np.uint16(ids[0] > 0)  # 1, 2, ... without gaps
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
