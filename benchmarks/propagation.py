"""What each constant of the 3D propagation is worth: volumes segmented again with one of them changed. (D6)

    python benchmarks/propagation.py --cases train        training volumes and synthetic ones; writes results/propagation

The constants of volumes.py are chosen by this table, so it must not see the volumes that a score is stated for.
Writes cases.csv (0..1) and table.md (per cent).
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

import table4

import volumes
from fast import engines
from files import InputError
from files.case import Case
from files.checkpoints import OUR_CHECKPOINT
from files.formats import list_cases, read_case
from files.writing import csv_text, save_text
from grid import boxes_from_labels, promptable_labels
from metrics import case_scores
from phantoms import synthetic_case
from segment import MODELS
from tables import REFERENCES

SWEEP = {
    "GROWTH": (0.0, 0.01, 0.06, 0.1),
    "LOGIT_LIMIT": (1.5, 6.0, 12.0),
    "PRIOR_WEIGHT": (0.0, 10.0, 40.0, 120.0, 400.0),
}
AS_SET = {name: getattr(volumes, name) for name in SWEEP}


def variants(sweep: bool) -> dict[str, tuple[str, dict]]:
    """{title: (model, constants)}: both models as volumes.py is, then ours with one constant changed."""
    found = {"LiteMedSAM": ("baseline", AS_SET), "proposed": ("proposed", AS_SET)}
    for name, values in SWEEP.items() if sweep else ():
        for value in values:
            if value != AS_SET[name]:
                found[f"proposed, {name} {value:g}"] = ("proposed", AS_SET | {name: value})
    return found


def volumes_of(folder: Path, at_most: int, synthetic: bool) -> list[Case]:
    """The first volumes of each data set, and a synthetic one of CT, MR and PET; boxes exact."""
    cases, count = [], defaultdict(int)
    for path in list_cases(folder):
        data_set = path.stem.rsplit("_", 1)[0]
        if path.name.startswith("3D") and count[data_set] < at_most:
            count[data_set] += 1
            cases.append(read_case(path))
    if not cases:
        raise InputError(f"{folder}: holds no volume (3D_*.npz) with masks; name another folder")
    return cases + [synthetic_case(modality) for modality in ("CT", "MR", "PET") if synthetic]


def dsc_and_nsd(case: Case, labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """DSC and NSD, strict, 0..1."""
    means = case_scores(found, labels, case.spacing_mm, "strict").means
    return {"DSC": means["dsc"], "NSD": means["nsd"]}


def variants_on(cases: list[Case], weights: Path, sweep: bool) -> list[dict]:
    """A row for each case and variant, and the inscribed ellipsoid."""
    paths = {"baseline": MODELS["baseline"].weights(), "proposed": weights}
    segmenters = {m: table4.RememberingSegmenter(engines.load(m, p, table4.PRESET, "fast")) for m, p in paths.items()}
    rows = []
    for case in tqdm(cases, "volumes", disable=None):
        labels = promptable_labels(case.labels)[0]
        boxes = boxes_from_labels(labels)[1]
        named = {"case": case.name, "data set": case.name.rsplit("_", 1)[0]}
        ellipsoid = REFERENCES["inscribed ellipse"](boxes, labels.shape)
        rows.append(named | {"system": "inscribed ellipsoid"} | dsc_and_nsd(case, labels, ellipsoid))
        for title, (model, constants) in variants(sweep).items():
            with patch.multiple(volumes, **constants):
                found = volumes.prompted(segmenters[model], case.image, boxes)
            rows.append(named | {"system": title} | dsc_and_nsd(case, labels, found))
        for segmenter in segmenters.values():
            segmenter.kept.clear()
    return rows


def propagation_table(rows: list[dict]) -> str:
    """A row a system: the mean of each data set, and of the data sets."""
    sets = list(dict.fromkeys(row["data set"] for row in rows))
    lines = ["| system | " + " | ".join(f"{name} DSC | NSD" for name in [*sets, "mean"]) + " |"]
    lines.append("| --- " * (2 * len(sets) + 3) + "|")
    for system in dict.fromkeys(row["system"] for row in rows):
        here = [row for row in rows if row["system"] == system]
        means = [[np.mean([r[s] for r in here if r["data set"] == name]) for s in ("DSC", "NSD")] for name in sets]
        cells = [f"{100 * value:.1f}" for pair in [*means, np.mean(means, axis=0)] for value in pair]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"As set: {', '.join(f'{name} {value:g}' for name, value in AS_SET.items())}.", ""])


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of cases.csv."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--cases", type=Path, required=True, help="folder of .npz cases with imgs, gts and spacing")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="checkpoint of the proposed model")
    p.add_argument("--at-most", type=int, default=4, help="volumes of each data set")
    p.add_argument("--no-sweep", action="store_true", help="the constants as they are, and real volumes only")
    p.add_argument("-o", "--out", type=Path, default=Path("results/propagation"), help="folder for the tables")
    args = p.parse_args(argv)
    try:
        rows = variants_on(volumes_of(args.cases, args.at_most, not args.no_sweep), args.weights, not args.no_sweep)
        save_text(args.out / "cases.csv", csv_text(rows, ("system", "data set", "case", "DSC", "NSD")))
        save_text(args.out / "table.md", propagation_table(rows))
    except (InputError, OSError) as error:
        sys.exit(f"propagation.py: {error}")
    print(propagation_table(rows))
    return rows


if __name__ == "__main__":
    main()
