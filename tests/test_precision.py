"""benchmarks/precision.py: the table's verdict."""

import precision
import pytest

import tables


def test_without_bfloat16_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    with pytest.raises(SystemExit, match="^precision.py: this processor has no bfloat16.*another machine$"):
        precision.main(["--cases", str(tmp_path)])


def test_the_table_says_whether_the_means_stay_within_what_is_allowed():
    rows = []
    for system, dsc, nsd in (("float32", 0.9, 0.7), ("bfloat16", 0.8995, 0.7015), ("int8", 0.901, 0.68)):
        for case, modality in (("2D_US_a", "US"), ("2D_CT_b", "CT")):
            row = {name: float("nan") for name in tables.score_names()}
            row |= {"case": case, "modality": modality, "system": system, "objects": 1}
            rows.append(row | {"dsc_strict": dsc, "nsd_strict": nsd})
    text = precision.precision_table(rows, ["float32", "bfloat16", "int8"])
    assert "| US | 1 | 90.00 | 89.95 | 90.10 | 70.00 | 70.15 | 68.00 |" in text
    assert "- bfloat16: -0.050 DSC, +0.150 NSD, within 0.1 and 0.2." in text
    assert "- int8: +0.100 DSC, -2.000 NSD, beyond 0.1 and 0.2." in text
    assert pytest.approx(0.1) == precision.ALLOWED["dsc_strict"]
