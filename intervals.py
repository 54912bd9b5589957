"""Is one system better than another? Differences on the same cases, with bootstrap intervals. [P Table 4 has none]

Two systems get the same cases with the same boxes, so they are subtracted case by case: what makes a case hard for both
falls out. The interval says how far the mean difference would move if other cases of the same kind had been drawn:
draw as many cases again, with repeats, from those we have; take the mean; do that 10,000 times; cut off the outer 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tables import AVERAGE, MODALITIES, SCORES

DRAWS = 10_000
LEVEL = 0.95


def bootstrap_interval(
    groups: Sequence[np.ndarray], draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile-bootstrap interval (low, high) of the mean of group means.

    groups: one array (n,) for each modality. Cases are drawn with repeats within their group, so that each keeps its
    size. A group of one case cannot vary; with two or three, the interval is narrower than it should be.
    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    >>> bootstrap_interval([np.array([2.0, 2.0]), np.array([4.0, 4.0, 4.0])])
    (3.0, 3.0)
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for values in groups:
        drawn = rng.integers(len(values), size=(draws, len(values)))  # (draws, n)
        means += values[drawn].mean(axis=1)
    low, high = np.quantile(means / len(groups), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def paired_differences(rows: list[dict], pairs: Sequence[tuple[str, str]], draws: int = DRAWS) -> list[dict]:
    """Mean difference of each pair of systems, by modality and on average, with its interval.

    rows: `scoring.score_case`'s, all at the same boxes. pairs: (system, system to subtract); a pair without rows is
    left out. Means are over cases, then over modalities; a case without a score in either system does not count.
    Returns one dict for each pair, modality and score: system, minus, modality, cases, score, difference, low, high.
    low and high are nan where one case is all there is.
    """
    of_system: dict[str, dict[str, dict]] = {}
    for row in rows:
        of_system.setdefault(row["system"], {})[row["case"]] = row
    found = []
    for system, minus in pairs:
        ours, theirs = of_system.get(system, {}), of_system.get(minus, {})
        for score in SCORES:
            values: dict[str, list[float]] = {}
            for case in ours.keys() & theirs.keys():
                difference = ours[case][score] - theirs[case][score]
                if not math.isnan(difference):
                    values.setdefault(ours[case]["modality"], []).append(difference)
            # sorted: sets have no order, and the draws must not depend on one
            groups = {m: np.sort(np.array(values[m])) for m in MODALITIES if m in values}
            lines = {m: [group] for m, group in groups.items()} | ({AVERAGE: list(groups.values())} if groups else {})
            for modality, members in lines.items():
                cases = sum(map(len, members))
                low, high = bootstrap_interval(members, draws) if cases > 1 else (math.nan, math.nan)
                line = {"system": system, "minus": minus, "modality": modality, "cases": cases, "score": score}
                mean = float(np.mean([group.mean() for group in members]))
                found.append(line | {"difference": mean, "low": low, "high": high})
    return found
