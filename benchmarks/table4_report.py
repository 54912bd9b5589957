"""Table 4's texts: scores and differences, with what must be known to read them. benchmarks/table4.py writes them."""

from __future__ import annotations

from pathlib import Path

from intervals import DRAWS
from tables import AVERAGE, SCORES, csv_text, difference_table, score_table, summarize
from writers import save_text

INT8_PAIRS = (("baseline-int8", "baseline"), ("proposed-int8", "proposed"))
PAIRS = (("proposed", "baseline"), ("proposed", "inscribed ellipse"), *INT8_PAIRS)
BAR = {"dsc_strict": 0.2, "nsd_strict": 0.3}  # points of per cent that int8 may differ from float, on average
SHOWN = {"DSC": "dsc_strict", "NSD strict": "nsd_strict", "NSD challenge": "nsd_challenge"}


def table_text(rows: list[dict], kinds: tuple[str, str]) -> str:
    """table.md: for each kind of boxes a table of DSC and one of NSD under each protocol."""
    lines = ["# Table 4 measured", ""]
    for kind in kinds:
        summary = summarize([row for row in rows if row["boxes"] == kind])
        for title, score in SHOWN.items():
            lines += [f"## {title}, boxes {kind}", "", score_table(summary, score), ""]
    return "\n".join(lines) + (
        "\n"
        "Boxes exact: each object's own. Boxes moved-Npx-seedS: each x and y side of them moved in or out by a whole number\n"
        "of pixels of the 256 grid, at most N, drawn from seed S; such a pixel is max(H, W) / 256 of the image's. z sides\n"
        "stay. All systems get the same boxes, so -int8 differs from its float model by quantization alone.\n"
        "Per cent. Means over a case's objects, a modality's cases, the modalities. DSC is the same under both protocols.\n"
        "Filled box and inscribed ellipse never look at the image: they are drawn from the same boxes.\n"
        "The paper's columns are its Table 4: another split, 256-pixel slices, another average: not comparable.\n"
    )


def differences_text(lines: list[dict], kinds: tuple[str, str]) -> str:
    """differences.md: a table for each kind of boxes and pair of systems."""
    text = ["# Differences, case by case, with 95 % bootstrap intervals", ""]
    for kind in kinds:
        for system, minus in PAIRS:
            chosen = [line for line in lines if (line["boxes"], line["system"], line["minus"]) == (kind, system, minus)]
            if chosen:
                text += [f"## {system} - {minus}, boxes {kind}", "", difference_table(chosen, SHOWN), ""]
    return "\n".join(text) + (
        "\n"
        f"Points of per cent, mean [low, high]: {DRAWS:,} draws of the cases within each modality, seed 0. With two or\n"
        "three cases an interval is narrower than it should be; it says nothing about cases of another source.\n"
    )


def verdicts(lines: list[dict]) -> list[str]:
    """One sentence for each quantized system and kind of boxes: does int8 stay within BAR of float on average?"""
    means = {
        (line["boxes"], line["system"], line["minus"], line["score"]): 100 * line["difference"]
        for line in lines
        if line["modality"] == AVERAGE
    }
    found = []
    for kind, pair in ((kind, pair) for kind in dict.fromkeys(line["boxes"] for line in lines) for pair in INT8_PAIRS):
        if (kind, *pair, "dsc_strict") in means:
            points = {score: means[kind, *pair, score] for score in BAR}
            kept = "within" if all(abs(points[score]) < BAR[score] for score in BAR) else "NOT within"
            told = " and ".join(f"{points[score]:+.2f} {score[:3].upper()}" for score in BAR)
            found.append(f"{pair[0]} - {pair[1]}, boxes {kind}: {told}, {kept} {' and '.join(map(str, BAR.values()))}")
    return found


def write_tables(out: Path, rows: list[dict], lines: list[dict], kinds: tuple[str, str]) -> list[str]:
    """The .csv and .md files into `out`. Returns the verdicts on int8.

    rows: `scoring.score_case`'s, lines: `intervals.paired_differences`'s, both with the kind of boxes as "boxes".
    """
    save_text(out / "cases.csv", csv_text(rows, ("boxes", "system", "case", "modality", "objects", *SCORES)))
    save_text(out / "table.md", table_text(rows, kinds))
    columns = ("boxes", "system", "minus", "modality", "cases", "score", "difference", "low", "high")
    save_text(out / "differences.csv", csv_text(lines, columns))
    told = verdicts(lines)
    save_text(out / "differences.md", differences_text(lines, kinds) + "".join(f"\n- {one}" for one in told) + "\n")
    return told
