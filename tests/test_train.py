"""data.py's draws, training.py, 02_train.py: what is drawn, what is minimised, and that a stopped run goes on exactly."""

import copy
import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_model import TinyNetwork

import training
from data import (
    CacheEntry,
    SliceDataset,
    epoch_entries,
    read_index,
    read_split,
    training_item,
    validation_item,
)
from demo_data import tiny_cache
from formats import InputError
from formats.checkpoints import lite_medsam_path, load_weights, read_checkpoint, save_checkpoint
from grid import move_box
from presets import PRESETS, override
from segment import build
from training import dice_loss, mask_iou, segmentation_loss, starting_network

ROOT = Path(__file__).parent.parent
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
    both = np.array([move_box(box, "both", (0, 0), rng, 256, 256) - box for _ in range(500)])
    outward = np.array([move_box(box, "outward", (0, 0), rng, 256, 256) - box for _ in range(500)])
    assert both.min() == -5 and both.max() == 5
    assert outward[:, :2].max() == 0 and outward[:, 2:].min() == 0 and abs(outward).max() == 5
    small = np.array([move_box(np.array([3.0, 3, 5, 5]), "both", (0, 0), rng, 40, 30) for _ in range(200)])
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("smoke") / "cache")


@pytest.fixture
def tiny(monkeypatch):
    """Every run trains the stand-in."""

    def starting(model, preset, init, seed, device):
        torch.manual_seed(seed)
        return TinyNetwork(), "made for the test"

    monkeypatch.setattr(train, "starting_network", starting)


def arguments(cache, out, steps, *more, fields=(), every=2):
    plan = ["--steps", str(steps), "--batch", "2", "--validate-every", str(every), "--set", "objects=2", *fields]
    return ["--cache", str(cache), "--out", str(out), *plan, *more]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_steps_are_those_of_table_3_written_by_hand(cache, tiny, tmp_path):
    train.main(arguments(cache, tmp_path, 3, every=100))
    preset, (network, _) = override(PRESETS["fixed"], ["objects=2"]), train.starting_network("", None, None, 0, None)
    entries = [e for e in read_index(cache) if e.split == "train"]
    data = SliceDataset(cache, entries, preset, 2, seed=0)
    optimiser, losses = torch.optim.AdamW(network.parameters(), lr=5e-5, weight_decay=0.01), []
    for step in range(3):
        items = [{key: torch.from_numpy(value) for key, value in data[step, place].items()} for place in range(2)]
        embedding = network.image_encoder(torch.stack([i["image"] for i in items]))
        answers = [network.decode(embedding[i : i + 1], items[i]["boxes"]) for i in range(2)]
        logits, iou = (torch.cat(part) for part in zip(*answers, strict=True))
        loss = segmentation_loss(logits, iou, torch.cat([i["masks"] for i in items]).unsqueeze(1))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    found = read_checkpoint(tmp_path / "last.pt")["model"]
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())
    rows = rows_of(tmp_path / "losses.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3"] and {row["learning_rate"] for row in rows} == {"5e-05"}
    assert [float(row["loss"]) for row in rows] == losses


def test_a_resumed_run_ends_in_the_same_bits(cache, tiny, tmp_path):
    train.main(arguments(cache, tmp_path / "whole", 7))
    train.main(arguments(cache, tmp_path / "parts", 3))  # not a multiple of --validate-every
    train.main(arguments(cache, tmp_path / "parts", 4, "--resume"))  # a multiple of it
    train.main(arguments(cache, tmp_path / "parts", 7, "--resume"))
    whole, parts = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert whole["optimiser"]["state"].keys() == parts["optimiser"]["state"].keys()
    assert all(whole[key] == parts[key] for key in ("step", "best", "log", "losses", "schedule"))
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and (tmp_path / "whole" / "curve.png").stat().st_size > 1000
    losses = [(tmp_path / name / "losses.csv").read_text() for name in ("whole", "parts")]
    assert losses[0] == losses[1] and [line.split(",")[0] for line in losses[0].split()] == ["step", *"1234567"]


def test_a_validation_before_the_first_step_is_logged_and_changes_nothing_else(
    cache, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "PATIENCE", 0)
    monkeypatch.setattr(train, "FACTOR", 0.5)
    rate = 1e-6  # so small that no loss falls by the share that the schedule wants to see
    last = train.main(arguments(cache, tmp_path, 4, fields=[f"learning_rate={rate}"], every=1))
    rows = rows_of(tmp_path / "log.csv")
    assert [row["step"] for row in rows] == [*"01234"] and rows[0]["train_loss"] == ""
    # the schedule sees steps 1, 2, 3: the first loss is the smallest so far, the others lower the rate
    rates = [float(row["learning_rate"]) for row in rows_of(tmp_path / "losses.csv")]
    assert rates == pytest.approx([rate, rate, rate / 2, rate / 4])
    best = read_checkpoint(tmp_path / "best.pt")
    assert best["step"] > 0 and best["best"] == min(float(row["validation_loss"]) for row in rows[1:])
    told = capsys.readouterr().out.splitlines()[-1]
    assert f"validation loss {float(rows[0]['validation_loss']):.4f} -> {last['validation_loss']:.4f}, Dice " in told


