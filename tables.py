"""Scores of cases -> means by modality -> the tables that people read. [P Table 4]"""

from __future__ import annotations

import csv
import io
import math

from metrics import PROTOCOLS, filled_box, inscribed_ellipse

# systems that never look at the image: what a box alone is worth
REFERENCES = {"filled box": filled_box, "inscribed ellipse": inscribed_ellipse}
SCORES = tuple(f"{score}_{protocol}" for protocol in PROTOCOLS for score in ("dsc", "nsd"))
AVERAGE = "Average"
PAPER_MODALITIES = "CT MR PET US X-Ray Dermoscopy Endoscopy Fundus Microscopy".split()  # rows of [P Table 4]
MODALITIES = [*PAPER_MODALITIES, "OCT", "Mammography", "Other"]
PAPER_SCORES = {  # columns of [P Table 4], per cent: PAPER_MODALITIES, then the average as printed
    "paper's Baseline on its own split: DSC": (72.47, 76.40, 70.56, 94.80, 96.04, 94.23, 91.47, 92.68, 65.80, 83.83),
    "paper's Baseline on its own split: NSD": (88.49, 93.02, 95.71, 98.41, 99.30, 98.09, 98.46, 98.90, 86.43, 95.20),
    "paper's Proposed on its own split: DSC": (84.46, 80.92, 79.22, 94.91, 95.21, 94.60, 91.38, 89.93, 83.24, 88.20),
    "paper's Proposed on its own split: NSD": (97.74, 95.86, 98.61, 98.38, 98.67, 98.12, 98.60, 98.60, 97.90, 98.05),
}
PAPER_INT8_SCORES = {  # the same of its quantized models
    "paper's Quantized Baseline on its own split: DSC": (72.71, 77.12, 70.91, 95.10, 95.82, 94.41, 91.45, 92.93, 66.10, 84.06),
    "paper's Quantized Baseline on its own split: NSD": (89.15, 93.22, 95.93, 98.93, 99.12, 98.09, 98.34, 98.30, 86.83, 95.32),
    "paper's Quantized Proposed on its own split: DSC": (84.80, 82.69, 79.15, 95.01, 95.17, 94.62, 91.40, 90.15, 83.86, 88.54),
    "paper's Quantized Proposed on its own split: NSD": (98.05, 97.22, 98.56, 98.42, 98.66, 98.14, 98.57, 98.73, 98.23, 98.28),
}  # fmt: skip


