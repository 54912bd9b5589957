"""Box-prompted segmentation of a case, 2D or 3D: images and boxes in, a label map out. [P 2.2, 4.3]

Each image or slice is encoded once, whatever the number of objects; boxes are decoded in chunks, only where their masks
can be. Box i (0-based) paints label i + 1, uint16. What a preset changes here: how boxes are rounded, how far from its box a
mask may be, which object wins a pixel that two masks claim, and how a 3D box becomes a box on each slice (volumes.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import openvino_engine
import volumes
from baseline import build_baseline
from data import boxes_to_grid, crop_to_box, grid_pixels_for, logits_to_original, network_input, reach_of
from fast_decoder import FastModel
from fused import fused
from model import BoxSegmenter, build_model
from presets import PRESETS, Preset, override
from quantize import int8_scales, quantize_linear_layers
from readers import Case, InputError
from weights import default_weights, load_weights, read_checkpoint

MODELS = ("baseline", "proposed")
# What runs the network: PyTorch in float32, or with linear layers in dynamic int8 (quantize.py); OpenVINO in float32, or
# with the encoder in static int8 (openvino_engine.py)
ENGINES = ("torch", "torch-int8", "openvino", "openvino-int8")
# Boxes in one decoder call: bounds the memory, whatever the number of boxes. 6 are 24 MB of maps, which find the processor's
# caches; their tokens share one pass over the weights. As many as the organs that the challenge asks for in a CT.
BOX_CHUNK = 6


class Segmenter:
    """A model, a preset, and the time spent in each stage.

    model: anything with `image_encoder(images (B, 3, 256, 256)) -> (B, 256, 64, 64)` and
    `decode(embedding, boxes (N, 4)) -> (logits (N, 1, 256, 256), iou (N, 1))`: the seam for other engines. A FastModel
    (fast_decoder.py) has any engine's encoder.
    enhanced: True if the model was trained on the three channels, False for raw images (the baseline).
    """

    def __init__(self, model: BoxSegmenter, preset: Preset, enhanced: bool) -> None:
        self.model, self.preset, self.enhanced = model.eval(), preset, enhanced
        self.box_chunk = BOX_CHUNK
        self.seconds: dict[str, float] = defaultdict(float)  # stage -> seconds, summed over all cases so far

    def segment(self, case: Case) -> np.ndarray:
        """Label map of a case: (H, W) or (D, H, W) uint16, original frame, object i + 1 for box i, 0 background."""
        if not case.is_3d:
            return self.segment_image(case.image, case.boxes)
        if self.preset.propagation == "prompted":
            return volumes.prompted(self, case.image, case.boxes)
        return volumes.published_loop(self, case.image, case.boxes, mended=self.preset.propagation == "mended")

    def segment_image(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """image (H, W) or (H, W, 3) uint8; boxes (N, 4), original pixels -> (H, W) uint16."""
        height, width = image.shape[:2]
        canvas = self.new_canvas((height, width), len(boxes))
        embedding = self.embed(image)
        limited = self.preset.reach == "box"
        reach = reach_of(boxes, height, width)
        for first in range(0, len(boxes), self.box_chunk):
            chunk = slice(first, first + self.box_chunk)
            within = grid_pixels_for(reach[chunk], height, width) if limited else None
            asked = boxes_to_grid(boxes[chunk], height, width, self.preset.box_rounding)
            logits, _ = self.decode(embedding, asked, within)
            with self.stage("upsample"):
                for i, one in enumerate(logits, start=first):
                    mask = logits_to_original(one, height, width)
                    canvas.paint(i + 1, crop_to_box(mask, reach[i]) if limited else mask)
        return canvas.labels

    def new_canvas(self, shape: tuple[int, int], objects: int) -> Canvas:
        """An empty label map (H, W) on which this preset's overlap rule holds; one object needs none, nor its memory."""
        return Canvas(shape, self.preset.overlap if objects > 1 else "last")

    def embed(self, image: np.ndarray) -> torch.Tensor:
        """One image or slice, original frame -> its embedding (1, 256, 64, 64).

        Slices are not batched: on 2 cores a slice takes 202, 224, 261, 301 ms in batches of 1, 2, 4, 8 (the baseline 1.30,
        1.45, 1.36, 1.91 s), because larger maps leave the processor's caches.
        """
        with self.stage("enhance"):
            tensor = torch.from_numpy(network_input(image, self.preset, self.enhanced)).unsqueeze(0)
        with self.stage("encode"), torch.inference_mode():
            return self.model.image_encoder(tensor)

    def decode(
        self, embedding: torch.Tensor, boxes: np.ndarray, within: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, 4) on the grid -> logits (N, 256, 256) on the grid, predicted IoU (N,), float32. Keep N small.

        within: (N, 4) x0 y0 x1 y1 on the grid, outside of which the caller does not use the logits.
        """
        with self.stage("decode"), torch.inference_mode():
            prompts = [torch.as_tensor(boxes, dtype=torch.float32)]
            if within is not None and isinstance(self.model, FastModel):  # the others decode all of the grid
                prompts.append(torch.as_tensor(within))
            logits, iou = self.model.decode(embedding, *prompts)
            return logits[:, 0].numpy(), iou[:, 0].numpy()

    @contextmanager
    def stage(self, name: str):
        """Adds the time spent inside to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class Canvas:
    """A label map that objects are painted on, one after another.

    overlap "last": a later object covers an earlier one, so that the result depends on the order of the boxes.
    overlap "logit": the object whose logit is higher keeps the pixel, whatever the order.
    """

    def __init__(self, shape: tuple[int, int], overlap: str) -> None:
        self.labels = np.zeros(shape, dtype=np.uint16)
        self.best = np.zeros(shape, dtype=np.float32) if overlap == "logit" else None

    def paint(self, label: int, mask: tuple[np.ndarray, slice, slice] | None) -> None:
        """mask: (logits (r, c), rows, columns) as `logits_to_original` returns it; None paints nothing."""
        if mask is None:
            return
        logits, rows, columns = mask
        if self.best is None:  # by number, not by time: in 3D an earlier object may be painted later
            won = (logits > 0) & (self.labels[rows, columns] <= label)
        else:
            won = logits > self.best[rows, columns]  # `best` starts at 0, the threshold of a mask
            np.copyto(self.best[rows, columns], logits, where=won)
        np.copyto(self.labels[rows, columns], np.uint16(label), where=won)


