"""recipe/: batches made on the device are data.py's, drawn evenly, augmented without losing objects; runs resume exactly."""

import numpy as np
import pytest
import torch
from fake_model import TinyNetwork

from data import CacheEntry, read_index, validation_item
from demo_data import tiny_cache
from formats import InputError
from formats.checkpoints import read_checkpoint
from grid import BOX_JITTER, JITTER_SHARE, LOOSE_SHARE, boxes_from_labels
from presets import PRESETS, override
from recipe import __main__ as recipe
from recipe import loop
from recipe.batches import MIN_AREA, ResidentSlices, boxes_of, draw_weights
from recipe.loop import boundary_loss, distillation_loss, one_cycle
from training import dice_loss

SCALED = override(PRESETS["fixed"], ["jitter=scaled"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("smoke") / "cache")


def resident(cache, augment, preset=SCALED, batch=6, objects=3):
    entries = [e for e in read_index(cache) if e.split == "train"]
    preset = override(preset, [f"objects={objects}"])
    return ResidentSlices(cache, entries, preset, batch, 0, torch.device("cpu"), augment), entries


def entry(modality, name, source):
    return CacheEntry(name, modality, modality, name, source, 64, 64, "train", 1)


def test_every_modality_data_set_file_and_slice_has_its_even_share():
    entries = [
        entry("CT", "3D_CT_A_1-000", "a1"), entry("CT", "3D_CT_A_1-001", "a1"), entry("CT", "3D_CT_A_2-000", "a2"),
        entry("CT", "2D_CT_B_1", "b1"), entry("US", "2D_US_C_1", "c1"), entry("US", "2D_US_C_2", "c2"),
    ]  # fmt: skip
    assert draw_weights(entries).tolist() == pytest.approx([1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 4, 1 / 4])


def test_without_augmentation_a_batch_holds_the_images_and_exact_masks_of_the_data_set(cache):
    slices, entries = resident(cache, augment=False)
    known = {e.name: {k: torch.from_numpy(v) for k, v in validation_item(cache, e, SCALED).items()} for e in entries}
    batch = slices.batch(5)
    for i in range(slices.size):
        item = next(v for v in known.values() if (v["image"].half().float() == batch["image"][i]).all())
        assert torch.equal(item["raw"].half().float(), batch["raw"][i])
        for mask in batch["masks"][i]:
            assert any(torch.equal(mask, true) for true in item["masks"])
    assert torch.equal(batch["boxes"], slices.batch(5)["boxes"])
    assert not torch.equal(batch["boxes"], slices.batch(6)["boxes"])


def test_augmentation_moves_masks_with_images_and_leaves_no_empty_one(cache):
    slices, _ = resident(cache, augment=True, preset=override(SCALED, ["equalize=nothing", "iterations=0"]))
    for step in range(8):
        batch = slices.batch(step)
        assert batch["image"].min() >= 0 and batch["image"].max() <= 1 and batch["image"].isfinite().all()
        assert batch["masks"].sum(dim=(2, 3)).min() >= MIN_AREA
        exact = boxes_of(batch["masks"] > 0)
        reach = (JITTER_SHARE * (exact[..., 2:] - exact[..., :2])).clamp(1, BOX_JITTER).repeat(1, 1, 2)
        assert ((batch["boxes"] - exact).abs() <= reach + 1e-4).all()


def test_a_warped_image_and_its_warped_label_still_cover_each_other(cache):
    slices, _ = resident(cache, augment=True)
    labels = torch.zeros(6, 256, 256, dtype=torch.long)
    labels[:, 90:150, 100:180] = 1
    image = (labels[:, None] > 0).float().expand(-1, 3, -1, -1)
    random = torch.Generator().manual_seed(3)
    warped, _, moved = slices.warp(image, image, labels, random)
    assert ((warped[:, 0] > 0.5) != (moved > 0)).float().mean() < 0.002
    assert (moved > 0).flatten(1).sum(dim=1).min() >= MIN_AREA and not torch.equal(moved, labels)


def test_objects_are_drawn_once_each_and_small_remains_only_if_nothing_else_is_left(cache):
    slices, _ = resident(cache, augment=False)
    slices.most, slices.size, slices.objects = 4, 2, 3
    labels = torch.zeros(2, 256, 256, dtype=torch.long)
    for label in (1, 2, 3):
        labels[0, 40 * label : 40 * label + 20, :50] = label
    labels[0, 0, 0] = 4  # one pixel
    labels[1, 0, :3] = 2  # the only one, and small
    chosen = slices.choose(labels, torch.Generator().manual_seed(0))
    assert sorted(chosen[0].tolist()) == [1, 2, 3] and chosen[1].tolist() == [2, 2, 2]


def test_boxes_on_the_device_are_the_boxes_of_the_readers():
    labels = np.zeros((256, 256), np.uint16)
    labels[3:9, 250:256], labels[100, 17] = 1, 2
    _, boxes = boxes_from_labels(labels)
    masks = torch.from_numpy(labels.astype(int))[None, None] == torch.tensor([1, 2])[None, :, None, None]
    assert boxes_of(masks)[0].tolist() == boxes.tolist()


def test_with_looseness_most_boxes_are_loose_and_the_others_move_as_before(cache):
    slices, _ = resident(cache, augment=False, preset=override(SCALED, ["looseness=0.3"]), batch=200)
    batch = slices.batch(0)
    exact = boxes_of(batch["masks"] > 0)
    outward = (batch["boxes"] - exact) * torch.tensor([-1, -1, 1, 1])
    sides = (exact[..., 2:] - exact[..., :2]).repeat(1, 1, 2)
    inside = ((batch["boxes"] > 0) & (batch["boxes"] < 255)).all(dim=2)  # not stopped by the border
    assert (outward[inside] <= 0.45 * sides[inside] + 1e-3).all()
    loose = (outward[inside] > (JITTER_SHARE * sides[inside]).clamp(1, BOX_JITTER)).any(dim=1).float().mean()
    assert 0.6 * LOOSE_SHARE < loose < LOOSE_SHARE


def test_shading_keeps_the_equalized_channel_of_gray_images_and_the_black_of_padding(cache):
    slices, _ = resident(cache, augment=True)
    image = torch.rand(6, 3, 256, 256)
    image[:, :, 200:] = 0
    gray = torch.tensor([True, True, True, False, False, False])
    shaded, _ = slices.shade(image, image, gray, torch.Generator().manual_seed(1))
    assert torch.equal(shaded[:3, 2], image[:3, 2]) and not torch.equal(shaded[3:, 2], image[3:, 2])
    assert not torch.equal(shaded[:3, 0], image[:3, 0]) and shaded[:, :, 200:].max() == 0


def test_a_preset_that_mirrors_by_itself_is_refused(cache):
    with pytest.raises(InputError, match="flips=off"):
        resident(cache, augment=False, preset=override(SCALED, ["flips=on"]))


# ---------------------------------------------------------------- the runs


@pytest.fixture
def tiny(monkeypatch):
    """Every run trains the stand-in."""

    def starting(model, preset, init, seed, device=None):
        torch.manual_seed(seed)
        return TinyNetwork(), "made for the test"

    monkeypatch.setattr(recipe, "starting_network", starting)


def run(stage, cache, out, steps, *more):
    plan = ["--steps", str(steps), "--batch", "2", "--set", "objects=2", "--validate-every", "2"]
    return recipe.main(["--stage", stage, "--cache", str(cache), "--out", str(out), *plan, *more])


def stop_and_resume(stage, cache, out, steps, *more):
    """The rate depends on how many steps there will be, so a run is stopped by the clock."""
    assert not run(stage, cache, out, steps, *more, "--minutes", "0")
    assert read_checkpoint(out / stage / "last.pt")["step"] == 1
    assert run(stage, cache, out, steps, *more, "--resume")


def assert_same_bits(folder, stage):
    whole, parts = (read_checkpoint(folder / name / stage / "last.pt") for name in ("whole", "parts"))
    for kind in ("model", "average"):
        assert all(torch.equal(whole[kind][name], parts[kind][name]) for name in whole[kind])
    assert (whole["step"], whole["best"], whole["log"]) == (parts["step"], parts["best"], parts["log"])


def test_a_resumed_run_ends_in_the_same_bits_and_exports_its_best_weights(cache, tiny, tmp_path):
    run("finetune", cache, tmp_path / "whole", 7)
    stop_and_resume("finetune", cache, tmp_path / "parts", 7)
    assert_same_bits(tmp_path, "finetune")
    exported = read_checkpoint(tmp_path / "whole" / "grays_anatomy_sam_l0.pt")
    assert "optimiser" not in exported and exported["model"]["mask_decoder.weight"].dtype == torch.float16


def test_the_run_for_loose_boxes_trains_what_it_names_and_starts_from_the_run_before(
    cache, tiny, tmp_path, monkeypatch
):
    started = []
    starting = recipe.starting_network
    monkeypatch.setattr(recipe, "starting_network", lambda *args: started.append(args[2]) or starting(*args))
    run("loosen", cache, tmp_path, 3)
    assert started == [tmp_path / "finetune" / "best.pt"]
    before, after = (
        starting("proposed", SCALED, None, 0)[0].state_dict(),
        read_checkpoint(tmp_path / "loosen" / "last.pt"),
    )
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after["model"][name])}
    assert changed == {"prompt_encoder", "mask_decoder"}, "neither the backbone nor the means of a norm"
    assert after["preset_fields"]["looseness"] == 0.3


