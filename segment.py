"""Boxes to masks of one image: embed the image once, decode boxes, paint a label map. [P 2.2]

From a Python prompt:
    >>> segmenter = load("proposed")                                    # doctest: +SKIP
    >>> embedding = segmenter.embed(image)                              # doctest: +SKIP
    >>> found = segmenter.masks(embedding, boxes, image.shape[:2])      # doctest: +SKIP
    >>> found.labels, found.own(0), found.iou[0]                        # doctest: +SKIP

Box i (0-based) paints label i + 1, uint16. What a preset changes here: how boxes are rounded, how far from its box a
mask may be, and which object wins a pixel that two masks claim. Volumes: volumes.py.
"""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from enhance import network_input
from formats import InputError, checkpoints
from formats.case import check_boxes, check_image
from grid import MaskPatch, boxes_to_grid, crop_to_box, grid_pixels_for, logits_to_original, reach_of
from presets import PRESETS, Preset, override

# How a box was made, which says how far its object may be from its sides. Kind -> how training makes such boxes: the
# share that is loosened, and by how much at most (grid.move_box); the others move as the preset's `jitter` says.
# Where a kind was trained (recipe/), the checkpoint has a decoder for it (D24). A new kind is a row here.
BOX_KINDS = {
    "exact": (0.0, 0.0),  # touches its object: made of a label, by a detector, by the challenge
    "drawn": (0.9, 0.45),  # by hand (D20)
}
# A box that was made of the mask of a neighbouring slice is looser than an exact one and tighter than a drawn one. Its
# decoder was not trained (D24): each weight is this share of that of drawn boxes, and the rest of that of exact ones
FOLLOWED, FOLLOWED_OF, FOLLOWED_SHARE = "followed", "drawn", 0.75
BOX_CHUNK = 6  # boxes a decoder call: bounds the memory; the feature maps of 6 are 24 MB


class Architecture(NamedTuple):
    """A row of MODELS."""

    module: str  # where the image encoder's class is
    encoder: str  # the class
    weights: Callable[[], Path]  # the checkpoint that is loaded when none is named
    enhanced: bool  # trained on the paper's three channels, or on raw images


# A new encoder is one class and one row here; the steps then know it as --model NAME
MODELS = {
    "baseline": Architecture("baseline", "TinyViT", checkpoints.lite_medsam_path, enhanced=False),
    "proposed": Architecture("efficientvit", "ImageEncoder", checkpoints.our_checkpoint_path, enhanced=True),
}

OPENVINO = "engines:load_openvino", {"precision": "auto|f32|bf16", "cache": "DIR", "threads": "N"}
# What runs a network: name -> the function that makes it, and the options it takes. Its module is imported when such an
# engine is asked for, so that nothing here imports a side room.
ENGINES = {
    "torch": ("segment:load_torch", {}),  # model.py as written
    "torch-int8": ("segment:load_torch", {}),  # its linear layers in dynamic int8
    "openvino": OPENVINO,
    "openvino-int8": OPENVINO,  # nearly the whole encoder in static int8
}


class Masks(NamedTuple):
    """The masks that were found for the boxes of one image."""

    labels: np.ndarray  # (H, W) uint16, object i + 1 where box i's mask is, 0 background
    patches: list[MaskPatch]  # each object's own mask, also where another object covers it
    iou: np.ndarray  # (N,) float32, what the network predicts for each mask's intersection over union

    def own(self, i: int) -> np.ndarray:
        """Object i's own mask, (H, W) bool."""
        mask = np.zeros(self.labels.shape, bool)
        values, rows, columns = self.patches[i]
        mask[rows, columns] = values > 0
        return mask


