"""Step 5 of 5, evaluate. Reads predictions (step 4) and truth (step 1), writes tables. Try: 05_evaluate.py --smoke

    python 05_evaluate.py --segs ours=segs baseline=segs_baseline --gts demo/gts

Scores DSC and NSD [P 3.1] of every system, next to two that never look at the image: filled box and inscribed
ellipse. Writes cases.csv, labels.csv (a row an object), modalities.csv (0..1), table.md (per cent), arguments.json.
Means are plain: over a case's labels, a modality's cases, the modalities. Protocols, conventions: see metrics.py.
"""

import argparse
import csv
import math
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

from metrics import PROTOCOLS, filled_box
from scoring import score_case
from tables import REFERENCES, SCORES, csv_text, markdown_table, summarize, terminal_table
from writers import save_json, save_text


def read_seconds(systems: dict[str, Path]) -> dict[tuple[str, str], float]:
    """{(system, case file name): total_s} from every folder that has an efficiency.csv (step 4 writes it)."""
    seconds = {}
    for system, path in ((system, folder / "efficiency.csv") for system, folder in systems.items()):
        if path.is_file():
            try:
                lines = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
                seconds |= {(system, line["case"]): float(line["total_s"]) for line in lines}
            except (KeyError, TypeError, ValueError) as error:
                sys.exit(f"05_evaluate.py: {path}: needs columns case and total_s ({error!r}); run 04_infer.py again")
    return seconds


def write_results(args: argparse.Namespace, rows: list[dict], summary: dict, table: str) -> None:
    """The three .csv files, the table and the arguments, into args.out."""
    blank = dict.fromkeys(SCORES, math.nan)  # else a label without a score would show its case's mean
    per_label = [row | blank | {"label": i} | scores for row in rows for i, scores in sorted(row["labels"].items())]
    per_modality = [{"system": system, "modality": modality, **line} for (system, modality), line in summary.items()]
    save_text(args.out / "cases.csv", csv_text(rows, ("system", "case", "modality", "objects", *SCORES, "seconds")))
    save_text(args.out / "labels.csv", csv_text(per_label, ("system", "case", "modality", "label", *SCORES)))
    columns = ("system", "modality", "cases", "objects", *SCORES, "seconds")
    save_text(args.out / "modalities.csv", csv_text(per_modality, columns))
    save_text(args.out / "table.md", table)
    save_json(args.out / "arguments.json", vars(args))


