"""Pictures with polygons -> masks, their polygons, and a table with the mean precision: python -m examples.instances

python -m examples.instances -i FOLDER -o out/instances    pictures NAME.png with NAME.json, see `read_polygons`
python -m examples.instances --smoke                       one tiny drawn picture

Boxes are the exact ones of the polygons. Step 4 makes the masks, and step 5 scores them. With a boxes.csv or a detector, step
4 would take those; the metric does not ask which box an object came from.
"""

import argparse
import importlib
from dataclasses import replace
from pathlib import Path

from demo_data import tiny_case
from examples.instances import add_rows, write_polygons
from formats import InputError
from formats.npz import write_case
from formats.readers import list_cases, read_case
from formats.writing import save_image, script, tell
from grid import promptable_labels
from tables import read_labels


def drawn_picture(args: argparse.Namespace, folder: Path) -> None:
    """For --smoke: a picture with two blobs and its polygons."""
    case, args.input, args.output = tiny_case(), folder, folder / "out"
    save_image(folder / "US_tiny0.png", case.image)
    write_polygons(folder / "US_tiny0.json", case.labels, dict(enumerate(case.label_names, start=1)))


def run(args: argparse.Namespace) -> dict:
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
        names[case.name] = {
            int(labels[case.labels == i][0]): n for i, n in enumerate(case.label_names, 1) if i in case.labels
        }
        write_case(out / "cases", replace(case, labels=labels))
    if not names:
        raise InputError(f"{args.input}: no picture has polygons; see --help")

    # 3. Steps 4 and 5. One process: others would not know the rows, which stand in no file of the house
    cases = out / "cases"
    importlib.import_module("04_infer").main(
        ["-i", str(cases / "imgs"), "-o", str(out / "segs"), "--model", args.model]
    )
    evaluate = importlib.import_module("05_evaluate").main
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