def test_a_curve_is_drawn_from_the_tenth_step_on_before_any_save_or_validation(cache, tiny, tmp_path, monkeypatch):
    drawn, write = [], training.Run.write_log
    monkeypatch.setattr(training.Run, "write_log", lambda run, folder: (drawn.append(run.step), write(run, folder)))
    train.main(arguments(cache, tmp_path, 12, every=100))
    assert drawn == [0, 10, 12, 12] and (tmp_path / "curve.png").exists()
    row = rows_of(tmp_path / "log.csv")[1]
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "losses.csv")]
    assert float(row["train_loss"]) == pytest.approx(np.mean(losses)), "their mean is the log's"


def test_resume_refuses_another_preset_seed_or_an_earlier_versions_file_but_more_epochs_go_on(cache, tiny, tmp_path):
    train.main(arguments(cache, tmp_path, 1))
    for more, fields, message in (
        (["--preset", "paper"], [], "with preset fixed, not paper"),
        (["--seed", "1"], [], "seed 0, not 1"),
        ([], ["jitter=outward"], "jitter both, not outward"),
        (["--model", "baseline"], [], "model proposed, not baseline"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main(arguments(cache, tmp_path, 2, "--resume", *more, fields=fields))
    train.main(arguments(cache, tmp_path, 2, "--resume", fields=["epochs=2"]))
    with pytest.raises(SystemExit, match="no such checkpoint"):
        train.main(arguments(cache, tmp_path / "none", 2, "--resume"))
    stored = read_checkpoint(tmp_path / "last.pt")
    del stored["architecture"], stored["preset_fields"]["objects"]
    save_checkpoint(tmp_path / "last.pt", stored)
    with pytest.raises(SystemExit, match="an earlier version wrote it; start from it with --init"):
        train.main(arguments(cache, tmp_path, 2, "--resume"))


def test_a_loss_that_is_not_finite_stops_the_run_in_a_sentence(cache, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "dice_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(SystemExit, match="step 1: the loss is nan; lower the rate"):
        train.main(arguments(cache, tmp_path, 4))
    assert not (tmp_path / "last.pt").exists()


def test_weights_or_a_validation_that_are_not_finite_reach_no_file(cache, tiny, tmp_path, monkeypatch):
    train.main(arguments(cache, tmp_path, 1))
    good = (tmp_path / "last.pt").read_bytes()
    note = training.Run.note

    def spoilt(run, loss):
        next(run.network.parameters()).data[:] = float("nan")  # as a gradient may do whose loss was finite
        note(run, loss)

    monkeypatch.setattr(training.Run, "note", spoilt)
    with pytest.raises(SystemExit, match="last.pt: not written, 1 tensors hold NaN or infinity"):
        train.main(arguments(cache, tmp_path, 2, "--resume"))
    monkeypatch.undo()
    assert (tmp_path / "last.pt").read_bytes() == good and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(train, "starting_network", lambda *_: (TinyNetwork(), ""))
    monkeypatch.setattr(
        train, "validate", lambda *_: {"validation_loss": float("nan"), "validation_dice": 0.5, "dice": {}}
    )
    with pytest.raises(SystemExit, match="step 0: the validation loss is nan; lower the rate"):
        train.main(arguments(cache, tmp_path / "other", 2))
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").glob("*.csv"))


@pytest.fixture(scope="module")
def stored(cache, tmp_path_factory):
    """last.pt after two steps of the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "starting_network", lambda model, preset, init, seed, device: (TinyNetwork(), ""))
        train.main(arguments(cache, out := tmp_path_factory.mktemp("run"), 2))
    return read_checkpoint(out / "last.pt")


PLACES = [
    (), ("model",), ("optimiser",), ("optimiser", "state"), ("optimiser", "state", 0), ("optimiser", "state", 0, "exp_avg"),
    ("optimiser", "param_groups"), ("optimiser", "param_groups", 0), ("optimiser", "param_groups", 0, "lr"), ("schedule",),
    ("schedule", "num_bad_epochs"), ("schedule", "best"), ("log",), ("log", 0), ("log", 0, "dice"), ("losses",),
    ("losses", 0), ("losses", 0, "loss"), ("must_match",), ("preset_fields",),
]  # fmt: skip
OTHERS = (None, "text", -7, float("nan"), {"a": 1}, torch.zeros(3))


def test_a_damaged_or_foreign_last_pt_is_refused_in_one_sentence(stored, cache, tiny, tmp_path):
    def changed(place, name, value=None, drop=False):
        new = inner = copy.deepcopy(stored)
        for step in place:
            inner = inner[step]
        if drop:
            del inner[name]
        else:
            inner[name] = value
        return new

    def said(state):
        torch.save(state, tmp_path / "last.pt")  # without a checksum
        with pytest.raises(InputError) as refused:
            run.resume(tmp_path / "last.pt")
        return str(refused.value)

    network = TinyNetwork()
    optimiser = torch.optim.AdamW(network.parameters(), fused=False)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser)
    preset = override(PRESETS["fixed"], ["objects=2"])
    run = training.Run("proposed", preset, network, optimiser, schedule, stored["must_match"])
    torch.save(stored, tmp_path / "last.pt")
    run.resume(tmp_path / "last.pt")
    assert run.step == 2 and len(run.losses) == 2
    torch.save(changed((), "step", 2**70), tmp_path / "last.pt")
    with pytest.raises(SystemExit, match="cannot be resumed, it is not complete"):
        train.main(arguments(cache, tmp_path, 3, "--resume"))
    tried = 0
    for place in PLACES:
        inner = stored
        for step in place:
            inner = inner[step]
        for name in (
            [*(inner if isinstance(inner, dict) else range(len(inner)))][:8] if hasattr(inner, "__len__") else ()
        ):
            if isinstance(inner, torch.Tensor) or place + (name,) in (("preset",), ("preset_fields", "epochs")):
                continue
            # a weight that had no gradient has no state
            if isinstance(inner, dict) and place not in (("log", 0, "dice"), ("optimiser", "state")):
                assert "last.pt" in said(changed(place, name, drop=True)), (place, name)
            for other in OTHERS:
                same = training.form_of(other) == training.form_of(inner[name])
                if not same and name not in ("train_loss", "foreach"):  # which may be None
                    assert "last.pt" in said(changed(place, name, other)), (place, name, other)
                    tried += 1
    assert tried > 200


@pytest.mark.parametrize("flag", ["--steps", "--batch", "--validate-every", "--seed"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e999", "99999999999999999999", "1.5", "", "x"])
def test_a_number_that_is_none_is_refused_before_anything_is_done(flag, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--cache", str(tmp_path / "none"), "--out", str(tmp_path / "out"), f"{flag}={value}"])
    assert stop.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["epochs", "objects", "learning_rate", "gamma", "kappa", "diffusion_range"])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "1e999", "99999999999999999999", "", "x", "9" * 5000])
def test_a_field_that_is_no_number_is_refused_in_one_sentence(name, value, cache, tmp_path):
    with pytest.raises(SystemExit, match=name) as stop:
        train.main(["--cache", str(cache), "--out", str(tmp_path / "out"), "--set", f"{name}={value}"])
    assert "\n" not in stop.value.code and len(stop.value.code) < 320 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("model, key", [("proposed", "image"), ("baseline", "raw")])
def test_a_network_is_trained_and_validated_on_the_images_that_it_is_given_later(
    model, key, cache, tmp_path, monkeypatch
):
    seen, network = [], TinyNetwork()
    network.image_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    monkeypatch.setattr(train, "starting_network", lambda *_: (network, "made for the test"))
    train.main(arguments(cache, tmp_path, 1, "--model", model))
    training, validation = read_split(cache)
    exact = [torch.from_numpy(validation_item(cache, e, PRESETS["fixed"])[key])[None] for e in validation]
    data = SliceDataset(cache, training, override(PRESETS["fixed"], ["objects=2"]), 2, seed=0)
    batch = torch.from_numpy(np.stack([data[0, place][key] for place in range(2)]))
    assert len(seen) == 2 * len(exact) + 1
    assert all(torch.equal(a, b) for a, b in zip(seen, [*exact, batch, *exact], strict=True))


def test_epochs_are_a_field_of_the_preset(cache, tiny, tmp_path):
    last = train.main(["--cache", str(cache), "--out", str(tmp_path), "--batch", "8", "--set", "epochs=2"])
    data = SliceDataset(cache, read_split(cache)[0], PRESETS["fixed"], 8, seed=0)
    assert last["step"] == 2 * data.steps_per_epoch == 2 * max(1, 2 * 10 // 8)


def test_smoke_says_that_its_files_are_gone(tiny, capsys):
    train.main(["--smoke"])
    told = capsys.readouterr().out.splitlines()[-1]
    assert "steps 0 -> 4, validation loss " in told and told.endswith(
        "removed again. Next: python 03_quantize.py --smoke"
    )


def test_a_decoder_of_ones_own_is_told_how_it_starts(tmp_path, monkeypatch):
    def build_small(model, kinds=()):
        network = build(model, kinds)
        del network.mask_decoder.transformer.layers[1]
        return network

    save_checkpoint(tmp_path / "ours.pt", {"model": build("proposed").state_dict(), "preset": "fixed"})
    monkeypatch.setattr(training, "build", build_small)
    for init in (None, tmp_path / "ours.pt"):
        with pytest.raises(InputError, match="--set decoder=random"):
            starting_network("proposed", PRESETS["fixed"], init, 0)
        network, told = starting_network("proposed", override(PRESETS["fixed"], ["decoder=random"]), init, 0)
        assert len(network.mask_decoder.transformer.layers) == 1 and "decoder from random weights" in told
    ours, kept = read_checkpoint(tmp_path / "ours.pt")["model"], network.image_encoder.state_dict()
    assert all(torch.equal(ours[f"image_encoder.{name}"], value) for name, value in kept.items())


# ---------------------------------------------------------------- several processes

FROZEN = """
import importlib, sys, torch
train = importlib.import_module("02_train")
from fake_model import TinyNetwork

class Frozen(TinyNetwork):
    def train(self, mode=True):
        return super().train(False)

def starting(model, preset, init, seed, device):
    torch.manual_seed(seed)
    return Frozen(), "made for the test"

train.starting_network = starting
train.main(sys.argv[1:])
"""


@pytest.mark.long
def test_two_processes_train_one_network_as_one_process_does(cache, tmp_path):
    """With frozen norms: batch norm would normalize each process's part of the batch on its own."""
    (tmp_path / "frozen.py").write_text(FROZEN)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        plan = arguments(cache, tmp_path / name, 5, "--batch", "4", fields=["learning_rate=1e-2"])
        command = [sys.executable, *launcher, str(tmp_path / "frozen.py"), *plan]
        done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("validation loss") == 1, "only the first process speaks"
    for file in ("losses.csv", "log.csv"):
        one, two = (
            [[float(value or 0) for value in row.values()] for row in rows_of(tmp_path / name / file)]
            for name in ("one", "two")
        )
        assert np.array(two) == pytest.approx(np.array(one), rel=1e-4) and len(one) >= 4
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "one" / "losses.csv")]
    assert len(set(losses)) == 5 and abs(losses[-1] - losses[0]) > 1e-3, "the steps change the network"


def test_a_batch_that_two_processes_cannot_share_is_refused(cache, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="--batch 3 cannot be cut into 2 equal parts"):
        train.main([*arguments(cache, tmp_path, 1), "--batch", "3"])


# ---------------------------------------------------------------- what is drawn


def test_a_batch_depends_on_seed_and_step_alone(cache):
    entries = [e for e in read_index(cache) if e.split == "train"]
    first, second = (
        SliceDataset(cache, entries, override(PRESETS["fixed"], ["objects=2"]), 2, seed=3) for _ in range(2)
    )
    for at in ((5, 1), (0, 0), (2, 1)):  # in any order
        a, b = first[at], second[at]
        assert all(np.array_equal(a[key], b[key]) for key in a)
    assert any(not np.array_equal(first[0, 0][key], first[1, 0][key]) for key in ("boxes", "image"))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_items_have_their_documented_shapes(cache, preset):
    entry = read_index(cache)[0]
    item = training_item(cache, entry, override(preset, ["objects=3"]), np.random.default_rng(0))
    assert item["image"].shape == item["raw"].shape == (3, 256, 256) and item["masks"].shape == (3, 256, 256)
    assert item["boxes"].shape == (3, 4) and item["masks"].sum(axis=(1, 2)).min() > 0
    exact = validation_item(cache, entry, preset)
    assert len(exact["masks"]) == len(exact["boxes"]) == entry.objects
    y, x = np.nonzero(exact["masks"][0])
    assert exact["boxes"][0].tolist() == [x.min(), y.min(), x.max(), y.max()]


@pytest.mark.long
def test_the_real_network_overfits_one_batch(cache):
    torch.manual_seed(0)
    entry = next(e for e in read_index(cache) if e.split == "train" and e.modality == "US")
    item = {key: torch.from_numpy(value) for key, value in validation_item(cache, entry, PRESETS["fixed"]).items()}
    model, decoder = build("proposed"), build("baseline")
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
    last = train.main(["--cache", str(cache), "--out", str(tmp_path), "--steps", "2", "--batch", "2"])
    assert np.isfinite(last["validation_loss"])
    rest = load_weights(tmp_path / "best.pt", build("proposed"))
    assert (rest["architecture"], rest["preset"], rest["step"]) == ("proposed", "fixed", 2)
