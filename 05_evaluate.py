"""Step 5 of 5, evaluate. Reads predictions (step 4) and truth (step 1), writes tables. Try: 05_evaluate.py --smoke

    python 05_evaluate.py --segs ours=segs baseline=segs_baseline --gts demo/gts --images demo/imgs

Scores DSC and NSD [P 3.1] of every system, next to two that never look at the image: filled box and inscribed
ellipse. Writes cases.csv, labels.csv (a row an object), modalities.csv (0..1), table.md (per cent), arguments.json.
report.html shows them: bars, worst cases, score against predicted IoU. With --images also figure2.png, figure3.png.
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

from enhance import is_gray
from figures import figure2, figure3, figure3_row
from files import InputError
from files.case import Case
from files.formats import list_cases, name_of, read_case
from files.writing import csv_text, progress, save_figure, save_json, save_text
from grid import boxes_from_labels, drawn_boxes
from metrics import PROTOCOLS, filled_box
from tables import REFERENCES, markdown_table, read_labels, score_case, score_names, summarize, terminal_table


def parse_systems(entries: list[str]) -> dict[str, Path]:
    """["ours=runs/segs", "other/segs"] -> {"ours": folder, "segs": folder}. InputError if either is of no use."""
    systems: dict[str, Path] = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals or Path(entry).is_dir():  # a folder may have "=" in its name
            name, folder = Path(entry).resolve().name, entry
        if not name or name in systems or name in REFERENCES:
            raise InputError(f"--segs {entry}: name {name!r} is empty or taken; give another, NAME={folder}")
        if not any(Path(folder).glob("*.npz")):
            raise InputError(f"no .npz in {folder}/. Run first: python 04_infer.py -i CASES -o {folder}")
        systems[name] = Path(folder)
    return systems


def read_seconds(systems: dict[str, Path]) -> dict[tuple[str, str], float]:
    """{(system, case file name): total_s} from every folder that has an efficiency.csv (step 4 writes it)."""
    seconds = {}
    for system, path in ((system, folder / "efficiency.csv") for system, folder in systems.items()):
        if path.is_file():
            try:
                lines = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
                seconds |= {(system, line["case"]): float(line["total_s"]) for line in lines}
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{path}: needs columns case and total_s ({error!r}); run 04_infer.py again"
                ) from error
    return seconds


def score_all(
    systems: dict[str, Path], gts: Path, protocols: tuple[str, ...], jobs: int, looseness: float = 0.0
) -> tuple[list[dict], list[str]]:
    """Score every file of ground truth, a case in each process. Returns (rows, problems): bad cases do not stop it."""
    files = sorted(gts.glob("*.npz"))
    if not files:
        raise InputError(f"no .npz in {gts}/. Run first: python 01_preprocess.py, or correct --gts")
    with ProcessPoolExecutor(min(jobs, 61)) as pool:  # Windows takes no more than 61
        results = (pool.map if jobs > 1 else map)(
            score_case, files, repeat(systems), repeat(protocols), repeat(looseness)
        )
        results = list(progress(results, "evaluate", len(files), unit="case"))
    rows, problems = ([item for result in results for item in result[part]] for part in (0, 1))
    names = {file.name for file in files}
    predicted = sorted(file for folder in systems.values() for file in folder.glob("*.npz"))
    problems += [f"{file}: has no ground truth in {gts}; add it" for file in predicted if file.name not in names]
    rows.sort(key=lambda row: [*systems, *REFERENCES].index(row["system"]))  # stable: cases stay in order
    return rows, problems


def write_results(out: Path, rows: list[dict], summary: dict) -> None:
    """cases.csv, labels.csv and modalities.csv. Scores are 0..1; what was not computed, or is nan, is left blank."""
    scores = score_names()
    blank = dict.fromkeys(scores, math.nan)  # else a label without a score would show its case's mean
    per_label = [row | blank | {"label": i} | found for row in rows for i, found in sorted(row["labels"].items())]
    per_modality = [{"system": system, "modality": modality, **line} for (system, modality), line in summary.items()]
    save_text(out / "cases.csv", csv_text(rows, ("system", "case", "modality", "objects", *scores, "seconds")))
    save_text(out / "labels.csv", csv_text(per_label, ("system", "case", "modality", "label", *scores)))
    columns = ("system", "modality", "cases", "objects", *scores, "seconds")
    save_text(out / "modalities.csv", csv_text(per_modality, columns))


def choose_cases(images: Path, scored: list[str], for_figure2: str | None, for_figure3: list[str] | None) -> tuple:
    """The cases of both figures: a gray 2D one, and a list. scored: names of cases that have truth and prediction.

    Without a name, Figure 2 takes the first gray 2D case (None if there is none), Figure 3 the first four. Or InputError.
    """
    files = {name_of(path): path for path in list_cases(images) if name_of(path) in scored}
    if not files:
        raise InputError(f"{images}: holds no image of the cases that were scored; name their folder with --images")
    for name in [for_figure2, *(for_figure3 or [])]:
        if name and name not in files:
            raise InputError(f"{images}: no case {name} that was scored; there are {', '.join(files)}")
    candidates = map(read_case, [files[for_figure2]] if for_figure2 else files.values())
    gray = next((case for case in candidates if not case.is_3d and is_gray(case.image)), None)
    if gray is None and for_figure2:
        raise InputError(f"{for_figure2}: no gray 2D image; Figure 2 is about gray ones")
    return gray, [read_case(files[name]) for name in for_figure3 or list(files)[:4]]


def draw_figures(out: Path, gray: Case | None, cases: list[Case], segs: Path, gts: Path) -> None:
    """figure2.png of one gray case; figure3.png, a row a case, with the masks in the folders segs and gts."""
    from matplotlib.figure import Figure  # not pyplot: no window, this also runs on a server

    if gray:
        figure = Figure(figsize=(9, 3.2))
        figure2(gray.image, figure.subplots(1, 3))
        save_figure(out / "figure2.png", figure)
    rows = []
    for case in cases:
        shape = case.image.shape if case.is_3d else case.image.shape[:2]
        masks = [
            read_labels(folder / f"{case.name}.npz", key, shape)[0] for folder, key in ((segs, "segs"), (gts, "gts"))
        ]
        rows.append(figure3_row(case.name, case.image, case.boxes, *masks))
    figure = Figure(figsize=(9, 2.6 * len(rows)))
    figure3(rows, figure.subplots(len(rows), 3, squeeze=False))
    save_figure(out / "figure3.png", figure)


def write_report(
    args, rows: list[dict], summary: dict, protocol: str, shown: str, segs: Path, problems: list[str]
) -> None:
    """report.html: bars, the worst cases of the system that is shown as pictures, its scores against predicted IoU."""
    from views import report  # only here: it draws

    pictures = {}
    files = {f"{name_of(path)}.npz": path for path in list_cases(args.images)} if args.images else {}
    for name in (row["case"] for row in report.worst_cases(rows, shown, f"dsc_{protocol}") if row["case"] in files):
        case = read_case(files[name])
        found, true = (read_labels(f / name, k, case.grid_shape)[0] for f, k in ((segs, "segs"), (args.gts, "gts")))
        boxes = boxes_from_labels(true)[1] if case.boxes is None else case.boxes
        boxes = drawn_boxes(case.name, boxes, args.looseness, case.grid_shape)
        pictures[name] = report.three_pictures(case, boxes, found, true)
    facts = [
        f"{len({row['case'] for row in rows})} cases of {args.gts}, protocol {protocol}. Scores are in per cent.",
        *(f"Not scored: {problem}" for problem in problems[:20]),
    ]
    page = report.report_page(rows, summary, protocol, shown, segs / "objects.csv", pictures, facts)
    save_text(args.out / "report.html", page)


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("-s", "--segs", nargs="+", metavar="NAME=FOLDER", help="folders of predictions, .npz with segs")
    p.add_argument("-g", "--gts", type=Path, help="folder of ground truth, .npz with gts (3D: and spacing)")
    p.add_argument("-o", "--out", type=Path, help="folder for the tables (default: eval; with --smoke: eval/smoke)")
    p.add_argument("--protocol", choices=(*PROTOCOLS, "both"), default="both", help="how to score (default: both)")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: number of CPU cores)")
    p.add_argument("--paper", action="store_true", help="add the paper's Table 4 (another split: not comparable)")
    p.add_argument(
        "--looseness", type=float, default=0.0, metavar="SHARE", help="of the boxes that step 4 was run with"
    )
    p.add_argument("--images", type=Path, help="folder of the cases' images: draw Figures 2 and 3 (default: draw none)")
    p.add_argument("--figure2", metavar="CASE", help="case of Figure 2 (default: the first gray 2D one)")
    p.add_argument("--figure3", nargs="+", metavar="CASE", help="cases of Figure 3 (default: the first four)")
    p.add_argument("--figure-system", metavar="NAME", help="system of Figure 3 (default: the first of --segs)")
    p.add_argument("--smoke", action="store_true", help="score three tiny synthetic cases, CPU, about 1 s")
    args = p.parse_args(argv)
    args.out = args.out or Path("eval/smoke" if args.smoke else "eval")
    return args


def evaluate(args: argparse.Namespace) -> tuple[dict, int]:
    """Returns (summary, number of problems told). InputError if nothing can be scored, or no figure drawn."""
    if args.jobs < 1 or args.looseness < 0 or not (args.smoke or args.segs and args.gts):
        raise InputError(
            "give --segs NAME=FOLDER and --gts FOLDER, or --smoke; --jobs must be 1 or more, --looseness 0 or more"
        )
    if not args.images and (args.figure2 or args.figure3 or args.figure_system):
        raise InputError("figures show images; give their folder with --images")
    protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)
    with tempfile.TemporaryDirectory() as scratch:
        # 1. Find the systems, and what step 4 wrote of their times
        if args.smoke:
            args.segs, args.gts = make_smoke_cases(Path(scratch))
        systems = parse_systems(args.segs)
        shown = args.figure_system or next(iter(systems))
        if shown not in systems:
            raise InputError(f"--figure-system {shown}: no such system; there are {', '.join(systems)}")
        seconds = read_seconds(systems)
        # 2. Score; what cannot be scored is told, and the rest goes on
        rows, problems = score_all(systems, args.gts, protocols, args.jobs, args.looseness)
    sys.stderr.writelines(f"05_evaluate.py: {problem}\n" for problem in problems)
    if not rows:
        raise InputError(f"no case could be scored; problems, told above: {len(problems)}")
    rows = [row | {"seconds": seconds.get((row["system"], row["case"]), math.nan)} for row in rows]
    # 3. Average, write, print
    summary = summarize(rows)
    write_results(args.out, rows, summary)
    save_text(args.out / "table.md", markdown_table(summary, protocols, args.paper))
    save_json(args.out / "arguments.json", vars(args))
    print(terminal_table(summary, protocols[0]))
    print(f"Scores in per cent, protocol {protocols[0]}; more in {args.out / 'table.md'}")
    # 4. Draw
    write_report(args, rows, summary, protocols[0], shown, systems[shown], problems)
    if args.images:
        names = [row["case"].removesuffix(".npz") for row in rows if row["system"] == shown]
        gray, cases = choose_cases(args.images, names, args.figure2, args.figure3)
        draw_figures(args.out, gray, cases, systems[shown], args.gts)
    written = "report.html, table.md, .csv files" + (" and figures" if args.images else "")
    scored = len({row["case"] for row in rows})
    print(f"05_evaluate.py: {scored} cases, problems: {len(problems)}; wrote {written} to {args.out}")
    return summary, len(problems)


def main(argv: list[str] | None = None) -> dict[tuple[str, str], dict]:
    """Returns {(system, modality or "Average"): cases, objects, mean scores 0..1, mean seconds}."""
    args = parse(argv)
    try:
        summary, problems = evaluate(args)
    except InputError as error:
        sys.exit(f"05_evaluate.py: {error}")
    if problems:
        sys.exit(1)
    return summary


if __name__ == "__main__":
    main()
