"""A fork for instances: pictures whose objects are polygons in JSON, scored by the mean precision over IoU thresholds.

python -m examples.instances -i FOLDER -o out/instances    pictures NAME.png with NAME.json, see `read_polygons`
python -m examples.instances --smoke                       one tiny drawn picture

Two things that the house does not know, and the row for each (`add_rows`): a layout of JSON, and a metric of a case. Boxes are
the exact ones of the polygons. Step 4 makes the masks, and step 5 scores them. With a boxes.csv or a detector, step 4 would
take those; the metric does not ask which box an object came from.
"""

import argparse
import importlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from demo_data import tiny_case
from figures import outlines
from formats import MAX_LABEL, InputError
from formats.annotations import LAYOUTS, Boxed, boxed_objects
from formats.npz import write_case
from formats.readers import list_cases, read_case
from formats.writing import save_image, save_json, script, tell
from grid import promptable_labels
from metrics import METRICS, Metric
from tables import read_labels

THRESHOLDS = np.arange(0.5, 1, 0.05)  # of IoU


def add_rows() -> None:
    """What a fork writes into formats/annotations.py and metrics.py."""
    LAYOUTS["polygons"] = read_polygons
    METRICS["map"] = Metric(mean_precision, of_case=True)


def read_polygons(path: Path, shape: tuple[int, int]) -> Boxed:
    """NAME.json of NAME.png: {"polygons": [{"label": "nucleus", "points": [[x, y], ...]}, ...]}.

    Points are centres of pixels, x to the right, y down; pixels on the polygon belong to the object. An object may have
    several polygons: then "points" holds a list of them. InputError for a file that is none, or an empty object.
    """
    masks, names = [], []
    try:
        for one in json.loads(path.read_text("utf-8"))["polygons"]:
            parts = one["points"] if np.ndim(one["points"][0][0]) else [one["points"]]
            corners = [np.array(part, float).reshape(-1, 2).round().astype(np.int32) for part in parts]
            masks.append(cv2.fillPoly(np.zeros(shape, np.uint8), corners, 1).astype(bool))
            names.append(str(one.get("label", "")))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, cv2.error) as error:
        raise InputError(f"{path}: polygon {len(masks) + 1} is not understood ({error!r}); correct it") from error
    empty = [str(i) for i, mask in enumerate(masks, start=1) if not mask.any()]
    if empty or not 0 < len(masks) <= MAX_LABEL:
        what = f"polygon {', '.join(empty)} lies outside the picture" if empty else f"holds {len(masks)} polygons"
        raise InputError(f"{path}: {what}; give 1 to {MAX_LABEL} inside it, or leave the picture out")
    return boxed_objects(path, masks, tuple(names))


def write_polygons(path: Path, labels: np.ndarray, names: dict[int, str]) -> None:
    """The objects of a label map (H, W) in the layout that `read_polygons` reads, without their holes.

    names: of labels; an object without one is called "".
    """
    objects = []
    for i in range(1, int(labels.max()) + 1):
        if parts := [part.tolist() for part in outlines(labels == i)]:
            objects.append({"label": names.get(i, ""), "points": parts})
    save_json(path, {"polygons": objects})


