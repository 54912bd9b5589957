"""Supervisely annotations: a JSON file for each image, a.jpg.json, with polygons or bitmaps."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from pathlib import Path

import cv2
import numpy as np

from files import InputError


def read_supervisely(path: Path, shape: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Objects of one image -> (labels (H, W) uint16, the class of each label). A later object covers an earlier one.

    shape: (H, W) of the image. InputError for another size, no object, or a damaged outline.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        size = (content["size"]["height"], content["size"]["width"])
        masks = [(str(one.get("classTitle", "")), _outline(one, size)) for one in content["objects"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error, zlib.error, cv2.error) as error:
        raise InputError(f"{path}: is no Supervisely annotation ({error!r}); export it again") from error
    if size != shape:
        raise InputError(
            f"{path}: is for an image of {size[0]} x {size[1]} (H, W), but this one is {shape[0]} x {shape[1]}"
        )
    if not masks:
        raise InputError(f"{path}: has no object; outline one, or leave the image out")
    labels = np.zeros(shape, np.uint16)
    for i, (_, mask) in enumerate(masks):
        labels[mask] = i + 1
    return labels, tuple(title for title, _ in masks)


def _outline(item: dict, shape: tuple[int, int]) -> np.ndarray:
    """One object -> (H, W) bool."""
    mask = np.zeros(shape, np.uint8)
    if "bitmap" in item:
        packed = np.frombuffer(zlib.decompress(base64.b64decode(item["bitmap"]["data"])), np.uint8)
        stamp = cv2.imdecode(packed, cv2.IMREAD_UNCHANGED)
        stamp = stamp[..., -1] if stamp.ndim == 3 else stamp  # alpha
        x, y = item["bitmap"]["origin"]
        mask[y : y + stamp.shape[0], x : x + stamp.shape[1]] = stamp > 0
    else:
        cv2.fillPoly(mask, [np.array(item["points"]["exterior"], np.float64).round().astype(np.int32)], 1)
        for hole in item["points"].get("interior", []):
            cv2.fillPoly(mask, [np.array(hole, np.float64).round().astype(np.int32)], 0)
    return mask.astype(bool)