def load_segmenter(
    model: str,
    weights: Path | None = None,
    preset: str | None = None,
    engine: str = "torch",
    force: bool = False,
    settings: Sequence[str] = (),
    engine_cache: Path | None = None,
    plain: bool = False,
) -> Segmenter:
    """A model by name with its weights and preset, ready to segment.

    model: "baseline" (LiteMedSAM; its published weights by default) or "proposed" (by default the checkpoint that lies
    beside the code).
    preset: a name of PRESETS; by default the one that the checkpoint carries, else "fixed".   settings: its fields to
    replace, as "field=value".
    engine: "torch"; "torch-int8": linear layers in dynamic int8, of a float checkpoint as the preset's weight_int8
    says, or of a NAME.dynamic.pt as the file says; "openvino": the same float weights; "openvino-int8": a
    NAME.static.xml.   engine_cache: folder in which OpenVINO's engines keep their graphs (default: the user's cache).
    plain: PyTorch's engines run the network as the checkpoint has it, to quantize or compare it; else its batch norms
    are folded away (fused.py), and `torch` decodes by fast_decoder.py.
    Raises InputError if weights are missing or of another architecture, or if the checkpoint was trained with
    another preset than the one asked for (unless `force`): its images would not be those it learnt from.
    """
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r}: unknown; choose one of {', '.join(ENGINES)}")
    file_int8 = None
    if engine == "openvino-int8":
        path = weights or openvino_engine.default_static(model)
        network, stored = openvino_engine.load_static(path, model, engine_cache)
    else:
        path = weights or default_weights(model)
        network, stored, file_int8 = torch_network(model, path, engine)
    chosen = chosen_preset(path, preset, stored.get("preset"), force, settings)
    if file_int8:
        chosen = replace(chosen, weight_int8=file_int8)
    elif engine == "torch-int8":
        quantize_linear_layers(network, chosen.weight_int8)
    elif engine == "openvino":
        network = openvino_engine.converted(network, path, engine_cache)
    if engine in ("torch", "torch-int8") and not plain:
        network = fused(network)
    if engine == "torch" and not plain:
        network = FastModel(network.image_encoder, network)
    return Segmenter(network, chosen, enhanced=model == "proposed")


def torch_network(model: str, path: Path, engine: str) -> tuple[BoxSegmenter, dict, str | None]:
    """The PyTorch network of a checkpoint, what else the checkpoint holds, and how its int8 weights are scaled, if any."""
    if path.suffix == ".xml":
        raise InputError(f"{path}: is an OpenVINO network; add --engine openvino-int8, or give a checkpoint")
    network = build_baseline() if model == "baseline" else build_model()
    stored = read_checkpoint(path)
    if file_int8 := int8_scales(stored, path):  # None for float weights
        if engine != "torch-int8":
            raise InputError(f"{path}: holds int8 weights; add --engine torch-int8, or give the float checkpoint")
        quantize_linear_layers(network, file_int8)
    return network, load_weights(path, network, stored), file_int8


def chosen_preset(
    path: Path, preset: str | None, trained_with: str | None, force: bool, settings: Sequence[str]
) -> Preset:
    """The preset that was asked for, else the one that the checkpoint `path` was trained with, else "fixed"."""
    if trained_with is not None and trained_with not in tuple(PRESETS):
        raise InputError(f"{path}: names the preset {trained_with!r}, which does not exist; give another checkpoint")
    if preset and trained_with and preset != trained_with and not force:
        raise InputError(
            f"{path}: trained with preset {trained_with}, not {preset}; leave out --preset, or add --force"
        )
    return override(PRESETS[preset or trained_with or "fixed"], list(settings))
