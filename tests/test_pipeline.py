"""The golden cases: a real image and a volume go through steps 01 to 05, and the scores equal the recorded ones."""

import csv
import importlib

import pytest
from metric_rows import PAPER, use

from demo_data import real_cases, tiny_case
from formats.npz import write_training_case

preprocess, train, quantize, infer, evaluate = (
    importlib.import_module(name) for name in ("01_preprocess", "02_train", "03_quantize", "04_infer", "05_evaluate")
)

# LiteMedSAM's weights, preset fixed; recorded on 2026-11-26 with the pinned packages (DSC and strict NSD, 0..1)
RECORDED = {"2DBox_CT_vertebra": (0.892182, 0.856797), "3DBox_CT_tiny0": (0.916651, 1.0)}


@pytest.mark.long
def test_golden_cases_go_from_01_to_05_and_score_what_they_scored(tmp_path, monkeypatch):
    use(monkeypatch, PAPER)
    vertebra = next(case for case in real_cases() if case.name == "2DBox_CT_vertebra")
    for case in (vertebra, tiny_case(dims=3)):
        write_training_case(tmp_path / "val", case)
    for case in (tiny_case(1, 2), tiny_case(1, 3)):
        write_training_case(tmp_path / "train", case)
    place = {name: str(tmp_path / name) for name in ("train", "val", "cache", "run", "segs", "int8", "eval")}
    inputs = str(tmp_path / "cache" / "cases" / "imgs")

    preprocess.main(["-i", place["train"], "--val", place["val"], "-o", place["cache"], "--jobs", "1"])
    train.main(["--cache", place["cache"], "--out", place["run"], "--steps", "1", "--batch", "1"])
    checkpoint, int8 = f"{place['run']}/last.pt", f"{place['run']}/last.dynamic.pt"
    quantize.main(["--model", checkpoint, "-o", int8, "--repeats", "1"])
    rows = infer.main(["-i", inputs, "-o", place["segs"], "--model", "baseline"])
    infer.main(["-i", inputs, "-o", place["int8"], "--model", int8, "--engine", "torch-int8"])
    systems = [f"baseline={place['segs']}", f"proposed int8={place['int8']}"]
    truth = str(tmp_path / "cache" / "cases" / "gts")
    evaluate.main(["-s", *systems, "-g", truth, "-o", place["eval"], "--jobs", "1"])

    assert [row["objects"] for row in rows] == [3, 2] and all(row["total_s"] > row["encode_s"] > 0 for row in rows)
    with (tmp_path / "eval" / "cases.csv").open(newline="") as file:
        cases = list(csv.DictReader(file))
    assert {c["system"] for c in cases} == {"baseline", "proposed int8", "filled box", "inscribed ellipse"}
    found = {c["case"].removesuffix(".npz"): c for c in cases if c["system"] == "baseline"}
    for name, (dsc, nsd) in RECORDED.items():
        assert float(found[name]["dsc_strict"]) == pytest.approx(dsc, abs=0.005)
        assert float(found[name]["nsd_strict"]) == pytest.approx(nsd, abs=0.02)
