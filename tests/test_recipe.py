"""recipe/: batches made on the device are data.py's, drawn evenly, augmented without losing objects; runs resume exactly."""

import io
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from fake_model import TinyNetwork

import training
from data import CacheEntry, encode_runs, read_index, save_mask, validation_item
from demo_data import tiny_cache
from formats import InputError
from formats.checkpoints import read_checkpoint, save_checkpoint
from grid import BOX_JITTER, GRID, JITTER_SHARE, boxes_from_labels
from presets import PRESETS, override
from recipe import __main__ as recipe
from recipe import loop, own_masks, pack
from recipe.batches import MIN_AREA, OWN_SHARE, ResidentSlices, boxes_of, draw_weights
from recipe.loop import distillation_loss, one_cycle
from segment import BOX_KINDS, build
from training import starting_network

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


def test_most_drawn_boxes_are_loose_and_the_others_move_as_exact_ones(cache):
    slices, _ = resident(cache, augment=False, batch=200)
    share, looseness = BOX_KINDS["drawn"]
    batch, exact_batch = slices.batch(0, "drawn"), slices.batch(0)
    assert torch.equal(batch["masks"], exact_batch["masks"]) and not torch.equal(batch["boxes"], exact_batch["boxes"])
    exact = boxes_of(batch["masks"] > 0)
    outward = (batch["boxes"] - exact) * torch.tensor([-1, -1, 1, 1])
    sides = (exact[..., 2:] - exact[..., :2]).repeat(1, 1, 2)
    inside = ((batch["boxes"] > 0) & (batch["boxes"] < 255)).all(dim=2)  # not stopped by the border
    assert (outward[inside] <= 1.5 * looseness * sides[inside] + 1e-3).all()
    loose = (outward[inside] > (JITTER_SHARE * sides[inside]).clamp(1, BOX_JITTER)).any(dim=1).float().mean()
    assert 0.6 * share < loose < share


def test_some_images_have_the_teachers_own_masks_for_labels(cache, monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    entries = [e for e in read_index(folder) if e.split == "train"]
    labels = np.zeros((GRID, GRID), np.uint16)
    labels[40:90, 50:120] = 1
    save_mask(own_masks.own_path(folder, entries[0]), encode_runs(labels), labels.shape)
    slices = ResidentSlices(
        folder, entries, override(SCALED, ["objects=1"]), 400, 0, torch.device("cpu"), augment=False
    )
    own = (slices.batch(0)["masks"][:, 0].numpy() == labels).all(axis=(1, 2)).mean()
    assert abs(own - OWN_SHARE) < 0.08


def test_the_teachers_mask_is_kept_if_it_is_sure_and_its_exact_box_gives_it_back():
    class Discs:
        """An engine that knows one disc at the middle: whatever box holds its centre gets the disc, surely or not."""

        sure = 0.95

        def encode(self, image):
            return image

        def decode(self, embedding, boxes):
            y, x = np.mgrid[:256, :256]
            disc = (x - 128) ** 2 + (y - 128) ** 2 < 30**2
            holds = ((boxes[:, :2] < 128) & (boxes[:, 2:] > 128)).all(axis=1)
            return np.where(disc & holds[:, None, None], 5.0, -5.0), np.full(len(boxes), self.sure)

    teacher, raw = Discs(), np.zeros((3, GRID, GRID), np.float32)
    labels = own_masks.own_masks(teacher, raw, (GRID, GRID), np.random.default_rng(0))
    assert labels.max() == 1 and abs(np.count_nonzero(labels) / (np.pi * 30**2) - 1) < 0.02, "once, not once a box"
    teacher.sure = 0.82  # enough for the first answer, not for the second
    assert not own_masks.own_masks(teacher, raw, (GRID, GRID), np.random.default_rng(0)).any()


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

    def starting(model, preset, init, seed, device=None, kinds=()):
        torch.manual_seed(seed)
        return TinyNetwork(), "made for the test"

    monkeypatch.setattr(training, "SAVE_EVERY", 1)

    monkeypatch.setattr(recipe, "starting_network", starting)


def run(stage, cache, out, steps, *more):
    plan = ["--steps", str(steps), "--batch", "2", "--set", "objects=2", "--validate-every", "2"]
    recipe.main(["--stage", stage, "--cache", str(cache), "--out", str(out), *plan, *more])


def stop_and_resume(stage, cache, out, steps, monkeypatch):
    """The rate depends on how many steps there will be, so a run is stopped from outside."""
    train_step = loop.StageRun.train_step

    def stopped(self, *batch):
        if self.step == 3:
            raise KeyboardInterrupt
        train_step(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.StageRun, "train_step", stopped)
        run(stage, cache, out, steps)
    assert read_checkpoint(out / stage / "last.pt")["step"] == 3
    run(stage, cache, out, steps, "--resume")


def assert_same_bits(folder, stage):
    whole, parts = (read_checkpoint(folder / name / stage / "last.pt") for name in ("whole", "parts"))
    for kind in ("model", "average"):
        assert all(torch.equal(whole[kind][name], parts[kind][name]) for name in whole[kind])
    assert (whole["step"], whole["best"], whole["log"]) == (parts["step"], parts["best"], parts["log"])


def test_a_resumed_run_ends_in_the_same_bits_and_exports_its_best_weights(cache, tiny, tmp_path, monkeypatch):
    run("both", cache, tmp_path / "whole", 7)
    stop_and_resume("both", cache, tmp_path / "parts", 7, monkeypatch)
    assert_same_bits(tmp_path, "both")
    exported = read_checkpoint(tmp_path / "whole" / "grays_anatomy_sam_l0.pt")
    assert "optimiser" not in exported and exported["model"]["mask_decoder.weight"].dtype == torch.float16


def test_a_decoders_run_trains_it_alone_and_starts_from_the_run_before(cache, tiny, tmp_path, monkeypatch):
    started, asked = [], []
    starting, decode = recipe.starting_network, TinyNetwork.decode
    monkeypatch.setattr(recipe, "starting_network", lambda *args: started.append(args[2]) or starting(*args))
    monkeypatch.setattr(
        TinyNetwork, "decode", lambda *args, boxes_are: asked.append(boxes_are) or decode(*args, boxes_are=boxes_are)
    )
    run("exact", cache, tmp_path, 3)
    assert started == [tmp_path / "both" / "best.pt"] and set(asked) == {"exact"}
    before = starting("proposed", SCALED, None, 0)[0].state_dict()
    after = read_checkpoint(tmp_path / "exact" / "last.pt")["model"]
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"prompt_encoder", "mask_decoder"}, "neither the backbone nor the means of a norm"
    asked.clear()
    run("both", cache, tmp_path / "both kinds", 2, "--init", str(tmp_path / "exact" / "best.pt"))
    assert set(asked) == {"exact", "drawn"}, "in turn"


