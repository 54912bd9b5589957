"""Demo data, no download: synthetic cases of the challenge's eleven modalities, and real images from packages.

Reads nothing but installed packages; writes demo/imgs/NAME.npz (`imgs`, `boxes`, in 3D `spacing`) and
demo/gts/NAME.npz (`gts`, in 3D `spacing`), the input of 04_infer.py and 05_evaluate.py.
Try: python phantoms.py --out demo

Every synthetic case is a drawing: it has the look of its modality (edges, texture, noise, clutter), so that the
pipeline, the tests and the figures have something to work on. A score on it says nothing about patients.
Source of names and file layout: the challenge's protocol, CVPR 2024 "Segment Anything in Medical Images on Laptop".
The recipes stand in phantoms_2d.py and phantoms_3d.py, the real images in demo_images.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import phantoms_2d as flat
import phantoms_3d as volume
from demo_images import annotated_images
from phantoms_3d import ball, field, mix, soft
from readers import boxes_from_labels
from writers import save_npz


@dataclass(frozen=True)
class Phantom:
    """One demo case with its truth."""

    name: str  # file name without .npz, as the challenge names its cases
    image: np.ndarray  # (H, W), (H, W, 3) or, if spacing_mm is given, (D, H, W); uint8
    labels: np.ndarray  # (H, W) or (D, H, W) uint16; object i is i + 1, 0 is background
    spacing_mm: tuple[float, float, float] | None  # (z, y, x); None in 2D
    descriptions: tuple[str, ...]  # one an object, in the order of the labels


# name in the challenge's files -> recipe, spacing (z, y, x) mm or None; a modality's place here seeds it: append only
RECIPES = {
    "CT": (volume.draw_ct, (8.0, 1.8, 1.8)),
    "MR": (volume.draw_mr, (10.0, 1.2, 1.2)),
    "PET": (volume.draw_pet, (4.0, 4.0, 4.0)),
    "US": (flat.draw_us, None),
    "X-Ray": (flat.draw_xray, None),
    "Mammography": (flat.draw_mammography, None),
    "Dermoscopy": (flat.draw_dermoscopy, None),
    "Endoscopy": (flat.draw_endoscopy, None),
    "Fundus": (flat.draw_fundus, None),
    "OCT": (flat.draw_oct, None),
    "Microscope": (flat.draw_microscope, None),
}


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Round and clip grey levels to 0..255."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def synthetic_case(modality: str, seed: int = 0) -> Phantom:
    """Draw one case: the same for the same seed (and versions of NumPy and OpenCV).

    modality : a key of RECIPES; seed : 0 or more.
    Raises ValueError for an unknown modality.
    """
    if modality not in RECIPES:
        raise ValueError(f"no recipe for modality {modality!r}; choose one of {', '.join(RECIPES)}.")
    recipe, spacing_mm = RECIPES[modality]
    rng = np.random.default_rng((seed, list(RECIPES).index(modality)))
    image, labels, descriptions = recipe(rng)
    prefix = "2DBox" if spacing_mm is None else "3DBox"
    name = f"{prefix}_{modality}_synthetic{seed}"
    return Phantom(name, to_uint8(image), labels.astype(np.uint16), spacing_mm, descriptions)


def tiny_case(seed: int = 0, dims: int = 2) -> Phantom:
    """Two bright blobs on a noisy ground, for --smoke runs.

    dims : 2 gives 64 x 80 px and a US name, 3 gives 6 x 48 x 40 voxels of 3 x 1 x 1 mm and a CT name.
    Raises ValueError for other dims.
    """
    if dims not in (2, 3):
        raise ValueError(f"a tiny case has 2 or 3 dimensions, not {dims}.")
    rng = np.random.default_rng((seed, 1000 + dims))
    shape, spacing_mm = ((64, 80), None) if dims == 2 else ((6, 48, 40), (3.0, 1.0, 1.0))
    image, labels = 60 + 6 * field(rng, shape, 3 if dims == 2 else (1, 3, 3)), np.zeros(shape, np.uint16)
    for i, at in enumerate((0.3, 0.7)):
        centre = (0.5,) * (dims - 2) + tuple(np.array((at, at)) + rng.uniform(-0.05, 0.05, 2))
        rho = ball(shape, centre, (0.45,) * (dims - 2) + tuple(rng.uniform(0.13, 0.18, 2)))
        image, labels[rho < 1] = mix(image, 150 + 40 * i, soft(rho, 0.06)), i + 1
    name = f"2DBox_US_tiny{seed}" if dims == 2 else f"3DBox_CT_tiny{seed}"
    return Phantom(name, to_uint8(image + 4 * rng.standard_normal(shape)), labels, spacing_mm, ("blob",) * 2)


def real_cases() -> list[Phantom]:
    """The real 2D images of demo_annotations.json, outlined by us."""
    return [Phantom(name, image, labels, None, text) for name, image, labels, text in annotated_images()]


def demo_cases(seed: int = 0) -> list[Phantom]:
    """The whole demo: the real images, then one synthetic case of each modality."""
    return real_cases() + [synthetic_case(modality, seed) for modality in RECIPES]


def write_case(folder: Path, case: Phantom) -> Path:
    """Write folder/imgs/NAME.npz and folder/gts/NAME.npz; returns the first.

    Files carry spacing as (x, y, z) mm, the order of SimpleITK, and boxes as int64, inclusive, exact.
    """
    boxes = boxes_from_labels(case.labels)[1].astype(np.int64)  # row i is object i + 1
    small = case.labels.astype(np.uint8 if case.labels.max() <= 255 else np.uint16)
    extra = {} if case.spacing_mm is None else {"spacing": np.array(case.spacing_mm[::-1], np.float64)}
    save_npz(folder / "imgs" / f"{case.name}.npz", imgs=case.image, boxes=boxes, **extra)
    save_npz(folder / "gts" / f"{case.name}.npz", gts=small, **extra)
    return folder / "imgs" / f"{case.name}.npz"


def write_training_case(folder: Path, case: Phantom) -> Path:
    """Write folder/NAME.npz as the challenge's training files are: `imgs`, `gts`, in 3D `spacing` (x, y, z) mm."""
    extra = {} if case.spacing_mm is None else {"spacing": np.array(case.spacing_mm[::-1], np.float64)}
    path = folder / f"{case.name.replace('Box_', '_', 1)}.npz"
    save_npz(path, imgs=case.image, gts=case.labels, **extra)
    return path


