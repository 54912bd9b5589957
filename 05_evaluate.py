"""Step 5 of 5, evaluate: DSC and NSD of every object, means, tables, figures. [P 3.1, 4]

With A the predicted mask of an object, B the true one, and A', B' their contours (volumes: surfaces):

    DSC = 2 |A and B| / (|A| + |B|)                       how much of the two overlaps
    NSD = (|A' near B'| + |B' near A'|) / (|A'| + |B'|)   near: within 2 pixels (volumes: 2 mm)

The first says whether the object was found, the second whether its edge is right. The paper's third
measure is time: step 4 wrote the seconds of each case. Tables 4 and 6 have a row for each modality,
a mean over cases, and the average of these rows. Baseline and proposed model, float and int8, stand
side by side [P 4.1, 4.3], and so do two that never look at the image, a filled box and the ellipse in
it: what a box alone is worth. Figure 2 shows the three channels, Figure 3 boxes, predictions, truth.

    python 05_evaluate.py --segs ours=segs baseline=segs_baseline --gts demo/gts --images demo/imgs
    python 05_evaluate.py --smoke

Writes cases.csv, labels.csv (a row an object), modalities.csv, differences.csv, table.md and
report.html; with --images also figure2.png and figure3.png. Other metrics: rows of metrics.METRICS.
"""

import argparse
import math
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

import tables
from demo_data import tiny_case
from figures import draw_figures
from formats import InputError, usable_cores
from formats.case import told_in_a_sentence
from formats.npz import write_case
from formats.writing import progress, save_json, save_npz
from grid import drawn_boxes, label_ids
from metrics import PROTOCOLS, case_scores
from page.report import write_report


def score_case(
    file: Path, systems: dict[str, Path], protocols: tuple[str, ...], looseness: float = 0.0
) -> tuple[list[dict], list[str]]:
    """Scores one case for every system and both references. Returns (rows, problems in one sentence each).

    file: .npz with the truth. systems: {name: folder of predictions, .npz of the same name}. looseness: of the boxes
    that step 4 asked with. A row holds system, case (the file's name), modality, objects, the case's mean of each
    score ("dsc_strict", ...), and labels: {label: {score: value}}. nan: there is no score.
    """
    try:
        with told_in_a_sentence(file):
            truth = tables.read_truth(file)
    except InputError as error:
        return [], [str(error)]
    predictions, problems = tables.read_predictions(file.name, systems, truth)

    # D11: what a box alone is worth. The references paint box i as i + 1; its label in the truth is ids[i].
    boxes = drawn_boxes(file.stem, truth.boxes, looseness, truth.labels.shape)
    label_of = np.append(0, truth.ids).astype(np.uint16)
    for name, paint in tables.REFERENCES.items():
        predictions[name] = label_of[paint(boxes, truth.labels.shape)]

    rows, objects = [], len(label_ids(truth.labels))
    for system, segs in predictions.items():
        row = {"system": system, "case": file.name, "modality": truth.modality, "objects": objects, "labels": {}}
        # D10: "strict" measures contours, in mm; "challenge" does what the challenge's own evaluator does
        for protocol in protocols:
            # [P 3.1] Of each object: DSC, the overlap of predicted and true pixels, and NSD, the share of both contours
            # that lies within 2 px (volumes: surfaces, 2 mm) of the other. An object that was missed scores 0.
            found = case_scores(segs, truth.labels, truth.spacing_mm, protocol)
            for i, label in enumerate(found.labels):
                scores = {f"{metric}_{protocol}": float(values[i]) for metric, values in found.scores.items()}
                if not all(map(math.isnan, scores.values())):
                    row["labels"].setdefault(label, {}).update(scores)
            # The case: the mean over its objects
            row |= {f"{metric}_{protocol}": mean for metric, mean in found.means.items()}
        rows.append(row)
    return rows, problems


