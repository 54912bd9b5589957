"""The golden cases: a real image and a volume go through steps 04 and 05, and the scores equal the recorded ones."""

import importlib

import pytest

from phantoms import real_cases, tiny_case, write_case

infer, evaluate = importlib.import_module("04_infer"), importlib.import_module("05_evaluate")

# LiteMedSAM's weights, preset fixed; recorded on 2026-11-23 with the pinned packages (DSC and strict NSD, 0..1)
RECORDED = {"2DBox_CT_vertebra": (0.892182, 0.856797), "3DBox_CT_tiny0": (0.931113, 1.0)}


def test_golden_cases_score_what_they_scored(tmp_path):
    vertebra = next(case for case in real_cases() if case.name == "2DBox_CT_vertebra")
    for case in (vertebra, tiny_case(dims=3)):
        write_case(tmp_path, case)
    rows = infer.main(["-i", str(tmp_path / "imgs"), "-o", str(tmp_path / "segs"), "--overlay"])
    assert [row["objects"] for row in rows] == [3, 2] and all(row["total_s"] > row["encode_s"] > 0 for row in rows)
    names = [
        "-s",
        f"baseline={tmp_path / 'segs'}",
        "-g",
        str(tmp_path / "gts"),
        "-o",
        str(tmp_path / "eval"),
        "--jobs",
        "1",
    ]
    evaluate.main(names)
    lines = [line.split(",") for line in (tmp_path / "eval" / "cases.csv").read_text().splitlines()]
    cases = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    found = {c["case"].removesuffix(".npz"): c for c in cases if c["system"] == "baseline"}
    for name, (dsc, nsd) in RECORDED.items():
        assert float(found[name]["dsc_strict"]) == pytest.approx(dsc, abs=0.005)
        assert float(found[name]["nsd_strict"]) == pytest.approx(nsd, abs=0.02)
    assert {c["system"] for c in cases} == {"baseline", "filled box", "inscribed ellipse"}
