"""Asynchronous checkpoints: a copy of the state is taken between two steps and written while the next ones run.

Each rank writes the slices it owns (tensor_files.py); when every rank has told that its file is on disk, rank 0 makes a
complete checkpoint of them (folders.py), and deletes old ones, while training goes on.  Ranks tell each other between
steps, from the thread that trains: collectives of two threads would get into each other's way.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from configs.errors import StorageFailed
from configs.loading import dump_config
from configs.schema import Config
from data.batches.batch_stream import BatchStream
from data.storage.atomic_write import apply_umask
from data.storage.checkpoint_folders import checkpoint_folder, newest_step
from trainer.checkpoints.folders import save_checkpoint
from trainer.checkpoints.host_copies import HostCopies
from trainer.checkpoints.keep import remove_old
from trainer.checkpoints.run_state import RunState, gather_replaced, write_state
from trainer.checkpoints.tensor_files import Span, rank_file, write_index, write_tensors
from trainer.engines.base import Engine
from trainer.engines.ema import Ema
from trainer.engines.slices import REPLICATED
from trainer.optimizers.state import eight_bit_moments, unreshardable_state
from trainer.process.launcher import save_before_the_end
from trainer.process.run_owner import owned_for_writing
from trainer.process.watchdog import longer

log = logging.getLogger("fluxfill")


@dataclass(frozen=True)
class _Save:
    """A save that has begun.

    engine: what `describe_engine` tells.  spans: which elements of which tensors this rank writes.  sizes: elements of
    each trained parameter.  adapter: on rank 0, of a run that trains one.  written: sha256 of this rank's file, or the
    error.  in_background: it is written from a copy, while training goes on.
    """

    state: RunState
    engine: dict
    staging: Path
    spans: dict[str, Span]
    sizes: dict[str, int]
    adapter: dict[str, Tensor]
    written: "Future[str]"
    in_background: bool


class Saver:
    """Checkpoints of one run, when they are due. All ranks call its methods together."""

    def __init__(self, config: Config, engine: Engine, ema: Ema, stream: BatchStream) -> None:
        self._config, self._engine, self._ema, self._stream = config, engine, ema, stream
        self._host_copies = HostCopies(engine)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: _Save | None = None
        self._completing: Future[None] | None = None  # on rank 0
        self._last_save = time.monotonic()
        self._saved_step = newest_step(config.run.folder)
        self._failure: str | None = None  # of the last save, on rank 0
        self._not_finite: str | None = None  # of the last save, on every rank, until it is told
        save_before_the_end()
        if engine.is_main:
            # Of a process that was killed while it saved.
            for leftover in (config.run.folder / "checkpoints").glob("*.staging"):
                shutil.rmtree(leftover, ignore_errors=True)

    @property
    def saved_step(self) -> int:
        """Step of the newest complete checkpoint that the run has not gone back behind; 0 if there is none. On a disk
        that does not answer, as it was known last on rank 0."""
        with suppress(OSError):
            self._saved_step = newest_step(self._config.run.folder)
        return self._saved_step

    def save_if_due(self, state: RunState, *, stopping: bool = False) -> str | None:
        """Every `checkpoint.every_steps` steps or `every_minutes` minutes; with `at_end` also when the run ends, or is
        stopping.

        Returns when a copy of the state is taken, or, at the end or when stopping, when the checkpoint is whole.  A
        save that fails (a full disk) is reported and the run goes on; the checkpoints before it are untouched.  What is
        returned: the weights, moments or averages, of this save or the one before, that are not finite, in words, on
        every rank: the run has to go back. None if there are none, or it stops anyway.  Raises InputError if too many
        rows were replaced.
        """
        with longer():
            self._save_if_due(state, stopping=stopping)
        found, self._not_finite = self._not_finite, None
        return None if stopping else found

    def _save_if_due(self, state: RunState, *, stopping: bool) -> None:
        self.commit_if_written()
        last = stopping or state.step == self._config.train.steps
        wanted = self._is_due(state.step) or (last and self._config.checkpoint.at_end)
        if wanted or last:
            self.finish()
        if not wanted or self._not_finite is not None:
            if last:
                self._engine.ranks.barrier()  # as below
            return
        in_background = self._config.checkpoint.asynchronous and not last
        state = gather_replaced(self._config, self._engine, state, self._stream)
        try:
            self._pending = self._begin(state, in_background=in_background)
            self._last_save = time.monotonic()
        except FloatingPointError as error:
            self._not_finite = str(error)
            self._note_failure(state.step, self._not_finite)
        if self._pending is None or not self._pending.in_background:
            self.finish()
            # A rank that left now would have its launcher end the others, rank 0 in the middle of its part.
            self._engine.ranks.barrier()

    def commit_if_written(self) -> None:
        """Have a complete checkpoint made of the save that has begun, if every rank has written its file by now."""
        if self._completing is not None and self._completing.done():
            self._wait_until_complete()
        if self._pending is not None and self._all_written():
            self._commit()

    def finish(self) -> None:
        """Wait for the save that has begun, if one has."""
        if self._pending is not None:
            self._pending.written.exception()  # waits; what went wrong is told by _commit
            self._commit()
        self._wait_until_complete()

    def leave_behind(self, not_finite: str | None) -> None:
        """`finish`, before the run goes back, which makes up for a save that failed because of what is not finite."""
        self.finish()
        if not_finite or self._not_finite:
            self._failure = self._not_finite = None

    def refuse_unsaved_end(self) -> None:
        """Raises StorageFailed, on every rank, if the run's last save has failed: it must not end as if all were well.
        All ranks call it."""
        failure = self._engine.ranks.broadcast_object(self._failure)
        if failure is None:
            return
        run, checkpoint = self._config.run.folder, self._config.checkpoint
        final = f" {run / 'final'} is whole: it holds what was trained." if checkpoint.at_end else ""
        at = f"step {self.saved_step}" if self.saved_step else "the start"
        raise StorageFailed(
            f"{run}: its last save has failed: {failure}.{final} Mend that, and the same command goes on from {at} "
            "(docs/troubleshooting.md#the-disk-is-full)."
        )

    def _wait_until_complete(self) -> None:
        """Raises AlreadyRunning if the folder was lost meanwhile."""
        completing, self._completing = self._completing, None
        if completing is not None:
            completing.result()

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
        staging = checkpoint_folder(self._config.run.folder, state.step).with_suffix(".staging")
        if engine.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        engine.ranks.barrier()
        tensors, spans = snapshot(engine, self._ema)
        if in_background:
            short = self._host_copies.shortage(tensors)
            in_background = short is None
            if short is not None and engine.is_main:
                log.warning("step %d is saved while training waits (not checkpoint.async): %s", state.step, short)
        if in_background:
            tensors = self._host_copies.take(tensors)
        described = describe_engine(engine)
        adapter = engine.full_weights() if self._config.method.type != "full" else {}
        written = self._pool.submit(_write, staging / rank_file(engine.rank), tensors)
        return _Save(state, described, staging, spans, engine.trained_sizes, adapter, written, in_background)

    def _commit(self) -> None:
        """Make a complete checkpoint of what all ranks have written; rank 0 does it in the background."""
        assert self._pending is not None
        self._wait_until_complete()
        save, self._pending = self._pending, None
        failure = save.written.exception()  # whatever it is (safetensors has its own for a full disk), others must know
        sha256 = None if failure else save.written.result()
        told = (failure and f"{failure} on rank {self._engine.rank}", isinstance(failure, FloatingPointError))
        everyone = self._engine.ranks.all_gather((*told, save.spans, sha256))
        self._not_finite = next((failure for failure, is_number, *_ in everyone if is_number), None)
        if self._engine.is_main:
            failure = next((failure for failure, *_ in everyone if failure), None)
            written = [(spans, sha256) for *_, spans, sha256 in everyone]
            self._completing = self._pool.submit(self._complete, save, failure, written)

    def _complete(self, save: _Save, failure: str | None, written: list[tuple[dict[str, Span], str]]) -> None:
        """failure: the first rank's that could not write its file.  written: (spans, the file's sha256), by rank."""
        try:
            if failure is not None:
                raise OSError(failure)

            def fill(folder: Path) -> dict[str, str]:
                for rank in range(len(written)):
                    (save.staging / rank_file(rank)).rename(folder / rank_file(rank))
                apply_umask(folder)
                write_index(folder, {rank: spans for rank, (spans, _) in enumerate(written)}, save.sizes)
                write_state(folder, save.state, save.engine)
                (folder / "config.yaml").write_text(dump_config(self._config), encoding="utf-8")
                if save.adapter:
                    from trainer.adapters.files import save_adapter  # with peft, which a full fine-tune does without

                    save_adapter(self._engine.unwrap(), folder / "adapter", tensors=save.adapter)
                return {rank_file(rank): sha256 for rank, (_, sha256) in enumerate(written)}

            with owned_for_writing():
                log.info("saved %s", save_checkpoint(self._config.run.folder, save.state.step, fill))
                self._saved_step, self._failure = save.state.step, None
                try:
                    remove_old(self._config)
                except OSError as error:  # the save itself stands
                    log.warning("old checkpoints were not deleted: %s", error)
        except (
            OSError,
            StorageFailed,
            SafetensorError,
        ) as error:  # a full disk is the one to Python, the other to safetensors
            self._note_failure(save.state.step, str(error))
        shutil.rmtree(save.staging, ignore_errors=True)

    def _note_failure(self, step: int, why: str) -> None:
        if self._engine.is_main:
            self._failure = f"step {step} was not saved ({why})"
            log.error("%s; earlier checkpoints are intact", self._failure)


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a rank's file and flush it to disk; returns its sha256.

    Raises FloatingPointError for a moment or an average that is not finite: looked for here, beside the training, the
    weights have been before.
    """
    if bad := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise FloatingPointError(f"{bad[0]}{more} is not finite and is not saved")
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tensors(path, tensors)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are. By their extremes, which a NaN is among: torch.isfinite needs as much room again."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def snapshot(engine: Engine, ema: Ema) -> tuple[dict[str, Tensor], dict[str, Span]]:
    """(tensors, by their names in the file; the parts of parameters in them) of what this rank owns.

    The tensors are those that train, where they are.  Raises FloatingPointError, on every rank, if a weight of any rank
    is not finite.
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
        tensors[name] = values.detach()
        spans[name] = Span(start, start + values.numel())
    # Where every rank holds the same optimizer state, one copy is enough.
    if engine.state_layout != REPLICATED or engine.is_main:
        for name, value in unreshardable_state(engine.optimizer_states()).items():
            tensors[f"state/{name}"] = value.detach()
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