class Segmenter:
    """A network and a preset, ready to segment. Also keeps the time that is spent in each stage.

    engine: anything like model.TorchEngine, with encode(image), decode(embedding, boxes, within, boxes_are), and kinds.
    enhanced: True if the network was trained on the three channels, False for raw images (the baseline)."""

    def __init__(self, engine, preset: Preset, enhanced: bool) -> None:
        self.engine, self.preset, self.enhanced = engine, preset, enhanced
        self.seconds: dict[str, float] = defaultdict(float)  # stage -> seconds, summed until somebody clears it

    def embed(self, image: np.ndarray):
        """Encode one image or slice, (H, W) or (H, W, 3) RGB uint8, original pixels, or InputError. -> its embedding"""
        image = check_image(np.asarray(image), False, "Segmenter.embed")
        with self.stage("enhance"):
            enhanced = network_input(image, self.preset, self.enhanced)
        with self.stage("encode"):
            return self.engine.encode(enhanced)

    def masks(self, embedding, boxes: np.ndarray, shape: tuple[int, int], boxes_are: str = "exact") -> Masks:
        """Masks for boxes (N, 4), x0 y0 x1 y1 in pixels of the original image (H, W) = shape. Or InputError.

        boxes_are: "exact" if they touch their objects, "drawn" if a hand drew them (BOX_KINDS)."""
        canvas, patches, iou = self.new_canvas(np.zeros(shape, np.uint16), len(boxes)), [], []
        for label, (mask, sure) in enumerate(self.decode_boxes(embedding, boxes, shape, boxes_are), start=1):
            with self.stage("upsample"):
                canvas.paint(label, mask)
            patches.append(mask)
            iou.append(sure)
        return Masks(canvas.labels, patches, np.array(iou, np.float32))

    def decode_boxes(
        self, embedding, boxes: np.ndarray, shape: tuple[int, int], boxes_are: str = "exact"
    ) -> Iterator[tuple[MaskPatch, float]]:
        """Yields of each box, as `masks` takes them, its mask in original pixels and its predicted IoU."""
        boxes = check_boxes(boxes, shape, "Segmenter.masks", flat=True)
        # D18: a mask ends near its box
        reach = reach_of(boxes, *shape) if self.preset.reach == "box" else None
        for i, (logits, iou) in enumerate(self.decode_all(embedding, boxes, shape, reach, boxes_are)):
            with self.stage("upsample"):
                mask = logits_to_original(logits, *shape)
                mask = mask if reach is None else crop_to_box(mask, reach[i])
            yield mask, iou

    def decode_all(
        self, embedding, boxes: np.ndarray, shape: tuple[int, int], reach: np.ndarray | None, boxes_are: str
    ) -> Iterator[tuple[np.ndarray, float]]:
        """Yields of each box (N, 4) its logits (256, 256) and its predicted IoU.   reach: (N, 4), where masks may lie."""
        # D8: boxes are decoded in groups
        for first in range(0, len(boxes), BOX_CHUNK):
            chunk = slice(first, first + BOX_CHUNK)
            within = None if reach is None else grid_pixels_for(reach[chunk], *shape)
            asked = boxes_to_grid(boxes[chunk], *shape, self.preset.box_rounding)
            for logits, iou in zip(*self.decode(embedding, asked, within, boxes_are), strict=True):
                yield logits, float(iou)

    def segment_image(self, image: np.ndarray, boxes: np.ndarray, boxes_are: str = "exact") -> np.ndarray:
        """image (H, W) or (H, W, 3) uint8; boxes (N, 4), original pixels -> (H, W) uint16."""
        return self.masks(self.embed(image), boxes, image.shape[:2], boxes_are).labels

    def decode(
        self, embedding, boxes: np.ndarray, within: np.ndarray | None = None, boxes_are: str = "exact"
    ) -> tuple[np.ndarray, np.ndarray]:
        """At most BOX_CHUNK boxes by the engine: arguments and result are model.TorchEngine.decode's."""
        kind = self.kind_to_ask(boxes_are)
        with self.stage("decode"):
            logits, iou = self.engine.decode(embedding, boxes, within, kind)
        # no pixel is above 0 then: it would look like an object that was not found
        if np.isnan(logits).any() or not np.isfinite(iou).all():
            raise InputError("the network answers with NaN; use an earlier checkpoint, or another --engine")
        return logits, iou

    def kind_to_ask(self, boxes_are: str) -> str:
        """The kind itself. InputError if nobody knows it. A network without a decoder for one asks as for exact ones; for
        followed ones as for drawn ones."""
        known = dict.fromkeys([*BOX_KINDS, FOLLOWED, *self.engine.kinds])
        if boxes_are not in known:
            raise InputError(f"boxes {boxes_are!r}: no such kind; choose one of {', '.join(known)}")
        return FOLLOWED_OF if boxes_are == FOLLOWED and FOLLOWED not in self.engine.kinds else boxes_are

    def new_canvas(self, labels: np.ndarray, objects: int) -> Canvas:
        """A canvas on an empty label map (H, W), with this preset's overlap rule. One object overlaps nothing."""
        return Canvas(labels, self.preset.overlap if objects > 1 else "last")

    @contextmanager
    def stage(self, name: str):
        """Adds the time spent inside to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class Canvas:
    """A label map (H, W) uint16, zeros at first, that objects are painted on, in any order. A pixel that two objects
    claim goes, with overlap "last", to the one with the higher number; with "logit", to the one with the higher logit.
    """

    def __init__(self, labels: np.ndarray, overlap: str) -> None:
        self.labels = labels
        self.best = np.zeros(labels.shape, dtype=np.float32) if overlap == "logit" else None

    def paint(self, label: int, mask: MaskPatch) -> None:
        """Paint the positive logits of a mask; NO_MASK paints nothing."""
        logits, rows, columns = mask
        if self.best is None:
            won = (logits > 0) & (self.labels[rows, columns] <= label)
        else:  # D5: the higher logit wins
            won = logits > self.best[rows, columns]  # `best` starts at 0, the threshold of a mask
            np.copyto(self.best[rows, columns], logits, where=won)
        np.copyto(self.labels[rows, columns], np.uint16(label), where=won)


# ---------------------------------------------------------------- a model by name


def load(
    model: str | Path, weights: Path | None = None, preset: str | None = None, engine: str = "torch",
    force: bool = False, settings: Sequence[str] = (), **options,
) -> Segmenter:  # fmt: skip
    """A model with its weights and preset, ready to segment.

    model: a name of MODELS, or a file: a checkpoint, or for openvino-int8 a folder NAME.static.
    weights: the file, if `model` is a name (default: the model's own).   engine, options: see `engine_options`.
    preset: a name of PRESETS (default: the file's, else "fixed").   settings: its fields to replace, "field=value".
    Raises InputError if weights are missing or of another architecture, if a package is missing, or if the weights were
    trained with another preset than the one asked for (unless `force`): their inputs would be prepared in another way.
    """

    def choose(path: Path, trained_with: str | None) -> Preset:
        was = trained_with
        if was not in (None, *PRESETS):
            raise InputError(f"{path}: names the preset {was!r}, which does not exist; give another checkpoint")
        if preset and was not in (None, preset) and not force:
            raise InputError(f"{path}: trained with preset {was}, not {preset}; leave out --preset, or add force=yes")
        return override(PRESETS[preset or trained_with or "fixed"], list(settings))

    module, _, function = ENGINES[engine_options([engine])[0]][0].partition(":")
    make = getattr(importlib.import_module(module), function)
    name, made, chosen = make(engine, *name_and_file(model, weights), choose, **options)
    return Segmenter(made, chosen, architecture(name).enhanced)


def engine_options(texts: Sequence[str]) -> tuple[str, dict]:
    """An engine's name and options as a command line has them, for `load`. InputError for what ENGINES does not have.

    >>> engine_options(["openvino", "precision=f32", "threads=2"])
    ('openvino', {'precision': 'f32', 'threads': 2})
    """
    (engine, *rest), options = texts, {}
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r}: unknown; choose one of {', '.join(ENGINES)}")
    known = ENGINES[engine][1]
    for text in rest:
        name, _, value = text.partition("=")
        kind = known.get(name, "")
        if not value or not {"DIR": True, "N": value.isdigit() and int(value)}.get(kind, value in kind.split("|")):
            takes = " ".join(f"{name}={kind}" for name, kind in known.items()) or "no options"
            raise InputError(f"engine {engine}: {text!r} is not understood; it takes {takes}")
        options[name] = {"DIR": Path, "N": int}.get(kind, str)(value)
    return engine, options


def name_and_file(model: str | Path, weights: Path | None = None) -> tuple[str | None, Path | None]:
    """What `load` is told of a model -> its name and its file, each None if it was not told."""
    return (None, Path(model)) if Path(model).suffix else (str(model), weights)


def file_of(model: str | Path, weights: Path | None = None) -> Path:
    """The file of a model: the one that was named, or the model's own."""
    name, path = name_and_file(model, weights)
    return path or architecture(name).weights()


def load_torch(engine: str, name: str | None, path: Path | None, choose: Callable) -> tuple:
    """Makes the engines torch and torch-int8. The latter quantizes a float checkpoint as the preset's weight_int8 says.

    Every maker of ENGINES takes these four, and its options. name, path: see `name_and_file`.
    choose: the file, and the preset that it was trained with -> the preset to use.
    Returns the name, what has the two calls of model.TorchEngine, and the preset."""
    if path and path.suffix == ".static":
        raise InputError(f"{path}: is an OpenVINO network; add --engine openvino-int8, or give a checkpoint")
    name, path, stored = read_model(path if name is None else name, path)
    file_int8 = checkpoints.int8_scales(stored, path)  # None for float weights
    if file_int8 and engine != "torch-int8":
        raise InputError(f"{path}: holds int8 weights; add --engine torch-int8, or give the float checkpoint")
    from model import TorchEngine  # here and below: so that this module loads without PyTorch
    from quantize import quantize_linear_layers

    network = build(name, checkpoints.kinds_of(stored))
    if file_int8:
        quantize_linear_layers(network, file_int8)
    preset = choose(path, checkpoints.load_weights(path, network, stored).get("preset"))
    if file_int8:
        preset = replace(preset, weight_int8=file_int8)
    elif engine == "torch-int8":
        quantize_linear_layers(network, preset.weight_int8)
    return name, TorchEngine(network), preset


def read_model(model: str | Path, weights: Path | None = None) -> tuple[str, Path, dict]:
    """What `load` is told of a model -> its name, its file and what that holds. A file belongs to the model that it
    names, else to the one whose layers have its names."""
    (name, _), path = name_and_file(model, weights), file_of(model, weights)
    stored = checkpoints.read_checkpoint(path)
    name = name or stored.get("architecture")
    if name is None:
        import torch

        layers, kinds = checkpoints.state_dict_of(stored).keys(), checkpoints.kinds_of(stored)
        with torch.device("meta"):  # layers without memory: only their names are needed
            name = next((one for one in MODELS if build(one, kinds).state_dict().keys() == layers), None)
    if name not in tuple(MODELS):
        raise InputError(f"{path}: belongs to none of the models {', '.join(MODELS)}; add a row to segment.MODELS")
    return name, path, checkpoints.with_mean_decoder(stored, FOLLOWED, FOLLOWED_OF, FOLLOWED_SHARE)


def architecture(model: str) -> Architecture:
    """A row of MODELS. InputError if there is none of this name."""
    if model not in MODELS:
        raise InputError(f"model {model!r}: unknown; choose one of {', '.join(MODELS)}, or give a checkpoint")
    return MODELS[model]


def build(model: str, kinds: tuple[str, ...] = ()):
    """The network of a model, model.BoxSegmenter, with random weights.   kinds: further ones of BOX_KINDS."""
    from model import BoxSegmenter

    row = architecture(model)
    return BoxSegmenter(getattr(importlib.import_module(row.module), row.encoder)(), kinds)
