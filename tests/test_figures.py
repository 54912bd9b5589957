"""figures.py: what is drawn is what was passed."""

import ast
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from torch import nn

import figures
from enhance import three_channels
from figures import YELLOW, busiest_slice, figure2, figure3, figure3_row, flat_view, overlay, plot_dice, plot_losses
from model import BoxSegmenter
from notebooks.network import PARTS, SKIPS, figure1, trace_parts
from presets import PRESETS
from segment import build


@pytest.mark.parametrize("side", [64, 100, 400, 512, 700])
def test_outlines_are_the_same_on_all_sides(side):
    labels = np.zeros((side, side), np.uint16)
    labels[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
    picture = overlay(np.full((side, side), 100, np.uint8), labels)
    assert picture.dtype == np.uint8 and max(picture.shape[:2]) >= 400
    assert np.array_equal(picture, picture[::-1]) and np.array_equal(picture, picture[:, ::-1])
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 3, "ground, tint and outline"


def test_boxes_are_yellow_lines_round_their_pixels():
    picture = overlay(
        np.zeros((512, 512, 3), np.uint8), np.zeros((512, 512), np.uint16), np.array([[100, 50, 200, 300]])
    )
    assert tuple(picture[50, 150]) == tuple(picture[300, 150]) == tuple(picture[150, 100]) == YELLOW
    assert not picture[170, 150].any()


def test_touching_objects_keep_an_outline_between_them():
    labels = np.ones((512, 512), np.uint16)
    labels[:, 256:] = 2
    picture = overlay(np.zeros((512, 512), np.uint8), labels)
    assert len(np.unique(picture[256], axis=0)) == 4, "two tints, two outlines"


def test_a_volume_shows_its_busiest_slice_and_the_boxes_that_cross_it():
    labels = np.zeros((5, 9, 9), np.uint16)
    labels[1, 2:4, 2:4] = 1
    labels[3, 2:4, 2:4], labels[3, 6:8, 6:8] = 1, 2
    boxes = np.array([[2, 2, 1, 3, 3, 3], [6, 6, 3, 7, 7, 3], [0, 0, 0, 1, 1, 2]])
    assert busiest_slice(labels) == 3
    image, plane, crossing = flat_view(np.arange(405).reshape(5, 9, 9), labels, boxes)
    assert image[0, 0] == 3 * 81 and plane.max() == 2 and crossing.tolist() == [[2, 2, 3, 3], [6, 6, 7, 7]]


def test_figure_2_draws_the_three_channels():
    image = np.random.default_rng(0).integers(0, 256, (256, 200), dtype=np.uint8)
    axes = Figure().subplots(1, 3)
    figure2(image, axes)
    drawn = [np.asarray(ax.images[0].get_array()) for ax in axes]
    assert np.array_equal(np.stack(drawn, axis=-1), three_channels(image, PRESETS["fixed"]))
    assert [ax.get_title() for ax in axes] == ["raw", "diffused", "equalized"]


def test_figure_3_draws_boxes_prediction_and_truth_of_a_case():
    rng = np.random.default_rng(0)
    image, segs, gts = rng.integers(0, 256, (3, 20, 30), dtype=np.uint8), *np.zeros((2, 3, 20, 30), np.uint16)
    segs[1, 2:9, 3:12], gts[1, 4:9, 5:12] = 1, 1
    boxes = np.array([[5, 4, 1, 11, 8, 1]])
    row = figure3_row("a", image, boxes, segs, gts)
    assert row[0] == "a, slice 1"
    axes = Figure().subplots(2, 3)
    assert figure3([row, figure3_row("b", image[1], boxes[:, [0, 1, 3, 4]], segs[1], gts[1])], axes) is axes
    flat = [overlay(image[1], labels, boxes[:, [0, 1, 3, 4]]) for labels in (0 * gts[1], segs[1], gts[1])]
    for line in axes:
        for ax, want in zip(line, flat, strict=True):
            assert np.array_equal(ax.images[0].get_array(), want)
    assert [ax.get_title() for ax in axes[:, 0]] == ["a, slice 1: box prompts", "b: box prompts"]
    assert [ax.get_title() for ax in axes[0, 1:]] == ["prediction", "reference"]


def test_curves_draw_the_numbers_that_were_passed():
    log = [{"step": 10, "validation_loss": 2.5}, {"step": 20, "validation_loss": 2}]
    lines = plot_losses(log, [(10, 3.0), (20, 1.0)]).lines
    assert [line.get_label() for line in lines[::2]] == ["training, each step", "validation"]
    assert [list(line.get_ydata()) for line in lines[::2]] == [[3, 1], [2.5, 2]]
    rows = [
        {"stage": "distill", "step": "5", "CT": "0.1", "US": "0.2"},
        {"stage": "finetune", "step": "3", "CT": "1", "US": "0.5"},
    ]
    ax = plot_dice(rows, Figure().subplots())
    ct, us, border = ax.lines
    assert list(ct.get_xdata()) == [5, 8] and list(us.get_ydata()) == [0.2, 0.5] and border.get_xdata()[0] == 5


def test_matplotlib_is_not_loaded_by_importing_the_module():
    for node in ast.parse(Path(figures.__file__).read_text(encoding="utf-8")).body:
        assert not (isinstance(node, ast.Import | ast.ImportFrom) and "matplotlib" in ast.unparse(node))


def test_figure_1_is_the_network_itself():
    network = BoxSegmenter(PatchEncoder()).eval()
    parts = {"patches": "image_encoder.conv", "prompt encoder": "prompt_encoder", "whole mask decoder": "mask_decoder"}
    rows = trace_parts(network, parts)
    first = rows[0]
    assert first["output"] == (256, 64, 64) and first["side"] == "image_encoder"
    assert first["parameters"] == 3 * 16 * 256 + 256 and first["multiply_adds"] == 3 * 16 * 256 * 64 * 64
    assert rows[1]["output"] == (2, 256) and rows[2]["output"] == (1, 256, 256)
    assert not network.image_encoder.conv._forward_hooks, "hooks are taken off again"
    ax = Figure().subplots()
    figure1(rows, ax)
    texts = [text.get_text() for text in ax.texts]
    assert any(t.startswith("patches\n256 x 64 x 64\n") for t in texts)
    assert sum("parameters" in t for t in texts) == len(ax.patches) == 3, "a box a row"


def test_the_parts_of_figure_1_are_all_of_the_encoder():
    rows = trace_parts(build("proposed").eval())
    encoder = [row for row in rows if row["inside"] == "whole image encoder"]
    assert {row["inside"] for row in rows} == {"", "whole image encoder", "whole mask decoder"}, "what is a frame"
    assert sum(row["parameters"] for row in encoder) == sum(
        p.numel() for p in build("proposed").image_encoder.parameters()
    )
    ax = Figure().subplots()
    figure1(rows, ax, skips=SKIPS)
    assert len(ax.patches) == len(rows) == len(PARTS)


class PatchEncoder(nn.Module):
    """The smallest encoder: one convolution. (B, 3, 256, 256) -> (B, 256, 64, 64)"""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 256, 4, stride=4)

    def forward(self, image):
        return self.conv(image)


