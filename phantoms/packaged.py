"""The real demo images: read from the packages that carry them, with outlines that are ours.

scikit-image, matplotlib and pydicom ship a few medical images for their own examples and tests.
This module reads eight of them and rasterises `annotations.json`. Nothing is downloaded.
The outlines were made for demonstration by somebody without clinical training: good enough to
show a box, a mask and a score; no reference standard. Sources and licences stand in the JSON.

Coordinates in the JSON are (x, y) in pixels of the file as stored, pixel centres at whole numbers.
"""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
import pydicom

from files.intensity import percentile_to_uint8, window_to_uint8
from files.pictures import read_image

ANNOTATIONS = Path(__file__).with_name("annotations.json")
SPLINE_STEPS = 12  # points drawn between two clicked points: fine enough for a gap of 60 px


def read_packaged(package: str, file: str, reader: str, frame: int | None = None) -> np.ndarray:
    """One image out of an installed package -> (H, W) or (H, W, 3) RGB uint8, all pixels, no crop.

    package, file : import name and path inside it; reader : picture, ima, dicom, dicom-ct or dicom-mr;
    frame : 0-based, for multi-frame DICOM.
    Raises FileNotFoundError if the installed version no longer carries the file, ValueError for an unknown reader.
    """
    path = Path(str(files(package))) / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: the installed {package} no longer ships it; install the version in requirements.txt."
        )
    if reader == "picture":
        return read_image(path)
    if reader == "ima":  # headerless, 256 x 256, 16 bit, most significant byte first
        return percentile_to_uint8(np.frombuffer(gzip.decompress(path.read_bytes()), ">u2").reshape(256, 256))
    if reader not in ("dicom", "dicom-ct", "dicom-mr"):
        raise ValueError(f"unknown reader {reader!r} for {file}; use picture, ima, dicom, dicom-ct or dicom-mr.")
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array  # YBR becomes RGB on the way
    if frame is not None:
        pixels = pixels[frame]
    if reader == "dicom-ct":
        return window_to_uint8(pixels * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept))
    return percentile_to_uint8(pixels) if reader == "dicom-mr" else pixels


def smooth_outline(points: np.ndarray) -> np.ndarray:
    """Closed Catmull-Rom curve through `points`.   points : (n, 2) x, y px.   Returns (n * SPLINE_STEPS, 2)."""
    before, after, beyond = (np.roll(points, shift, axis=0) for shift in (1, -1, -2))
    t = (np.arange(SPLINE_STEPS) / SPLINE_STEPS)[None, :, None]  # (1, steps, 1)
    p0, p1, p2, p3 = (p[:, None, :] for p in (before, points, after, beyond))  # each (n, 1, 2)
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return curve.reshape(-1, 2)


def fill_outline(outline: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """outline : (n, 2) x, y px, closed; may leave the image.   shape : (H, W).   Returns (H, W) bool."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round(outline * 16).astype(np.int32)], 1, shift=4)  # 1/16 px fixed point
    return mask.astype(bool)


def apply_rule(mask: np.ndarray, image: np.ndarray, rule: dict) -> np.ndarray:
    """Move a hand-drawn outline to the visible edge: threshold inside it, largest piece, holes filled.

    mask : (H, W) bool, drawn a little generously; image : (H, W) or (H, W, 3) uint8.
    rule : {"above": g} or {"below": g}, grey levels; optional "channel" (0 red, 1 green, 2 blue; else the mean of all)
    and "blur" (px, standard deviation of the Gaussian that the image passes before the threshold).
    Returns (H, W) bool. Raises ValueError if nothing is left.
    """
    gray = image.astype(np.float32)
    if gray.ndim == 3:
        gray = gray[..., rule["channel"]] if "channel" in rule else gray.mean(axis=-1)
    if "blur" in rule:
        gray = cv2.GaussianBlur(gray, (0, 0), rule["blur"])
    kept = mask & (gray > rule["above"] if "above" in rule else gray < rule["below"])
    contours, _ = cv2.findContours(kept.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        raise ValueError(f"the rule {rule} keeps no pixel of its outline; correct annotations.json.")
    largest = max(contours, key=cv2.contourArea)
    filled = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(filled, [largest], -1, 1, cv2.FILLED)  # outer contour only, so holes are filled
    return filled.astype(bool)


def rasterise(entry: dict, image: np.ndarray) -> np.ndarray:
    """Every object of one JSON entry -> (H, W) uint16; object i (0-based) is i + 1, later ones paint over earlier."""
    labels = np.zeros(image.shape[:2], np.uint16)
    for i, item in enumerate(entry["objects"]):
        mask = fill_outline(smooth_outline(np.array(item["outline"], float)), image.shape[:2])
        labels[apply_rule(mask, image, item["rule"]) if "rule" in item else mask] = i + 1
    return labels


def annotated_images() -> list[tuple[str, np.ndarray, np.ndarray, tuple[str, ...]]]:
    """All entries of annotations.json, cropped as it says.

    Returns a list of (name, image (H, W) or (H, W, 3) uint8, labels (H, W) uint16, one description an object).
    """
    cases = []
    for entry in json.loads(ANNOTATIONS.read_text(encoding="utf-8"))["images"]:
        image = read_packaged(entry["package"], entry["file"], entry["reader"], entry.get("frame"))
        labels = rasterise(entry, image)
        x0, y0, x1, y1 = entry.get("crop", (0, 0, image.shape[1], image.shape[0]))  # px, x1 and y1 exclusive
        image, labels = image[y0:y1, x0:x1].copy(), labels[y0:y1, x0:x1].copy()
        cases.append((entry["name"], image, labels, tuple(item["description"] for item in entry["objects"])))
    return cases
