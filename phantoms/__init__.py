"""Demo data, no download: synthetic cases of the challenge's eleven modalities, and real images from packages.

`python -m phantoms --out demo` writes them. Nothing but installed packages is read.

Every synthetic case is a drawing: it has the look of its modality (edges, texture, noise, clutter), so that the
pipeline, the tests and the figures have something to work on. A score on it says nothing about patients.
Source of names and file layout: the challenge's protocol, CVPR 2024 "Segment Anything in Medical Images on Laptop".
The recipes stand in flat.py and volume.py, the real images in packaged.py.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from files.case import Case
from files.index import write_index
from files.npz import write_training_case
from phantoms import flat, volume
from phantoms.packaged import annotated_images
from phantoms.volume import ball, field, mix, soft

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


def synthetic_case(modality: str, seed: int = 0) -> Case:
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
    image, labels = to_uint8(image), labels.astype(np.uint16)
    return Case(name, image, None, labels, spacing_mm, spacing_mm is not None, descriptions)


def tiny_case(seed: int = 0, dims: int = 2) -> Case:
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
    image = to_uint8(image + 4 * rng.standard_normal(shape))
    return Case(name, image, None, labels, spacing_mm, dims == 3, ("blob",) * 2)


def real_cases() -> list[Case]:
    """The real 2D images of annotations.json, outlined by us."""
    return [Case(name, image, None, labels, None, False, text) for name, image, labels, text in annotated_images()]


def demo_cases(seed: int = 0) -> list[Case]:
    """The whole demo: the real images, then one synthetic case of each modality."""
    return real_cases() + [synthetic_case(modality, seed) for modality in RECIPES]


def write_tiny_cases(folder: Path) -> Path:
    """Three tiny images and three tiny volumes as training files, for step 1's --smoke. Returns the folder."""
    for seed, dims in ((seed, dims) for seed in range(3) for dims in (2, 3)):
        write_training_case(folder, tiny_case(seed, dims))
    return folder


def tiny_cache(folder: Path) -> Path:
    """A cache of three tiny images and three tiny volumes; the first of each is for validation. Returns the folder."""
    # step 1's own function, from a script whose name `import` cannot say
    cache_case, entries = importlib.import_module("01_preprocess").cache_case, []
    for seed, dims in ((seed, dims) for seed in range(3) for dims in (2, 3)):
        found = cache_case(folder, tiny_case(seed, dims), source="phantoms").entries
        entries += [replace(entry, split="train" if seed else "val") for entry in found]
    write_index(folder, entries)
    return folder
