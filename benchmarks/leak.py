"""What is a leak worth? The mask of the nearest slice of the same patient, scored as if a network had answered it. [P 3.2]

    python benchmarks/leak.py --cases val                writes results/leak/slices.csv, a row a slice and object

Beside it the mask of another patient of the same data set, at the same depth of the object: what remains when patients are
kept apart. Nobody looks at an image in either.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

from files import InputError, bare_name
from files.case import Case
from files.formats import list_cases, read_case
from files.writing import csv_text, save_text
from metrics import dsc

COLUMNS = ("data set", "case", "slice", "label", "pixels", "same patient", "other patient")


def data_set(case: Case) -> str:
    return "_".join(bare_name(case.name).split("_")[:2])


def slice_at(case: Case, label: int, depth: float, shape: tuple[int, int]) -> np.ndarray:
    """The object's mask of another volume at a depth of 0..1 from its first slice to its last, stretched to shape (H, W)."""
    slices = np.flatnonzero((case.labels == label).any(axis=(1, 2)))
    z = slices[round(depth * (len(slices) - 1))]
    mask = (case.labels[z] == label).astype(np.uint8)
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 0


def leaks(case: Case, others: list[Case]) -> list[dict]:
    """A row for each slice and object: DSC of the slice before it, and the mean DSC of other patients' slices."""
    rows = []
    for label in np.unique(case.labels[case.labels > 0]).tolist():
        slices = np.flatnonzero((case.labels == label).any(axis=(1, 2)))
        having = [other for other in others if (other.labels == label).any()]
        for before, z in zip(slices[:-1], slices[1:], strict=True):
            truth = case.labels[z] == label
            depth = (z - slices[0]) / (len(slices) - 1)
            found = [dsc(slice_at(other, label, depth, truth.shape), truth) for other in having]
            row = {"data set": data_set(case), "case": case.name, "slice": int(z), "label": label}
            row |= {"pixels": int(truth.sum()), "same patient": float(dsc(case.labels[before] == label, truth))}
            rows.append(row | {"other patient": float(np.mean(found)) if found else float("nan")})
    return rows


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--cases", type=Path, required=True, help="folder of .npz volumes with gts")
    p.add_argument("-o", "--out", type=Path, default=Path("results/leak"), help="folder for slices.csv")
    args = p.parse_args(argv)
    try:
        volumes = [case for case in map(read_case, list_cases(args.cases)) if case.is_3d]
        if not volumes:
            raise InputError(f"{args.cases}: holds no volume; a leak needs slices of one patient")
        rows = []
        for case in volumes:
            rows += leaks(case, [o for o in volumes if o is not case and data_set(o) == data_set(case)])
        save_text(args.out / "slices.csv", csv_text(rows, COLUMNS, number=".4f"))
    except (InputError, OSError) as error:
        sys.exit(f"leak.py: {error}")
    for name in ("same patient", "other patient"):
        print(
            f"{name}: {np.nanmean([row[name] for row in rows]):.3f} DSC, {len(rows)} slices of {len(volumes)} volumes"
        )


if __name__ == "__main__":
    main()