def run(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """Returns (summary, problems). InputError if nothing can be scored, or no figure drawn."""
    systems, shown = tables.find_systems(args.segs, args.show)
    files, problems = tables.find_truth(args.gts, systems)
    seconds = tables.read_seconds(systems)
    protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)

    # 1. DSC and NSD of every object. Cases do not depend on each other: each core takes the next one.
    score = partial(score_case, systems=systems, protocols=protocols, looseness=args.looseness)
    with ProcessPoolExecutor(args.jobs) as pool:
        scored = (pool.map if args.jobs > 1 else map)(score, files)
        scored = list(progress(scored, "evaluate", len(files), unit="case"))
    problems += [problem for _, found in scored for problem in found]
    sys.stderr.writelines(f"05_evaluate.py: {problem}\n" for problem in problems)
    rows = [row for found, _ in scored for row in found]
    if not rows:
        raise InputError("no case could be scored; the problems are told above")
    rows.sort(key=lambda row: [*systems, *tables.REFERENCES].index(row["system"]))
    rows = [row | {"seconds": seconds.get((row["system"], row["case"]), math.nan)} for row in rows]

    # 2. Means [P Table 4]. With s_mc the score of case c of modality m, n_m its cases, and M modalities:
    #        S_m = 1/n_m sum_c s_mc        S = 1/M sum_m S_m
    #    so a modality with many cases counts no more than one with few.
    summary = tables.summarize(rows)

    # 3. Is one system better than another? All get the same cases and boxes, so they are subtracted case by case.
    #    The bootstrap says how far the mean difference would move if other cases of the same kind had been drawn.
    first, *others = systems
    pairs = [*product(others, [first]), *product(systems, tables.REFERENCES)]
    differences = tables.paired_differences(rows, pairs)

    # 4. Table 4, Figures 2 and 3
    save_json(args.out / "arguments.json", vars(args))
    tables.write_tables(args.out, rows, summary, differences, protocols)
    print(tables.terminal_table(summary, protocols[0]))
    print(f"{tables.units()}, protocol {protocols[0]}; more in {args.out / 'table.md'}")
    folders = (args.images, systems[shown], args.gts)
    write_report(args.out, rows, summary, protocols[0], shown, folders, args.looseness, problems)
    if args.images:
        names = [row["case"].removesuffix(".npz") for row in rows if row["system"] == shown]
        draw_figures(args.out, names, args.figures, *folders)
    written = "report.html, table.md, .csv files" + " and figures" * bool(args.images)
    count = len({row["case"] for row in rows})
    print(f"05_evaluate.py: {count} cases, problems: {len(problems)}; wrote {written} to {args.out}")
    return summary, problems


def make_smoke_cases(folder: Path) -> tuple[list[str], Path]:
    """A tiny image and a tiny volume, predicted one pixel off. Returns what --segs and --gts are then."""
    for case in (tiny_case(dims=2), tiny_case(dims=3)):
        write_case(folder, case)
        save_npz(folder / "shifted" / f"{case.name}.npz", segs=np.roll(case.labels, 1, axis=-1))
    return [str(folder / "shifted")], folder / "gts"


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("-s", "--segs", nargs="+", metavar="NAME=FOLDER", help="folders of predictions, .npz with segs")
    p.add_argument("-g", "--gts", type=Path, help="folder of ground truth, .npz with gts (3D: and spacing)")
    p.add_argument("-o", "--out", type=Path, help="folder for the tables (default: eval; with --smoke: eval/smoke)")
    p.add_argument("--protocol", choices=(*PROTOCOLS, "both"), default="both", help="how to score (default: both)")
    p.add_argument("--jobs", type=int, default=usable_cores(), help="processes (default: one a core, at most 61)")
    p.add_argument("--looseness", type=float, default=0.0, metavar="SHARE", help="of the boxes that step 4 asked with")
    p.add_argument("--images", type=Path, help="folder of the cases' images: draw Figures 2 and 3 (default: draw none)")
    p.add_argument("--figures", nargs="+", default=[], metavar="CASE", help="cases that they show (default: the first)")
    p.add_argument("--show", metavar="NAME", help="system in figures and report (default: the first of --segs)")
    p.add_argument("--smoke", action="store_true", help="score two tiny synthetic cases, CPU, about 1 s")
    args = p.parse_args(argv)
    args.out = args.out or Path("eval/smoke" if args.smoke else "eval")
    args.jobs = min(args.jobs, 61)  # the most that Windows allows
    if args.jobs < 1 or args.looseness < 0 or not (args.smoke or args.segs and args.gts):
        p.error("give --segs NAME=FOLDER and --gts FOLDER, or --smoke; --jobs from 1, --looseness from 0")
    if args.figures and not args.images:
        p.error("--figures shows images; give their folder with --images")
    return args


def main(argv: list[str] | None = None) -> dict[tuple[str, str], dict]:
    """Returns {(system, modality or "Average"): cases, objects, mean scores 0..1, mean seconds}."""
    args = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if args.smoke:
                args.segs, args.gts = make_smoke_cases(Path(scratch))
            summary, problems = run(args)
    except InputError as error:
        sys.exit(f"05_evaluate.py: {error}")
    if problems:
        sys.exit(1)
    return summary


if __name__ == "__main__":
    main()
