"""Asynchronous checkpoints: a copy of the state is taken between two steps and written while the next ones run.

Each rank writes the slices it owns (tensor_files.py); when every rank has told that its file is on disk, rank 0 makes a
complete checkpoint of them (folders.py).  Ranks tell each other between steps, from the thread that trains: collectives
of two threads would get into each other's way.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from configs.loading import dump_config
from configs.schema import Config
from data.batches.batch_stream import BatchStream
from data.storage.atomic_write import apply_umask
from trainer.checkpoints.folders import flush_and_hash, save_checkpoint
from trainer.checkpoints.keep import remove_old
from trainer.checkpoints.run_state import RunState, gather_replaced, write_state
from trainer.checkpoints.tensor_files import Span, rank_file, write_index, write_tensors
from trainer.engines.base import Engine
from trainer.engines.ema import Ema
from trainer.engines.slices import REPLICATED
from trainer.optimizers.state import eight_bit_moments, unreshardable_state

log = logging.getLogger("fluxfill")


@dataclass(frozen=True)
class _Save:
    """A save that has begun.

    engine: what `describe_engine` tells.  spans: which elements of which tensors this rank writes.  sizes: elements of
    each trained parameter.  adapter: on rank 0, of a run that trains one.  written: sha256 of this rank's file, or the
    error.
    """

    state: RunState
    engine: dict
    staging: Path
    spans: dict[str, Span]
    sizes: dict[str, int]
    adapter: dict[str, Tensor]
    written: "Future[str]"


class Saver:
    """Checkpoints of one run, when they are due. All ranks call its methods together."""

    def __init__(self, config: Config, engine: Engine, ema: Ema, stream: BatchStream) -> None:
        self._config, self._engine, self._ema, self._stream = config, engine, ema, stream
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: _Save | None = None
        self._last_save = time.monotonic()
        if engine.is_main:  # of a process that was killed while it saved
            for leftover in (config.run.folder / "checkpoints").glob("*.staging"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save_if_due(self, state: RunState, *, stopping: bool = False) -> None:
        """Every `checkpoint.every_steps` steps or `every_minutes` minutes, at the end, and when the run is stopping.

        Returns when a copy of the state is taken, or, at the end or when stopping, when the checkpoint is whole.  A
        save that fails (a full disk) is reported and the run goes on; the checkpoints before it are untouched.  Raises
        FloatingPointError rather than save weights that are not finite, InputError if too many rows were replaced.
        """
        if self._pending is not None and self._all_written():
            self._commit()
        last = stopping or state.step == self._config.train.steps
        if not (last or self._is_due(state.step)):
            return
        self.finish()
        in_background = self._config.checkpoint.asynchronous and not last
        state = gather_replaced(self._config, self._engine, state, self._stream)
        self._pending = self._begin(state, in_background=in_background)
        self._last_save = time.monotonic()
        if not in_background:
            self.finish()
            # A rank that left now would have its launcher end the others, rank 0 in the middle of its part.
            self._engine.ranks.barrier()

    def finish(self) -> None:
        """Wait for the save that has begun, if one has."""
        if self._pending is not None:
            self._pending.written.exception()  # waits; what went wrong is told by _commit
            self._commit()

    def _is_due(self, step: int) -> bool:
        every, minutes = self._config.checkpoint.every_steps, self._config.checkpoint.every_minutes
        if every is not None and step % every == 0:
            return True
        if minutes is None:
            return False
        # Rank 0's clock, for all: ranks that disagreed would wait for each other for ever.
        late = self._engine.is_main and time.monotonic() - self._last_save >= 60 * minutes
        return self._engine.ranks.all_reduce_sum(late) > 0

    def _all_written(self) -> bool:
        assert self._pending is not None
        return self._engine.ranks.all_reduce_sum(self._pending.written.done()) == self._engine.world_size

    def _begin(self, state: RunState, *, in_background: bool) -> _Save:
        engine = self._engine
        staging = self._config.run.folder / "checkpoints" / f"step-{state.step:08d}.staging"
        if engine.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        engine.ranks.barrier()
        tensors, spans = snapshot(engine, self._ema, copy=in_background)
        described = describe_engine(engine)
        adapter = engine.full_weights() if self._config.method.type != "full" else {}
        written = self._pool.submit(_write, staging / rank_file(engine.rank), tensors)
        return _Save(state, described, staging, spans, engine.trained_sizes, adapter, written)

    def _commit(self) -> None:
        """Make a complete checkpoint of what all ranks have written; rank 0 does it, the others go on."""
        assert self._pending is not None
        save, self._pending = self._pending, None
        failure = save.written.exception()  # whatever it is (safetensors has its own for a full disk), others must know
        sha256 = None if failure else save.written.result()
        told = (failure and f"{failure} on rank {self._engine.rank}", save.spans, sha256)
        everyone = self._engine.ranks.all_gather(told)
        if not self._engine.is_main:
            return
        try:
            if failures := [failure for failure, _, _ in everyone if failure]:
                raise OSError(failures[0])

            def fill(folder: Path) -> dict[str, str]:
                for rank in range(len(everyone)):
                    (save.staging / rank_file(rank)).rename(folder / rank_file(rank))
                apply_umask(folder)
                write_index(folder, {rank: spans for rank, (_, spans, _) in enumerate(everyone)}, save.sizes)
                write_state(folder, save.state, save.engine)
                (folder / "config.yaml").write_text(dump_config(self._config), encoding="utf-8")
                if save.adapter:
                    from trainer.adapters.files import save_adapter  # with peft, which a full fine-tune does without

                    save_adapter(self._engine.unwrap(), folder / "adapter", tensors=save.adapter)
                return {rank_file(rank): sha256 for rank, (_, _, sha256) in enumerate(everyone)}

            log.info("saved %s", save_checkpoint(self._config.run.folder, save.state.step, fill))
            remove_old(self._config.run.folder, self._config.checkpoint)
        except (OSError, SafetensorError) as error:  # a full disk is the one to Python, the other to safetensors
            step = save.state.step
            log.error("step %d was not saved (%s); the run goes on, earlier checkpoints are intact", step, error)
        shutil.rmtree(save.staging, ignore_errors=True)


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a rank's file and flush it to disk; returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors)
    return flush_and_hash(path)


def snapshot(engine: Engine, ema: Ema, *, copy: bool) -> tuple[dict[str, Tensor], dict[str, Span]]:
    """(tensors on the CPU, by their names in the file; the parts of parameters in them) of what this rank owns.

    copy: into memory of their own, so that training may go on.  Raises FloatingPointError, on every rank, if a weight
    of any rank is not finite.
    """
    slices = engine.local_slices()
    owned = [part for part in slices if part.owned and part.weight.numel()]
    bad = [part.name for part in owned if not torch.isfinite(part.weight).all()]
    of_ranks = enumerate(engine.ranks.all_gather(bad[:1]))
    if named := [f"{name} (rank {rank})" for rank, names in of_ranks for name in names]:
        raise FloatingPointError(f"weights are not finite and are not saved: {', '.join(named)}")

    def pieces() -> Iterator[tuple[str, int, Tensor]]:
        for part in owned:
            yield f"weight/{part.name}", part.start, part.weight
            yield from ((f"{key}/{part.name}", part.start, moment) for key, moment in part.moments.items())
            if ema.averages:
                yield f"ema/{part.name}", part.start, ema.averages[part.name]

    tensors: dict[str, Tensor] = {}
    spans: dict[str, Span] = {}
    for name, start, values in pieces():
        tensors[name] = values.detach().to("cpu", copy=copy).contiguous()
        spans[name] = Span(start, start + values.numel())
    # Where every rank holds the same optimizer state, one copy is enough.
    if engine.state_layout != REPLICATED or engine.is_main:
        for name, value in unreshardable_state(engine.optimizer_states()).items():
            tensors[f"state/{name}"] = value.detach().to("cpu", copy=copy).contiguous()
        states = {name: state for name, _, state in engine.optimizer_states()}
        for part in slices if engine.state_layout == REPLICATED else owned:
            for moment, _ in eight_bit_moments(states.get(part.of, {})):
                stop = part.start + part.weight.numel()
                spans[f"{moment}/{part.name}"] = Span(part.start, stop, part.of, part.at)
    return tensors, spans


def describe_engine(engine: Engine) -> dict:
    """The engine that saves, as `resume.load_tensors` needs to know it. All ranks call it."""
    steps = next((int(s["step"]) for _, _, s in engine.optimizer_states() if "step" in s), 0)
    return {
        "name": engine.name,
        "world_size": engine.world_size,
        "layout": engine.state_layout,
        # Of all ranks: small tensors have none, and a rank may hold no other.
        "bound": any(engine.ranks.all_gather(bool(unreshardable_state(engine.optimizer_states())))),
        "steps": steps,
    }