def make_smoke_cases(folder: Path) -> tuple[list[str], Path]:
    """Two images and a volume: notched boxes, and predictions that are 1, 2 and 3 pixels off. Returns --segs, --gts."""
    (folder / "gts").mkdir()
    (folder / "shifted").mkdir()
    shapes = {"2D_US_a.npz": (48, 64), "2D_CT_b.npz": (64, 48), "3D_CT_c.npz": (12, 48, 40)}
    for shift, (name, shape) in enumerate(shapes.items(), start=1):
        gts = filled_box(np.array([[n // 4 for n in shape[::-1]] + [n // 2 for n in shape[::-1]]]), shape)
        gts[tuple(slice(3 * n // 8, None) for n in shape)] = 0  # else the filled box would score 100
        np.savez_compressed(folder / "gts" / name, gts=gts, spacing=np.array([0.8, 0.8, 2.5]))  # x, y, z mm
        np.savez_compressed(folder / "shifted" / name, segs=np.roll(gts, shift, axis=-1))
    times = "".join(f"{name},0.1\n" for name in shapes)
    (folder / "shifted" / "efficiency.csv").write_text(f"case,total_s\n{times}", encoding="utf-8")
    return [str(folder / "shifted")], folder / "gts"


def parse_systems(entries: list[str]) -> dict[str, Path]:
    """["ours=runs/segs", "other/segs"] -> {"ours": folder, "segs": folder}; stops if a name or folder is no use."""
    systems: dict[str, Path] = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals or Path(entry).is_dir():  # a folder may have "=" in its name
            name, folder = Path(entry).resolve().name, entry
        if not name or name in systems or name in REFERENCES:
            sys.exit(f"05_evaluate.py: --segs {entry}: name {name!r} is empty or taken; give another, NAME={folder}")
        if not any(Path(folder).glob("*.npz")):
            sys.exit(f"05_evaluate.py: no .npz in {folder}/. Run first: python 04_infer.py -i CASES -o {folder}")
        systems[name] = Path(folder)
    return systems


def main(argv: list[str] | None = None) -> dict[tuple[str, str], dict]:
    """Returns {(system, modality or "Average"): cases, objects, mean scores 0..1, mean seconds}."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("-s", "--segs", nargs="+", metavar="NAME=FOLDER", help="folders of predictions, .npz with segs")
    p.add_argument("-g", "--gts", type=Path, help="folder of ground truth, .npz with gts (3D: and spacing)")
    p.add_argument("-o", "--out", type=Path, help="folder for the tables (default: eval; with --smoke: eval/smoke)")
    p.add_argument("--protocol", choices=(*PROTOCOLS, "both"), default="both", help="how to score (default: both)")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: number of CPU cores)")
    p.add_argument("--paper", action="store_true", help="add the paper's Table 4 (another split: not comparable)")
    p.add_argument("--smoke", action="store_true", help="score three tiny synthetic cases, CPU, about 1 s")
    args = p.parse_args(argv)
    if args.jobs < 1 or not (args.smoke or args.segs and args.gts):
        sys.exit("05_evaluate.py: give --segs NAME=FOLDER and --gts FOLDER, or --smoke; --jobs must be 1 or more")
    args.out = args.out or Path("eval/smoke" if args.smoke else "eval")
    protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(min(args.jobs, 61)) as pool:  # Windows: 61
        # 1. Find the cases: each file of ground truth is one
        if args.smoke:
            args.segs, args.gts = make_smoke_cases(Path(scratch))
        systems, files = parse_systems(args.segs), sorted(args.gts.glob("*.npz"))
        if not files:
            sys.exit(f"05_evaluate.py: no .npz in {args.gts}/. Run first: python 01_preprocess.py, or correct --gts")
        seconds = read_seconds(systems)
        # 2. Score them, a case in each process; what cannot be scored is told, and the rest goes on
        results = (pool.map if args.jobs > 1 else map)(score_case, files, repeat(systems), repeat(protocols))
        results = list(tqdm(results, "evaluate", len(files), unit="case", disable=None))  # None: silent in a log
        predicted = sorted(file for folder in systems.values() for file in folder.glob("*.npz"))
    names, rows = {file.name for file in files}, [row for found, _ in results for row in found]
    problems = [problem for _, found in results for problem in found]
    problems += [f"{file}: has no ground truth in {args.gts}; add it" for file in predicted if file.name not in names]
    sys.stderr.writelines(f"05_evaluate.py: {problem}\n" for problem in problems)
    if not rows:
        sys.exit(f"05_evaluate.py: no case could be scored; problems, told above: {len(problems)}")
    # 3. Average, write, print
    rows = [row | {"seconds": seconds.get((row["system"], row["case"]), math.nan)} for row in rows]
    rows.sort(key=lambda row: [*systems, *REFERENCES].index(row["system"]))  # stable: cases stay in order
    summary = summarize(rows)
    write_results(args, rows, summary, markdown_table(summary, protocols, args.paper))
    print(terminal_table(summary, protocols[0]))
    print(f"DSC and NSD in per cent, protocol {protocols[0]}; both protocols are in {args.out / 'table.md'}")
    print(f"05_evaluate.py: {len(files)} cases, problems: {len(problems)}; wrote table.md and .csv files to {args.out}")
    if problems:
        sys.exit(1)
    return summary


if __name__ == "__main__":
    main()
