"""segment.py and volumes.py: label maps, overlaps, and what each 3D preset does, right and wrong."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_model import BrightModel

import segment
from formats import InputError
from formats.case import Case
from formats.checkpoints import lite_medsam_path, save_checkpoint
from formats.readers import read_case
from grid import NO_MASK, MaskPatch, boxes_from_labels, crop_to_box
from metrics import dsc
from presets import PRESETS, override
from segment import Canvas, Segmenter, engine_options, load
from volumes import box_of_previous, ellipsoid_depth, ellipsoid_section, segment_case, slice_box, with_prior

VALIDATION = os.environ.get("VALIDATION_CASES")  # a folder with 3D_MR_MSDHippocampus_114.npz, where one has it


def segmenter(preset="fixed", **settings):
    changed = override(PRESETS[preset], [f"{k}={v}" for k, v in settings.items()])
    return Segmenter(BrightModel(), changed, enhanced=False)


def case(image, labels):
    return Case("case", image, boxes_from_labels(labels)[1], labels, None, labels.ndim == 3)


def volume_of(labels, seed=0):
    """Bright objects on a dark ground with noise, uint8."""
    noise = np.random.default_rng(seed).normal(0, 6, labels.shape)
    return np.clip(40 + 160 * (labels > 0) + noise, 0, 255).astype(np.uint8)


def cylinder():
    """A cylinder of 14 slices along z, radius 15: nothing shrinks towards its ends."""
    z, y, x = np.mgrid[:18, :64, :64]
    return (((y - 30) ** 2 + (x - 34) ** 2 < 15**2) & (z >= 2) & (z < 16)).astype(np.uint16)


def touching_balls():
    """Two balls side by side that share a face; slices are 3 times as thick as pixels."""
    z, y, x = np.mgrid[:16, :64, :96]
    first = ((z - 7) * 3) ** 2 + (y - 30) ** 2 + (x - 30) ** 2 < 18**2
    second = ((z - 8) * 3) ** 2 + (y - 34) ** 2 + (x - 65) ** 2 < 17**2
    return (first + 2 * (second & ~first)).astype(np.uint16)


def scores(found, labels):
    return [dsc(found == i, labels == i) for i in np.unique(labels)[1:]]


def test_300_objects_get_300_labels_from_one_embedding():
    labels = np.zeros((400, 600), np.uint16)
    for i in range(300):
        y, x = divmod(i, 20)
        labels[5 + 26 * y : 17 + 26 * y, 5 + 29 * x : 19 + 29 * x] = i + 1
    one = segmenter()
    found = segment_case(one, case(np.where(labels > 0, 220, 20).astype(np.uint8), labels))
    assert found.dtype == np.uint16 and found.max() == 300
    assert np.mean(scores(found, labels)) > 0.9
    assert one.engine.encoded == 1 and one.engine.decoded == 300


def test_boxes_in_chunks_equal_boxes_one_by_one():
    labels = np.zeros((100, 256), np.uint16)
    for i in range(40):
        labels[10 + 40 * (i % 2) : 40 + 40 * (i % 2), 6 * i + 4 : 6 * i + 8] = i + 1
    image = np.where(labels > 0, 220, 20).astype(np.uint8)
    boxes = boxes_from_labels(labels)[1]
    together = segmenter().segment_image(image, boxes)
    for i, box in enumerate(boxes):
        alone = segmenter().segment_image(image, box[None])
        assert np.array_equal(together == i + 1, alone == 1)


def test_overlap_goes_to_the_last_object_or_to_the_higher_logit():
    sure = MaskPatch(np.full((4, 6), 5.0, np.float32), slice(0, 4), slice(0, 6))
    unsure = MaskPatch(np.full((4, 6), 1.0, np.float32), slice(0, 4), slice(3, 9))
    for overlap, want in (("last", [1, 1, 1, 2, 2, 2, 2, 2, 2]), ("logit", [1, 1, 1, 1, 1, 1, 2, 2, 2])):
        canvas = Canvas(np.zeros((4, 9), np.uint16), overlap)
        canvas.paint(1, sure)
        canvas.paint(2, unsure)
        canvas.paint(3, NO_MASK)
        assert canvas.labels[0].tolist() == want


@pytest.mark.parametrize("shape", [cylinder, touching_balls])
def test_fixed_is_right_on_a_cylinder_and_on_touching_objects(shape):
    labels = shape()
    one = segmenter()
    found = segment_case(one, case(volume_of(labels), labels))
    assert min(scores(found, labels)) > 0.9
    assert one.engine.encoded == np.count_nonzero(labels.any(axis=(1, 2))), "each slice is encoded once"
    assert not found[~labels.any(axis=(1, 2))].any(), "nothing outside the boxes' slices"


class Recorder(BrightModel):
    """Answers that the whole image is the object, with a stated predicted IoU, and remembers what it was asked."""

    def __init__(self, iou: float = 1.0) -> None:
        super().__init__()
        self.iou, self.asked, self.told = iou, [], []

    def decode(self, embedding, boxes, within=None, boxes_are="exact"):
        self.asked.append(boxes.copy())
        self.told += [boxes_are] * len(boxes)
        return np.full((len(boxes), 256, 256), 8.0, np.float32), np.full(len(boxes), self.iou, np.float32)


def test_fixed_keeps_every_mask_inside_its_box():
    labels = touching_balls()
    found = segment_case(Segmenter(Recorder(), PRESETS["fixed"], enhanced=False), case(volume_of(labels), labels))
    boxes = boxes_from_labels(labels)[1]
    for i, box in enumerate(boxes, start=1):
        z, y, x = np.nonzero(found == i)
        assert np.all([x.min(), y.min(), z.min()] >= box[:3]) and np.all([x.max(), y.max(), z.max()] <= box[3:])
    assert np.count_nonzero(found) > 0.9 * np.prod(boxes[0, 3:] - boxes[0, :3] + 1)


def test_fixed_walks_down_from_the_middle_again_not_from_the_top():
    # a cone with its tip on top: below the middle it is as wide as the prompt, which only the middle's mask can tell
    z, y, x = np.mgrid[:21, :80, :80]
    labels = ((y - 40) ** 2 + (x - 40) ** 2 < np.minimum(30, 58 - 2.8 * z) ** 2).astype(np.uint16)
    asked = []

    class Cone(BrightModel):
        def decode(self, embedding, boxes, within=None, boxes_are="exact"):
            asked.append(float(boxes[0, 2] - boxes[0, 0]) * 80 / 256)
            return super().decode(embedding, boxes)

    found = segment_case(Segmenter(Cone(), PRESETS["fixed"], enhanced=False), case(volume_of(labels), labels))
    assert len(asked) == 21 and asked[10] < 40, "slices 10 .. 20, up to the tip"
    assert min(asked[11:]) > 55, "slices 9 .. 0 keep the middle's width; the ellipsoid's section would shrink to 20"
    assert dsc(found == 1, labels == 1) > 0.9


def test_objects_that_share_slices_on_different_ways_keep_each_others_masks():
    labels = np.zeros((20, 40, 120), np.uint16)
    for i, (low, high) in enumerate(((0, 12), (4, 16), (8, 20))):  # middles 5, 9, 13: up for one, down for another
        labels[low:high, 8:32, 8 + 36 * i : 32 + 36 * i] = i + 1
    one = segmenter()
    found = segment_case(one, case(volume_of(labels), labels))
    for z in range(20):
        assert set(np.unique(found[z])) == set(np.unique(labels[z])), f"slice {z}"
    assert one.engine.encoded == 20


@pytest.mark.parametrize("preset", ["fixed", "paper"])
def test_few_kept_embeddings_cost_time_and_change_nothing(preset, monkeypatch):
    labels = np.zeros((20, 40, 120), np.uint16)
    for i, (low, high) in enumerate(((0, 12), (4, 16), (8, 20))):
        labels[low:high, 8:32, 8 + 36 * i : 32 + 36 * i] = i + 1
    many, few = segmenter(preset), segmenter(preset)
    want = segment_case(many, case(volume_of(labels), labels))
    monkeypatch.setattr("volumes.EMBEDDINGS_KEPT", 2)
    assert np.array_equal(segment_case(few, case(volume_of(labels), labels)), want)
    assert few.engine.encoded > many.engine.encoded == 20


def test_in_3d_too_the_last_object_or_the_surer_one_wins():
    boxes = np.array([[2.0, 2, 4, 30, 30, 16], [2, 2, 0, 30, 30, 10]])
    volume = np.full((20, 36, 36), 100, np.uint8)
    volume[:, 0, 0] = 0
    one = Case("case", volume, boxes, None, None, True)
    last = segment_case(Segmenter(Recorder(), override(PRESETS["fixed"], ["overlap=last"]), enhanced=False), one)
    assert (last[4:11, 10:22, 10:22] == 2).all() and (last[11:17, 10:22, 10:22] == 1).all()
    depth = np.full((256, 256), 0.5, np.float32)
    sure = with_prior(np.full((256, 256), 8.0, np.float32), 0.95, depth)
    unsure = with_prior(np.full((256, 256), -8.0, np.float32), 0.1, depth)
    assert (sure > unsure).all(), "the ellipsoid may not take from a sure answer"


def test_with_prior_and_ellipsoid_depth_by_hand():
    box = np.array([10.0, 20, 2, 29, 39, 6])  # centre (19.5, 29.5, 4), radii (10, 10, 2.5); image 100 high, 200 wide
    depth = ellipsoid_depth(box, 4, 100, 200)
    row, column = (29.5 + 0.5) / 200 * 256 - 0.5, (19.5 + 0.5) / 200 * 256 - 0.5  # of the centre, on the grid
    peak = np.unravel_index(depth.argmax(), depth.shape)
    assert peak == (pytest.approx(row, abs=0.6), pytest.approx(column, abs=0.6)) and depth.max() > 0.9
    inside = (depth > 0).sum() * (200 / 256) ** 2
    assert inside == pytest.approx(np.pi * 100, rel=0.03)
    logits, one = np.full((1, 1), 9.0, np.float32), np.full((1, 1), 0.25, np.float32)
    weight = 10 * 0.3**2  # PRIOR_WEIGHT 10, doubt 0.3
    assert with_prior(logits, 0.7, one)[0, 0] == pytest.approx(9 + weight * 0.25, rel=1e-5)


def test_box_of_previous_by_hand():
    mask = np.zeros((128, 64), np.uint16)
    mask[20:40, 10:30] = 300  # also a label that 8 bits cannot hold
    assert box_of_previous(mask).tolist() == [
        [20 - 3, 40 - 3, 59 + 3, 79 + 3]
    ]  # twice as large on the grid, grown by 3
    mask[:, -1] = 1
    assert box_of_previous(mask)[0, 2] == 127 + 3
    assert box_of_previous(np.zeros((8, 8), np.uint16)) is None and box_of_previous(None) is None


def test_released_forgets_to_round_a_box_on_the_way_down():
    volume, boxes = np.full((9, 50, 50), 100, np.uint8), np.array([[5, 7, 1, 30, 33, 7]])
    model = Recorder()
    model.decode = lambda e, b, within, boxes_are: (
        model.asked.append(b.copy()),
        (np.full((1, 256, 256), -8.0, np.float32), np.ones(1, np.float32)),
    )[1]
    one = Case("c", volume, boxes.astype(float), None, None, True)
    segment_case(Segmenter(model, PRESETS["released"], enhanced=False), one)
    exact = boxes[0, [0, 1, 3, 4]] * 256 / 50
    ups, downs = model.asked[:3], model.asked[3:]  # z = 4, 5, 6, then 3, 2
    assert len(downs) == 2 and all(np.array_equal(b[0], np.trunc(exact)) for b in ups)
    assert all(b[0] == pytest.approx(exact) for b in downs)


def test_the_middle_slice_is_asked_as_its_box_was_made_and_the_others_as_drawn():
    labels = touching_balls()
    one = Segmenter(Recorder(), PRESETS["fixed"], enhanced=False)
    segment_case(one, case(volume_of(labels), labels))
    objects = len(boxes_from_labels(labels)[0])
    assert one.engine.told.count("exact") == objects and set(one.engine.told) == {"exact", "drawn"}
    segment_case(one, replace(case(volume_of(labels), labels), boxes_are="drawn"))
    assert one.engine.told.count("exact") == objects, "none more: all of the second volume's boxes are drawn"


def test_one_embedding_serves_both_kinds_and_each_kind_has_its_decoder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    path = tmp_path / "two.pt"
    save_checkpoint(path, {"model": segment.build("proposed", ("drawn",)).state_dict()})
    one, encoded = load(path), []
    encoder = one.engine.network.image_encoder
    encoder.register_forward_hook(lambda *_: encoded.append(1))
    image, boxes = volume_of(cylinder()[4]), np.array([[10.0, 10, 50, 50]])
    embedding = one.embed(image)
    exact, drawn = (one.masks(embedding, boxes, image.shape, kind).iou for kind in ("exact", "drawn"))
    assert len(encoded) == 1 and exact != drawn
    assert exact == one.masks(embedding, boxes, image.shape).iou, "exact is what a box is taken for"
    monkeypatch.setitem(segment.BOX_KINDS, "by a detector", (0.5, 0.1))  # a fork's row, not yet trained
    assert exact == one.masks(embedding, boxes, image.shape, "by a detector").iou
    int8 = load(path, engine="torch-int8").engine.network
    layers = {name for name, layer in int8.named_modules() if type(layer).__name__ == "Int8Linear"}
    own = {name for name in layers if name.startswith("mask_decoder.")}
    for kind in ("drawn", "followed"):
        assert own and {name.replace("mask_decoder.", f"mask_decoders.{kind}.") for name in own} <= layers
    assert one.engine.kinds == ("exact", "drawn", "followed"), "the last was made when the file was read"
    weights = one.engine.network.state_dict()
    for name in [name for name in weights if name.startswith(("mask_decoder.", "prompt_encoder."))]:
        drawn, followed = (weights[name.replace(".", f"s.{kind}.", 1)] for kind in ("drawn", "followed"))
        assert torch.allclose(followed, 0.25 * weights[name] + 0.75 * drawn, atol=1e-6)
    one.engine.kinds = ("exact", "drawn")  # as in an int8 file of an earlier form
    assert one.kind_to_ask("followed") == "drawn" and one.kind_to_ask("exact") == "exact"


def test_a_kind_that_nobody_knows_is_refused_before_anything_is_asked():
    one = Segmenter(Recorder(), PRESETS["fixed"], enhanced=False)
    with pytest.raises(InputError, match="boxes 'loose': no such kind; choose one of exact, drawn"):
        one.segment_image(np.zeros((40, 50), np.uint8), np.array([[5, 5, 20, 20]]), "loose")
    assert not one.engine.asked


def test_fixed_falls_back_to_the_ellipsoid_when_the_network_is_unsure(monkeypatch):
    depth = ellipsoid_depth(np.array([20.0, 30, 2, 60, 90, 10]), 6, 256, 256)
    everywhere = np.full((256, 256), 3.0, np.float32)
    assert (with_prior(everywhere, 1.0, depth) > 0).all(), "a sure network is not overruled"
    unsure, more = (dsc(with_prior(everywhere, iou, depth) > 0, depth > 0) for iou in (0.0, 0.5))
    assert unsure > more, "the less sure, the nearer to the ellipsoid"
    monkeypatch.setattr("volumes.PRIOR_WEIGHT", 400.0)  # a heavy prior: nothing else is left
    assert dsc(with_prior(everywhere, 0.2, depth) > 0, depth > 0) > 0.97


def test_ellipsoid_section_by_hand():
    box = np.array([0.0, 0, 0, 9, 19, 4])  # centre (4.5, 9.5, 2), radii (5, 10, 2.5)
    assert ellipsoid_section(box, 2) == pytest.approx([-0.5, -0.5, 9.5, 19.5])
    assert ellipsoid_section(box, 0) == pytest.approx([4.5 - 3, 9.5 - 6, 4.5 + 3, 9.5 + 6])  # sqrt(1 - 0.8^2) = 0.6
    one_slice = np.array([3.0, 4, 7, 11, 12, 7])
    assert ellipsoid_section(one_slice, 7) == pytest.approx([2.5, 3.5, 11.5, 12.5])


def test_slice_box_lies_between_the_section_and_the_prompt():
    box = np.array([0.0, 0, 0, 100, 100, 20])
    assert slice_box(box, 10, None, 10).tolist() == [0, 0, 100, 100]
    section = ellipsoid_section(box, 18)
    assert np.array_equal(slice_box(box, 18, None, 10), section)
    assert np.array_equal(slice_box(box, 18, np.array([48.0, 48, 52, 52]), 10), section), "never smaller"
    assert slice_box(box, 18, np.array([-9.0, 1, 99, 130]), 10).tolist() == [0, 0, 100, 100], "never larger"
    assert slice_box(box, 18, np.array([10.0, 10, 80, 90]), 10).tolist() == [7, 7, 83, 93], "3 % wider than before"


def test_crop_to_box_is_inclusive():
    mask = MaskPatch(np.ones((20, 20), np.float32), slice(10, 30), slice(5, 25))
    values, rows, columns = crop_to_box(mask, np.array([0.0, 12, 9, 40]))
    assert (rows, columns, values.shape) == (slice(12, 30), slice(5, 10), (18, 5))
    assert crop_to_box(mask, np.array([30.0, 12, 40, 40])) is NO_MASK and crop_to_box(NO_MASK, np.zeros(4)) is NO_MASK


def test_released_never_visits_the_end_slices_and_mended_does():
    labels = cylinder()
    first, last = np.flatnonzero(labels.any(axis=(1, 2)))[[0, -1]]
    released, mended = (segment_case(segmenter(p), case(volume_of(labels), labels)) for p in ("released", "paper"))
    assert not released[[first, last]].any() and released[first + 1].any() and released[last - 1].any()
    assert mended[first].any() and mended[last].any()
    assert not mended[:first].any() and not mended[last + 1 :].any()


def test_released_follows_other_objects_and_mended_follows_its_own():
    # object 2 stands still behind object 1 in the list; its released boxes are those of object 1's masks
    labels = np.zeros((13, 64, 128), np.uint16)
    labels[1:12, 8:24, 30:60] = 1
    labels[1:12, 40:50, 70:110] = 2
    released, mended = (segment_case(segmenter(p), case(volume_of(labels), labels)) for p in ("released", "paper"))
    assert dsc(mended == 2, labels == 2) > 0.8
    assert dsc(released == 2, labels == 2) < 0.5, "its boxes come from object 1's masks (#40)"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_box_of_one_slice_and_a_volume_with_no_answer(preset):
    labels = np.zeros((5, 40, 40), np.uint16)
    labels[2, 10:30, 10:30] = 1
    found = segment_case(segmenter(preset), case(volume_of(labels), labels))
    assert found.shape == labels.shape and not found[[0, 1, 3, 4]].any()
    dark = Segmenter(BrightModel(threshold=2.0), PRESETS[preset], enhanced=False)  # no pixel is ever bright enough
    assert segment_case(dark, case(volume_of(labels), labels)).shape == labels.shape


@pytest.fixture(scope="module")
def lite_medsam():
    return load("baseline").engine


@pytest.mark.long
@pytest.mark.skipif(not VALIDATION, reason="set VALIDATION_CASES to the folder that holds the hippocampus volume")
def test_published_loops_equal_the_originals(lite_medsam):
    golden = np.load(Path(__file__).parent / "golden" / "lite_medsam_3d_golden.npz")
    hippocampus = read_case(Path(VALIDATION) / str(golden["case"]), boxes_from_masks=True)
    assert np.array_equal(hippocampus.boxes, golden["boxes"])
    embeddings = {}

    class Remembering(Segmenter):
        """Both presets give the baseline the same image: encode it once."""

        def embed(self, image):
            key = image.tobytes()
            if key not in embeddings:
                embeddings[key] = super().embed(image)
            return embeddings[key]

    for preset, key in (("released", "released_segs"), ("paper", "upstream_segs")):
        found = segment_case(Remembering(lite_medsam, PRESETS[preset], enhanced=False), hippocampus)
        assert (found != golden[key]).mean() <= 0.001


@pytest.mark.long
def test_lite_medsam_with_fixed_is_right_on_a_cylinder(lite_medsam):
    labels = np.pad(cylinder()[::2], ((0, 0), (16, 16), (16, 16)))  # 9 slices, to be quick
    one = case(volume_of(labels, seed=1), labels)
    found = segment_case(Segmenter(lite_medsam, PRESETS["fixed"], enhanced=False), one)
    assert dsc(found == 1, labels == 1) > 0.9  # the inscribed ellipsoid scores 0.79


# ---------------------------------------------------------------- by a name, and on the seam


def test_the_baseline_needs_no_preset_and_five_lines_segment_an_image(lite_medsam):
    segmenter = load("baseline")
    assert segmenter.preset.name == "fixed" and not segmenter.enhanced
    labels = np.zeros((80, 120), np.uint16)
    labels[20:60, 30:90] = 1
    image = volume_of(labels)
    embedding = segmenter.embed(image)
    found = segmenter.masks(embedding, boxes_from_labels(labels)[1], image.shape[:2])
    assert dsc(found.own(0), labels == 1) > 0.9 and np.array_equal(found.own(0), found.labels == 1)
    assert found.iou.shape == (1,) and 0.5 < found.iou[0] < 1.1


def test_a_new_encoder_is_one_class_and_one_row(monkeypatch, tmp_path):
    import sys
    import types

    class Patches(torch.nn.Module):
        """Each cell of the embedding is a projection of its 4x4 pixels."""

        def __init__(self):
            super().__init__()
            self.project = torch.nn.Conv2d(3, 256, 4, stride=4)

        def forward(self, image):
            return self.project(image)

    module = types.ModuleType("patches")
    module.Patches = Patches
    monkeypatch.setitem(sys.modules, "patches", module)
    path = tmp_path / "patches.pt"
    monkeypatch.setitem(segment.MODELS, "patches", segment.Architecture("patches", "Patches", lambda: path, True))
    save_checkpoint(path, {"model": segment.build("patches").state_dict(), "preset": "fixed"})
    for engine in ("torch", "torch-int8"):
        segmenter = load("patches", engine=engine)
        found = segmenter.segment_image(volume_of(cylinder()[4]), np.array([[10.0, 10, 50, 50]]))
        assert found.shape == (64, 64) and segmenter.enhanced


@pytest.mark.long
def test_eight_threads_on_one_segmenter_get_the_masks_that_one_gets(lite_medsam):
    # three objects apart: of masks that overlap, a thread's rounding would decide who gets a pixel
    labels = np.zeros((80, 120), np.uint16)
    labels[10:40, 5:35], labels[45:75, 45:75], labels[15:60, 85:115] = 1, 2, 3
    one, boxes = Segmenter(lite_medsam, PRESETS["fixed"], enhanced=False), boxes_from_labels(labels)[1]
    embeddings = [one.embed(np.roll(volume_of(labels), shift, axis=1)) for shift in (0, 20)]

    def masks(i):
        return one.masks(embeddings[i % 2], boxes[: 1 + i % 3], labels.shape).labels

    wanted = [masks(i) for i in range(6)]
    assert wanted[0].any() and not np.array_equal(wanted[0], wanted[3])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(masks, range(24)))
    assert all(np.array_equal(labels, wanted[i % 6]) for i, labels in enumerate(found))


def test_a_checkpoint_by_itself_tells_its_model(tmp_path, monkeypatch):
    found = load(lite_medsam_path())
    assert not found.enhanced and type(found.engine.network.image_encoder).__name__ == "TinyViT"
    proposed = {name: torch.zeros(0) for name in segment.build("proposed").state_dict()}
    path = tmp_path / "last.pt"

    def name_of(stored):
        save_checkpoint(path, stored)
        return segment.read_model(path)[0]

    assert name_of({"model": proposed, "step": 3}) == "proposed"
    assert name_of(proposed) == "proposed", "a bare state dict"
    assert name_of({"model": proposed, "architecture": "baseline"}) == "baseline"
    for stored in (proposed | {"more": torch.zeros(0)}, {"model": proposed, "architecture": "third"}, {"model": {}}):
        with pytest.raises(InputError, match=r"last\.pt: belongs to none of the models baseline, proposed") as error:
            name_of(stored)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"none\.pt: no such checkpoint"):
        load(tmp_path / "none.pt")
    with pytest.raises(InputError, match="'third': unknown; choose one of baseline, proposed, or give a checkpoint"):
        load("third")


def test_without_its_checkpoint_the_proposed_model_is_not_replaced_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr("formats.checkpoints.OUR_CHECKPOINT", tmp_path / "ours.pt")
    with pytest.raises(InputError, match=r"ours\.pt does not exist: .* or use --model baseline") as error:
        load("proposed")
    assert "\n" not in str(error.value)


def test_an_engine_and_its_options_as_a_command_line_has_them():
    assert engine_options(["torch"]) == ("torch", {})
    texts = ["openvino-int8", "precision=bf16", "cache=a=b", "threads=2"]
    assert engine_options(texts) == ("openvino-int8", {"precision": "bf16", "cache": Path("a=b"), "threads": 2})
    takes = r"it takes precision=auto\|f32\|bf16 cache=DIR threads=N$"
    for texts, message in (
        (["fast"], "engine 'fast': unknown; choose one of torch, torch-int8, openvino, openvino-int8$"),
        (["torch", "precision=f32"], "engine torch: 'precision=f32' is not understood; it takes no options$"),
        *((["openvino", text], f"engine openvino: '{text}' is not understood; {takes}")
          for text in ("precision=f64", "precision", "precision=", "threads=0", "threads=two", "cache=", "size=2")),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            engine_options(texts)
    with pytest.raises(InputError, match="'tensorrt': unknown; choose one of torch, torch-int8, openvino"):
        load("baseline", engine="tensorrt")


@pytest.mark.parametrize("bad", ["logits", "iou"])
@pytest.mark.parametrize("is_3d", [False, True])
def test_a_network_that_answers_with_nan_is_told_and_no_empty_mask(bad, is_3d):
    class Broken(BrightModel):
        def decode(self, *args, **kwargs):
            logits, iou = super().decode(*args, **kwargs)
            (logits if bad == "logits" else iou)[:] = np.nan
            return logits, iou

    labels = np.zeros((3, 40, 40)[1 - is_3d :], np.uint16)
    labels[..., 10:30, 10:30] = 1
    with pytest.raises(InputError, match="the network answers with NaN"):
        segment_case(Segmenter(Broken(), PRESETS["fixed"], enhanced=False), case(volume_of(labels), labels))
