"""Files of truth and predictions -> scores -> means by modality, differences with intervals -> the tables people read.

Read top to bottom: the paper's numbers -> names and units of scores -> the files that step 5 reads -> means
(`summarize`) -> differences of two systems (`paired_differences`) -> tables as text. [P 3.1, Table 4]
"""

import csv
import itertools
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from formats import MODALITIES, InputError, printable
from formats.cache import in_parallel
from formats.case import told_in_a_sentence
from formats.truth import Truth, read_labels, read_prediction, read_truth  # noqa: F401  for step 5, and an example
from formats.writing import csv_cell, csv_text, progress, save_json, save_text, tell
from metrics import METRICS, PROTOCOLS, filled_box, inscribed_ellipse

# D11: two systems that never look at the image, to show what a box alone is worth
REFERENCES = {"filled box": filled_box, "inscribed ellipse": inscribed_ellipse}
AVERAGE, DRAWN = "Average", " (drawn)"  # the latter ends the name of a line of cases that demo_data drew
DRAWS, LEVEL = 10_000, 0.95  # of the bootstrap
PAPER_TABLES = Path(__file__).with_name("results") / "paper"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, each {column: text}. Or InputError."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited on for ever
            raise OSError(0, "no file")
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: csv_cell(text or "") for name, text in row.items() if name} for row in csv.DictReader(file)]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a clone of the repository holds it") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is no CSV in UTF-8 ({error}); write it again") from error


def paper_scores(quantized: tuple[bool, ...] = (False,)) -> dict[str, dict[str, float]]:
    """Columns of [P Table 4]: {title: {modality or Average: per cent}}. quantized: which models, float or int8."""
    rows, columns = read_rows(PAPER_TABLES / "table4.csv"), {}
    for system, metric, int8 in itertools.product(("Baseline", "Proposed"), ("DSC", "NSD"), quantized):
        name = "Quantized " * int8 + system
        numbers = {row["target"]: float(row[f"{name} {metric}"]) for row in rows}
        columns[f"paper's {name} on its own split: {metric}"] = numbers
    return columns


# Names and units of scores -----------------------------------------------------------------------------------------


def score_names(of_objects: bool = False) -> tuple[str, ...]:
    """The scores of a case, or of its objects, in the order of the columns: dsc_strict, nsd_strict, dsc_challenge, ..."""
    pairs = itertools.product(PROTOCOLS, METRICS.items())
    return tuple(f"{name}_{protocol}" for protocol, (name, metric) in pairs if not (of_objects and metric.of_case))


def scores_in(row: dict) -> list[str]:
    """The columns of a row that hold scores, whatever rows METRICS has by now."""
    return [column for column in row if column.rpartition("_")[2] in PROTOCOLS]


def title_and_factor(score: str) -> tuple[str, int]:
    """Title of a column, and what its numbers are printed times: ("NSD strict", 100), ("HD95 strict, mm", 1), ("s", 1)."""
    if score == "seconds":
        return "s", 1
    name, protocol = score.rsplit("_", 1)
    unit = METRICS[name].unit if name in METRICS else "%"
    return f"{name.upper()} {protocol}" + ("" if unit == "%" else f", {unit}"), 100 if unit == "%" else 1


def units() -> str:
    """What the numbers of all metrics are: "DSC and NSD in per cent, HD95 in mm (less is better)"."""
    names: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        unit = ("per cent" if metric.unit == "%" else metric.unit) + " (less is better)" * (not metric.more_is_better)
        names.setdefault(unit, []).append(name.upper())
    return ", ".join(f"{' and '.join(of)} in {unit}" for unit, of in names.items())


# What step 5 is given, scored case by case --------------------------------------------------------------------------


def score_cases(score: Callable, cases: list[Path]) -> tuple[list[dict], int]:
    """Rows that `score` gives of every case; a bad one is told and left out. -> rows, how many. InputError if none is left."""
    rows, left_out = [], 0
    for path in progress(cases, "score", unit="case"):
        try:
            rows += score(path)
        except InputError as error:
            left_out += 1
            tell(f"left out: {error}", error=True)
    if not rows:
        raise InputError(f"no case could be scored; {left_out} left out as told above")
    return rows, left_out


