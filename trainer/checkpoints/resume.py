"""Resuming: the checkpoint to go on from, chosen and checked by all ranks together, and its tensors into any engine."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import InputError, StorageFailed
from configs.resume_settings import Change
from configs.schema import Config
from data.batches.order import OrderSettings
from data.storage.checkpoint_folders import complete_checkpoints, step_of
from trainer.checkpoints.compare import compare_configs, is_finished, precision_of
from trainer.checkpoints.folders import find_damage, newest_intact, set_later_ones_aside
from trainer.checkpoints.run_state import (
    RunState,
    TrainedBase,
    forget_rollbacks,
    good_checkpoints,
    read_rollbacks,
    read_state,
)
from trainer.checkpoints.tensor_files import StateFiles
from trainer.engines.base import Engine
from trainer.engines.ema import Ema
from trainer.engines.slices import REPLICATED, LocalSlice
from trainer.model.base_fingerprint import base_fingerprint, is_base
from trainer.optimizers.state import eight_bit_moments, quantize, scale_of, unreshardable_state
from trainer.process.json_lines import write_event
from trainer.process.outcome import AlreadyDone

log = logging.getLogger("fluxfill")


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on.  folder: the checkpoint; None for a fresh start.  saved_by: the engine, as
    `save.describe_engine` told of it.  changes: of the config, in force from now on."""

    state: RunState
    folder: Path | None = None
    saved_by: dict = field(default_factory=dict)
    changes: Sequence[Change] = ()


def find_start(config: Config, resume_from: str, engine: Engine, model: Path, order: OrderSettings) -> Start:
    """Where the run begins or goes on, before its model is loaded; all ranks call it.

    resume_from: "auto" (the newest checkpoint of the run folder that is intact and good, if there is one), "never", or
    a checkpoint's folder.  order: of a run that would start now.  Raises InputError if it cannot be: another order of
    the samples, another run's state, more steps than there are to be, nothing intact; AlreadyDone if nothing is left.
    """
    _refuse_ranks_that_differ(engine.ranks.all_gather(order))
    fingerprint_of_base = base_fingerprint(model) if engine.is_main else None
    base = TrainedBase(engine.ranks.broadcast_object(fingerprint_of_base), precision_of(config, engine.compute_dtype))
    folder = choose_checkpoint(config, resume_from, engine)
    if folder is None:
        if engine.is_main:
            forget_rollbacks(config.run.folder)
        fresh = RunState(step=0, batch=0, skips=0, restarts=0, order=order, base=base)
        return Start(fresh.exclude(config.guard.exclude_batches))
    state, saved_by = read_state(folder)
    if engine.is_main:
        state = _renew_fingerprint(read_rollbacks(config.run.folder, state), base, model)
    state = engine.ranks.broadcast_object(state if engine.is_main else None)
    _refuse_another_order(folder, state.order, order)
    if state.step > config.train.steps:
        raise InputError(
            f"train.steps is {config.train.steps}, but {folder} has {state.step} steps. Raise it, give an earlier "
            "checkpoint by --resume FOLDER, or start a new run (run.name)."
        )
    changes = compare_configs(folder, config, state, base, log_changes=engine.is_main)
    done = engine.is_main and state.step == config.train.steps and is_finished(config, state.step)
    if engine.ranks.broadcast_object(done):
        raise AlreadyDone(
            state.step,
            f"{config.run.folder}: all {state.step} steps are done. Nothing is left to train, and nothing was written; "
            "to go on, raise train.steps.",
        )
    state = replace(state.exclude(config.guard.exclude_batches), restarts=state.restarts + 1, base=base)
    return Start(state, folder, saved_by, changes)


