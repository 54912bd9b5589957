"""The report of step 3 as text: shares, sizes, speed and scores of a float model and of its int8 form."""

from __future__ import annotations

import numpy as np

from files import modality_of

SYSTEMS = ("float", "int8")


def markdown(report: dict) -> str:
    """A report as text with tables.   report: what 03_quantize.py writes as JSON."""
    weights, macs, size, speed = report["weights"], report["macs"], report["bytes"], report["speed"]
    lines = [
        f"# {report['model']}, {report['method']} int8, one weight scale per {report['weight_int8']}",
        "",
        f"- Layers: {report['what']}",
        f"- Weights: {weights['int8']:,} of {weights['total']:,} ({weights['share']:.1%}).",
        f"- Multiply-adds, one image and one box: {report['mac_share']['total']:.1%} of {macs['total'] / 1e9:.2f} G "
        f"(encoder {report['mac_share']['encoder']:.1%}, decoder {report['mac_share']['decoder']:.1%}).",
        f"- File: {size['float'] / 1e6:.1f} MB -> {size['int8'] / 1e6:.1f} MB ({size['int8'] / size['float']:.0%}).",
        f"- Speed: {speed['threads']} threads, median of {speed['repeats']}, in turns; float is PyTorch.",
        "",
    ]
    timed = [name for name in ("float", "openvino", "int8") if name in next(iter(times_of(report).values()))]
    titles = {"float": "float, ms", "openvino": "float in OpenVINO, ms", "int8": "int8, ms"}
    lines += [f"| part | {' | '.join(titles[name] for name in timed)} | times as fast |"]
    lines += ["| --- |" + " --- |" * (1 + len(timed))]
    for part, found in times_of(report).items():
        times = " | ".join(f"{found[name] * 1e3:.0f}" for name in timed)
        lines.append(f"| {part} | {times} | {found['ratio']:.2f} |")
    for first, rows in (("modality", by_modality(report["cases"])), ("case", report["cases"])):
        lines += ["", *before_and_after(first, [*rows, report["mean"]])]
    lines += ["", "In per cent, protocol strict, the same boxes for both models.", "", "Layers that became int8:", ""]
    return "\n".join(lines + [f"- `{name}`" for name in report["layers"]] + [""])


def times_of(report: dict) -> dict[str, dict]:
    """The timed parts of a report: {part: {system: seconds, "ratio": float / int8}}."""
    return {part: found for part, found in report["speed"].items() if isinstance(found, dict)}


def before_and_after(first: str, rows: list[dict]) -> list[str]:
    """Lines of a table with a row each: name, objects, DSC and NSD of both models, pixels that differ."""
    keys = [f"{metric}_{name}" for metric in ("dsc", "nsd") for name in SYSTEMS] + ["differ"]
    titles = [f"{metric} {name}" for metric in ("DSC", "NSD") for name in SYSTEMS] + ["pixels that differ"]
    lines = [f"| {first} | objects | {' | '.join(titles)} |", "| --- |" + " --- |" * (1 + len(titles))]
    for row in rows:
        lines.append(f"| {row['case']} | {row['objects']} | " + " | ".join(f"{100 * row[k]:.2f}" for k in keys) + " |")
    return lines


def mean_row(rows: list[dict], name: str = "mean of the modalities") -> dict:
    """Plain means over rows: a modality's from its cases, the last one from the modalities, as in step 5."""
    keys = [key for key in rows[0] if key not in ("case", "objects")]
    means = {key: float(np.nanmean([row[key] for row in rows])) for key in keys}
    return {"case": name, "objects": sum(row["objects"] for row in rows)} | means


def by_modality(rows: list[dict]) -> list[dict]:
    """Means over the cases of each modality, in alphabetical order."""
    modalities = sorted({modality_of(row["case"]) for row in rows})
    return [mean_row([row for row in rows if modality_of(row["case"]) == name], name) for name in modalities]
