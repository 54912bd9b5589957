"""Demo data, no download: eight real images that installed packages carry, and four synthetic cases.

`python -m demo_data --out demo` writes them. The outlines of the real images are ours, made for demonstration by
somebody without clinical training: good enough to show a box, a mask and a score, no reference standard.
`annotations.json` has them, with sources and licences; its coordinates are (x, y) in pixels of the file as stored, pixel
centres at whole numbers. A synthetic case (drawn.py) shows that a volume, or a modality without a real image here, runs.
A score on it says nothing about patients, so step 5 leaves it out of its averages (formats.is_drawn).
"""

import gzip
import importlib
import json
from dataclasses import replace
from functools import partial
from importlib.resources import files as packaged_files
from pathlib import Path

import cv2
import numpy as np
import pydicom

from demo_data import drawn
from formats.cache import write_index
from formats.case import Case
from formats.intensity import percentile_to_uint8, window_to_uint8
from formats.npz import write_case, write_training_case
from formats.pictures import read_image
from formats.writing import save_npz

ANNOTATIONS = Path(__file__).with_name("annotations.json")
# modality in the challenge's file names -> recipe, and what its seed begins with
RECIPES = {"CT": (drawn.draw_ct, 0), "Fundus": (drawn.draw_fundus, 8), "Microscope": (drawn.draw_microscope, 10)}
RECIPES |= {name: (partial(drawn.draw_scene, modality=name), i) for i, name in enumerate(drawn.SCENES, start=11)}
SPACINGS = {"CT": (8.0, 1.8, 1.8), "MR": (10.0, 1.2, 1.2)}  # (z, y, x) mm, of those in 3D
TINY = [(seed, dims) for seed in range(3) for dims in (2, 3)]  # three tiny images and three tiny volumes


def painted(name: str, image: np.ndarray, objects: list, spacing_mm: tuple[float, ...] | None = None) -> Case:
    """A case: grey levels rounded, objects (description, mask) painted one after the other."""
    labels = np.zeros(objects[0][1].shape, np.uint16)
    for number, (_, mask) in enumerate(objects, start=1):
        labels[mask] = number
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return Case(name, image, None, labels, spacing_mm, labels.ndim == 3, tuple(what for what, _ in objects))


def synthetic_case(modality: str, seed: int = 0) -> Case:
    """Draw a case of a modality of RECIPES; one seed (and NumPy, and OpenCV) gives one case."""
    if modality not in RECIPES:
        raise ValueError(f"no recipe for modality {modality!r}; choose one of {', '.join(RECIPES)}.")
    recipe, place = RECIPES[modality]
    image, objects = recipe(np.random.default_rng((seed, place)))
    name = f"{'3DBox' if modality in SPACINGS else '2DBox'}_{modality}_synthetic{seed}"
    return painted(name, image, objects, SPACINGS.get(modality))


def tiny_case(seed: int = 0, dims: int = 2) -> Case:
    """Two bright blobs for --smoke runs, an image named US or a volume named CT."""
    rng = np.random.default_rng((seed, 1000 + dims))
    shape, sigma, spacing_mm = ((64, 80), 3, None) if dims == 2 else ((6, 48, 40), (1, 3, 3), (3.0, 1.0, 1.0))
    image, objects = 60 + 6 * drawn.field(rng, shape, sigma), []
    for at, level in ((0.3, 150), (0.7, 190)):
        centre = (0.5,) * (dims - 2) + tuple(at + rng.uniform(-0.05, 0.05, 2))
        rho = drawn.ball(shape, centre, (0.45,) * (dims - 2) + tuple(rng.uniform(0.13, 0.18, 2)))
        image = drawn.mix(image, level, drawn.soft(rho, 0.06))
        objects.append(("blob", rho < 1))
    name = f"{'2DBox_US' if dims == 2 else '3DBox_CT'}_tiny{seed}"
    return painted(name, image + 4 * rng.standard_normal(shape), objects, spacing_mm)


def read_packaged(package: str, file: str, reader: str, frame: int | None = None) -> np.ndarray:
    """An image inside an installed package -> (H, W) or (H, W, 3) RGB uint8."""
    path = Path(str(packaged_files(package))) / file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; install the {package} that requirements.txt names.")
    if reader == "picture":
        return read_image(path)
    if reader == "ima":  # headerless, 256 x 256, 16 bit, most significant byte first
        return percentile_to_uint8(np.frombuffer(gzip.decompress(path.read_bytes()), ">u2").reshape(256, 256))
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array if frame is None else dataset.pixel_array[frame]  # YBR becomes RGB on the way
    if reader == "dicom-ct":
        return window_to_uint8(pixels * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept))
    return percentile_to_uint8(pixels) if reader == "dicom-mr" else pixels


