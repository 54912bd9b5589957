"""The paper's Tables 1 to 6: what it prints (results/paper) beside what is measured or counted here, as Markdown.

`print(table4())` shows one; notebooks/08_tables.ipynb shows them all. Numbers from long runs are read from results/,
where table.md, or docs/accuracy.md and docs/speed.md, name the command that made them. "-": there is no such number.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from formats import MODALITIES, PAPER_MODALITIES, bare_name
from quantize import count_macs
from segment import build
from tables import AVERAGE, PAPER_TABLES, cell, pipe_table, read_rows, scores_in, summarize

RESULTS = PAPER_TABLES.parent
CARD = RESULTS.parent / "checkpoints" / "README.md"
BATCH = 32  # images, of the paper's Table 3
OURS = "fixed proposed openvino-int8"  # our fastest system in results/table5/times.csv
SOFT = "\u00ad"  # a hyphen that shows only where a narrow column breaks the word
NARROW = "\u00a0"  # a space at which no line breaks
RELEASED = ("released baseline torch", "released proposed torch")


def score_rows(path: Path, **chosen: str) -> list[dict]:
    """Rows of a cases.csv with numbers as numbers, as `tables.summarize` and `tables.paired_differences` take them.

    chosen: columns and the value that a row must have there, such as boxes="exact". A score that is missing is nan.
    """
    rows = [row for row in read_rows(path) if all(row[column] == value for column, value in chosen.items())]
    numbers = [{name: float(row[name] or math.nan) for name in scores_in(row)} for row in rows]
    return [row | found | {"objects": int(row["objects"])} for row, found in zip(rows, numbers, strict=True)]


def network_counts() -> tuple[int, float]:
    """Parameters of the proposed network, and multiply-adds of one image with one box in thousand millions (G)."""
    network = build("proposed").eval()
    return sum(p.numel() for p in network.parameters()), sum(count_macs(network).values()) / 1e9


Scores = dict[str, tuple[float, float]]  # target or Average -> DSC and NSD in per cent


def printed_scores(table: str, system: str) -> Scores:
    """A system's columns in the paper's "table4" or "table6", its printed average included."""
    rows = read_rows(PAPER_TABLES / f"{table}.csv")
    return {row["target"]: (float(row[f"{system} DSC"]), float(row[f"{system} NSD"])) for row in rows}


def measured_scores(rows: list[dict], system: str) -> Scores:
    """The same of a system here: `score_rows`'s rows -> means by modality, strict protocol, and their average."""
    summary = summarize([row for row in rows if row["system"] == system])
    return {key: (100 * line["dsc_strict"], 100 * line["nsd_strict"]) for (_, key), line in summary.items()}


def mean_score(scores: Scores, targets: Iterable[str]) -> tuple[float, float]:
    """Mean DSC and NSD over some targets."""
    dsc, nsd = zip(*(scores[target] for target in targets), strict=True)
    return statistics.mean(dsc), statistics.mean(nsd)