def test_small_batches_leave_the_means_of_norms_alone_and_all_weights_learn(cache, tmp_path):
    stage = loop.RecipeStage("both", 1, 1e-3, 1, ("exact", "drawn"), 1.0, batch=1)
    network = build("proposed", ("drawn",))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run = loop.StageRun(stage, SCALED, network, torch.device("cpu"), {}, False)
    slices, _ = resident(cache, augment=False, batch=1, objects=1)
    for step in range(2):
        run.train_step(slices.batch(step, run.kind()), 0.5)
    changed = [name for name, value in network.state_dict().items() if not before[name].equal(value)]
    parts = {name.split(".")[0] for name in changed}
    assert parts == {"image_encoder", "mask_decoder", "mask_decoders", "prompt_encoder", "prompt_encoders"}
    assert {f"image_encoder.{part}" for part in ("backbone", "neck")} <= {".".join(n.split(".")[:2]) for n in changed}
    assert not any("running" in name for name in changed)


def test_minutes_end_every_run_with_a_checkpoint(cache, tiny, tmp_path):
    plan = ["--steps", "1000", "--batch", "2", "--set", "objects=2", "--minutes", "0.05"]
    stages = ["--stage", "both", "exact", "--init", str(tmp_path / "start.pt")]
    recipe.main([*stages, "--cache", str(cache), "--out", str(tmp_path / "out"), *plan])
    for stage in ("both", "exact"):
        assert 0 <= read_checkpoint(tmp_path / "out" / stage / "best.pt")["step"] < 1000
    assert (tmp_path / "out" / "grays_anatomy_sam_l0.pt").is_file()


def test_another_kinds_decoder_starts_as_a_copy_and_step_2_leaves_it_out(tmp_path):
    network, _ = starting_network("proposed", PRESETS["fixed"], None, 0, kinds=("drawn",))
    state = network.state_dict()
    names = [name for name in state if name.startswith("mask_decoder.")]
    assert all(torch.equal(state[name], state[name.replace("decoder.", "decoders.drawn.", 1)]) for name in names)
    state["mask_decoders.drawn.iou_token.weight"] += 1
    save_checkpoint(tmp_path / "two.pt", {"model": state, "preset": "fixed"})
    again, told = starting_network("proposed", PRESETS["fixed"], tmp_path / "two.pt", 0, kinds=("drawn",))
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items()) and "all weights" in told
    one, told = starting_network("proposed", PRESETS["fixed"], tmp_path / "two.pt", 0)
    assert not one.mask_decoders and "all weights" in told


