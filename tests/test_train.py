"""data.py's draws, training.py, 02_train.py: what is drawn, what is minimised, and that a stopped run goes on exactly."""

import importlib

import numpy as np
import pytest
import torch
from fake_model import TinyNetwork

import training
from data import CacheEntry, SliceDataset, epoch_entries, read_index, training_item, validation_item
from files.checkpoints import lite_medsam_path, load_weights, read_checkpoint
from grid import move_box
from model import build_model
from phantoms import tiny_cache
from presets import PRESETS
from segment import build
from training import boundary_loss, dice_loss, distillation_loss, mask_iou, segmentation_loss

train = importlib.import_module("02_train")


def entries_of(**sizes):
    """CacheEntry lists by sub-modality, e.g. CT_A=3."""
    return [
        CacheEntry(f"{group}_{i}", group.split("_")[0], group, f"{group}_{i}", "test", 64, 64, "train", 1)
        for group, size in sizes.items()
        for i in range(size)
    ]


def test_equal_sampling_gives_each_modality_the_same_share_and_repeats_small_ones_evenly():
    drawn = epoch_entries(entries_of(US=10, CT_A=4, CT_B=3, OCT=2), "equal", seed=0, epoch=0)
    count = {m: sum(e.modality == m for e in drawn) for m in ("US", "CT", "OCT")}
    assert count == {"US": 10, "CT": 10, "OCT": 10}
    assert sorted(sum(e.name == f"OCT_{i}" for e in drawn) for i in range(2)) == [5, 5]


def test_paper_sampling_never_repeats_and_released_does(monkeypatch):
    monkeypatch.setattr("data.GROUP_SIZE", 20)
    entries = entries_of(US=30, CT_A=30, CT_B=5)
    without = epoch_entries(entries, "without", 0, 0)
    assert len(without) == len(set(without)) == 20 + 20 + 5, "each 3D sub-modality is a group of its own"
    repeated = epoch_entries(entries, "with", 0, 0)
    assert len(repeated) == 45 and len(set(repeated)) < 45


def test_an_epoch_is_the_same_for_the_same_seed_and_another_for_another():
    entries = entries_of(US=30)
    first = epoch_entries(entries, "equal", 1, 2)
    assert first == epoch_entries(entries, "equal", 1, 2)
    assert first != epoch_entries(entries, "equal", 1, 3) and first != epoch_entries(entries, "equal", 2, 2)


def test_boxes_move_as_the_preset_says():
    box, rng = np.array([50.0, 60, 120, 130]), np.random.default_rng(0)
    both = np.array([move_box(box, "both", 0, rng, 256, 256) - box for _ in range(500)])
    outward = np.array([move_box(box, "outward", 0, rng, 256, 256) - box for _ in range(500)])
    assert both.min() == -5 and both.max() == 5
    assert outward[:, :2].max() == 0 and outward[:, 2:].min() == 0 and abs(outward).max() == 5
    small = np.array([move_box(np.array([3.0, 3, 5, 5]), "both", 0, rng, 40, 30) for _ in range(200)])
    assert (small[:, 2:] - small[:, :2]).min() >= 1 and small.min() >= 0 and small.max() <= 40


def test_losses_by_hand():
    logits = torch.tensor([[[[100.0, -100.0], [100.0, -100.0]]]])
    masks = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    assert dice_loss(logits, masks).item() == pytest.approx(1 - 2 * 1 / (2 + 2), abs=1e-4)
    assert mask_iou(logits, masks).item() == pytest.approx(1 / 3)
    empty = torch.zeros_like(masks)
    assert mask_iou(-logits.abs(), empty).item() == 1 and torch.isfinite(dice_loss(-logits.abs(), empty))
    terms = segmentation_loss(logits, torch.tensor([[1.0]]), masks)
    assert terms["mse"].item() == pytest.approx((1 - 1 / 3) ** 2)
    assert terms["loss"].item() == pytest.approx(sum(terms[k].item() for k in ("bce", "dice", "mse")))
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("smoke") / "cache")


@pytest.fixture
def tiny(monkeypatch):
    """Every run trains the stand-in."""

    def starting(model, preset, init, seed):
        torch.manual_seed(seed)
        return TinyNetwork(), "made for the test"

    monkeypatch.setattr(train, "build", lambda model: TinyNetwork())
    monkeypatch.setattr(train, "starting_network", starting)


def arguments(cache, out, steps, *more):
    plan = ["--steps", str(steps), "--batch", "2", "--objects", "2", "--validate-every", "2", "--device", "cpu"]
    return ["--cache", str(cache), "--out", str(out), *plan, "--save-every", "1", *more]