def test_one_cycle_rises_and_falls():
    rates = [one_cycle(step, 100, 1.0) for step in range(100)]
    assert rates.index(max(rates)) in (4, 5) and max(rates) == pytest.approx(1.0) and rates[-1] < 0.01
    assert rates[0] == pytest.approx(0.2)


def test_a_finetuning_without_a_distillation_before_it_says_what_is_missing(cache, tmp_path):
    with pytest.raises(SystemExit, match=r"recipe: .*distill/best\.pt: no such checkpoint"):
        run("finetune", cache, tmp_path, 1)


@pytest.mark.long
def test_smoke_makes_all_runs_with_the_real_networks():
    assert recipe.main(["--smoke"])


def test_a_distillation_resumes_in_the_same_bits_and_leaves_the_decoder_as_it_is(cache, tiny, tmp_path, monkeypatch):
    encoder = torch.nn.Conv2d(3, 8, 5, stride=4, padding=2)
    monkeypatch.setattr(loop, "teacher_encoder", lambda: encoder)
    run("distill", cache, tmp_path / "whole", 5)
    stop_and_resume("distill", cache, tmp_path / "parts", 5)
    assert_same_bits(tmp_path, "distill")
    before = recipe.starting_network("proposed", SCALED, None, 0)[0].state_dict()
    after = read_checkpoint(tmp_path / "whole" / "distill" / "last.pt")["model"]
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"image_encoder", "bn"}


