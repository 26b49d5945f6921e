"""Resuming: the checkpoint to go on from, chosen and checked by all ranks together, and its tensors into any engine."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import InputError
from configs.schema import Config
from data.batches.order import OrderSettings
from trainer.checkpoints.folders import complete_checkpoints, find_damage, newest_intact
from trainer.checkpoints.run_state import RunState, read_state
from trainer.checkpoints.tensor_files import StateFiles
from trainer.engines.base import Engine
from trainer.engines.ema import Ema
from trainer.engines.slices import REPLICATED, LocalSlice
from trainer.optimizers.state import eight_bit_moments, quantize, scale_of, unreshardable_state

log = logging.getLogger("fluxfill")


def resume(config: Config, resume_from: str, engine: Engine, ema: Ema, order: OrderSettings) -> RunState:
    """The state that the run goes on from, weights, optimizer and average loaded; all zero for a fresh start.

    resume_from: "auto" (the newest intact checkpoint of the run folder, if there is one), "never", or a checkpoint's
    folder.  order: of a run that would start now.  Raises InputError if it cannot be: another order of the samples,
    another method, a damaged folder.
    """
    _refuse_ranks_that_differ(engine.ranks.all_gather(order))
    folder = choose_checkpoint(config, resume_from, engine)
    if folder is None:
        return RunState(step=0, batch=0, skips=0, restarts=0, order=order)
    state, saved_by = read_state(folder)
    _refuse_another_order(folder, state.order, order)
    load_tensors(folder, engine, ema, saved_by)
    log.info("resumed from %s, step %d (saved by %s)", folder, state.step, saved_by["name"])
    return replace(state, restarts=state.restarts + 1)


def _refuse_ranks_that_differ(orders: list[OrderSettings]) -> None:
    """Raise InputError if ranks would train in different orders: some rows twice, others never, in silence."""
    if others := [rank for rank, order in enumerate(orders) if order != orders[0]]:
        raise InputError(
            f"rank {others[0]} sees another data.cache than rank 0 ({orders[others[0]]}, not {orders[0]}). Look "
            "whether all machines read the same one, and whether it was written to just now; then start again."
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
            "run (run.name)."
        )
    if current.streams != saved.streams:
        log.info("data.streams %d: the run keeps the %d that it began with", current.streams, saved.streams)


def choose_checkpoint(config: Config, resume_from: str, engine: Engine) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None for a fresh start.

    Raises InputError if the one that was asked for is damaged, or if there should be none.
    """
    run = config.run.folder
    # Rank 0's list is everyone's: ranks that chose differently would drift apart in silence.
    complete = engine.ranks.all_gather(complete_checkpoints(run) if engine.is_main else None)[0]
    if resume_from == "never":
        if complete:
            raise InputError(
                f"{run}: holds checkpoints already. Choose another run.name, or resume with --resume auto."
            )
        return None
    if resume_from == "auto":
        return newest_intact(complete, partial(_damage_that_all_find, engine), log_skipped=engine.is_main)
    folder = Path(resume_from)
    if damage := _damage_that_all_find(engine, folder):
        raise InputError(f"--resume {folder}: {damage}. Give an intact checkpoint folder, or auto.")
    return folder


def _damage_that_all_find(engine: Engine, folder: Path) -> str | None:
    """Damage of a checkpoint, the same answer on every rank: each reads its share of it, since one alone would read
    190 GiB for longer than the others wait.

    Rank 0 reads again what another finds damaged. Raises InputError if it finds nothing: a machine that sees another
    run.dir must not send the run back to an older checkpoint.
    """
    seen = engine.ranks.all_gather(find_damage(folder, rank=engine.rank, world_size=engine.world_size))
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
            + ". model.base and method must stay as they were; start a new run (run.name) to change them."
        )
    states = {name: state for name, _, state in engine.optimizer_states()}
    bound, same_layout = unreshardable_state(engine.optimizer_states()), saved_by["layout"] == engine.state_layout
    saved_bound = (
        files.read_bound(0 if engine.state_layout == REPLICATED else engine.rank) if bound and same_layout else {}
    )
    kinds: set[str] = set().union(*(part.moments for part in slices))
    kinds |= {moment for state in states.values() for moment, _ in eight_bit_moments(state)}
    # Of all ranks: of small tensors, or of none, a rank has no such state.
    told = engine.ranks.all_gather((kinds, bool(bound)))
    kinds, any_bound = set[str]().union(*(of_rank for of_rank, _ in told)), any(flag for _, flag in told)
    shapes, saved_shapes = ({name: value.shape for name, value in kept.items()} for kept in (bound, saved_bound))
    if (
        kinds != files.kinds() - {"weight", "ema"}
        or any_bound != saved_by["bound"]
        or (same_layout and shapes != saved_shapes)
    ):
        raise InputError(
            f"{folder}: was saved with another train.optimizer. It must stay as it was, or start a new run."
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
            moment.copy_(files.read(key, part.name, part.start, count))
        if ema.averages:
            ema.averages[part.name].copy_(files.read("ema", part.name, part.start, count))
    for name, value in saved_bound.items():
        bound[name].copy_(value)
    if bound and not same_layout:
        _requantize(files, slices, states)
    if any_bound and not same_layout:
        log.warning(
            "8-bit optimizer state saved as %s was quantized again as %s, so not bit for bit",
            saved_by["layout"],
            engine.state_layout,
        )
    for _, _, state in engine.optimizer_states():
        step = state.get("step")
        state["step"] = torch.full_like(step, saved_by["steps"]) if isinstance(step, Tensor) else saved_by["steps"]
    engine.sync_after_load()


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