def test_a_resumed_run_ends_in_the_same_bits(cache, tiny, tmp_path):
    train.main(arguments(cache, tmp_path / "whole", 7))
    train.main(arguments(cache, tmp_path / "parts", 3))  # not a multiple of --validate-every
    train.main(arguments(cache, tmp_path / "parts", 7, "--resume", "--minutes", "0"))
    assert read_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 4
    train.main(arguments(cache, tmp_path / "parts", 7, "--resume"))
    whole, parts = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert whole["optimiser"]["state"].keys() == parts["optimiser"]["state"].keys()
    assert (whole["step"], whole["best"], whole["log"]) == (parts["step"], parts["best"], parts["log"])
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and (tmp_path / "whole" / "curve.png").stat().st_size > 1000
    losses = [(tmp_path / name / "losses.csv").read_text() for name in ("whole", "parts")]
    assert losses[0] == losses[1] and [line.split(",")[0] for line in losses[0].split()] == ["step", *"1234567"]


def test_a_curve_is_there_from_the_tenth_step_on_before_any_save_or_validation(cache, tiny, tmp_path, monkeypatch):
    seen, step = {}, training.Training.train_step

    def look(run, batch):
        step(run, batch)
        seen[run.step] = (tmp_path / "curve.png").exists()

    monkeypatch.setattr(training.Training, "train_step", look)
    late = [word if word not in ("1", "2") else "100" for word in arguments(cache, tmp_path, 12)]
    late[late.index("--batch") + 1] = late[late.index("--objects") + 1] = "2"
    train.main(late)
    assert not seen[10] and seen[11], "the tenth step is drawn once it is done"
    rows = (tmp_path / "losses.csv").read_text().split()[1:]
    log = (tmp_path / "log.csv").read_text().split()[1].split(",")
    assert float(log[1]) == pytest.approx(np.mean([float(row.split(",")[1]) for row in rows])), (
        "their mean is the log's"
    )


def test_resume_refuses_another_preset_batch_or_cache(cache, tiny, tmp_path):
    train.main(arguments(cache, tmp_path, 1))
    for more, message in (
        (["--preset", "paper"], "preset"),
        (["--seed", "1"], "seed 0, not 1"),
        (["--set", "jitter=outward"], "preset"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main(arguments(cache, tmp_path, 2, "--resume", *more))
    with pytest.raises(SystemExit, match="no such checkpoint"):
        train.main(arguments(cache, tmp_path / "none", 2, "--resume"))


def test_a_loss_that_is_not_finite_stops_the_run_in_a_sentence(cache, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "segmentation_loss", lambda *_: {"loss": torch.tensor(float("nan"))})
    with pytest.raises(SystemExit, match="step 0: the loss is nan; lower the rate"):
        train.main(arguments(cache, tmp_path, 4))


def test_a_batch_depends_on_seed_and_step_alone(cache):
    entries = [e for e in read_index(cache) if e.split == "train"]
    first, second = (SliceDataset(cache, entries, PRESETS["fixed"], 2, 2, seed=3) for _ in range(2))
    for at in ((5, 1), (0, 0), (2, 1)):  # in any order
        a, b = first[at], second[at]
        assert all(np.array_equal(a[key], b[key]) for key in a)
    assert any(not np.array_equal(first[0, 0][key], first[1, 0][key]) for key in ("boxes", "image"))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_items_have_their_documented_shapes(cache, preset):
    entry = read_index(cache)[0]
    item = training_item(cache, entry, preset, 3, np.random.default_rng(0))
    assert item["image"].shape == item["raw"].shape == (3, 256, 256) and item["masks"].shape == (3, 256, 256)
    assert item["boxes"].shape == (3, 4) and item["masks"].sum(axis=(1, 2)).min() > 0
    exact = validation_item(cache, entry, preset)
    assert len(exact["masks"]) == len(exact["boxes"]) == entry.objects
    y, x = np.nonzero(exact["masks"][0])
    assert exact["boxes"][0].tolist() == [x.min(), y.min(), x.max(), y.max()]


def test_the_real_network_overfits_one_batch(cache):
    torch.manual_seed(0)
    entry = next(e for e in read_index(cache) if e.split == "train" and e.modality == "US")
    item = {key: torch.from_numpy(value) for key, value in validation_item(cache, entry, PRESETS["fixed"]).items()}
    model, decoder = build_model(), build("baseline")
    load_weights(lite_medsam_path(), decoder)
    model.prompt_encoder.load_state_dict(decoder.prompt_encoder.state_dict())
    model.mask_decoder.load_state_dict(decoder.mask_decoder.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        logits, iou = model(item["image"][None], item["boxes"])
        masks = item["masks"].unsqueeze(1)
        loss = segmentation_loss(logits, iou, masks)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found = logits > 0
        dice = 2 * (found & (masks > 0.5)).sum().item() / (found.sum() + masks.sum()).item()
        if dice > 0.96:
            break
    assert dice > 0.95


def test_smoke_trains_the_real_network_and_its_checkpoint_loads(cache, tmp_path):
    last = train.main(
        ["--cache", str(cache), "--out", str(tmp_path), "--steps", "2", "--batch", "2", "--device", "cpu"]
    )
    assert np.isfinite(last["validation_loss"])
    rest = load_weights(tmp_path / "best.pt", build_model())
    assert rest["preset"] == "fixed" and rest["step"] == 2