def find_inputs(entries: Sequence[str], shown: str | None, gts: Path) -> tuple[dict, str, list[Path], list[str]]:
    """What step 5 was given: ({system: folder}, the one that is shown, files of truth, a sentence for each file without).

    entries: "ours=runs/segs" or "other/segs", whose name is then "segs". shown: the first system if None. Or InputError."""
    systems: dict[str, Path] = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals or Path(entry).is_dir():  # a folder may have "=" in its name
            name, folder = Path(entry).resolve().name, entry
        if not name or name in systems or name in REFERENCES or printable(name) != name:
            raise InputError(f"--segs {entry}: name {name!r} is empty, taken or not text; give another, NAME={folder}")
        if not any(Path(folder).glob("*.npz")):
            raise InputError(f"no .npz in {folder}/. Run first: python 04_infer.py -i CASES -o {folder}")
        systems[name] = Path(folder)
    shown = shown or next(iter(systems))
    if shown not in systems:
        raise InputError(f"--show {shown}: no such system; there are {', '.join(systems)}")
    files = sorted(gts.glob("[!.]*.npz"))  # not the ._NAME.npz that a Mac leaves beside each file
    if not files:
        raise InputError(f"no .npz in {gts}/. Run first: python 01_preprocess.py, or correct --gts")
    named = {file.name for file in files}
    predicted = sorted(file for folder in systems.values() for file in folder.glob("[!.]*.npz"))
    problems = [f"{file}: has no ground truth in {gts}; add it" for file in predicted if file.name not in named]
    return systems, shown, files, problems


def with_times(rows: list[dict], systems: dict[str, Path]) -> list[dict]:
    """The rows with `seconds` and `boxes_are` (segment.BOX_KINDS) of step 4's efficiency.csv; nan and "" without one."""
    found = {}
    for system, path in ((system, folder / "efficiency.csv") for system, folder in systems.items()):
        try:
            lines = read_rows(path) if path.exists() else []
            if path.exists() and not lines:
                raise ValueError("no row")
            for line in lines:
                found[system, line["case"]] = float(line["total_s"]), line.get("boxes_are", "")
                if not 0 <= found[system, line["case"]][0] < math.inf:
                    raise ValueError(f"total_s is {line['total_s']}")
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise InputError(f"{path}: needs columns case and total_s ({error!r}); run 04_infer.py again") from error
    of_rows = [found.get((row["system"], row["case"]), (math.nan, "")) for row in rows]
    return [row | {"seconds": s, "boxes_are": kind} for row, (s, kind) in zip(rows, of_rows, strict=True)]


def score_all(
    score: Callable, protocols: tuple[str, ...], files: list[Path], systems: dict[str, Path], looseness: float, jobs: int,
    problems: list[str],
) -> list[dict]:  # fmt: skip
    """The rows of `score`, step 5's `score_case`, for every file, system by system; InputError if there are none.

    problems: sentences so far. Those of the cases are added, and all are told."""
    scored = in_parallel(partial(_score_file, score, protocols, systems, looseness), files, jobs)
    scored = list(progress(scored, "evaluate", len(files), unit="case"))
    problems += [problem for _, found in scored for problem in found]
    for problem in problems:
        tell(f"05_evaluate.py: {problem}", error=True)
    rows = [row for found, _ in scored for row in found]
    if not rows:
        raise InputError("no case could be scored; the problems are told above")
    return sorted(rows, key=lambda row: [*systems, *REFERENCES].index(row["system"]))


def _score_file(
    score: Callable, protocols: tuple[str, ...], systems: dict[str, Path], looseness: float, file: Path
) -> tuple[list, list[str]]:
    """In a worker: the rows of one file of truth, and a sentence for each prediction that cannot be scored."""
    masks, problems = {}, []
    try:
        with told_in_a_sentence(file):
            truth = read_truth(file, looseness)
            for system, path in ((system, folder / file.name) for system, folder in systems.items()):
                try:
                    if not path.exists():
                        raise InputError(f"{path}: no prediction for this case; run python 04_infer.py on it first")
                    with told_in_a_sentence(path):
                        masks[system] = read_prediction(path, truth)
                except InputError as error:
                    problems.append(str(error))
            masks |= {
                name: truth.labels_of(paint(truth.boxes, truth.labels.shape)) for name, paint in REFERENCES.items()
            }
            return list(score(truth, masks, protocols)), problems
    except InputError as error:
        return [], [*problems, str(error)]


# Means -------------------------------------------------------------------------------------------------------------


