"""Contenders compared: means with intervals, by hole size, and whether they differ by more than noise."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from trainer.evaluation.intervals import Interval, bootstrap, paired_difference
from trainer.evaluation.scores import SCORES

HOLE_SIZES = ((0.0, 0.1), (0.1, 0.3), (0.3, 1.01))  # fractions of the picture
_Scores = Sequence[Mapping[str, float]]  # of each picture


@dataclass(frozen=True)
class Contender:
    """What fills: a checkpoint, the base, or another run's.  step: None: it is not on this run's curve."""

    label: str
    step: int | None
    scores: list[dict[str, float]] = field(default_factory=list)  # of each picture


@dataclass(frozen=True)
class ScoreTable:
    """A score of all contenders over the same pictures, by label.

    gains: of each over the contender that all are held against, paired by picture, in units in which higher is better.
    by_hole_size: "0-10 %" -> label -> interval.
    """

    score: str
    means: dict[str, Interval]
    gains: dict[str, Interval]
    by_hole_size: dict[str, dict[str, Interval]]


@dataclass(frozen=True)
class Verdict:
    """Which step is best, by one score.  gains: of the best over each other contender."""

    score: str
    best: str
    gains: dict[str, Interval]


def compare(contenders: Sequence[Contender], hole_fractions: Sequence[float], *, against: str) -> dict[str, ScoreTable]:
    """Score -> its table, of every score that all contenders have for one picture at least."""
    fractions = np.array(hole_fractions)
    tables = {}
    for name in SCORES:
        columns = {each.label: _column(each.scores, name) for each in contenders}
        known = np.isfinite(np.stack(list(columns.values()))).all(axis=0)
        if not known.any():
            continue
        columns = {label: values[known] for label, values in columns.items()}
        good = {label: SCORES[name].goodness(values) for label, values in columns.items()}
        sizes = {}
        for low, high in HOLE_SIZES:
            inside = (fractions[known] >= low) & (fractions[known] < high)
            if inside.any():
                text = f"{low:.0%} to {min(high, 1):.0%}"
                sizes[text] = {label: bootstrap(values[inside]) for label, values in columns.items()}
        tables[name] = ScoreTable(
            name,
            {label: bootstrap(values) for label, values in columns.items()},
            {label: paired_difference(values, good[against]) for label, values in good.items() if label != against},
            sizes,
        )
    return tables


def judge(contenders: Sequence[Contender], score: str) -> Verdict:
    """The best of the run's steps by a score, and its gains over all others, paired by picture."""
    good = {each.label: SCORES[score].goodness(_column(each.scores, score)) for each in contenders}
    known = np.isfinite(np.stack(list(good.values()))).all(axis=0)
    good = {label: values[known] for label, values in good.items()}
    steps = [each.label for each in contenders if each.step is not None]
    best = max(steps, key=lambda label: good[label].mean())
    gains = {label: paired_difference(good[best], values) for label, values in good.items() if label != best}
    return Verdict(score, best, gains)


def _column(scores: _Scores, name: str) -> np.ndarray:
    return np.array([each.get(name, np.nan) for each in scores], dtype=np.float64)


def say_verdict(verdict: Verdict, tables: Mapping[str, ScoreTable]) -> list[str]:
    """The verdict in sentences, the first of which names the best."""
    score = SCORES[verdict.score]
    unit = f" {score.unit}" if score.unit else ""
    mean = tables[verdict.score].means[verdict.best]
    pictures = count_pictures(mean.n)
    said = [f"{verdict.best} is best by {score.title}: {_between(mean)}{unit}, over {pictures}."]
    for label, gain in verdict.gains.items():
        apart = f"{_between(-gain if gain.high < 0 else gain)}{unit if score.better != 'one' else ''}"
        if gain.excludes_zero and gain.mean > 0:
            said.append(f"It is better than {label} by {apart}: more than noise.")
        elif gain.excludes_zero:
            said.append(f"It is worse than {label} by {apart}: more than noise.")
        elif gain.is_of_too_few:
            said.append(f"It cannot be told from {label} ({apart}): {pictures} cannot tell, whatever the interval.")
        else:
            said.append(f"It cannot be told from {label} ({apart}): that is within the noise of these pictures.")
    return said


def count_pictures(count: int) -> str:
    return f"{count} picture{'s' if count != 1 else ''}"


def _between(interval: Interval) -> str:
    return f"{show(interval.mean)} [{show(interval.low)}, {show(interval.high)}]"


def show(value: float) -> str:
    """A figure of three significant digits or so, without an exponent."""
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def as_json(tables: Mapping[str, ScoreTable]) -> dict[str, Any]:
    return {name: asdict(table) | {"better": SCORES[name].better} for name, table in tables.items()}
