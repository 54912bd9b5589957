"""Step 4 of 5, infer. Reads images and boxes, writes label maps, overlays, a table of objects and running times.

    python 04_infer.py -i examples -o out                   a folder of images with boxes.csv
    python 04_infer.py -i demo/cache/cases/imgs -o segs     a folder of challenge cases (.npz)
    python 04_infer.py -i examples/retina.jpg -o out --box 44 200 112 274
    python 04_infer.py -i examples/retina.jpg -o out --draw            a window to draw the boxes in
    python 04_infer.py --smoke                              two tiny synthetic cases, 10 s

Writes of each case what files/results.py says: NAME.npz (`segs`, the input's shape, box i painted as i + 1), and where the input
was no .npz, NAME.nii.gz or NAME_mask.png; objects.csv, a row an object; efficiency.csv; of one image NAME_overlay.png, of a folder
with --overlay overlays/NAME.png. Formats: docs/formats.md. The command line is the challenge's: 04_infer.py -i INPUTS -o OUTPUTS.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

# NumPy's own threads would take cores from the network's, and wait on them
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np

import segment
from figures import PALETTE, flat_view, overlay
from files import InputError, results
from files.case import Case, check_boxes
from files.formats import ending_of, list_cases, name_of, read_case
from files.writing import csv_text, progress, save_image, save_json, save_text, tell
from grid import boxes_from_labels, drawn_boxes
from presets import PRESETS
from segment import MODELS, Segmenter
from volumes import segment_objects


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("-i", "--input", type=Path, help="a folder of cases, a file, a DICOM folder (docs/formats.md)")
    p.add_argument("-o", "--output", type=Path, default=Path("segs"), help="folder for the results, made if missing")
    p.add_argument(
        "--box", type=float, nargs="+", action="append", metavar="N",
        help="box of one image: X0 Y0 X1 Y1, pixels, x to the right, y down; in 3D X0 Y0 Z0 X1 Y1 Z1; repeat for more objects",
    )  # fmt: skip
    p.add_argument(
        "--model", choices=MODELS, default="proposed",
        help="proposed is the paper's, the default; baseline is LiteMedSAM",
    )  # fmt: skip
    p.add_argument("--weights", type=Path, help="checkpoint, or folder NAME.static (default: the model's own)")
    p.add_argument("--preset", choices=PRESETS, help="reading of the paper (default: the checkpoint's, else fixed)")
    p.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the preset")
    p.add_argument("--force", action="store_true", help="use another preset than the checkpoint was trained with")
    p.add_argument(
        "--engine", choices=segment.ENGINES, default="torch",
        help="what runs the network: torch is model.py as written, torch-int8 its linear layers in int8; the others give "
        "its results sooner (fast/); openvino ones need: pip install -r requirements-fast.txt",
    )  # fmt: skip
    p.add_argument(
        "--precision", choices=("auto", "f32", "bf16"),
        help="of the openvino engines: auto is bf16 where the processor has it, else f32 (default: auto)",
    )  # fmt: skip
    p.add_argument("--engine-cache", type=Path, metavar="DIR", help="OpenVINO's graphs (default: the user's cache)")
    p.add_argument("--boxes-from-masks", action="store_true", help="take exact boxes of the labels; keep their numbers")
    p.add_argument(
        "--looseness", type=float, default=0.0, metavar="SHARE",
        help="with --boxes-from-masks: move each side outward by 0.5 to 1.5 times this share of the object, as people do",
    )  # fmt: skip
    p.add_argument(
        "--window", metavar="NAME|W/L",
        help="intensities to show, for more than 8 bits: soft, lung, brain, bone, percentile, or width/level such as 400/40 "
        "(default: the file's own; else soft for CT and percentile for the rest)",
    )  # fmt: skip
    p.add_argument("--overlay", action="store_true", help="also write a picture of each case with masks and boxes")
    p.add_argument("--draw", action="store_true", help="open a window to draw the boxes of one image or volume in")
    p.add_argument("--smoke", action="store_true", help="two tiny synthetic cases instead of --input")
    args = p.parse_args(argv)
    if args.input is None and not args.smoke:
        p.error("name the input: -i FOLDER, or -i IMAGE --box X0 Y0 X1 Y1, or --smoke")
    try:
        if args.window:
            from files.intensity import parse_window

            args.window = parse_window(args.window)
    except ValueError as error:
        p.error(f"--window: {error}")
    if {len(box) for box in args.box or ()} not in (set(), {4}, {6}):
        p.error("--box takes 4 numbers, X0 Y0 X1 Y1, or in a volume 6, X0 Y0 Z0 X1 Y1 Z1; all of one kind")
    if args.box and (args.boxes_from_masks or args.draw):
        p.error("--box, --boxes-from-masks and --draw are three ways to say the boxes; give one of them")
    if args.precision and not args.engine.startswith("openvino"):
        p.error("--precision is for the openvino engines; the others have their own")
    if args.looseness < 0 or (args.looseness and not args.boxes_from_masks):
        p.error("--looseness is 0 or more, and loosens the boxes of --boxes-from-masks")
    return args


def read_boxed(path: Path, args: argparse.Namespace) -> Case:
    """A case with its boxes: of the command line, of its file, of boxes.csv, or of its masks. InputError if there are none."""
    case = read_case(path, args.boxes_from_masks, args.window, labels=False)
    if args.box:
        case = replace(case, boxes=check_boxes(np.array(args.box), case.grid_shape, path), label_names=None)
    if case.boxes is None:
        raise InputError(
            f"{path}: has no boxes (in .npz the key 'boxes'); give --box X0 Y0 X1 Y1, draw them with --draw, put a "
            "boxes.csv beside it, or take them from masks with --boxes-from-masks"
        )
    if args.looseness:
        case = replace(case, boxes=drawn_boxes(case.name, case.boxes, args.looseness, case.grid_shape))
    return case


def infer_case(segmenter: Segmenter, case: Case, path: Path, read_s: float, args: argparse.Namespace) -> results.Done:
    """Segment one case and write its files. Times are in seconds."""
    start, before = time.perf_counter(), dict(segmenter.seconds)
    found = segment_objects(segmenter, case, partial(progress, what=case.name, unit="slice", leave=False))
    numbers = np.arange(1, len(found.iou) + 1)
    if args.boxes_from_masks:  # box i is the i-th label that occurs, which need not be label i + 1
        numbers = boxes_from_labels(case.labels)[0]
        found = found._replace(labels=np.append(0, numbers).astype(np.uint16)[found.labels])
    segmented = time.perf_counter()
    names = results.save_label_map(args.output, case, found.labels, path, PALETTE)
    written = time.perf_counter()
    if args.overlay or path == args.input:  # not part of the running time: the challenge writes none
        names.append(f"{case.name}_overlay.png" if path == args.input else f"overlays/{case.name}.png")
        save_image(args.output / names[-1], overlay(*flat_view(case.image, found.labels, case.boxes), numbers=True))
    objects = results.object_rows(case, found.labels, numbers, found.iou, found.own, segmented - start)
    spent = {stage: segmenter.seconds[stage] - before.get(stage, 0.0) for stage in results.STAGES}
    row = results.efficiency_row(case, spent, read_s, written - segmented, read_s + written - start)
    return results.Done(row, objects, names)


def infer_cases(files: list[Path], args: argparse.Namespace) -> tuple[list[results.Done], Segmenter | None]:
    """Every file. A bad one is told and left out; the others are done. The model is loaded for the first good one."""
    done, segmenter = [], None
    for path in progress(files, "cases", unit="case"):
        start = time.perf_counter()
        try:
            case = read_boxed(path, args)
        except InputError as error:
            if path == args.input:
                raise
            for ending in results.RESULT_ENDINGS:  # an earlier run's result would be taken for this one's
                (args.output / f"{name_of(path)}{ending}").unlink(missing_ok=True)
            tell(f"04_infer.py: left out: {error}", error=True)
            continue
        read_s = time.perf_counter() - start
        if segmenter is None:
            segmenter = load_segmenter(args)
            tell(f"04_infer.py: {args.model}, preset {segmenter.preset.name}, engine {args.engine}")
        done.append(infer_case(segmenter, case, path, read_s, args))
        if told := results.objects_told(done[-1].objects):
            tell(f"04_infer.py: {told}", error=True)
    return done, segmenter


def infer_drawn(args: argparse.Namespace) -> list[dict]:
    """--draw: one case in a window, written whenever the window says save."""
    from views.saving import draw_and_save  # only here: it brings matplotlib

    files = files_to_do(args)
    if len(files) > 1:
        raise InputError(f"{args.input}: --draw takes one image or volume; {len(files)} are here: name one")
    case = read_case(files[0], window=args.window, labels=False)
    segmenter = load_segmenter(args)
    objects = draw_and_save(segmenter, case, files[0], args.output)
    if objects:
        save_json(args.output / "arguments.json", vars(args) | {"preset_fields": vars(segmenter.preset)})
    return [{"case": case.name, "objects": len(objects)}] if objects else []


def load_segmenter(args: argparse.Namespace) -> Segmenter:
    """The model by the engine that the flags name."""
    options = {"precision": args.precision, "cache": args.engine_cache} if args.engine.startswith("openvino") else {}
    options = {name: value for name, value in options.items() if value}
    return segment.load(args.model, args.weights, args.preset, args.engine, args.force, args.set, **options)


def files_to_do(args: argparse.Namespace) -> list[Path]:
    """The cases to segment. InputError if input and flags do not go together."""
    alone = ending_of(args.input) and not args.input.is_dir()
    files = [args.input] if alone else list_cases(args.input, with_boxes=not args.boxes_from_masks)
    if args.box and len(files) > 1:
        raise InputError(f"{args.input}: --box is for one image; the cases of a folder carry their own boxes")
    results.check_output(args.output, args.input, files)
    return files


def run(args: argparse.Namespace) -> list[dict]:
    # 1. What to segment. What is wrong with it is told before the model is loaded
    files = files_to_do(args)

    # 2. Case by case
    done, segmenter = infer_cases(files, args)
    rows, objects = [one.row for one in done], [item for one in done for item in one.objects]

    # 3. How long it took, what was found, what was run
    if done:
        save_text(args.output / "efficiency.csv", csv_text(rows, results.COLUMNS, number=".4f"))
        save_text(args.output / "objects.csv", csv_text(objects, results.OBJECT_COLUMNS))
        save_json(args.output / "arguments.json", vars(args) | {"preset_fields": vars(segmenter.preset)})
    if len(done) < len(files):
        sys.exit(
            f"04_infer.py: {len(done)} of {len(files)} cases done, {len(files) - len(done)} left out as told above."
        )
    if files == [args.input]:
        found = ", ".join(
            f"object {o['label']}: {o['pixels']} pixels, predicted IoU {o['predicted_iou']}" for o in objects
        )
        print(f"04_infer.py: {found}; wrote {', '.join(done[0].files)} and objects.csv to {args.output}")
        return rows
    seconds = sum(row["total_s"] for row in rows)
    kept = f"wrote {args.output}. Next: python 05_evaluate.py -s {args.output} -g GROUND_TRUTH"
    told = "results removed again. Next: python 05_evaluate.py --smoke" if args.smoke else kept
    print(f"04_infer.py: {len(rows)} cases, {len(objects)} objects in {seconds:.1f} s, {told}")
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns one dict a case, the rows of efficiency.csv."""
    args = parse(argv)
    try:
        if not args.smoke:
            return infer_drawn(args) if args.draw else run(args)
        import tempfile  # these only here: phantoms brings pydicom, a third of a second

        from files.npz import write_case
        from phantoms import tiny_case

        with tempfile.TemporaryDirectory() as folder:
            for dims in (2, 3):
                write_case(Path(folder), tiny_case(dims=dims))
            args.input, args.output = Path(folder) / "imgs", Path(folder) / "segs"
            return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"04_infer.py: {error}")


if __name__ == "__main__":
    main()