def load_state(config: Config, start: Start, engine: Engine, ema: Ema) -> RunState:
    """The state that the run goes on from, weights, optimizer and average loaded; all zero for a fresh start."""
    state = start.state
    if start.folder is None:
        if engine.is_main:  # of what is damaged: the next start must not stumble over it
            set_later_ones_aside(config.run.folder, -1)
        return state
    load_tensors(start.folder, engine, ema, start.saved_by)
    log.info("resumed from %s, step %d (saved by %s)", start.folder, state.step, start.saved_by["name"])
    if engine.is_main:
        changed = [{"key": c.key, "before": c.before, "now": c.now, "effect": c.mark.effect} for c in start.changes]
        place = {"step": state.step, "restart": state.restarts, "checkpoint": str(start.folder)}
        write_event(config.run.folder, "resumed", **place, changed=changed)
    return state


def _renew_fingerprint(state: RunState, base: TrainedBase, model: Path) -> RunState:
    """The state with the fingerprint that its base has by now, if that is the model: releases made it of the files."""
    if state.base is None or not is_base(model, state.base.fingerprint):
        return state
    return replace(state, base=replace(state.base, fingerprint=base.fingerprint))


def _refuse_ranks_that_differ(orders: list[OrderSettings]) -> None:
    """Raise InputError if ranks would train in different orders: some rows twice, others never, in silence."""
    if others := [rank for rank, order in enumerate(orders) if order != orders[0]]:
        raise InputError(
            f"rank {others[0]} sees another data.cache than rank 0 ({orders[others[0]]}, not {orders[0]}). Look "
            "whether all machines read the same one, and whether it was written to just now; then start again "
            "(docs/troubleshooting.md#a-run-on-several-machines-hangs)."
        )


def _refuse_another_order(folder: Path, saved: OrderSettings, current: OrderSettings) -> None:
    """Raise InputError that lists what would change the order of a run's samples. Version, streams and blocks are not
    asked of the config again: the run keeps its own."""
    problems = [
        f"{key} is {now!r}, the run has {before!r}"
        for key, now, before in (
            ("run.seed", current.seed, saved.seed),
            ("train.global_batch_size", current.global_batch_size, saved.global_batch_size),
            ("weight of data.datasets", current.weights, saved.weights),
        )
        if now != before
    ]
    if current.shards != saved.shards:
        problems.append("data.cache holds other training samples than when the run began")
    if problems:
        raise InputError(
            f"{folder}: another order of the samples:\n  " + "\n  ".join(problems) + "\n"
            "Set them back (the cache: `fluxfill preprocess CONFIG` with the pictures as they were), or start a new "
            "run, run.name (docs/troubleshooting.md#a-run-does-not-go-on)."
        )
    if current.streams != saved.streams:
        log.info("data.streams %d: the run keeps the %d that it began with", current.streams, saved.streams)


