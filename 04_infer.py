"""Step 4 of 5, infer. Reads images and boxes, writes label maps, overlays and running times.

    python 04_infer.py -i demo/imgs -o demo/segs                        a folder of challenge cases (.npz)
    python 04_infer.py -i scan.png -o out --box 30 40 120 150           one picture
    python 04_infer.py -i scan.png -o out --draw                        one picture or volume, boxes drawn in a window
    python 04_infer.py --smoke                                          two tiny synthetic cases, 10 s

For a folder it writes NAME.npz (`segs`, the input's shape, box i painted as i + 1), efficiency.csv, and with
--overlay overlays/NAME.png; for one image NAME_mask.png (255 inside), NAME_overlay.png and NAME.npz.
The command line is the challenge's: python 04_infer.py -i INPUTS -o OUTPUTS.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import fast
import segment
from figures import flat_view, overlay
from files import InputError, modality_of
from files.case import Case, check_boxes
from files.formats import PICTURE_ENDINGS, ending_of, list_cases, name_of, read_case
from files.writing import csv_text, save_image, save_json, save_npz, save_text
from grid import boxes_from_labels, case_rng, loosen_boxes
from presets import PRESETS
from segment import MODELS, Segmenter
from volumes import segment_case

STAGES = ("enhance", "encode", "decode", "upsample")
COLUMNS = ("case", "modality", "shape", "objects", "read_s", *(f"{stage}_s" for stage in STAGES), "write_s", "total_s")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(
        "-i", "--input", type=Path, help="folder of cases (.npz), one case, or one picture together with --box"
    )
    p.add_argument("-o", "--output", type=Path, default=Path("segs"), help="folder for the results, made if missing")
    p.add_argument(
        "--box", type=float, nargs=4, action="append", metavar=("X0", "Y0", "X1", "Y1"),
        help="box prompt for one image, pixels, x to the right, y down; repeat it for more objects",
    )  # fmt: skip
    p.add_argument(
        "--model", choices=MODELS, default=segment.default_model(),
        help="proposed is the paper's, the default where its checkpoint is in checkpoints/; baseline is LiteMedSAM",
    )  # fmt: skip
    p.add_argument(
        "--weights", type=Path, help="checkpoint (default: LiteMedSAM's, or checkpoints/grays_anatomy_sam_l0.pt)"
    )
    p.add_argument("--preset", choices=PRESETS, help="reading of the paper (default: the checkpoint's, else fixed)")
    p.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the preset")
    p.add_argument("--force", action="store_true", help="use another preset than the checkpoint was trained with")
    p.add_argument(
        "--engine", choices=(*segment.ENGINES, *fast.ENGINES), default="torch",
        help="what runs the network: torch is model.py as written, torch-int8 its linear layers in int8; the others give "
        "its results sooner (fast/); openvino ones need: pip install -r requirements-fast.txt",
    )  # fmt: skip
    p.add_argument(
        "--engine-cache", type=Path, metavar="DIR", help="where OpenVINO keeps graphs (default: user's cache)"
    )
    p.add_argument(
        "--boxes-from-masks", action="store_true", help="take each box exactly from 'gts', and keep its labels"
    )
    p.add_argument(
        "--looseness", type=float, default=0.0, metavar="SHARE",
        help="with --boxes-from-masks: move each side outward by 0.5 to 1.5 times this share of the object, as people do",
    )  # fmt: skip
    p.add_argument("--overlay", action="store_true", help="also write a picture of each case with masks and boxes")
    p.add_argument(
        "--draw", action="store_true", help="open a window to draw the boxes in, for one picture or one case"
    )
    p.add_argument("--smoke", action="store_true", help="two tiny synthetic cases instead of --input")
    args = p.parse_args(argv)
    if args.input is None and not args.smoke:
        p.error("name the input: -i FOLDER, or -i IMAGE --box X0 Y0 X1 Y1, or --smoke")
    if args.looseness < 0 or (args.looseness and not args.boxes_from_masks):
        p.error("--looseness is 0 or more, and loosens the boxes of --boxes-from-masks")
    return args


def infer_case(segmenter: Segmenter, case: Case, read_s: float, args: argparse.Namespace) -> dict:
    """Segment one case and write its files. Returns its row of efficiency.csv, times in seconds."""
    start, before = time.perf_counter(), dict(segmenter.seconds)
    labels = segment_case(segmenter, case)
    if args.boxes_from_masks:  # box i is the i-th label that occurs, which need not be label i + 1
        labels = np.append(0, boxes_from_labels(case.labels)[0]).astype(np.uint16)[labels]
    segmented = time.perf_counter()
    # 8 bits where they hold every label, as the challenge's own files; 16 above 255 objects (D9)
    save_npz(args.output / f"{case.name}.npz", segs=labels.astype(np.uint8) if labels.max() <= 255 else labels)
    written = time.perf_counter()
    if args.overlay:  # not part of the running time: the challenge writes none
        save_image(args.output / "overlays" / f"{case.name}.png", overlay(*flat_view(case.image, labels, case.boxes)))
    stages = {f"{stage}_s": segmenter.seconds[stage] - before.get(stage, 0.0) for stage in STAGES}
    return {
        "case": f"{case.name}.npz",
        "modality": modality_of(case.name),
        "shape": "x".join(map(str, case.image.shape)),
        "objects": len(case.boxes),
        "read_s": read_s,
        **stages,
        "write_s": written - segmented,
        "total_s": read_s + written - start,
    }


def infer_cases(segmenter: Segmenter, files: list[Path], args: argparse.Namespace) -> tuple[list[dict], int]:
    """Every file. A bad one is told and left out; the others are done. -> (rows of efficiency.csv, number left out)"""
    rows, left_out = [], 0
    for path in tqdm(files, desc="cases", disable=None):
        start = time.perf_counter()
        try:
            case = read_case(path, args.boxes_from_masks)
            if case.boxes is None:
                raise InputError(f"{path}: has no key 'boxes'; add box prompts, or use --boxes-from-masks")
            if args.looseness:
                boxes = loosen_boxes(case.boxes, args.looseness, case_rng(case.name), *case.labels.shape[-2:])
                case = replace(case, boxes=boxes)
            rows.append(infer_case(segmenter, case, time.perf_counter() - start, args))
        except InputError as error:
            # an earlier run's result would be taken for this one's by step 5
            (args.output / f"{name_of(path)}.npz").unlink(missing_ok=True)
            left_out += 1
            tqdm.write(f"04_infer.py: left out: {error}", file=sys.stderr)
    if rows:
        save_text(args.output / "efficiency.csv", csv_text(rows, COLUMNS, number=".4f"))
    return rows, left_out


def infer_picture(segmenter: Segmenter, args: argparse.Namespace) -> list[dict]:
    """One picture with --box: its mask and overlay as PNG, its label map as npz."""
    case = read_case(args.input)
    boxes = check_boxes(np.array(args.box), case.image.shape[:2], args.input)
    labels = segment_case(segmenter, replace(case, boxes=boxes))
    save_npz(args.output / f"{case.name}.npz", segs=labels)
    save_image(args.output / f"{case.name}_mask.png", np.where(labels > 0, 255, 0).astype(np.uint8))
    save_image(args.output / f"{case.name}_overlay.png", overlay(case.image, labels, boxes))
    shares = ", ".join(f"object {i + 1}: {np.count_nonzero(labels == i + 1)} pixels" for i in range(len(boxes)))
    print(
        f"04_infer.py: {shares}; wrote {args.output / case.name}_mask.png, {case.name}_overlay.png and {case.name}.npz"
    )
    return [{"case": case.name, "objects": len(boxes), **{f"{k}_s": v for k, v in segmenter.seconds.items()}}]


def infer_drawn(args: argparse.Namespace) -> list[dict]:
    """--draw: one picture or case in a window, written whenever the window says save."""
    if args.input.is_dir() or args.box:
        raise InputError(f"{args.input}: --draw takes one picture or one case, and no --box")
    case, saved = read_case(args.input), []
    path = args.output / f"{case.name}.npz"
    if path.resolve() == args.input.resolve():
        raise InputError(f"{path}: the result would replace the case; name another folder with -o")
    from views.window import draw_window  # only here: it brings matplotlib

    def save(drawn) -> str:
        save_npz(path, segs=drawn.labels, boxes=drawn.boxes)
        save_image(path.with_name(f"{case.name}_overlay.png"), overlay(*flat_view(case.image, *drawn[:2])))
        saved[:] = [drawn]
        print(f"04_infer.py: {len(drawn.boxes)} objects, wrote {path} and {case.name}_overlay.png")
        return f"Saved {len(drawn.boxes)} objects as {path}, and as {case.name}_overlay.png."

    drawn = draw_window(load_segmenter(args), case, save)
    if len(drawn.boxes) and not (saved and all(map(np.array_equal, saved[0], drawn))):
        print("04_infer.py: the window was closed without saving the last changes")
    return [{"case": case.name, "objects": len(one.boxes)} for one in saved]


def load_segmenter(args: argparse.Namespace) -> Segmenter:
    """The model by the engine that the flags name."""
    named = (args.model, args.weights, args.preset, args.engine, args.force, args.set)
    if args.engine in segment.ENGINES:
        return segment.load(*named)
    from fast import engines  # only here: whoever runs model.py as written need not load it

    return engines.load(*named, cache=args.engine_cache)


def check_input(args: argparse.Namespace) -> bool:
    """Whether the input is one picture with --box. InputError if input and flags do not go together."""
    if args.input.is_dir() or (not args.input.exists() and not args.box):
        if args.box:
            raise InputError(f"{args.input}: --box is for one picture; the cases of a folder carry their own boxes")
        if args.output.resolve() == args.input.resolve():
            raise InputError(
                f"{args.output}: input and output are the same folder; the results would replace the cases"
            )
        return False
    picture = ending_of(args.input) in PICTURE_ENDINGS
    if picture and not args.box:
        raise InputError(f"{args.input}: not a folder; for one picture give a box: --box X0 Y0 X1 Y1 (pixels)")
    return bool(args.box)


def run(args: argparse.Namespace) -> list[dict]:
    if args.draw:
        return infer_drawn(args)
    # 1. The model with its weights, and the preset
    picture = check_input(args)
    segmenter = load_segmenter(args)
    print(f"04_infer.py: {args.model}, preset {segmenter.preset.name}, engine {args.engine}")

    # 2. One picture, or cases
    if picture:
        rows, left_out = infer_picture(segmenter, args), 0
    else:
        files = [args.input] if args.input.is_file() else list_cases(args.input)
        rows, left_out = infer_cases(segmenter, files, args)

    # 3. What was run, beside what it wrote
    if rows:
        save_json(args.output / "arguments.json", vars(args) | {"preset_fields": vars(segmenter.preset)})
    if left_out:
        sys.exit(f"04_infer.py: {len(rows)} of {len(rows) + left_out} cases done, {left_out} left out as told above.")
    if not picture:
        objects, seconds = sum(row["objects"] for row in rows), sum(row["total_s"] for row in rows)
        kept = f"wrote {args.output}. Next: python 05_evaluate.py -s {args.output} -g GROUND_TRUTH"
        told = "results removed again. Next: python 05_evaluate.py --smoke" if args.smoke else kept
        print(f"04_infer.py: {len(rows)} cases, {objects} objects in {seconds:.1f} s, {told}")
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns one dict a case, the rows of efficiency.csv."""
    args = parse(argv)
    try:
        if not args.smoke:
            return run(args)
        from files.npz import write_case
        from phantoms import tiny_case  # only here: it brings pydicom, a third of a second

        with tempfile.TemporaryDirectory() as folder:
            for dims in (2, 3):
                write_case(Path(folder), tiny_case(dims=dims))
            args.input, args.output = Path(folder) / "imgs", Path(folder) / "segs"
            return run(args)
    except (InputError, OSError) as error:
        sys.exit(f"04_infer.py: {error}")


if __name__ == "__main__":
    main()
