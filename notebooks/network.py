"""Figure 1, and README's picture of the whole idea: a network as it is, seen while one image and one box go through.

README's picture is drawn by: python -m notebooks.network assets/idea.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from demo_data import real_cases
from enhance import three_channels
from figures import GRAY, PALETTE, overlay
from formats.writing import save_figure
from grid import boxes_from_labels, boxes_to_grid, resize_to_grid
from model import BoxSegmenter
from quantize import count_operations
from segment import load

PARTS = {  # boxes of Figure 1: title -> module of the proposed network, in the order in which data flow
    "stem": "image_encoder.backbone.stages.0",
    "stage 1, FusedMBConv": "image_encoder.backbone.stages.1",
    "stage 2, FusedMBConv": "image_encoder.backbone.stages.2",
    "stage 3, MBConv": "image_encoder.backbone.stages.3",
    "stage 4, EfficientViT": "image_encoder.backbone.stages.4",
    "neck": "image_encoder.neck",
    "norm": "image_encoder.norm",
    "whole image encoder": "image_encoder",
    "prompt encoder": "prompt_encoder",
    "two-way transformer": "mask_decoder.transformer",
    "upscaling": "mask_decoder.output_upscaling",
    "whole mask decoder": "mask_decoder",
}
SKIPS = (("stage 2, FusedMBConv", "neck"), ("stage 3, MBConv", "neck"))  # the neck takes three maps


def trace_parts(network: BoxSegmenter, parts: dict[str, str] = PARTS) -> list[dict]:
    """What Figure 1 shows, seen by hooks during one call, in the order of `parts`.   parts: {title: a module's name}.

    Each row: name, side (the network's module that it is in), inside (the part that holds it, or ""), parameters, output
    (shape of the first tensor that comes out, without its batch axis), multiply_adds. A part inside another counts in both.
    """
    modules, shapes = {title: network.get_submodule(name) for title, name in parts.items()}, {}

    def note(module, _, output) -> None:
        shapes[module] = tuple((output[0] if isinstance(output, tuple) else output).shape[1:])

    handles = [module.register_forward_hook(note) for module in modules.values()]
    found = count_operations(network)
    for handle in handles:
        handle.remove()
    return [
        {
            "name": title, "side": parts[title].split(".")[0],
            "inside": next((other for other, holder in parts.items() if parts[title].startswith(f"{holder}.")), ""),
            "parameters": sum(p.numel() for p in module.parameters()),
            "output": shapes[module], "multiply_adds": sum(found.get(parts[title], {}).values()),
        }
        for title, module in modules.items()
    ]  # fmt: skip


def figure1(rows: list[dict], ax, skips: Sequence[tuple[str, str]] = ()):
    """[P Fig. 1] The network as boxes: the image encoder from top to bottom, prompt encoder and mask decoder beside it.

    rows: of `trace_parts`, the image encoder's first; each is a box with its output's shape (C x H x W), its parameters
    and its multiply-adds. A row that others are inside is a frame round their boxes. skips: pairs of the image
    encoder's rows; the output of the first goes to the second as well.
    """
    colours = {"image_encoder": PALETTE[0], "prompt_encoder": PALETTE[5], "mask_decoder": PALETTE[1]}
    inputs = {"image_encoder": "image\n3 x 256 x 256", "prompt_encoder": "box\n4 numbers, x y x y"}
    holders = {row["inside"] for row in rows}
    boxes = [row for row in rows if row["name"] not in holders]
    left = [row for row in boxes if row["side"] == "image_encoder"]
    right = [row for row in boxes if row["side"] != "image_encoder"]
    height = len(left)
    places = {row["name"]: (0, height - 1 - i) for i, row in enumerate(left)}  # column, row from below
    places |= {row["name"]: (1, len(right) - 1 - i) for i, row in enumerate(right)}
    ends: dict[int, float] = {}  # where the last box of each column ends
    for column, side in enumerate(inputs):
        top = 1.1 + max((y for x, y in places.values() if x == column), default=-1)
        ax.text(column, top, inputs[side], ha="center", va="center", fontsize=10)
        ends[column] = top - 0.27
    frame = {"edgecolor": "0.4", "linewidth": 0.8}
    for row in [*(row for row in rows if row["name"] in holders), *boxes]:
        count, work = row["parameters"], row["multiply_adds"] / 1e9
        size = f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"
        text = f"{row['name']}\n{' x '.join(map(str, row['output']))}\n{size} parameters, {work:.2f} G"
        pale = 1 - 0.35 * (1 - colours[row["side"]] / 255)  # so that the text stays readable
        if row["name"] in holders:
            inner = [places[one["name"]] for one in boxes if one["inside"] == row["name"]]
            x, low, high = inner[0][0], min(y for _, y in inner) - 1.15, max(y for _, y in inner) + 0.45
            margin = 0.1 + 0.06 * len(skips) if skips and x == 0 else 0.02  # skips run inside the frame
            corner, width = (x - 0.46 - margin, low), 0.94 + margin
            ax.add_patch(Rectangle(corner, width, high - low, facecolor=(pale + 2) / 3, **frame))
            ax.text(x, low + 0.36, text, ha="center", va="center", fontsize=9, linespacing=1.15)
            continue
        x, y = places[row["name"]]
        ax.add_patch(Rectangle((x - 0.46, y - 0.37), 0.92, 0.74, facecolor=pale, **frame))
        ax.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.15)
        ax.annotate("", (x, y + 0.38), (x, ends[x]), arrowprops={"arrowstyle": "->"})
        ends[x] = y - 0.38
    decoder = [row["name"] for row in right if row["side"] == "mask_decoder"]
    if left and decoder:  # the embedding goes over to the decoder
        (x, y), (to_x, to_y) = places[left[-1]["name"]], places[decoder[0]]
        ax.annotate("", (to_x - 0.47, to_y), (x + 0.47, y), arrowprops={"arrowstyle": "->"})
    for i, (start, end) in enumerate(skips):
        y, to_y, x = places[start][1], places[end][1] + 0.15 - 0.25 * i, -0.54 - 0.06 * i
        ax.plot([-0.46, x, x], [y, y, to_y], color="black", linewidth=1, marker="")
        ax.annotate("", (-0.46, to_y), (x, to_y), arrowprops={"arrowstyle": "->", "shrinkA": 0})
    ax.set(xlim=(-0.6 - 0.06 * len(skips), 1.5), ylim=(-1.2 if holders - {""} else -0.5, height + 0.5))
    ax.axis("off")
    return ax


def draw_idea(path: Path) -> None:
    """[P Figs. 1, 2] The whole idea in six pictures from the box to the mask: an MR slice of the abdomen, one kidney.

    An embedding has 256 numbers for each cell. The three directions in which those vary most become red, green, blue.
    """
    case, segmenter = {case.name: case for case in real_cases()}["2DBox_MR_abdomen"], load("proposed")
    figure = Figure(figsize=(10, 6.4))
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.92, wspace=0.32, hspace=0.5)
    image, axes = case.image, figure.subplots(2, 3)
    boxes, nothing = boxes_from_labels(case.labels)[1][:1], np.zeros(image.shape, np.uint16)
    on_grid = boxes_to_grid(boxes, *image.shape)
    channels = three_channels(resize_to_grid(image), segmenter.preset)
    stack = np.concatenate([np.pad(channels[..., i], ((0, 8), (0, 0)), constant_values=255) for i in range(3)])
    embedding = segmenter.embed(image)  # (1, 256, 64, 64), padding at the right and below
    height, width = np.array(channels.shape[:2]) // 4
    cells = embedding[0, :, :height, :width].numpy().reshape(256, -1)
    varies = np.linalg.eigh(np.cov(cells))[1][:, -3:]  # (256, 3), the last varies most
    colours = (cells - cells.mean(axis=1, keepdims=True)).T @ varies
    low, high = np.percentile(colours, [2, 98], axis=0)
    colours = ((colours - low) / (high - low)).clip(0, 1).reshape(height, width, 3)
    tokens = segmenter.engine.network.prompt_encoder(embedding.new_tensor(on_grid))[0][0].detach()  # (2, 256)
    logits = segmenter.decode(embedding, on_grid)[0][0, : channels.shape[0], : channels.shape[1]]
    most = float(np.abs(logits).max())
    mask = segmenter.masks(embedding, boxes, image.shape).labels
    sharp, signed = {"interpolation": "nearest"}, {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
    shown = [
        ("image and box", overlay(image, nothing, boxes), {}),
        ("three channels: raw,\ndiffused, equalized", stack, GRAY),
        ("embedding: 256 numbers\nfor each of 64 x 64 cells", colours, sharp),
        ("box tokens: 256 numbers\nfor each of two corners", tokens, sharp | {"cmap": "cividis", "aspect": 60}),
        ("logits: where above 0 (red)\nthe pixel is the object's", logits, signed),
        ("mask", overlay(image, mask, boxes), {}),
    ]
    for ax, (title, picture, settings) in zip(axes.ravel(), shown, strict=True):
        ax.imshow(picture, **settings)
        ax.set_title(title, fontsize=13)
        ax.axis("off")
    figure.canvas.draw()  # else the panels are not yet where they will be
    image_at, channels_at, embedding_at, tokens_at, logits_at, mask_at = (ax.transAxes for ax in axes.ravel())
    below, above, left, right = (0.5, -0.03), (0.5, 1.38), (-0.03, 0.5), (1.03, 0.5)
    for start, end, (first, last), name in (
        (image_at, channels_at, (right, left), "enhance"),
        (channels_at, embedding_at, (right, left), "image\nencoder"),
        (image_at, tokens_at, (below, above), "    prompt encoder"),
        (embedding_at, logits_at, (below, (0.97, 1.32)), ""),
        (tokens_at, logits_at, (right, left), "mask\ndecoder"),
        (logits_at, mask_at, (right, left), "> 0"),
    ):
        axes[0, 0].annotate("", last, first, end, start, arrowprops={"arrowstyle": "-|>", "linewidth": 1.5})
        x, y = (start.transform(first) + end.transform(last)) / 2
        at = figure.transFigure.inverted().transform((x, y + 4 * ("encoder" not in name or "\n" in name)))
        where = {"ha": "left", "va": "center"} if first == below else {"ha": "center", "va": "bottom"}
        figure.text(*at, name, fontsize=12, **where)
    save_figure(path, figure)


if __name__ == "__main__":
    draw_idea(Path(sys.argv[1]))
