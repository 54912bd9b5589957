"""How well both models do as boxes get looser: exact ones, the challenge's 5 pixels, and boxes as people draw them. (D20)

    python benchmarks/looseness.py --cases val val_unseen        pictures only; writes results/looseness

The same boxes for everyone, and the inscribed ellipse, which never looks at the image. Label maps are kept in --predictions,
as table4.py keeps them. Writes cases.csv (0..1), table.md (per cent), looseness.png and settings.json.
"""

import hashlib
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

import table4

import tables
from files import InputError
from files.checkpoints import OUR_CHECKPOINT
from files.writing import csv_text, save_figure, save_json, save_text

SYSTEMS = ("baseline", "proposed")
SHOWN = {"baseline": "LiteMedSAM", "proposed": "proposed", "inscribed ellipse": "inscribed ellipse"}
SCORES = {"DSC": "dsc_strict", "NSD": "nsd_strict"}


def parse(argv: list[str] | None) -> Namespace:
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument("--cases", type=Path, nargs="+", required=True, help="folders of .npz cases with imgs and gts")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="float checkpoint of the proposed model")
    p.add_argument("--looseness", type=float, nargs="+", default=[0.15, 0.3], help="shares of the object's size")
    p.add_argument("--seed", type=int, default=0, help="seed of moved and loose boxes, 0 or more")
    p.add_argument("-p", "--predictions", type=Path, default=Path("out/looseness"), help="for boxes and label maps")
    p.add_argument("-o", "--out", type=Path, default=Path("results/looseness"), help="folder for table and figure")
    return p.parse_args(argv)


def rows_of(cases: Path, args: Namespace) -> list[dict]:
    """05_evaluate.score_case's rows of one folder, each with `boxes` and `folder`."""
    place = args.predictions / cases.name
    flags = ["--cases", cases, "--2d-only", "--predictions", place, "--seed", args.seed]
    chosen = table4.parse([str(flag) for flag in flags] + ["--looseness", *map(str, args.looseness)])
    kinds = table4.box_kinds(chosen.jitter, chosen.looseness, chosen.seed)
    names, _ = table4.prepare(kinds, chosen)
    rows = table4.scored(table4.weights_of(SYSTEMS, args.weights), kinds, names, place)
    return [row | {"folder": cases.name} for row in rows]


def means_of(rows: list[dict]) -> list[dict]:
    """A row for each folder, kind of boxes and system: cases, DSC, NSD (0..1), means over the modalities."""
    means = []
    for folder, boxes in dict.fromkeys((row["folder"], row["boxes"]) for row in rows):
        summary = tables.summarize([row for row in rows if (row["folder"], row["boxes"]) == (folder, boxes)])
        for system in SHOWN:
            line = summary[system, tables.AVERAGE]
            scores = {name: line[score] for name, score in SCORES.items()}
            means.append({"folder": folder, "boxes": boxes, "system": system, "cases": line["cases"], **scores})
    return means


def looseness_table(rows: list[dict], means: list[dict]) -> str:
    """table.md: the means, the difference of both models with its interval, and every modality."""
    head = [f"{title} {name}" for title in SHOWN.values() for name in SCORES]
    lines = ["# Scores as boxes get looser", "", "| cases | boxes | " + " | ".join(head) + " | difference DSC | NSD |"]
    lines.append("| --- " * (len(head) + 4) + "|")
    details = []
    for folder, boxes in dict.fromkeys((line["folder"], line["boxes"]) for line in means):
        here = [row for row in rows if (row["folder"], row["boxes"]) == (folder, boxes)]
        found = {line["score"]: line for line in tables.paired_differences(here, [SYSTEMS[::-1]])
                 if line["modality"] == tables.AVERAGE}  # fmt: skip
        cells = [f"{100 * line[name]:.1f}" for line in means for name in SCORES
                 if (line["folder"], line["boxes"]) == (folder, boxes)]  # fmt: skip
        cells += ["{difference:+.1f} [{low:.1f}, {high:.1f}]".format(
            **{key: 100 * found[score][key] for key in ("difference", "low", "high")}) for score in SCORES.values()]  # fmt: skip
        lines.append(f"| {folder} | {boxes} | " + " | ".join(cells) + " |")
        for name, score in SCORES.items():
            details += [
                f"## {name}, {folder}, boxes {boxes}",
                "",
                tables.score_table(tables.summarize(here), score),
                "",
            ]
    lines += ["", "Per cent, strict protocol, pictures only; means over a case's objects, a modality's cases, the modalities.",
              "Loose: each side moved outward by 0.5 to 1.5 times the share of the object's width or height; moved: as the challenge,",
              "in or out by whole pixels of the 256 grid. Difference: proposed minus LiteMedSAM, case by case, 95 % bootstrap interval.", ""]  # fmt: skip
    return "\n".join(lines + details)


def looseness_plot(means: list[dict]) -> Figure:
    """DSC and NSD over the kinds of boxes, a column a folder."""
    folders, kinds = (list(dict.fromkeys(line[key] for line in means)) for key in ("folder", "boxes"))
    figure = Figure(figsize=(4.2 * len(folders), 6), layout="constrained")
    axes = figure.subplots(2, len(folders), sharex=True, sharey="row", squeeze=False)
    for row, name in zip(axes, SCORES, strict=True):
        for ax, folder in zip(row, folders, strict=True):
            for system, title in SHOWN.items():
                values = [100 * line[name] for line in means if (line["folder"], line["system"]) == (folder, system)]
                ax.plot(kinds, values, marker="o", label=title, linestyle=":" if "ellipse" in system else "-")
            ax.set(title=f"{folder}: {name}" if name == "DSC" else name, ylabel=f"{name}, per cent")
            ax.set_xticks(range(len(kinds)), [kind.removesuffix("-seed0").replace("pct", " %") for kind in kinds])
            ax.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    return figure


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the means, a row for each folder, kind of boxes and system."""
    args = parse(argv)
    try:
        rows = [row for cases in args.cases for row in rows_of(cases, args)]
        means = means_of(rows)
        columns = ("folder", "boxes", "system", "case", "modality", "objects", *tables.score_names())
        save_text(args.out / "cases.csv", csv_text(rows, columns))
        save_text(args.out / "table.md", looseness_table(rows, means))
        save_figure(args.out / "looseness.png", looseness_plot(means))
        weights = table4.weights_of(SYSTEMS, args.weights)
        digests = {system: hashlib.sha256(path.read_bytes()).hexdigest() for system, path in weights.items()}
        settings = {"preset": table4.PRESET, "looseness": args.looseness, "seed": args.seed}
        save_json(args.out / "settings.json", settings | {"sha256 of weights": digests})
    except (InputError, OSError) as error:
        sys.exit(f"looseness.py: {error}")
    for line in means:
        print(
            f"{line['folder']}, {line['boxes']}, {line['system']}: DSC {100 * line['DSC']:.1f}, NSD {100 * line['NSD']:.1f}"
        )
    return means


if __name__ == "__main__":
    main()
