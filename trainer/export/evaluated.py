"""What `fluxfill evaluate` found of a run, for its exports: the best step, and a step's scores for the model card."""

import json
import logging
from pathlib import Path
from statistics import fmean
from typing import Any

log = logging.getLogger("fluxfill")

PAGE = "evaluation.html"

_VERSION = 1


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """A run's evaluation.json; None where there is none, or one that this code does not know."""
    path = run / "evaluation" / "evaluation.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s: left out, it cannot be read (%s)", path, error)
        return None
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        log.warning("%s: left out, this fluxfill knows evaluations of version %d", path, _VERSION)
        return None
    return found


def best_evaluated(run: Path, weights: str) -> int | None:
    """The step that the run's evaluation found best; None also where that was of other weights than these."""
    found = read_evaluation(run) or {}
    step = found.get("steps", {}).get((found.get("best") or {}).get("step"))
    return step if step is not None and _is_of(run, found, weights) else None


def render_scores(run: Path, step: int, weights: str) -> str:
    """Means over the pictures that a step was evaluated on, beside those of what it was held against, as a table of
    Markdown; empty if it was not evaluated with these weights."""
    found = read_evaluation(run) or {}
    label = next((label for label, evaluated in found.get("steps", {}).items() if evaluated == step), None)
    pictures = [picture["scores"] for picture in found.get("pictures", [])]
    if label is None or not pictures or not _is_of(run, found, weights):
        return ""
    rival = found.get("against", label)
    columns = [label] if rival == label else [rival, label]
    rows = []
    for score in pictures[0].get(label, {}):
        means = [_mean([scores.get(each, {}).get(score) for scores in pictures]) for each in columns]
        rows.append(f"| {score} | {' | '.join(means)} |")
    head = f"| mean of {len(pictures)} pictures | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}\n"
    return head + "\n".join(rows) + "\n"


def _is_of(run: Path, found: dict[str, Any], weights: str) -> bool:
    """Whether an evaluation is of these weights. What is left out as it is not, is told."""
    evaluated = found.get("weights")  # None: by a fluxfill that did not note them
    if evaluated != weights:
        log.warning(
            "%s: left out, it is of %s weights. For those of this export: fluxfill evaluate %s --weights %s",
            *(run / "evaluation" / "evaluation.json", evaluated or "unknown", run, weights),
        )
    return evaluated == weights


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.4g}" if known else ""
