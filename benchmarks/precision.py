"""What does a shorter number cost? DSC and NSD of the network in float32, bfloat16 and int8, by modality. (D17, D23)

    python benchmarks/precision.py --cases val --static NAME.static           5 min on 2 cores

Engines openvino and openvino-int8. Only the encoder is int8; what else there is, the decoder too, is float32 or bfloat16. It needs a
processor that has bfloat16: 16 bits with the range of float32, 8 of them for the digits. Exact boxes. Writes
results/precision/cases.csv and table.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from choices import exact_cases, scores_of  # it puts the repository on the path too

import tables
from fast import engines
from fast.openvino_engine import has_bfloat16
from files import InputError
from files.checkpoints import OUR_CHECKPOINT
from files.writing import csv_text, save_text
from segment import Segmenter

FLOAT = "float32"
ALLOWED = {"dsc_strict": 0.1, "nsd_strict": 0.2}  # points that bfloat16 may move the means and still be the default


def forms_of(args: argparse.Namespace) -> dict[str, Segmenter]:
    """name of the numbers -> what segments with them. InputError where the processor has no bfloat16."""
    if not has_bfloat16():
        raise InputError("this processor has no bfloat16, there is nothing to compare; use another machine")

    def loaded(weights: Path | None, engine: str, precision: str) -> Segmenter:
        return engines.load("proposed", weights, engine=engine, cache=args.engine_cache, precision=precision)

    floats = {"float32": "f32", "bfloat16": "bf16"}
    found = {name: loaded(args.weights, "openvino", precision) for name, precision in floats.items()}
    if args.static:
        mixed = {"int8": "f32", "int8 and bfloat16": "bf16"}  # which the layers are in that are not int8
        found |= {name: loaded(args.static, "openvino-int8", precision) for name, precision in mixed.items()}
    return found


def precision_table(rows: list[dict], names: list[str]) -> str:
    """table.md: a row a modality; DSC and NSD of each form, and what it moves the means by."""
    summary = tables.summarize(rows)
    modalities = list(dict.fromkeys(modality for _, modality in summary))
    lines = [["modality", "cases", *(f"{score} {name}" for score in ("DSC", "NSD") for name in names)]]
    for modality in modalities:
        found = [summary[name, modality] for name in names]
        cells = [f"{100 * line[score]:.2f}" for score in ALLOWED for line in found]
        lines.append([modality, str(found[0]["cases"]), *cells])
    told = []
    for name in names[1:]:
        moved = {s: 100 * (summary[name, tables.AVERAGE][s] - summary[FLOAT, tables.AVERAGE][s]) for s in ALLOWED}
        within = all(abs(moved[score]) < limit for score, limit in ALLOWED.items())
        told.append(
            f"- {name}: {moved['dsc_strict']:+.3f} DSC, {moved['nsd_strict']:+.3f} NSD, {'within' if within else 'beyond'} "
            "0.1 and 0.2."
        )
    note = "Per cent, protocol strict, exact boxes. Means of the modalities, and how far from float32:"
    return "\n".join([f"# {__doc__.splitlines()[0]}", "", tables.pipe_table(lines), "", note, "", *told, ""])


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--cases", type=Path, nargs="+", required=True, help="folders of .npz cases with imgs and gts")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="checkpoint of the proposed model")
    p.add_argument("--static", type=Path, help="its int8 form, NAME.static (default: int8 is left out)")
    p.add_argument("--engine-cache", type=Path, default=Path("out/precision"), help="where OpenVINO keeps graphs")
    p.add_argument("-o", "--out", type=Path, default=Path("results/precision"), help="folder for the tables")
    args = p.parse_args(argv)
    try:
        rows, systems = [], forms_of(args)
        with tempfile.TemporaryDirectory() as work:
            cases = exact_cases(args.cases, Path(work), only_2d=False)
            for name, segmenter in systems.items():
                rows += scores_of(segmenter, cases, name, Path(work))
        columns = ("system", "case", "modality", "objects", *tables.score_names())
        save_text(args.out / "cases.csv", csv_text(rows, columns))
        save_text(args.out / "table.md", precision_table(rows, list(systems)))
    except (InputError, OSError) as error:
        sys.exit(f"precision.py: {error}")
    print(precision_table(rows, list(systems)))


if __name__ == "__main__":
    main()
