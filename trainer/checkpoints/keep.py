"""Checkpoints that stay: the newest `keep_last`, the newest good one, and the best validated one."""

import json
from collections.abc import Iterator
from pathlib import Path

from configs.best_figure import best_figure
from configs.schema import Config
from data.storage.checkpoint_folders import complete_checkpoints, step_of
from trainer.checkpoints.folders import prune_checkpoints
from trainer.checkpoints.run_state import good_checkpoints


def remove_old(config: Config) -> None:
    """Delete what `keep_last` lets go, but never the newest good one, which a rollback goes to, nor the best one so far
    unless `keep_best` is null."""
    run, checkpoint = config.run.folder, config.checkpoint
    if checkpoint.keep_last is None:
        return
    kept = good_checkpoints(complete_checkpoints(run))[-1:]
    if checkpoint.keep_best is not None and (best := best_checkpoint(run, best_figure(config))):
        kept.append(best)
    prune_checkpoints(run, keep_last=checkpoint.keep_last, others=kept)


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
        try:
            line = json.loads(text)
        except ValueError:  # written just now: the training goes on meanwhile
            continue
        figures = line.get("holdout") or line.get("train") or {}
        sign, prefix = (1, "hole_psnr") if figure == "hole_psnr" else (-1, "loss_sigma")
        values = [value for name, value in figures.items() if name == prefix or name.startswith(f"{prefix}_0")]
        if values and None not in values:  # null stands for a figure that was not finite
            yield line["step"], sign * sum(values) / len(values)