def scores_by_modality(rows: list[dict], system: str, score: str) -> dict[str, np.ndarray]:
    """{modality: one number a case, per cent} of a system, in the order of MODALITIES. score: one of `tables.score_names`."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["system"] == system:
            found.setdefault(row["modality"], []).append(100 * row[score])
    return {modality: np.array(found[modality]) for modality in MODALITIES if modality in found}


def drops(before: Scores, after: Scores) -> Scores:
    """DSC and NSD lost from one set of cases to another, for the targets of both."""
    return {t: (before[t][0] - after[t][0], before[t][1] - after[t][1]) for t in before if t in after}


def _pair(scores: tuple[float, float] | None) -> str:
    """DSC and NSD in one cell; "-" if there is none."""
    return f"{NARROW}/ ".join(map(cell, scores)) if scores else "-"


def _with_notes(lines: list[list[str]], *notes: str) -> str:
    return "\n".join([pipe_table(lines), "", *notes])


def table1() -> str:
    """External data sets of the paper's training. Here: are they in our checkpoint's, and what stands in for them."""
    near = {  # of the data sets that the model card names: those with the same target
        "Nuclei Segmentation": "DSB 2018, TNBC",
        "HipXRay": "none",
        "BTCV": "CURVAS, KiTS19, MSD spleen, NIH pancreas",
        "Micro-Ultrasound": "none (multi-site prostate is MR)",
        "ToothSeg": "periapical teeth",
    }
    # the card's section about data
    used = CARD.read_text(encoding="utf-8").partition("## Data")[2].partition("\n## ")[0].lower()
    lines = [["data set: targets", "images", "in our training", "ours with that target"]]
    for row in read_rows(PAPER_TABLES / "table1.csv"):
        name = row["data set"]
        title = f"{name}: {row['targets']}, {row['modality']}"
        lines.append([title, row["annotated images"], "yes" if name.lower() in used else "no", near[name]])
    return _with_notes(lines, "Our training: the data sets that checkpoints/README.md names.")


def table2() -> str:
    """Environment: the paper's beside that of whoever runs this."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none is used"
    here = {
        "System": platform.system(),
        "CPU": f"{platform.machine()}, {os.cpu_count()} logical processors",
        "RAM": "-",
        "GPU (number and type)": gpu,
        "CUDA version": torch.version.cuda or "none",
        "Programming language": f"Python {platform.python_version()}",
        "Deep learning framework": f"torch {torch.__version__}",
    }
    lines = [["", "paper", "here"]]
    lines += [[row["item"], row["paper"], here[row["item"]]] for row in read_rows(PAPER_TABLES / "table2.csv")]
    return _with_notes(
        lines,
        "The paper's versions cannot be installed together: torch 2.0 (2023) goes with torchvision 0.15, while torchvision",
        "0.2.2 is of 2019, and torch 2.0 has no build for Python 3.12, which is younger.",
    )


def table3() -> str:
    """Training protocol: the paper's, and how our checkpoint was made. Parameters and multiply-adds are counted now."""
    parameters, macs = network_counts()
    here = {
        "Pre-trained model": "encoder: none, distilled from LiteMedSAM; decoder: LiteMedSAM's",
        "Batch size": "64 on a GPU (runs 1, 2), 4 on a CPU (run 3)",
        "Patch size": "256x256x3",
        "Total epochs": "counted in steps: 1,700, 2,300 and 1,660",
        "Optimizer": "AdamW",
        "Initial learning rate": "peaks 1.5e-3, 4e-4, 1e-4",
        "Decay schedule": "one cycle",
        "Training time": "0.5 h GPU, 5.6 h CPU",
        "Loss function": "the same three; run 3 adds one for the contour",
        "Number of model parameters": f"{parameters:,}",
        "Number of flops": f"{macs:.2f} G multiply-adds an image; times {BATCH}: {BATCH * macs:.0f} G",
        "CO2 equivalent": "at most 0.17 kg (GPU)",
    }
    lines = [["", "paper", "here"]]
    lines += [[row["item"], row["paper"], here[row["item"]]] for row in read_rows(PAPER_TABLES / "table3.csv")]
    return _with_notes(lines, "Ours: checkpoints/README.md and recipe/; the two counts: quantize.py, from the network.")


def table4(quantized: bool = False) -> str:
    """DSC / NSD by modality, baseline and proposed: the paper's own split beside our cases `val`. quantized: int8."""
    rows = score_rows(RESULTS / "table4" / "cases.csv", boxes="exact")
    word, ending = ("Quantized ", "-int8") if quantized else ("", "")
    columns = {}
    for title, printed, system in (
        (f"base{SOFT}line", "Baseline", "baseline"),
        (f"pro{SOFT}posed", "Proposed", "proposed"),
    ):
        columns[f"{title}, paper"] = printed_scores("table4", word + printed)
        columns[f"{title}, here"] = here = measured_scores(rows, system + ending)
        here["all of ours"] = here[AVERAGE]
        here[AVERAGE] = mean_score(here, PAPER_MODALITIES)  # of the paper's nine
    targets = [target for target in here if target not in (AVERAGE, "all of ours")]
    lines = [["target", *columns]]
    for target in (*targets, AVERAGE, "all of ours"):
        lines.append([target, *(_pair(column.get(target)) for column in columns.values())])
    return _with_notes(
        lines,
        f"DSC / NSD in per cent{', int8' if quantized else ''}. Average: of the paper's nine targets. Do not compare paper with here: the",
        "paper scores 256-pixel slices of its own split, we score whole cases of other data, by the NSD of the contour.",
    )


