"""What do the differences between paper and released code cost? Ours with one field changed at a time. (PAPER_VS_CODE.md)

    python benchmarks/differences.py --cases val                 writes results/differences/cases.csv and table.md

Our checkpoint was trained under `fixed`. So a row says what one other reading costs when it is used at inference only;
a network that is trained under it may lose less. Exact boxes.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from choices import exact_cases, scores_of  # it puts the repository on the path too

import tables
from fast import engines
from files import InputError
from files.checkpoints import OUR_CHECKPOINT
from files.writing import csv_text, save_text

FIXED = "fixed"
PICTURES = {  # name -> (number in PAPER_VS_CODE.md, settings); each is compared with `fixed`
    "diffusion is a blur": ("#1", ["iterations=1", "diffusion_range=1.0"]),
    "raw image equalized": ("#2", ["equalize=raw"]),
    "opposite borders touch": ("#3", ["border=wrap"]),
    "truncated to 8 bits": ("#4", ["rounding=truncate"]),
    "colour turns gray": ("#5", ["color=gray"]),
    "enhanced at full size": ("#7", ["enhance_at=original"]),
    "padded before resizing": ("pad", ["pad=before"]),
    "boxes cut to whole pixels": ("#43", ["box_rounding=int"]),
    "masks may lie anywhere": ("D18", ["reach=image"]),
    "last object wins": ("#46", ["overlap=last"]),
}
VOLUMES = {
    "mended loop": ("#42, #47", ["propagation=mended"]),
    "released loop": ("#40, #41", ["propagation=released"]),
}
INT8 = {
    "int8, a scale a channel": ("#39", ["weight_int8=channel"]),
    "int8, a scale a tensor": ("#39", ["weight_int8=tensor"]),
}
WHOLE = "all of `released`"


def measured(cases: list, weights: Path, work: Path) -> list[dict]:
    """05_evaluate.score_case's rows of `fixed` and of every difference that concerns these cases."""
    flat = [case for case in cases if not case[2].startswith("3D")]
    deep = [case for case in cases if case[2].startswith("3D")]
    rows = []
    for title, settings, engine, chosen in [
        (FIXED, [], "fast", flat + deep),
        *((title, settings, "fast", flat) for title, (_, settings) in PICTURES.items()),
        *((title, settings, "fast", deep) for title, (_, settings) in VOLUMES.items()),
        *((title, settings, "torch-int8", flat) for title, (_, settings) in INT8.items()),
    ]:
        if chosen:
            rows += scores_of(engines.load("proposed", weights, FIXED, engine, settings=settings), chosen, title, work)
    whole = engines.load("proposed", weights, "released", "fast", force=True)
    return rows + scores_of(whole, flat + deep, WHOLE, work)


def cost_table(rows: list[dict]) -> str:
    """table.md: a row for each difference, pictures and volumes apart, points above `fixed` with their interval."""
    numbers = {title: number for group in (PICTURES, VOLUMES, INT8) for title, (number, _) in group.items()}
    lines = [["cases", "number", "difference", "entry", "DSC", "NSD"]]
    for name, chosen in (("pictures", "2D"), ("volumes", "3D")):
        here = [row for row in rows if row["case"].startswith(chosen)]
        pairs = [(title, FIXED) for title in dict.fromkeys(row["system"] for row in here) if title != FIXED]
        found = tables.paired_differences(here, pairs)
        for title, _ in pairs:
            cells = []
            for score in ("dsc_strict", "nsd_strict"):
                line = next(
                    x for x in found if (x["system"], x["modality"], x["score"]) == (title, tables.AVERAGE, score)
                )
                difference, low, high = (100 * line[key] for key in ("difference", "low", "high"))
                cells.append(f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]")
            lines.append([name, str(line["cases"]), title, numbers.get(title, "all"), *cells])
    note = (
        "Points of per cent above preset `fixed`, mean of the modalities, strict, 95 % bootstrap interval over cases."
    )
    return "\n".join([f"# {__doc__.splitlines()[0]}", "", tables.pipe_table(lines), "", note, ""])


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--cases", type=Path, nargs="+", required=True, help="folders of .npz cases with imgs and gts")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="checkpoint of the proposed model")
    p.add_argument("-o", "--out", type=Path, default=Path("results/differences"), help="folder for the tables")
    args = p.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as work:
            rows = measured(exact_cases(args.cases, Path(work), only_2d=False), args.weights, Path(work))
        save_text(
            args.out / "cases.csv", csv_text(rows, ("system", "case", "modality", "objects", *tables.score_names()))
        )
        save_text(args.out / "table.md", cost_table(rows))
    except (InputError, OSError) as error:
        sys.exit(f"differences.py: {error}")
    print(cost_table(rows))


if __name__ == "__main__":
    main()