def summarize(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """{(system, modality or "Average"): cases, objects, mean scores and seconds}, in the order of the table."""
    keys, summary = [key for key in (*SCORES, "seconds") if key in rows[0]], {}

    def mean(members: list[dict]) -> dict[str, float]:  # of the numbers; nan (no score, no time) if there is none
        known = {key: [row[key] for row in members if not math.isnan(row[key])] for key in keys}
        return {key: sum(values) / len(values) if values else math.nan for key, values in known.items()}

    for system in dict.fromkeys(row["system"] for row in rows):
        lines = {}
        for modality in MODALITIES:
            if members := [row for row in rows if (row["system"], row["modality"]) == (system, modality)]:
                objects = sum(row["objects"] for row in members)
                lines[modality] = {"cases": len(members), "objects": objects, **mean(members)}
        counts = {key: sum(line[key] for line in lines.values()) for key in ("cases", "objects")}
        summary |= {(system, modality): line for modality, line in lines.items()}
        summary[system, AVERAGE] = counts | mean(list(lines.values()))
    return summary


def markdown_table(summary: dict[tuple[str, str], dict], protocols: tuple[str, ...], paper: bool) -> str:
    """A row a modality and the average; for each system DSC and NSD of the first protocol, challenge NSD, seconds."""
    first, systems = protocols[0], list(dict.fromkeys(system for system, _ in summary))
    keys = {f"DSC {first}": f"dsc_{first}", f"NSD {first}": f"nsd_{first}", "NSD challenge": "nsd_challenge"}
    keys = {title: key for title, key in keys.items() if key in summary[systems[-1], AVERAGE]} | {"s": "seconds"}
    fields = {f"{s}: {t}": (s, k) for s in systems for t, k in keys.items() if k != "seconds" or s not in REFERENCES}
    lines = [["modality", "cases", *fields, *(PAPER_SCORES if paper else ())]]
    printed = {name: column for name, *column in zip([*PAPER_MODALITIES, AVERAGE], *PAPER_SCORES.values(), strict=True)}
    for modality in (m for s, m in summary if s == systems[-1]):  # a reference: it has a score for every case
        line_of = {system: summary.get((system, modality), {}) for system in systems}
        values = [line_of[s].get(key, math.nan) * (1 if key == "seconds" else 100) for s, key in fields.values()]
        values += printed.get(modality, [math.nan] * 4) if paper else []
        cells = ["-" if math.isnan(value) else f"{value:.2f}" for value in values]
        lines.append([modality, str(line_of[systems[-1]]["cases"]), *cells])
    notes = ["DSC and NSD in per cent, s in seconds: means over the cases that have one. Average: over the modalities."]
    notes += ["Paper: its Table 4, slices of other cases at 256 x 256, average over its nine: not comparable."] * paper
    return "\n".join([pipe_table(lines), "", *notes, ""])


def score_table(summary: dict[tuple[str, str], dict], score: str) -> str:
    """One score of every system, per cent: a row a modality and the average, the paper's four columns at the right.

    score: one of SCORES. The paper's columns are those of DSC or of NSD, on its own split.
    """
    systems, ending = list(dict.fromkeys(system for system, _ in summary)), f": {score[:3].upper()}"
    both = [pair for pairs in zip(PAPER_SCORES.items(), PAPER_INT8_SCORES.items(), strict=True) for pair in pairs]
    printed = {title: column for title, column in both if title.endswith(ending)}  # float, int8, float, int8
    lines = [["modality", "cases", "objects", *systems, *(title.removesuffix(ending) for title in printed)]]
    places = [*PAPER_MODALITIES, AVERAGE]
    for modality in (m for s, m in summary if s == systems[-1]):
        counts = summary[systems[-1], modality]
        values = [100 * summary[system, modality][score] for system in systems]
        values += [column[places.index(modality)] if modality in places else math.nan for column in printed.values()]
        cells = ["-" if math.isnan(value) else f"{value:.2f}" for value in values]
        lines.append([modality, str(counts["cases"]), str(counts["objects"]), *cells])
    return pipe_table(lines)


def difference_table(lines: list[dict], scores: dict[str, str]) -> str:
    """Differences of one pair of systems in points of per cent, with their intervals: a row a modality and the average.

    lines: `intervals.paired_differences`'s of that pair. scores: {title of the column: one of SCORES}.
    """
    rows: dict[str, list[str]] = {}
    for score in scores.values():
        for line in (line for line in lines if line["score"] == score):
            numbers = [100 * line[key] for key in ("difference", "low", "high")]
            interval = "" if math.isnan(numbers[1]) else f" [{numbers[1]:+.2f}, {numbers[2]:+.2f}]"
            rows.setdefault(line["modality"], [str(line["cases"])]).append(f"{numbers[0]:+.2f}{interval}")
    return pipe_table([["modality", "cases", *scores], *([modality, *cells] for modality, cells in rows.items())])


def pipe_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first one the header, as a Markdown table without a line end at its end."""
    header, *body = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([header, "| " + " | ".join(["---"] * len(rows[0])) + " |", *body])


def terminal_table(summary: dict[tuple[str, str], dict], protocol: str) -> str:
    """The same in a terminal's width: DSC and NSD of one protocol for each system, seconds where known."""
    systems = list(dict.fromkeys(system for system, _ in summary))
    modalities = [m for s, m in summary if s == systems[-1]]
    columns = [
        ["", "modality", *modalities],
        ["", "cases", *(str(summary[systems[-1], m]["cases"]) for m in modalities)],
    ]
    for system in systems:
        keys = {"DSC": f"dsc_{protocol}", "NSD": f"nsd_{protocol}"} | ({} if system in REFERENCES else {"s": "seconds"})
        for title, key in keys.items():
            values = [
                summary.get((system, m), {}).get(key, math.nan) * (1 if title == "s" else 100) for m in modalities
            ]
            cells = ["-" if math.isnan(value) else f"{value:.1f}" for value in values]
            columns.append([system if title == "DSC" else "", title, *cells])
    widths = [max(5, *(len(cell) for cell in column[1:])) for column in columns]
    starts = [i for i, column in enumerate(columns) if column[0]]  # where each system's columns begin
    header = ""
    for start, end in zip(starts, [*starts[1:], len(columns)], strict=True):
        header = header.ljust(widths[0] + sum(width + 2 for width in widths[1:start]) + 4) + columns[start][0]
        widths[start] += max(0, len(columns[start][0]) + 4 - sum(width + 2 for width in widths[start:end]))
    lines = [header]
    for first, *rest in list(zip(*columns, strict=True))[1:]:
        lines.append("".join([first.ljust(widths[0]), *(f"  {c:>{w}}" for c, w in zip(rest, widths[1:], strict=True))]))
    return "\n".join(line.rstrip() for line in lines)


def csv_text(rows: list[dict], columns: tuple[str, ...]) -> str:
    """Rows as CSV, floats with 6 decimals; a score that was not computed, or is nan, is left blank."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        writer.writerow([("" if math.isnan(c) else f"{c:.6f}") if isinstance(c, float) else c for c in cells])
    return text.getvalue()