def main(argv: list[str] | None = None) -> list[Path]:
    p = argparse.ArgumentParser(
        description="Write the demo cases.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--out", type=Path, default=Path("demo"), help="folder for imgs/ and gts/")
    p.add_argument("--seed", type=int, default=0, help="seed of the synthetic cases, 0 or more")
    p.add_argument("--only", choices=("all", "real", "synthetic"), default="all", help="which cases to write")
    p.add_argument(
        "--train",
        type=int,
        default=0,
        help="also write this many synthetic cases of each modality, with other seeds, to train/, and the demo cases to val/, in training format",
    )
    p.add_argument("--smoke", action="store_true", help="two tiny synthetic cases instead, one 2D and one 3D, 1 s")
    args = p.parse_args(argv)
    if args.seed < 0:
        p.error(f"--seed must be 0 or more, got {args.seed}.")
    if args.smoke:
        cases = [tiny_case(args.seed, 2), tiny_case(args.seed, 3)]
    else:
        cases = real_cases() if args.only == "real" else demo_cases(args.seed)
        cases = [c for c in cases if args.only != "synthetic" or c.name.endswith(f"synthetic{args.seed}")]
    written = []
    for case in cases:
        written.append(write_case(args.out, case))
        print(f"{case.name}: {' x '.join(map(str, case.image.shape))}, {case.labels.max()} objects")
    for seed in range(args.seed + 1, args.seed + 1 + args.train):
        for case in [tiny_case(seed, d) for d in (2, 3)] if args.smoke else [synthetic_case(m, seed) for m in RECIPES]:
            write_training_case(args.out / "train", case)
    for case in cases if args.train else ():
        write_training_case(args.out / "val", case)
    print(
        f"phantoms.py: wrote {len(written)} cases to {args.out / 'imgs'} and {args.out / 'gts'}. "
        f"Next: python 04_infer.py -i {args.out / 'imgs'} -o {args.out / 'segs'} --model baseline"
    )
    return written


if __name__ == "__main__":
    main()