def table_lines(rows: list[dict], key: str) -> dict[str, list[np.ndarray]]:
    """{line of a table: the numbers that its mean of means is of}: one array for a modality, one of each for the average.

    rows: of one system. nan (no score, no time) is left out. Drawn cases have lines below the average; they are in it
    only where all cases are drawn."""
    lines = {}
    for drawn, modality in itertools.product((False, True), MODALITIES):
        if numbers := [r[key] for r in rows if (r["modality"], bool(r.get("drawn"))) == (modality, drawn)]:
            lines[modality + DRAWN * drawn] = [np.sort([x for x in numbers if not math.isnan(x)])]
    averaged = {name: values for name, values in lines.items() if not name.endswith(DRAWN)} or lines
    lines = averaged | {AVERAGE: [values for (values,) in averaged.values()]} | lines
    return {name: [values for values in arrays if len(values)] for name, arrays in lines.items()}


def mean_of_means(values: list[np.ndarray]) -> float:
    """1/M sum_m 1/n_m sum_c s_mc, the equation of step 5; nan without a number.   values: one array a modality."""
    return float(np.mean([numbers.mean() for numbers in values])) if values else math.nan


def summarize(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """{(system, line of the table): cases, objects, mean scores and seconds}, in the order of the table."""
    keys, summary = [*scores_in(rows[0]), *(["seconds"] if "seconds" in rows[0] else [])], {}
    for system in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in rows if row["system"] == system]
        lines = {key: table_lines(mine, key) for key in ("objects", *keys)}
        for name, objects in lines["objects"].items():
            counts = {"cases": sum(map(len, objects)), "objects": int(sum(map(sum, objects)))}
            summary[system, name] = counts | {key: mean_of_means(lines[key][name]) for key in keys}
    return summary


# Is one system better than another? --------------------------------------------------------------------------------
# D is the mean difference of step 5. How far would it move if other cases of the same kind had been drawn?
# Draw n_m cases of every modality m again, with repeats, from those we have, K = 10,000 times:
#
#     D_k = 1/M sum_m 1/n_m sum_j d_m,i(j)    i(j): the case that came j-th in draw k
#     interval: from the 2.5th to the 97.5th percentile of D_1 .. D_K                     [P Table 4 has no intervals]


def bootstrap_interval(groups: Sequence[np.ndarray], draws: int = DRAWS, seed: int = 0, level: float = LEVEL) -> tuple:
    """Percentile-bootstrap interval (low, high) of the mean of group means.

    groups: one array (n,) for each modality. A group keeps its size in each draw. A group of one case cannot vary;
    with two or three, the interval is narrower than it should be.
    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    >>> bootstrap_interval([np.array([2.0, 2.0]), np.array([4.0, 4.0, 4.0])])
    (3.0, 3.0)
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)  # D_k, until the division the sum over m
    for values in groups:
        drawn = rng.integers(len(values), size=(draws, len(values)))  # (draws, n)
        means += values[drawn].mean(axis=1)
    low, high = np.quantile(means / len(groups), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def paired_differences(rows: list[dict], pairs: Sequence[tuple[str, str]]) -> list[dict]:
    """Mean difference of each pair of systems, for each line of the table, with its interval; nan where one case is all.

    rows: of step 5's `score_case`, all at the same boxes. pairs: (system, system to subtract); a pair without rows is
    left out, and so is a case that has no score in either."""
    row_of, scores, found = {(row["system"], row["case"]): row for row in rows}, scores_in(rows[0]), []
    columns = ("system", "minus", "modality", "cases", "score", "difference", "low", "high")
    for system, minus in pairs:
        both = [(row, row_of.get((minus, row["case"]))) for row in rows if row["system"] == system]
        both = [ours | {s: ours[s] - theirs[s] for s in scores} for ours, theirs in both if theirs]
        for score, name, values in ((s, *line) for s in scores for line in table_lines(both, s).items()):
            if count := sum(map(len, values)):
                ends = bootstrap_interval(values) if count > 1 else (math.nan, math.nan)
                cells = (system, minus, name, count, score, mean_of_means(values), *ends)
                found.append(dict(zip(columns, cells, strict=True)))
    return found


# Tables as text ----------------------------------------------------------------------------------------------------


def summary_cells(summary: dict, columns: dict[str, tuple[str, str]], decimals: int = 2) -> list[list[str]]:
    """Cells of a table, its header first: a row a modality and the average.   columns: {title: (system, score)}."""
    last, rows = systems_of(summary)[-1], [["modality", "cases", *columns]]
    for modality in [modality for system, modality in summary if system == last]:
        found = [(summary.get((system, modality), {}).get(key, math.nan), key) for system, key in columns.values()]
        numbers = [cell(value * title_and_factor(key)[1], decimals) for value, key in found]
        rows.append([modality, str(summary[last, modality]["cases"]), *numbers])
    return rows


def score_columns(summary: dict, protocol: str, *more: str) -> dict[str, tuple[str, str]]:
    """{"system: title": (system, score)}: the scores of a protocol, more scores, seconds; what was computed of them."""
    systems = systems_of(summary)
    keys = dict.fromkeys([*(f"{metric}_{protocol}" for metric in METRICS), *more, "seconds"])
    pairs = [(s, key) for s in systems for key in keys if not (key == "seconds" and s in REFERENCES)]
    return {f"{s}: {title_and_factor(key)[0]}": (s, key) for s, key in pairs if key in summary[systems[-1], AVERAGE]}


def markdown_table(summary: dict[tuple[str, str], dict], protocols: tuple[str, ...]) -> str:
    """A row a modality and the average; a system's columns are its metrics, strict if computed, challenge NSD, seconds."""
    rows = summary_cells(summary, score_columns(summary, protocols[0], "nsd_challenge"))
    note = f"{units()}, s in seconds: means over the cases that have one. {AVERAGE}: over the modalities."
    return "\n".join([pipe_table(rows), "", note, *drawn_note(summary), ""])


