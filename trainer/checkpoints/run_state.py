"""What a run goes on from: step and place in the order, weights, optimizer and average of every engine alike."""

import json
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import InputError
from configs.schema import Config
from data.batches.batch_stream import BatchStream
from data.batches.order import OrderSettings
from data.batches.row_filler import ReplacedRow, refuse_too_many
from trainer.checkpoints.folders import complete_checkpoints, find_damage, newest_intact
from trainer.checkpoints.tensor_files import StateFiles
from trainer.engines.base import Engine, Update
from trainer.engines.ema import Ema
from trainer.engines.slices import REPLICATED, LocalSlice
from trainer.optimizers.state import eight_bit_moments, quantize, scale_of, unreshardable_state

MAX_SKIPS = 5

log = logging.getLogger("fluxfill")


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    step: updates done.  batch: global batches taken from the order.  skips: updates in a row that were not applied.
    restarts: times the run was resumed.  order: what the order depends on; a resumed run keeps it.
    replaced: damaged rows that another row stood in for, of all ranks, up to the last save.
    """

    step: int
    batch: int
    skips: int
    restarts: int
    order: OrderSettings
    replaced: tuple[ReplacedRow, ...] = ()

    def after(self, update: Update) -> "RunState":
        """The state after an update; one that was skipped has used up its step and its batch.

        Raises FloatingPointError after the fifth skip in a row.
        """
        skips = 0 if update.applied else self.skips + 1
        if skips >= MAX_SKIPS:
            raise FloatingPointError(
                f"step {self.step + 1}: loss or gradient not finite {skips} times in a row (loss {update.loss}, "
                f"gradient norm {update.grad_norm}). Lower train.lr, or look at the samples of the last steps."
            )
        return replace(self, step=self.step + 1, batch=self.batch + 1, skips=skips)


def gather_replaced(config: Config, engine: Engine, state: RunState, stream: BatchStream) -> RunState:
    """The state with every rank's replaced rows; all ranks call it.

    Raises InputError, on all of them, if together they are more than guard.max_bad_samples: each alone counts its own.
    """
    replaced = tuple(sorted(set().union(*engine.ranks.all_gather(stream.replaced()))))
    refuse_too_many(replaced, config.guard.max_bad_samples)
    return replace(state, replaced=replaced)


# --- going on ---------------------------------------------------------------------------------------------------------


def resume(config: Config, resume_from: str, engine: Engine, ema: Ema, order: OrderSettings) -> RunState:
    """Where the run goes on, with weights, optimizer and average loaded; all zero for a fresh start.

    resume_from: "auto" (the newest whole checkpoint of the run folder, if there is one), "never", or a checkpoint's
    folder.  order: of a run that would start now.  Raises InputError if it cannot be: another order of the samples,
    another method, a damaged folder.
    """
    _refuse_ranks_that_differ(engine.ranks.all_gather(order))
    folder = choose_checkpoint(config, resume_from, engine)
    if folder is None:
        return RunState(step=0, batch=0, skips=0, restarts=0, order=order)
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    fields = saved["state"]
    replaced = tuple(ReplacedRow(**row) for row in fields["replaced"])
    state = RunState(**fields | {"order": OrderSettings(**fields["order"]), "replaced": replaced})
    _refuse_another_order(folder, state.order, order)
    load_tensors(folder, engine, ema, saved["engine"], requantize=config.checkpoint.requantize)
    log.info("resumed from %s, step %d (saved by %s)", folder, state.step, saved["engine"]["name"])
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
        raise InputError(f"--resume {folder}: {damage}. Give a whole checkpoint folder, or auto.")
    return folder


def _damage_that_all_find(engine: Engine, folder: Path) -> str | None:
    """What is wrong with a checkpoint, alike on every rank: each reads its share of it, since one alone would read
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
        f"{folder}: rank {finders[0]} finds that {seen[finders[0]]}, rank 0 finds it whole. Look whether all machines "
        "see the same run.dir; then start again."
    )


@torch.no_grad()
def load_tensors(folder: Path, engine: Engine, ema: Ema, saved_by: dict, *, requantize: bool) -> None:
    """Load weights, optimizer and average of this rank's slices from any engine's checkpoint.

    saved_by: what `saver.describe_engine` told of the engine.  requantize: make 8-bit moments that were cut otherwise
    whole, and quantize them anew.  Raises InputError if the trained tensors or the optimizer are not the checkpoint's,
    or, without `requantize`, the layout of an 8-bit one.
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
    if any_bound and not same_layout and not requantize:
        raise InputError(
            f"{folder}: the 8-bit optimizer state was saved as {saved_by['layout']} and is not exactly that of "
            f"{engine.state_layout}. Go on with the engine and number of processes that saved it, or set "
            "checkpoint.requantize=true to have it quantized anew."
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
        log.warning("the 8-bit optimizer state of %s was quantized anew for this engine; not bit for bit", folder)
    for _, _, state in engine.optimizer_states():
        step = state.get("step")
        state["step"] = torch.full_like(step, saved_by["steps"]) if isinstance(step, Tensor) else saved_by["steps"]
    engine.sync_after_load()


def _requantize(files: StateFiles, slices: list[LocalSlice], states: dict[str, dict]) -> None:
    """Fill 8-bit moments from a checkpoint whose slices were cut otherwise."""
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