def test_a_run_that_is_given_several_starts_says_so(cache, tiny, tmp_path):
    with pytest.raises(SystemExit, match="recipe: --init: a run starts from one checkpoint"):
        run("finetune", cache, tmp_path, 1, "--init", "a.pt", "b.pt")


def test_the_recipe_is_not_started_twice_by_torchrun(cache, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="one process; start it without torchrun"):
        run("finetune", cache, tmp_path, 1)


# ---------------------------------------------------------------- losses


def test_the_distillation_loss_is_0_for_the_teachers_answer_and_1_for_its_mean_value():
    teacher = torch.randn(2, 8, 4, 4)
    assert distillation_loss(teacher, teacher).item() == 0
    assert distillation_loss(teacher.mean().expand_as(teacher), teacher).item() == pytest.approx(1, abs=0.02)


def test_the_boundary_loss_sees_the_contour_alone_and_small_objects_as_well_as_large_ones():
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, 0, 20:50, 20:50], masks[1, 0, 10:14, 10:14] = 1, 1
    right = 20 * (2 * masks - 1)
    assert boundary_loss(right, masks).item() < 1e-6
    far = right.clone()
    far[:, :, 60:, 60:] = 20  # wrong, but far from both contours
    assert boundary_loss(far, masks).item() < 1e-6 and dice_loss(far, masks).item() > 0.01
    assert boundary_loss(-right, masks).item() == pytest.approx(20, abs=1e-3)
    one_wrong = torch.stack([right[0], -right[1]])
    assert boundary_loss(one_wrong, masks).item() == pytest.approx(10, abs=1e-3), "each object counts the same"
    assert boundary_loss(right[:1] * 0 - 20, masks[:1] * 0).item() == 0, "no contour, no loss"


# ---------------------------------------------------------------- averaged weights


def test_an_average_lies_between_its_checkpoints_and_the_donor_counts_only_where_it_has_weights(tmp_path, monkeypatch):
    torch.manual_seed(0)
    ours, theirs, donor = (TinyNetwork().state_dict() for _ in range(3))
    for name, state in (("a.pt", ours), ("b.pt", theirs), ("lite_medsam", donor)):
        torch.save({"model": state, "preset": "fixed", "step": 7}, tmp_path / name)
    monkeypatch.setattr(loop, "build", lambda model: TinyNetwork())
    monkeypatch.setattr(loop, "lite_medsam_path", lambda: tmp_path / "lite_medsam")
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    assert recipe.main(
        ["--stage", "average", "--init", f"{a}=1", f"{b}=2", "lite_medsam=1", "--out", str(tmp_path / "out")]
    )
    found = read_checkpoint(tmp_path / "out" / "grays_anatomy_sam_l0.pt")
    assert found["preset"] == "fixed" and found["step"] == 7
    name, shared = "image_encoder.weight", "mask_decoder.weight"
    assert found["model"][name] == pytest.approx((ours[name] + 2 * theirs[name]) / 3, abs=1e-3)
    assert found["model"][shared] == pytest.approx((ours[shared] + 2 * theirs[shared] + donor[shared]) / 4, abs=1e-3)
    assert found["model"][name].dtype == torch.float16


@pytest.mark.parametrize("shares, words", [(["a.pt"], "CHECKPOINT=SHARE"), (["a.pt=-1"], "above 0"), (["lite_medsam=1"], "image encoder of ours"), (["none.pt=1"], "no such checkpoint")])  # fmt: skip
def test_shares_that_cannot_be_used_are_told(shares, words, tmp_path):
    with pytest.raises(SystemExit, match=words):
        recipe.main(["--stage", "average", "--init", *shares, "--out", str(tmp_path)])