def choose_checkpoint(config: Config, resume_from: str, engine: Engine) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None for a fresh start.

    Raises InputError if the one that was asked for is damaged, if there should be none, or if all are damaged: that is
    no fresh start, unless "never" asks for one.
    """
    run = config.run.folder
    if resume_from not in ("auto", "never"):
        folder = Path(resume_from)
        if damage := _damage_that_all_find(engine, folder):
            raise InputError(f"--resume {folder}: {damage}. Give an intact checkpoint folder, or auto.")
        return folder
    # Rank 0's list is everyone's: ranks that chose differently would drift apart in silence.
    complete = engine.ranks.broadcast_object(_best_last(config) if engine.is_main else None)
    chosen = newest_intact(complete, partial(_damage_that_all_find, engine), log_skipped=engine.is_main)
    if resume_from == "never":
        if chosen is not None:
            raise InputError(
                f"{run}: holds checkpoints already. Choose another run.name, or resume with --resume auto."
            )
        return None
    if complete and chosen is None:
        raise InputError(
            f"{run}: none of its {len(complete)} checkpoints is intact; the log says what is wrong with each. Put back "
            "the damaged files, or begin anew: --resume never, which keeps these folders as step-<number>.undone, or "
            "another run.name (docs/troubleshooting.md#a-run-does-not-go-on)."
        )
    later = [folder for folder in complete if chosen is not None and step_of(folder) > step_of(chosen)]
    if engine.is_main and later:
        log.warning("%s was saved between skipped updates, or is damaged: not gone on from", later[-1])
    return chosen


def _best_last(config: Config) -> list[Path]:
    """The run's complete checkpoints, good ones behind the others, and behind these the end of a run that is done.

    From a good one the run comes to the others again, to the bit, if nothing was changed; and a learning rate that was
    lowered since must not begin with weights that had diverged already.
    """
    complete = complete_checkpoints(config.run.folder)
    good = set(good_checkpoints(complete))
    return sorted(complete, key=lambda folder: (step_of(folder) >= config.train.steps, folder in good, step_of(folder)))


def choose_rollback(config: Config, engine: Engine, state: RunState) -> Path | None:
    """The checkpoint to go back to: the newest good one; if none was saved since the last rollback, the one before
    that, if there is one. None if no good one is intact. All ranks call it."""
    good: list[Path] = []
    if engine.is_main:
        good = good_checkpoints(complete_checkpoints(config.run.folder))
    good = engine.ranks.broadcast_object(good)
    find_damage_together = partial(_damage_that_all_find, engine)
    newest = newest_intact(good, find_damage_together, log_skipped=engine.is_main)
    if newest is None or step_of(newest) != state.back_to:
        return newest
    before = good[: good.index(newest)]
    return newest_intact(before, find_damage_together, log_skipped=engine.is_main) or newest


def _damage_that_all_find(engine: Engine, folder: Path) -> str | None:
    """Damage of a checkpoint, the same answer on every rank: each reads its share of it, since one alone would read
    190 GiB for longer than the others wait.

    Rank 0 reads again what another finds damaged. Raises InputError if it finds nothing: a machine that sees another
    run.dir must not send the run back to an older checkpoint. Raises StorageFailed, on all, if one's storage does not
    answer.
    """
    own, failure = None, None
    try:
        own = find_damage(folder, rank=engine.rank, world_size=engine.world_size)
    except StorageFailed as error:
        failure = f"{error} What does not answer is not damaged: --resume FOLDER takes another checkpoint meanwhile."
    told = engine.ranks.all_gather((own, failure))
    if failures := [failure for _, failure in told if failure]:
        raise StorageFailed(failures[0])
    seen = [damage for damage, _ in told]
    finders = [rank for rank, damage in enumerate(seen) if damage]
    if not finders or finders[0] == 0:
        return seen[0]
    own = find_damage(folder, rank=finders[0], world_size=engine.world_size) if engine.is_main else None
    if damage := engine.ranks.all_gather(own)[0]:
        return damage
    raise InputError(
        f"{folder}: rank {finders[0]} finds that {seen[finders[0]]}, rank 0 finds it intact. Look whether all machines "
        "see the same run.dir; then start again."
    )


@torch.no_grad()
def load_tensors(folder: Path, engine: Engine, ema: Ema, saved_by: dict) -> None:
    """Load weights, optimizer and average of this rank's slices from any engine's checkpoint.

    saved_by: the engine, as `save.describe_engine` told of it.  8-bit moments that were cut otherwise are dequantized
    and quantized again, which moves them by up to the width of a code, and the log says so.  Raises InputError if the
    trained tensors or the optimizer are not the checkpoint's.
    """
    engine.init_optimizer_state()
    slices = engine.local_slices()
    files = StateFiles(folder)
    own = {part.name: part.numel for part in slices}
    wrong = [name for name, numel in own.items() if files.sizes.get(name) != numel]
    if wrong or len(files.sizes) != len(engine.trained_sizes):
        raise InputError(
            f"{folder}: trains {len(files.sizes)} tensors, this config {len(engine.trained_sizes)}"
            + (f"; {wrong[0]} is of another size" if wrong else "")
            + ". model.base and method must stay as they were; start a new run, run.name, to change them "
            "(docs/troubleshooting.md#a-run-does-not-go-on)."
        )
    states = {name: state for name, _, state in engine.optimizer_states()}
    bound, same_layout = unreshardable_state(engine.optimizer_states()), saved_by["layout"] == engine.state_layout
    saved_bound = (
        files.read_bound(0 if engine.state_layout == REPLICATED else engine.rank) if bound and same_layout else {}
    )
    # One number of a weight that began at 0 throughout: so Prodigy's older checkpoints hold where it began.
    numbers = {name: value for name, value in saved_bound.items() if value.ndim == 0}
    saved_bound |= {name: value.expand_as(bound[name]) for name, value in numbers.items() if name in bound}
    of_moments = {name: saved_bound.pop(name) for name in numbers.keys() - bound.keys()}
    kinds: set[str] = set().union(*(part.moments for part in slices))
    kinds |= {moment for state in states.values() for moment, _ in eight_bit_moments(state)}
    # Of all ranks: of small tensors, or of none, a rank has no such state.
    told = engine.ranks.all_gather((kinds, bool(bound)))
    kinds, any_bound = set[str]().union(*(of_rank for of_rank, _ in told)), any(flag for _, flag in told)
    saved_kinds = files.kinds() - {"weight", "ema"} | {name.rpartition("//")[2] for name in of_moments}
    other = sorted(dict(_shapes(bound).items() ^ _shapes(saved_bound).items())) if same_layout else []
    if other or (kinds, any_bound) != (saved_kinds, saved_by["bound"]):
        raise InputError(
            f"{folder}: its optimizer's state is not what train.optimizer keeps here: it holds "
            f"{', '.join(sorted(saved_kinds)) or 'no moments'}, this run {', '.join(sorted(kinds)) or 'none'}"
            + (f"; {other[0]} is of another shape" if other else "")
            + ". train.optimizer and the version of its package must stay as they were, or start a new run, run.name "
            "(docs/troubleshooting.md#a-run-does-not-go-on)."
        )
    if ema.averages and "ema" not in files.kinds():
        raise InputError(f"{folder}: holds no moving average. Set train.ema_decay=null, or start a new run.")
    for part in slices:
        count = part.weight.numel()
        weight = files.read("weight", part.name, part.start, count)
        if count and weight.dtype != part.weight.dtype:
            raise InputError(
                f"{folder}: holds weights in {weight.dtype}, this run trains them in {part.weight.dtype}. "
                "train.weights must stay as it was, or start a new run."
            )
        part.weight.copy_(weight)
        for key, moment in part.moments.items():
            number = of_moments.get(f"{part.of}//{key}")
            moment.copy_(files.read(key, part.name, part.start, count) if number is None else number)
        if ema.averages:
            ema.averages[part.name].copy_(files.read("ema", part.name, part.start, count))
    for name, value in saved_bound.items():
        bound[name].copy_(value)
    if bound and not same_layout:
        _requantize(files, slices, states)
    if engine.is_main and any_bound and not same_layout:
        log.warning(
            "8-bit optimizer state saved as %s was quantized again as %s, so not bit for bit",
            saved_by["layout"],
            engine.state_layout,
        )
    for _, _, state in engine.optimizer_states():
        step = state.get("step")
        state["step"] = torch.full_like(step, saved_by["steps"]) if isinstance(step, Tensor) else saved_by["steps"]
    engine.sync_after_load()


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _requantize(files: StateFiles, slices: list[LocalSlice], states: dict[str, dict]) -> None:
    """Quantize moments that a checkpoint holds in other slices into this rank's 8-bit tensors."""
    for of, state in states.items():
        for moment, codes in eight_bit_moments(state):
            numbers = torch.zeros(codes.numel(), device=codes.device)
            for part in slices:
                if part.of == of:
                    count = part.weight.numel()
                    numbers[part.at : part.at + count] = files.read(moment, part.name, part.start, count)
            new_codes, scales = quantize(numbers, moment)
            codes.copy_(new_codes.view_as(codes))
            state[scale_of(moment)].copy_(scales)
