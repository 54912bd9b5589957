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
    assert [line["cases"] for line in lines] == [1, 1] and (tmp_path / "out" / "runs.md").is_file()
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


def test_equal_runs_are_subtracted_case_by_case_after_the_mean_over_the_seeds():
    def rows(title, seed, values):
        scores = dict.fromkeys(choices.tables.score_names(), 0.5)
        return [{"system": title, "seed": seed, "folder": "val", "case": f"{i}.npz", "modality": "CT", "objects": 1}
                | scores | {"dsc_strict": value} for i, value in enumerate(values)]  # fmt: skip

    found = rows(choices.RAW, 0, [0.5, 0.7]) + rows("released channels", 0, [0.6, 0.9])
    found += rows(choices.RAW, 1, [0.5, 0.7]) + rows("released channels", 1, [0.5, 0.6])
    dsc, nsd = choices.differences(found)
    assert abs(dsc["difference"] - 0.05) < 1e-9 and nsd["difference"] == 0
    assert abs(dsc["least seed"] + 0.05) < 1e-9 and abs(dsc["most seed"] - 0.15) < 1e-9
    assert "| val | released channels | DSC | +5.00 |" in choices.runs_table(found, [dsc, nsd], 30)
