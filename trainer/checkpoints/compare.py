"""A checkpoint's config beside that of the run that goes on from it: what is told, and what is refused."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from configs.combinations import QUANTIZED
from configs.errors import InputError
from configs.loading import load_config
from configs.resume_settings import Change, compare_settings
from configs.schema import Config
from trainer.checkpoints.run_state import RunState, TrainedBase
from trainer.optimizers.optimizer import learning_rate
from trainer.process.json_lines import EVENTS

log = logging.getLogger("fluxfill")

_RATE_KEYS = {"steps", "lr", "lr_schedule", "lr_final_fraction", "warmup_steps", "schedule_steps"}


def precision_of(config: Config, compute_dtype: torch.dtype) -> str:
    """What model.precision is, or became of auto."""
    if config.model.precision in QUANTIZED:
        return config.model.precision
    return "fp32" if compute_dtype == torch.float32 else "bf16"


def compare_configs(
    folder: Path, config: Config, state: RunState, base: TrainedBase, *, log_changes: bool
) -> Sequence[Change]:
    """What of the config is in force from now on and was not when the checkpoint was saved.

    log_changes: say so in the log, with what cannot be told; for one of the ranks, which all find the same.  Raises
    InputError, with all of it, if the state would be another run's.
    """
    path = folder / "config.yaml"
    try:
        before = load_config(path, saved_by_a_run=True)
    except InputError as error:
        if log_changes:
            log.warning("what has changed since the checkpoint cannot be told: %s", error)
        return ()
    known: dict[str, tuple[str | None, str | None]] = {}
    if state.base is None:  # saved before that was kept: a path tells nothing of what lies there
        known = {key: (None, None) for key in ("model.base", "model.precision")}
    else:
        bases = [
            f"{of.model.base} (transformer {kept.fingerprint[:12]})"
            for of, kept in ((before, state.base), (config, base))
        ]
        is_same = state.base.fingerprint == base.fingerprint
        known["model.base"] = ("", "") if is_same else (bases[0], bases[1])
        # Whole models are trained in fp32 or by train.weights; to them the precision is that of the arithmetic.
        is_adapter = config.method.type != "full"
        known["model.precision"] = (state.base.precision, base.precision) if is_adapter else ("", "")
    in_force, refused = compare_settings(before, config, known)
    if refused:
        raise InputError(
            f"{folder} is another run's state:\n  "
            + "\n  ".join(map(str, refused))
            + "\nSet them back, or start a new "
            "run: run.name, and method.init_from to begin with what this one has trained "
            "(docs/troubleshooting.md#a-run-does-not-go-on)."
        )
    if not log_changes:
        return in_force
    for change in in_force:
        log.info("%s: from now on, %s", change, change.mark.effect)
    if state.step and {change.key.removeprefix("train.") for change in in_force} & _RATE_KEYS:
        _tell_rates(before, config, state)
    return in_force


def _tell_rates(before: Config, config: Config, state: RunState) -> None:
    last = learning_rate(before.train, state.step - 1) * state.lr_scale
    log.info("learning rate: %.3g at the last step", last)
    if state.step == config.train.steps:
        return
    next_rate = learning_rate(config.train, state.step) * state.lr_scale
    would_be = learning_rate(before.train, state.step) * state.lr_scale
    log.info("learning rate: %.3g at the next one; by the run's config so far it would be %.3g", next_rate, would_be)
    if next_rate > 1.5 * last and config.train.steps > before.train.steps and config.train.schedule_steps is None:
        end = before.train.schedule_steps or before.train.steps
        log.warning(
            "the learning rate jumps from %.3g to %.3g, as its schedule now ends at step %d. "
            "train.schedule_steps=%d lets it end where it did (with train.lr_final_fraction above 0)",
            *(last, next_rate, config.train.steps, end),
        )


def is_finished(config: Config, step: int) -> bool:
    """Whether the last thing that the run did was to write what it had trained at this step."""
    if not config.checkpoint.at_end:
        return True
    run, last = config.run.folder, None
    if (run / EVENTS).is_file() and (run / "final").is_dir():
        for text in (run / EVENTS).read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # of a process that was killed while it wrote
                continue
            if line["event"] in ("resumed", "exported"):
                last = line
    return last is not None and (last["event"], last["step"]) == ("exported", step)
