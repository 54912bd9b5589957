"""What our network leans on: its scores when its input is changed, on the same 2D cases and boxes. [P 4.5]

    python benchmarks/choices.py --cases val        writes results/choices/inputs.csv

This says nothing about a network that was trained on such inputs.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

import table4

from fast import engines
from files import InputError
from files.npz import read_npz
from files.writing import csv_text, save_npz, save_text
from tables import AVERAGE, score_case, summarize

INPUTS = {  # name -> changes of preset `fixed`
    "as trained": [],
    "gray three times": ["iterations=0", "equalize=nothing"],
    "released channels": ["iterations=1", "diffusion_range=1.0", "border=wrap", "rounding=truncate", "equalize=raw"],
    "gray": ["color=gray"],
}


def changed_inputs(cases: Path, work: Path) -> list[dict]:
    """DSC and NSD (strict, 0..1) of our checkpoint under each of INPUTS, by modality. work: a folder for label maps."""
    flags, rows = ["--cases", str(cases), "--2d-only", "--predictions", str(work)], []
    names, _ = table4.prepare(("exact", "moved"), table4.parse(flags))
    for title, settings in INPUTS.items():
        segmenter = engines.load("proposed", settings=settings)
        for name in tqdm(names, title, disable=None):
            case = read_npz(work / "exact" / "imgs" / name)
            save_npz(work / "segs" / name, segs=segmenter.segment_image(case.image, case.boxes))
            found, problems = score_case(work / "exact" / "gts" / name, {title: work / "segs"}, ("strict",))
            if problems:
                raise InputError(problems[0])
            rows += [row for row in found if row["system"] == title]
    return [{"input": title, "modality": modality, "cases": line["cases"]}
            | {"DSC": line["dsc_strict"], "NSD": line["nsd_strict"]}
            for (title, modality), line in summarize(rows).items()]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--cases", type=Path, required=True, help="folder of .npz cases with imgs and gts")
    p.add_argument("-o", "--out", type=Path, default=Path("results/choices"), help="folder for inputs.csv")
    args = p.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as work:
            table = changed_inputs(args.cases, Path(work))
        save_text(args.out / "inputs.csv", csv_text(table, tuple(table[0])))
    except (InputError, OSError) as error:
        sys.exit(f"choices.py: {error}")
    for row in table:
        if row["modality"] == AVERAGE:
            print(f"{row['input']}: DSC {100 * row['DSC']:.2f}, NSD {100 * row['NSD']:.2f}, {row['cases']} cases")


if __name__ == "__main__":
    main()