def apply_rule(mask: np.ndarray, image: np.ndarray, rule: dict) -> np.ndarray:
    """Move a generous outline to the visible edge: threshold inside it, largest piece, no holes.

    rule : {"above": g} or {"below": g}, grey levels; optional "channel" of a colour image, and "blur", the standard
    deviation (px) of a Gaussian before the threshold."""
    gray = (image[..., rule["channel"]] if "channel" in rule else image).astype(np.float32)
    if "blur" in rule:
        gray = cv2.GaussianBlur(gray, (0, 0), rule["blur"])
    kept = mask & (gray > rule["above"] if "above" in rule else gray < rule["below"])
    contours, _ = cv2.findContours(kept.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(mask.shape, np.uint8)
    return cv2.drawContours(filled, [max(contours, key=cv2.contourArea)], -1, 1, cv2.FILLED).astype(bool)


def real_cases() -> list[Case]:
    """The real 2D images of annotations.json with our outlines, cropped as it says."""
    cases = []
    for entry in json.loads(ANNOTATIONS.read_text(encoding="utf-8"))["images"]:
        image = read_packaged(entry["package"], entry["file"], entry["reader"], entry.get("frame"))
        x0, y0, x1, y1 = entry.get("crop", (0, 0, image.shape[1], image.shape[0]))  # px, x1 and y1 exclusive
        objects = []
        for item in entry["objects"]:
            mask = drawn.fill_outline(np.array(item["outline"], float), image.shape[:2])
            mask = apply_rule(mask, image, item["rule"]) if "rule" in item else mask
            objects.append((item["description"], mask[y0:y1, x0:x1]))
        cases.append(painted(entry["name"], image[y0:y1, x0:x1], objects))
    return cases


def demo_cases() -> list[Case]:
    """The whole demo: the real images, then a synthetic case of each modality or volume that they lack."""
    real, synthetic = real_cases(), [synthetic_case(modality) for modality in RECIPES]
    covered = {(case.modality, case.is_3d) for case in real}
    return real + [case for case in synthetic if (case.modality, case.is_3d) not in covered]


def tiny_cache(folder: Path) -> Path:
    """A cache of the cases of TINY, those of seed 0 for validation. Returns the folder."""
    # step 1's own function; a module whose name begins with a digit cannot be imported otherwise
    cache_case, entries = importlib.import_module("01_preprocess").cache_case, []
    for seed, dims in TINY:
        found = cache_case(folder, tiny_case(seed, dims), source="demo_data").entries
        entries += [replace(entry, split="train" if seed else "val") for entry in found]
    write_index(folder, entries)
    return folder


def smoke_preprocess(args, folder: Path) -> None:
    """Step 1's --smoke: the cases of TINY as training files."""
    args.input, args.out = folder / "train", args.out or folder / "cache"
    for seed, dims in TINY:
        write_training_case(args.input, tiny_case(seed, dims))


def smoke_train(args, folder: Path) -> None:
    """Step 2's --smoke, and the recipe's: a few steps on a tiny cache."""
    args.cache, args.out = tiny_cache(folder / "cache"), folder / "run"
    args.steps, args.batch, args.set = 4, 2, [*args.set, "objects=2"]


def tiny_folder(folder: Path) -> Path:
    """A tiny image as step 4 reads it, with its truth. Returns the folder of the image."""
    return write_case(folder, tiny_case()).parent


def smoke_quantize(args, folder: Path) -> None:
    """Step 3's --smoke: one repeat, nothing is kept."""
    args.out, args.repeats = folder / "smoke.dynamic.pt", 1


def smoke_infer(args, folder: Path) -> None:
    """Step 4's --smoke: a tiny image and a tiny volume."""
    args.input, args.output = folder / "imgs", folder / "segs"
    for dims in (2, 3):
        write_case(folder, tiny_case(dims=dims))


def smoke_evaluate(args, folder: Path) -> None:
    """Step 5's --smoke: a tiny image and a tiny volume, predicted one pixel off."""
    args.segs, args.gts = [str(folder / "shifted")], folder / "gts"
    for case in (tiny_case(dims=2), tiny_case(dims=3)):
        write_case(folder, case)
        save_npz(folder / "shifted" / f"{case.name}.npz", segs=np.roll(case.labels, 1, axis=-1))