def test_the_thick_line_of_a_training_curve_is_the_mean_of_the_last_steps():
    losses = [(step, float(step % 2)) for step in range(1, 41)]
    log = [{"step": 40, "train_loss": 0.5, "validation_loss": 0.7}]
    each, mean, validation = plot_losses(log, losses).lines
    assert each.get_ydata().tolist() == [loss for _, loss in losses] and validation.get_ydata().tolist() == [0.7]
    assert mean.get_label() == "training, mean of the last 4" and mean.get_ydata()[3:].tolist() == [0.5] * 37
    assert mean.get_ydata()[:3].tolist() == pytest.approx([1, 1 / 2, 2 / 3]), "fewer at first"


def test_numbers_stand_beside_objects_and_small_objects_get_thin_lines():
    image, labels = np.full((400, 600), 90, np.uint8), np.zeros((400, 600), np.uint16)
    labels[50:350, 50:350], labels[100:112, 500:512] = 1, 2
    plain, numbered = overlay(image, labels), overlay(image, labels, numbers=True)
    changed = (plain != numbered).any(axis=-1)
    assert changed[:, :400].any() and changed[:, 450:].any(), "each has its number"
    tint = overlay(image, labels)[200, 200]

    def edge(row, first):
        """Pixels of the outline along a row, from the object's left side on."""
        return next(
            i
            for i in range(50)
            if (plain[row, first + i] == plain[row, first + 25 if first < 400 else first + 5]).all()
        )

    assert (plain[200, 200] == tint).all() and edge(200, 50) == 3 and edge(105, 500) == 1