def mean_precision(pred: np.ndarray, gt: np.ndarray, spacing_mm: tuple[float, ...] = ()) -> float:
    """Mean over THRESHOLDS of TP / (TP + FP + FN), the score of the 2018 Data Science Bowl. 0..1

    pred, gt: label maps of one shape, 0 is background; numbers need not agree. A true object is found (TP) if a
    predicted one has an IoU above the threshold with it. From 0.5 on there is at most one such pair for each object.
    >>> round(mean_precision(np.array([7, 7, 0, 0, 4]), np.array([1, 1, 0, 2, 0])), 6)  # a pair, one more, one missed
    0.333333
    """
    (ids_p, p), (ids_g, g) = (np.unique(labels.ravel(), return_inverse=True) for labels in (pred, gt))
    shared = np.bincount(p * len(ids_g) + g, minlength=len(ids_p) * len(ids_g)).reshape(len(ids_p), len(ids_g))
    areas_p, areas_g = shared.sum(axis=1, keepdims=True), shared.sum(axis=0, keepdims=True)
    iou = (shared / (areas_p + areas_g - shared))[ids_p > 0][:, ids_g > 0]
    if not iou.size:
        return 0.0
    found = [np.count_nonzero(iou.max(axis=0) > threshold) for threshold in THRESHOLDS]
    return float(np.mean([tp / (sum(iou.shape) - tp) for tp in found]))  # TP + FP + FN = predicted + true - TP


def drawn_picture(args: argparse.Namespace, folder: Path) -> None:
    """For --smoke: a picture with two blobs and its polygons."""
    case, args.input, args.output = tiny_case(), folder, folder / "out"
    save_image(folder / "US_tiny0.png", case.image)
    write_polygons(folder / "US_tiny0.json", case.labels, dict(enumerate(case.label_names, start=1)))


def run(args: argparse.Namespace) -> dict:
    """Pictures and polygons -> cases, masks, their scores, polygons again. -> step 5's summary"""
    # 1. Rows first; from now on every step knows the layout and the metric
    add_rows()
    out, names = args.output, {}

    # 2. Pictures and polygons as challenge cases, which steps 4 and 5 share: box i asks for label i
    for path in list_cases(args.input):
        try:
            case = read_case(path)
            if case.labels is None:
                raise InputError(f"{path}: has no {path.stem}.json with polygons beside it; add it")
        except InputError as error:
            tell(f"examples.instances: left out: {error}", error=True)
            continue
        labels, _ = promptable_labels(case.labels)
        # `promptable_labels` numbers anew: the name follows its object
        there = [(i, name) for i, name in enumerate(case.label_names, 1) if i in case.labels]
        names[case.name] = {int(labels[case.labels == i][0]): name for i, name in there}
        write_case(out / "cases", replace(case, labels=labels))
    if not names:
        raise InputError(f"{args.input}: no picture has polygons; see --help")

    # 3. Steps 4 and 5. One process: others would not know the rows, which stand in no file of the house
    infer, evaluate = (importlib.import_module(step).main for step in ("04_infer", "05_evaluate"))
    cases = out / "cases"
    infer(["-i", str(cases / "imgs"), "-o", str(out / "segs"), "--model", args.model])
    summary = evaluate(["-s", f"ours={out / 'segs'}", "-g", str(cases / "gts"), "-o", str(out / "eval"), "--jobs", "1"])

    # 4. The masks as polygons again
    for name, of in names.items():
        write_polygons(out / "polygons" / f"{name}.json", read_labels(out / "segs" / f"{name}.npz", "segs")[0], of)
    print(f"examples.instances: {len(names)} pictures; wrote polygons, segs and eval to {out}")
    return summary


def main(argv: list[str] | None = None) -> dict:
    """Returns what step 5 does: {(system, modality or "Average"): means}."""
    p = argparse.ArgumentParser(prog="python -m examples.instances", description=__doc__.splitlines()[0])
    p.add_argument("-i", "--input", type=Path, help="folder of pictures, each with its .json of polygons")
    p.add_argument("-o", "--output", type=Path, default=Path("out/instances"), help="folder (default: out/instances)")
    p.add_argument("--model", default="proposed", help="as step 4 takes it (default: proposed)")
    p.add_argument("--smoke", action="store_true", help="one tiny drawn picture in place of --input")
    args = p.parse_args(argv)
    if not (args.input or args.smoke):
        p.error("give --input FOLDER, or --smoke")
    with script("examples.instances", args, "examples.instances.__main__:drawn_picture"):
        return run(args)


if __name__ == "__main__":
    main()
