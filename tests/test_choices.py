"""benchmarks/choices.py: each input is trained and scored, and subtracted case by case after the mean over the seeds."""

import csv

import choices
import numpy as np
import pytest
import torch
from fake_model import BrightModel, TinyNetwork

import segment
from demo_data import tiny_cache, tiny_case
from formats.npz import write_training_case
from formats.writing import save_bytes, save_npz
from presets import PRESETS, override
from segment import Segmenter


def test_every_input_is_trained_and_scored_with_its_own_channels_on_gray_pictures(tmp_path, monkeypatch):
    trained, loaded = [], []

    def train(args, name, seed, out):
        trained.append((name, seed, args.steps, str(args.weights)))
        save_bytes(out, str(len(trained)).encode())
        return str(out)

    def load(model, weights=None, preset=None, engine="torch", force=False, settings=(), **options):
        loaded.append(tuple(settings))
        return Segmenter(BrightModel(0.45), override(PRESETS[preset], list(settings)), enhanced=True)

    monkeypatch.setattr(choices, "train", train)
    monkeypatch.setattr(segment, "load", load)
    write_training_case(tmp_path / "cases", tiny_case(0, 2))
    write_training_case(tmp_path / "cases", tiny_case(0, 3))  # a volume is left out
    color = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)  # and a picture in colour
    save_npz(tmp_path / "cases" / "2D_Fundus_a.npz", imgs=color, gts=np.eye(32, dtype=np.uint8))
    arguments = ["--cases", str(tmp_path / "cases"), "--train", "cache", "--seeds", "2", "--steps", "7"]
    lines = choices.main([*arguments, "--weights", "ours.pt", "-o", str(tmp_path / "out")])
    assert trained == [(name, seed, 7, "ours.pt") for seed in (0, 1) for name in list(choices.INPUTS)[:2]]
    assert loaded == [(), choices.INPUTS[choices.RAW]] * 2
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert {row["case"] for row in rows} == {"2D_US_tiny0.npz"} and len(rows) == 2 * 2
    assert {row["system"] for row in rows} == set(list(choices.INPUTS)[:2]) and {row["seed"] for row in rows} == {
        "0",
        "1",
    }
    pairs = [(f"raw, diffused, equalized{end}", f"{choices.RAW}{end}") for end in ("", ", seed 0", ", seed 1")]
    assert {line["cases"] for line in lines} == {1}
    assert list(dict.fromkeys((line["system"], line["minus"]) for line in lines)) == pairs
    text = (tmp_path / "out" / "runs.md").read_text()
    assert "| cases | 1 | raw, diffused, equalized, seed 1 | raw three times, seed 1 | " in text
    assert "| US | 1 | 2 | " in text
    with pytest.raises(SystemExit, match="^choices.py: --inputs: runs are compared with 'raw three times'; name it"):
        choices.main([*arguments, "--inputs", "released channels"])


def test_a_run_depends_on_seed_and_input_alone(tmp_path, monkeypatch):
    cache = tiny_cache(tmp_path / "cache")

    def weights(name, seed):
        torch.manual_seed(0)
        network = TinyNetwork()
        monkeypatch.setattr(choices, "starting_network", lambda *args: (network, "a stand-in"))
        args = choices.Namespace(train=cache, weights=tmp_path / "ours.pt", steps=2)
        path = choices.train(args, name, seed, tmp_path / "run.pt")
        return torch.load(path, weights_only=True)["model"]["image_encoder.weight"]

    first = weights(choices.RAW, 0)
    assert torch.equal(first, weights(choices.RAW, 0)) and not torch.equal(first, weights(choices.RAW, 1))
    assert not torch.equal(first, weights("raw, diffused, equalized", 0))


def test_an_input_has_the_mean_of_its_scores_over_the_seeds_case_by_case():
    scores = dict.fromkeys(choices.tables.score_names(), 0.5)
    one = {"folder": "val", "input": "a", "modality": "CT", "objects": 1} | scores
    values = ((0, "1.npz", 0.5), (0, "2.npz", 0.7), (1, "1.npz", 0.6), (1, "2.npz", 0.2))
    rows = [one | {"system": f"a, seed {s}", "case": case, "dsc_strict": value} for s, case, value in values]
    found = choices.with_means(rows)
    assert found[:4] == rows and [row["system"] for row in found[4:]] == ["a", "a"]
    assert [(row["case"], row["dsc_strict"]) for row in found[4:]] == [
        ("1.npz", pytest.approx(0.55)), ("2.npz", pytest.approx(0.45))]  # fmt: skip
    assert found[4]["nsd_strict"] == 0.5