def table5_seconds() -> dict[str, list[float]]:
    """{case: five numbers}: the paper's baseline and proposed; here the released algorithm with either, in float; ours."""
    times: dict[tuple[str, str], list[float]] = {}
    for row in read_rows(RESULTS / "table5" / "times.csv"):
        times.setdefault((row["case"], row["system"]), []).append(float(row["seconds"]))
    return {
        row["case"]: [float(row["Baseline s"]), float(row["Proposed s"])]
        + [statistics.median(times[row["case"], system]) for system in (*RELEASED, OURS)]
        for row in read_rows(PAPER_TABLES / "table5.csv")
    }


def table5() -> str:
    """Seconds a case: the paper's machine, the released algorithm on ours, and our fastest engine."""
    lines, seconds = [["case, size; objects", "paper s", "ratio", "here s", "ratio"]], table5_seconds()
    for row in read_rows(PAPER_TABLES / "table5.csv"):
        *paper, baseline, proposed, ours = seconds[row["case"]]
        name, size = bare_name(row["case"]).replace("_", " "), row["size"].strip("()").replace(", ", " x ")
        title = f"{name}, {size}; {row['objects']}"
        printed = f"{row['Baseline s']} / {row['Proposed s']}"
        here = " / ".join(f"{value:.3g}" for value in (baseline, proposed, ours))
        ratios = f"{paper[0] / paper[1]:.1f}", f"{baseline / proposed:.1f}"
        lines.append([title, printed, ratios[0], here, ratios[1]])
    return _with_notes(
        lines,
        "Paper s: baseline / proposed. Here s: the released algorithm with either network / ours with engine openvino-int8;",
        "medians. Ratio: baseline to proposed, of the released algorithm. The machines differ: compare ratios. Our cases are",
        "drawn at the sizes of the paper's; docs/speed.md tells how.",
    )


def table6() -> str:
    """The paper's hidden test set beside data sets that we have not seen; what is lost against Table 4, in points."""
    paper_before, paper = (printed_scores(table, "Quantized Proposed") for table in ("table4", "table6"))
    # ours: pictures of `val`, and of `val_unseen`, whose data sets our model has not seen
    rows = (score_rows(RESULTS / folder / "cases.csv", boxes="exact") for folder in ("table4", "table4_unseen"))
    rows = ([row for row in one if row["case"].startswith("2D_")] for one in rows)
    before, here = (measured_scores(one, "proposed-int8") for one in rows)
    lost = [drops(paper_before, paper), drops(before, here)]
    lines = [["target", "paper's test", "lost", "here, unseen sets", "lost"]]
    for target in [*PAPER_MODALITIES, "OCT"]:
        lines.append([target, *(_pair(column.get(target)) for column in (paper, lost[0], here, lost[1]))])
    lines.append([AVERAGE, _pair(paper[AVERAGE]), _pair(lost[0].pop(AVERAGE)), _pair(here[AVERAGE]), "-"])
    lost[1].pop(AVERAGE)
    common = [_pair(mean_score(column, column)) for column in lost]
    lines.append(["where both have it", "-", common[0], "-", common[1]])
    return _with_notes(
        lines,
        "DSC / NSD in per cent, int8. Paper's lost: Table 4 minus these. Average: as printed, of different targets in either table.",
        "Here: slices and pictures, no volumes; lost: pictures of val (data sets of the training) minus val_unseen; negative: gained.",
    )