def test_the_pieces_hold_all_that_training_needs_and_each_fits(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "PIECE", 20_000_000)
    network, _ = starting_network("proposed", PRESETS["fixed"], None, 0, kinds=("drawn",))
    save_checkpoint(tmp_path / "a.pt", {"model": network.state_dict(), "preset": "fixed"})
    names = pack.write_pack(tmp_path / "pack", cache, tmp_path / "a.pt")
    pieces = [(tmp_path / "pack" / name).read_bytes() for name in names]
    assert len(names) > 3 and all(len(piece) <= 20e6 for piece in pieces) and names == sorted(names)
    there = tmp_path / "there"
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as archive:
        archive.extractall(there, filter="data")
    again, told = starting_network("proposed", PRESETS["fixed"], there / "start.pt", 0, kinds=("drawn",))
    assert "all weights" in told
    pairs = zip(again.state_dict().values(), network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b.half().float() if b.is_floating_point() else b) for a, b in pairs)
    assert {e.name for e in read_index(there / "cache")} == {e.name for e in read_index(cache)}
    command = [sys.executable, "-m", "recipe", "--help"]
    told = subprocess.run(command, cwd=there, capture_output=True, text=True, check=True).stdout
    assert "--minutes" in told, "the code is there"


def test_an_average_is_the_mean_of_its_checkpoints_and_refuses_two_networks(tmp_path):
    for name, value in (("a", 1.0), ("b", 4.0), ("c", 4.0)):
        torch.save(
            {"model": {"x": torch.full((2,), value), "n": torch.tensor(3)}, "preset": "fixed"}, tmp_path / f"{name}.pt"
        )
    recipe.main(["--average", *(str(tmp_path / f"{name}.pt") for name in "abc"), "--out", str(tmp_path / "out")])
    stored = torch.load(tmp_path / "out" / "grays_anatomy_sam_l0.pt")
    assert stored["model"]["x"].tolist() == [3.0, 3.0] and stored["model"]["n"] == 3 and stored["preset"] == "fixed"
    torch.save({"model": {"y": torch.zeros(2)}}, tmp_path / "d.pt")
    with pytest.raises(SystemExit, match="different networks"):
        recipe.main(["--average", str(tmp_path / "a.pt"), str(tmp_path / "d.pt"), "--out", str(tmp_path / "out")])


def test_one_cycle_rises_and_falls():
    rates = [one_cycle(step / 100, 1.0) for step in range(100)]
    assert rates.index(max(rates)) in (4, 5) and max(rates) == pytest.approx(1.0) and rates[-1] < 0.01
    assert 0 < rates[0] < rates[1] < rates[4]


def test_a_run_without_the_one_before_it_says_what_is_missing(cache, tmp_path):
    with pytest.raises(SystemExit, match=r"recipe: .*distill/best\.pt: no such checkpoint"):
        run("both", cache, tmp_path, 1)


@pytest.mark.long
def test_smoke_makes_all_runs_with_the_real_networks():
    recipe.main(["--smoke"])


def test_a_distillation_resumes_in_the_same_bits_and_leaves_the_decoder_as_it_is(cache, tiny, tmp_path, monkeypatch):
    encoder = torch.nn.Conv2d(3, 8, 5, stride=4, padding=2)
    monkeypatch.setattr(loop, "teacher_encoder", lambda: encoder)
    run("distill", cache, tmp_path / "whole", 5)
    stop_and_resume("distill", cache, tmp_path / "parts", 5, monkeypatch)
    assert_same_bits(tmp_path, "distill")
    before = recipe.starting_network("proposed", SCALED, None, 0)[0].state_dict()
    after = read_checkpoint(tmp_path / "whole" / "distill" / "last.pt")["model"]
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"image_encoder", "bn"}


def test_the_recipe_is_not_started_twice_by_torchrun(cache, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="one process; start it without torchrun"):
        run("both", cache, tmp_path, 1)


# ---------------------------------------------------------------- losses


def test_the_distillation_loss_is_0_for_the_teachers_answer_and_1_for_its_mean_value():
    teacher = torch.randn(2, 8, 4, 4)
    assert distillation_loss(teacher, teacher).item() == 0
    assert distillation_loss(teacher.mean().expand_as(teacher), teacher).item() == pytest.approx(1, abs=0.02)
