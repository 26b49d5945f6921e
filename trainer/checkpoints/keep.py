"""Checkpoints that stay: the newest `keep_last`, and the best validated one."""

import json
from collections.abc import Iterator
from pathlib import Path

from configs.schema import CheckpointConfig
from trainer.checkpoints.folders import complete_checkpoints, prune_checkpoints, step_of


def remove_old(run: Path, checkpoint: CheckpointConfig) -> None:
    """Delete what `keep_last` lets go, but never the best one so far if `keep_best` names its figure."""
    if checkpoint.keep_last is None:
        return
    best = best_checkpoint(run, checkpoint.keep_best) if checkpoint.keep_best is not None else None
    prune_checkpoints(run, keep_last=checkpoint.keep_last, best=best)


def best_checkpoint(run: Path, figure: str) -> Path | None:
    """The complete checkpoint whose step was validated best: on held-out pictures if there are any, else on those of
    the training. None if no checkpoint's step was validated.

    figure: "hole_psnr" (higher is better) or "loss" (mean over the noise levels, lower is better).
    """
    scores = dict(_scores(run / "validation.jsonl", figure))
    validated = [folder for folder in complete_checkpoints(run) if step_of(folder) in scores]
    return max(validated, key=lambda folder: scores[step_of(folder)], default=None)


def _scores(path: Path, figure: str) -> Iterator[tuple[int, float]]:
    """(step, score) of each validation, higher is better."""
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        figures = line.get("holdout") or line.get("train") or {}
        sign, prefix = (1, "hole_psnr") if figure == "hole_psnr" else (-1, "loss_sigma")
        values = [value for name, value in figures.items() if name == prefix or name.startswith(f"{prefix}_0")]
        if values and None not in values:  # null stands for a figure that was not finite
            yield line["step"], sign * sum(values) / len(values)