def terminal_table(summary: dict[tuple[str, str], dict], protocol: str) -> str:
    """The scores of one protocol, and seconds where known, in a terminal's width."""
    header, *body = summary_cells(summary, score_columns(summary, protocol), decimals=1)
    titles = [re.sub(rf" {protocol}(, \S+)?$", r"\1", title) for title in header]
    return "\n".join([aligned([titles, *body]), *drawn_note(summary)])


def drawn_note(summary: dict[tuple[str, str], dict]) -> list[str]:
    """The sentence below a table that says how many of its cases are drawn; none if it has none."""
    cases = {name: line["cases"] for (_, name), line in summary.items()}
    count = sum(number for name, number in cases.items() if name.endswith(DRAWN))
    if list(cases)[-1] == AVERAGE and count:  # no line of real cases stands above it
        return [f"All {count} cases are drawn by us: scores on them say nothing about real images."]
    return [f"Drawn by us, to show that more kinds of images run: {count} cases, outside the average."] if count else []


def difference_table(lines: list[dict], columns: dict[str, str], scores: dict[str, str]) -> str:
    """Differences with their intervals, shares in points of per cent; a row for what the first columns name.

    lines: `paired_differences`'s. columns: {title: format, such as "{system}"}. scores: {title: score}."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for line in (line for line in lines if line["score"] in scores.values()):
        mean, low, high = (title_and_factor(line["score"])[1] * line[key] for key in ("difference", "low", "high"))
        row = rows.setdefault(tuple(form.format(**line) for form in columns.values()), {})
        row[line["score"]] = f"{mean:+.2f}" + ("" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]")
    body = [[*named, *(row.get(score, "-") for score in scores.values())] for named, row in rows.items()]
    return pipe_table([[*columns, *scores], *body])


def pipe_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first one the header, as a Markdown table without a line end at its end."""
    rows = [[printable(text).replace("|", "\\|").replace("<", "&lt;") for text in cells] for cells in rows]
    header, *body = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([header, "| " + " | ".join(["---"] * len(rows[0])) + " |", *body])


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as columns for the terminal, the header first; of titles "group: name" the group stands above."""
    groups, names = zip(*(title.rpartition(": ")[::2] for title in rows[0]), strict=True)
    widths = [max(5, *map(len, column)) for column in zip(names, *rows[1:], strict=True)]
    starts = [i for i in range(1, len(groups)) if groups[i] != groups[i - 1]]
    above = ""
    for start, end in itertools.pairwise([*starts, len(widths)]):
        above = above.ljust(widths[0] + sum(width + 2 for width in widths[1:start]) + 4) + groups[start]
        widths[start] += max(0, len(groups[start]) + 4 - sum(width + 2 for width in widths[start:end]))
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (names, *rows[1:])]
    return "\n".join(line.rstrip() for line in (above, *lines))


def systems_of(summary: dict[tuple[str, str], dict]) -> list[str]:
    """The systems of a summary in their order. The last one is a reference: it has a score for every case."""
    return list(dict.fromkeys(system for system, _ in summary))


def cell(value: float, decimals: int = 2) -> str:
    """A number as a table shows it; "-" for nan."""
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def write_tables(
    arguments: dict, rows: list[dict], summary: dict, differences: list[dict], protocols: tuple[str, ...]
) -> str:
    """Writes step 5's .csv files, table.md and arguments.json. Returns a table for the terminal.

    Scores in .csv are as computed, shares 0..1; what was not computed, or is nan, is left blank."""
    out, names = arguments["out"], ("system", "case", "modality")
    save_json(out / "arguments.json", arguments)
    labels = [(row, *labelled) for row in rows for labelled in sorted(row["labels"].items())]
    labels = [(row, label, scores) for row, label, scores in labels if not all(map(math.isnan, scores.values()))]
    objects = [{name: row[name] for name in names} | {"label": label} | scores for row, label, scores in labels]
    means = [{"system": system, "modality": modality, **line} for (system, modality), line in summary.items()]
    scored, compared = score_names(), ("system", "minus", "modality", "cases", "score", "difference", "low", "high")
    save_text(out / "cases.csv", csv_text(rows, (*names, "drawn", "objects", "boxes_are", *scored, "seconds")))
    save_text(out / "labels.csv", csv_text(objects, (*names, "label", *score_names(of_objects=True))))
    save_text(out / "modalities.csv", csv_text(means, ("system", "modality", "cases", "objects", *scored, "seconds")))
    save_text(out / "differences.csv", csv_text(differences, compared))
    scores = {title_and_factor(score)[0]: score for score in (f"{metric}_{protocols[0]}" for metric in METRICS)}
    averages = [line for line in differences if line["modality"] == AVERAGE]
    table = difference_table(averages, {"pair": "{system} - {minus}", "cases": "{cases}"}, scores)
    kinds = " and ".join(kind for kind in dict.fromkeys(row["boxes_are"] for row in rows) if kind)
    note = "Differences of the average, the first system's minus the second's, in the same units, with their "
    note += f"{LEVEL:.0%} bootstrap intervals." + f" The networks were asked with boxes that are {kinds}." * bool(kinds)
    save_text(out / "table.md", "\n".join([markdown_table(summary, protocols), table, "", note, ""]))
    told = f"{units()}, protocol {protocols[0]}" + f", boxes {kinds}" * bool(kinds)
    return f"{terminal_table(summary, protocols[0])}\n{told}; more in {out / 'table.md'}"


def finish_int8(
    out: Path, title: str, layers: list, reach: dict, seconds: dict, cases: list[dict], left_out: int, arguments: dict
) -> dict:
    """Write what step 3 found beside its file `out` as .md and .json, and print it. -> the report

    cases: rows of scores, float and int8.   left_out: cases that could not be scored; InputError if there are any."""
    import torch

    report = {"title": title, "layers": layers, "reach": reach, "seconds": seconds, "cases": cases}
    report |= {"repeats": arguments["repeats"], "threads": torch.get_num_threads(), "arguments": arguments}
    reached = [[what, f"{n:,}", f"{total:,}", f"{n / total:.1%}"] for what, (n, total) in reach.items()]
    timed = list(next(iter(seconds.values())))
    times = [["part", *(f"{name}, ms" for name in timed), *(f"{name}: times as fast" for name in timed[1:])]]
    for part, found in seconds.items():
        ratios = [f"{found['float'] / found[name]:.2f}" for name in timed[1:]]
        times.append([part, *(f"{1e3 * found[name]:.0f}" for name in timed), *ratios])
    text = "\n\n".join([
        "Multiply-adds, where counted, are those of one image and one box.", pipe_table([["", "int8", "of", "share"], *reached]),
        f"Median of {report['repeats']} runs, in turns, on {report['threads']} threads.", pipe_table(times),
        "Protocol strict, at the same boxes.", markdown_table(summarize(cases), ("strict",)).strip(),
    ])  # fmt: skip
    listed, beside = "\n".join(f"- `{name}`" for name in layers), out.name.removesuffix(".pt")
    save_text(out.with_name(f"{beside}.md"), f"# {title}\n\n{text}\n\nLayers in int8:\n\n{listed}\n")
    save_json(out.with_name(f"{beside}.json"), report)
    tell(text)
    if left_out:
        raise InputError(f"{len(cases) // 2} cases scored, {left_out} left out as told above; wrote {out}")
    command = f"python 04_infer.py --model {out} --engine torch-int8 -i CASES -o segs_int8"
    tell("Removed again. Next: 04_infer.py --smoke" if arguments.get("smoke") else f"Wrote {out}. Next: {command}")
    return report
