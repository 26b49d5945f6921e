"""The figures of a log's lines as points of a curve: thinned to what a screen shows, with every peak kept."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

MOST_POINTS = 1200  # of a curve


class Curve(TypedDict):
    """x: steps, rising.  y: a figure of each; None where it was not finite."""

    x: list[int]
    y: list[float | None]


def as_number(value: object) -> float | None:
    """None of what is no finite number."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_one else None  # type: ignore[arg-type]


def as_whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def make_curve(lines: Iterable[dict[str, Any]], name: str, *, digits: int = 6) -> Curve | None:
    """The curve of a figure over "step". None of one that no line has.  digits: that are kept of a figure; a time, in
    seconds since 1970, needs 13."""
    points = [(step, as_number(line.get(name))) for line in lines if (step := as_whole(line.get("step"))) is not None]
    if all(value is None for _, value in points):
        return None
    points = thin(points)
    return {"x": [step for step, _ in points], "y": [_short(value, digits) for _, value in points]}


def thin(points: Sequence[tuple[int, float | None]], most: int = MOST_POINTS) -> list[tuple[int, float | None]]:
    """At most so many of the points: of each stretch the lowest and the highest, and the first gap, in their order."""
    if len(points) <= most:
        return list(points)
    stretches = max(most // 3, 1)
    kept: set[int] = {0, len(points) - 1}
    for number in range(stretches):
        first, end = number * len(points) // stretches, (number + 1) * len(points) // stretches
        known = [index for index in range(first, end) if points[index][1] is not None]
        if known:
            kept |= {min(known, key=lambda index: points[index][1] or 0.0)}
            kept |= {max(known, key=lambda index: points[index][1] or 0.0)}
        if len(known) < end - first:
            kept.add(next(index for index in range(first, end) if points[index][1] is None))
    return [points[index] for index in sorted(kept)]


def _short(value: float | None, digits: int) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")
