"""Which images should calibrate static int8? Masks of crowded pictures with an int8 encoder, held to the float one's. (D17)

    python benchmarks/calibration.py --cache cache --cases val               5 min on 2 cores

An int8 layer rounds to 256 levels of a range that calibration images set. Here are several sets of them. Of each object of two drawn
pictures (table5_work.py: 241 cells, 34 shapes) and of real ones with many objects, the Dice of the int8 mask with the float mask.
For scale: the float masks of the same pictures with noise of 1 and of 3 grey levels. Writes results/calibration/table.md.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script sees its own folder only

from table5_work import BY_NAME, draw

import segment
from data import read_index
from enhance import network_input
from fast.engines import float_graphs
from fast.graphs import write_graphs
from fast.openvino_engine import OpenVINOEngine
from fast.static_int8 import calibration_entries, calibration_image, int8_encoder
from files import InputError, modality_of
from files.case import Case
from files.checkpoints import OUR_CHECKPOINT
from files.formats import list_cases, read_case
from files.writing import save_text
from grid import MaskPatch, boxes_from_labels
from metrics import dsc
from segment import Masks, Segmenter
from tables import pipe_table

DRAWN = ("2DBox_Microscope_0016", "2DBox_X-Ray_0053")
CROWDED = ("Microscopy", "X-Ray")  # modalities with many objects a picture
ALL, FEW = 198, 33  # calibration images: what step 3 takes, and few
LOW = 0.95  # Dice below which a mask is counted


def calibration_sets(segmenter: Segmenter, cache: Path) -> dict[str, list[np.ndarray]]:
    """Name of a set -> its images."""
    entries = read_index(cache)
    cells = [entry for entry in entries if entry.modality == "Microscopy" and entry.split == "train"]
    every = [calibration_image(segmenter, cache, entry) for entry in calibration_entries(entries, ALL)]
    crowds = [
        network_input(draw(BY_NAME[name], seed).image, segmenter.preset, True)[None]
        for name in ("2DBox_Microscope_0016", "2DBox_Microscope_0008")
        for seed in range(1, 7)  # the picture that is asked about has seed 0
    ]
    return {
        f"every modality in turn, {len(every)} images (step 3)": every,
        f"the first {FEW} of them": every[:FEW],
        f"these {len(every)}, and {len(crowds)} drawn crowds": every + crowds,
        "microscopy alone": [calibration_image(segmenter, cache, entry) for entry in cells[: ALL // 2]],
    }


def pictures(folder: Path) -> dict[str, list[Case]]:
    """Name of a group -> its pictures, with boxes."""
    real = [path for path in list_cases(folder, with_boxes=False) if modality_of(path.stem) in CROWDED]
    drawn = [draw(BY_NAME[name]) for name in DRAWN]
    drawn = [replace(case, boxes=boxes_from_labels(case.labels)[1]) for case in drawn]
    groups = {f"{len(case.boxes)} drawn": [case] for case in drawn}
    return groups | {"real": [read_case(path, boxes_from_masks=True) for path in real]}


def noisy(image: np.ndarray, levels: int) -> np.ndarray:
    """An image with each pixel moved by up to so many grey levels, channels alike."""
    noise = np.random.default_rng(0).integers(-levels, levels + 1, image.shape[:2])
    return np.clip(image + (noise if image.ndim == 2 else noise[..., None]), 0, 255).astype(np.uint8)


def masks_of(segmenter: Segmenter, case: Case, levels: int = 0) -> Masks:
    """The masks of a picture's boxes, which may lie one upon the other."""
    image = noisy(case.image, levels) if levels else case.image
    return segmenter.masks(segmenter.embed(image), case.boxes, case.grid_shape)


def agreement(one: MaskPatch, other: MaskPatch, shape: tuple[int, int]) -> float:
    """Dice of two masks of one object; 1 if both are empty."""
    found = np.zeros((2, *shape), bool)
    for mask, (values, rows, columns) in zip(found, (one, other), strict=True):
        mask[rows, columns] = values > 0
    top, left = (min(a.start, b.start) for a, b in ((one.rows, other.rows), (one.columns, other.columns)))
    bottom, right = (max(a.stop, b.stop) for a, b in ((one.rows, other.rows), (one.columns, other.columns)))
    return dsc(*found[:, top:bottom, left:right]) if found.any() else 1.0


def compared(name: str, groups: dict, wanted: dict, ask: Callable[[Case], Masks]) -> list[dict]:
    """A row for each object: how well its mask agrees with the float one."""
    rows = []
    for group, cases in groups.items():
        for case, kept in zip(cases, wanted[group], strict=True):
            pairs = zip(ask(case).patches, kept, strict=True)
            rows += [
                {"set": name, "pictures": group, "case": case.name, "dice": agreement(*pair, case.grid_shape)}
                for pair in pairs
            ]
    return rows


def agreement_table(rows: list[dict]) -> str:
    """table.md: a row for each set and group of pictures."""
    lines = [["calibrated on", "pictures", "objects", "least Dice", "5th percentile", "median", f"below {LOW}"]]
    for name, group in dict.fromkeys((row["set"], row["pictures"]) for row in rows):
        dice = np.array([row["dice"] for row in rows if (row["set"], row["pictures"]) == (name, group)])
        numbers = [f"{value:.3f}" for value in (dice.min(), np.percentile(dice, 5), np.median(dice))]
        lines.append([name, group, str(len(dice)), *numbers, str((dice < LOW).sum())])
    return f"# {__doc__.splitlines()[0]}\n\n{pipe_table(lines)}\n"


def agreements(args: argparse.Namespace) -> list[dict]:
    """Rows of every calibration set, after those of noise."""
    plain, groups = segment.load("proposed", args.weights), pictures(args.cases)
    folder, _ = float_graphs(args.weights, "proposed", args.engine_cache)
    exact = Segmenter(OpenVINOEngine(folder, precision="f32"), plain.preset, plain.enhanced)
    wanted = {group: [masks_of(exact, case).patches for case in cases] for group, cases in groups.items()}
    rows = []
    for levels in (1, 3):
        name = f"no int8; noise of {levels} grey level{'s' * (levels > 1)}"
        rows += compared(name, groups, wanted, lambda case, levels=levels: masks_of(exact, case, levels))
    for name, images in calibration_sets(plain, args.cache).items():
        with tempfile.TemporaryDirectory() as scratch:
            graph = int8_encoder(plain.engine.network, images)
            write_graphs(Path(scratch) / "try.static", plain.engine.network, {}, "openvino-int8", graph)
            short = Segmenter(OpenVINOEngine(Path(scratch) / "try.static"), plain.preset, plain.enhanced)
            rows += compared(name, groups, wanted, lambda case, short=short: masks_of(short, case))
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns a row for each set and object."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--cache", type=Path, required=True, help="cache of step 1, whose training images calibrate")
    p.add_argument("--cases", type=Path, required=True, help="folder of real .npz cases with imgs and gts")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="checkpoint of the proposed model")
    p.add_argument("--engine-cache", type=Path, default=Path("out/calibration"), help="where OpenVINO keeps graphs")
    p.add_argument("-o", "--out", type=Path, default=Path("results/calibration"), help="folder for the tables")
    args = p.parse_args(argv)
    try:
        rows = agreements(args)
    except (InputError, OSError) as error:
        sys.exit(f"calibration.py: {error}")
    save_text(args.out / "table.md", agreement_table(rows))
    print(agreement_table(rows))
    return rows


if __name__ == "__main__":
    main()
