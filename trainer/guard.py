"""The guard: what becomes of updates that were not applied.

A skip changes nothing but the run's step and place in the order (engines/base.py); here it is told. After
guard.max_skips in a row the run goes back to its last good checkpoint and passes over the batches that were skipped, at
a lower learning rate; after guard.max_rollbacks of that it stops, and leaves a report. All ranks decide alike, by what
they know alike, and within the process: no launcher has to start anything again.
"""

import json
import logging
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import InputError
from configs.schema import Config, GuardConfig
from configs.webhook import notify
from data.batches.batch_stream import BatchStream
from data.batches.training_set import TrainingSet
from data.storage.checkpoint_folders import complete_checkpoints, step_of
from trainer.checkpoints.folders import set_later_ones_aside
from trainer.checkpoints.resume import choose_rollback, load_tensors
from trainer.checkpoints.run_state import RunState, gather_replaced, good_checkpoints, read_state, write_rollbacks
from trainer.checkpoints.save import Saver
from trainer.engines.base import Engine, Update
from trainer.engines.ema import Ema
from trainer.process.disk_room import told_if_not_written, with_room
from trainer.process.json_lines import EVENTS, without_nan, write_event
from trainer.process.watchdog import longer
from trainer.run_log import RunLog
from trainer.training_data import restart_stream

log = logging.getLogger("fluxfill")

REPORT = "guard-report"
_FEWEST_LOSSES = 20  # before a spike can be told from the rest
_DEVIATIONS = 1.4826  # standard deviation of normal numbers / the median of their distances from the median
_LEAST_SPREAD = 0.01  # of the median; losses that hardly differ must not make a spike of each
_LIMIT_KEY = "guard.loss_spike"
_SAMPLES_IN_EVENT, _SAMPLES_IN_LOG = 16, 3


def loss_limit(guard: GuardConfig, state: RunState) -> float:
    """The loss above which an update is not applied: guard.loss_spike robust standard deviations above the median of
    the last ones. inf if that is off, or they are too few."""
    if guard.loss_spike is None or len(state.losses) < _FEWEST_LOSSES:
        return math.inf
    median = statistics.median(state.losses)
    spread = statistics.median(abs(loss - median) for loss in state.losses)
    return median + guard.loss_spike * max(_DEVIATIONS * spread, _LEAST_SPREAD * abs(median))


@dataclass(frozen=True)
class TrainedSample:
    """A sample of a batch.  loss: its own, on the rank that computed it."""

    rank: int
    dataset: str
    shard: str
    row: int
    key: str
    loss: float


@dataclass(frozen=True)
class Skip:
    """An update that was not applied.  batch: its global batch.  ranks: on which a loss was not finite.  samples: all
    of the batch, those that were not finite first, then by loss."""

    step: int
    batch: int
    why: str
    loss: float
    grad_norm: float
    ranks: list[int]
    samples: list[TrainedSample]

    @property
    def suspects(self) -> list[TrainedSample]:
        """The samples whose loss is not finite; where that is none, those of the largest losses."""
        bad = [sample for sample in self.samples if not math.isfinite(sample.loss)]
        return bad or self.samples[:_SAMPLES_IN_EVENT]


class Guard:
    """What a run does about updates that were not applied. All ranks call its methods together."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        ema: Ema,
        samples: TrainingSet,
        stream: BatchStream,
        saver: Saver,
        run_log: RunLog,
    ) -> None:
        self._config, self._engine, self._ema, self._samples = config, engine, ema, samples
        self._stream, self._saver, self._run_log = stream, saver, run_log
        self._run = config.run.folder
        self._skips: list[Skip] = []  # of this process, on rank 0

    def skip(self, state: RunState, update: Update) -> RunState | None:
        """Record the update that was not applied, which led to `state`; after guard.max_skips in a row, the state that
        the run goes on from instead. Raises InputError where `roll_back` does."""
        self._record_skip(state, update)
        return self.roll_back(state) if state.skips >= self._config.guard.max_skips else None

    def _record_skip(self, state: RunState, update: Update) -> None:
        """Record the update that was not applied, which led to `state`: in the log and in events.jsonl."""
        table, rank = self._samples.table, self._engine.rank
        own = [
            TrainedSample(rank, str(table.dataset[shard]), str(table.path[shard]), row, key, loss)
            for (shard, row, key), loss in zip(self._stream.own_samples(), self._engine.own_losses(), strict=False)
        ]
        of_ranks = self._engine.ranks.gather(own)
        if of_ranks is None:
            return
        samples = sorted((sample for samples in of_ranks for sample in samples), key=_badness, reverse=True)
        ranks = sorted({sample.rank for sample in samples if not math.isfinite(sample.loss)})
        why = self._reason(state, update, ranks)
        skip = Skip(state.step, state.skipped[-1], why, update.loss, update.grad_norm, ranks, samples)
        self._skips.append(skip)
        suspects = skip.suspects
        told = asdict(replace(skip, samples=suspects[:_SAMPLES_IN_EVENT]))
        write_event(self._run, "skip", **told, in_a_row=state.skips)
        if len(self._skips) == 1:  # of this start: a line each is in the log
            notify(self._run.name, "skipped an update", reason=why, step=state.step, wait=False)
        names = [f"{sample.key} of {sample.shard}" for sample in suspects]
        log.warning(
            "step %d skipped: %s (loss %.4g, gradient norm %.4g): %s%s",
            *(state.step, why, update.loss, update.grad_norm),
            *(", ".join(names[:_SAMPLES_IN_LOG]), " ..." if len(names) > _SAMPLES_IN_LOG else ""),
        )

    def _reason(self, state: RunState, update: Update, ranks: list[int]) -> str:
        """Why an update was not applied, in words."""
        if ranks:
            return f"the loss is not finite on rank {', '.join(map(str, ranks))}"
        if not math.isfinite(update.loss):
            return "the sum of the losses is not finite, each of them is"
        if update.loss > (limit := loss_limit(self._config.guard, state)):
            return f"the loss is above {limit:.4g}, which {_LIMIT_KEY} allows now"
        return "the gradient is not finite, every loss is"

    def roll_back(self, state: RunState, not_finite: str | None = None) -> RunState:
        """The state to go on from after too many skips in a row: that of the last good checkpoint, loaded, past the
        batches that were skipped since, at a lower learning rate. Where none was saved yet, the weights are still those
        before the first of the skips, and the run goes on from there.

        not_finite: what is not in the state itself, in words, in place of the skips.  Raises InputError once
        guard.max_rollbacks are used up, or if nothing that is finite was saved: a restart would end the same way.
        """
        with longer():  # it reads all of a checkpoint, twice
            return self._roll_back(state, not_finite)

    def _roll_back(self, state: RunState, not_finite: str | None) -> RunState:
        self._saver.leave_behind(not_finite)
        why = not_finite or f"{state.skips} updates in a row were skipped"
        if state.rollbacks >= self._config.guard.max_rollbacks:
            why += f", and {state.rollbacks} rollback(s) (guard.max_rollbacks) have not helped"
            self._stop(state, why, by_skips=not_finite is None)
        folder = choose_rollback(self._config, self._engine, state)
        if folder is None and not_finite is not None:
            self._stop(state, f"{why}, and there is no good checkpoint to go back to", by_skips=False, is_lost=True)
        if folder is None:
            back = gather_replaced(self._config, self._engine, _before_skips(state), self._stream)
        else:
            back, saved_by = read_state(folder)
            load_tensors(folder, self._engine, self._ema, saved_by)
        passed_over = [batch for batch in state.skipped if batch >= back.batch]
        back = replace(
            back,
            restarts=state.restarts,
            rollbacks=state.rollbacks + 1,
            back_to=back.step,
            lr_scale=state.lr_scale * self._config.guard.lr_factor,
        ).exclude([*state.excluded, *passed_over])
        if self._engine.is_main:
            write_rollbacks(self._run, back)
            set_later_ones_aside(self._run, back.step)
            self._tell_rollback(state, back, why, folder, passed_over)
        self._run_log.go_back(back)
        restart_stream(self._config, self._samples, self._stream, back)
        return back

    def _tell_rollback(
        self, state: RunState, back: RunState, why: str, folder: Path | None, passed_over: list[int]
    ) -> None:
        told = f"{why}; it goes on from step {back.step}"
        notify(self._run.name, "rolled back", reason=told, step=state.step, wait=False)
        write_event(
            self._run,
            "rollback",
            step=state.step,
            why=why,
            to_step=back.step,
            checkpoint=folder and folder.name,
            passed_over=passed_over,
            lr_scale=back.lr_scale,
            rollbacks=back.rollbacks,
            samples=[
                asdict(sample)
                for skip in self._skips
                if skip.batch in passed_over
                for sample in skip.suspects[:_SAMPLES_IN_EVENT]
            ],
        )
        log.warning(
            "step %d: %s. Back to step %d (%s)%s, learning rate x %.3g; rollback %d of %d",
            *(state.step, why, back.step, folder or "nothing was saved since"),
            f", past batches {', '.join(map(str, passed_over))}" if passed_over else "",
            *(back.lr_scale, back.rollbacks, self._config.guard.max_rollbacks),
        )

    # --- the stop ----------------------------------------------------------------------------------------------------

    def _stop(self, state: RunState, why: str, *, by_skips: bool, is_lost: bool = False) -> NoReturn:
        """Leave the report, a copy of the batch with which the skips began, and a run that can be gone on with; of no
        skips, what cannot be saved and the run alone.  is_lost: no good checkpoint is there."""
        streak = state.skipped[-state.skips :] if by_skips else ()
        reason = f"step {state.step}: {why}"
        if self._engine.is_main:
            skips = [skip for skip in self._skips if skip.batch in streak]
            reason += f"; {skips[-1].why}" if skips else ""
            # Who starts it again has changed something, or should have: neither count nor lower rate outlive the stop.
            with told_if_not_written("what to pass over at the next start"):
                write_rollbacks(self._run, replace(state, rollbacks=0, back_to=None, lr_scale=1.0).exclude(streak))
            with told_if_not_written(f"the stop in {EVENTS}"):
                write_event(self._run, "stop", step=state.step, why=reason, batches=streak, report=REPORT)
            with told_if_not_written(f"{REPORT}/report.txt"):
                with_room(self._run, lambda: self._write_report(state, reason, skips))
            with told_if_not_written("which checkpoints are left behind"):
                for good in good_checkpoints(complete_checkpoints(self._run))[-1:]:
                    set_later_ones_aside(self._run, step_of(good))
        for first in streak[:1]:
            with told_if_not_written(f"batch {first} in {REPORT}"):
                self._save_batch(state, first)
        self._engine.ranks.barrier()  # the launcher ends the others when one has left
        reason = self._engine.ranks.broadcast_object(reason)
        report, cure, past = "", "set train.max_grad_norm", ""
        if by_skips:
            report = f" {self._run / REPORT}/report.txt names ranks, shards and samples."
            cure = "mend the pictures"
            if _LIMIT_KEY in reason:  # of the last skip, as all ranks are told
                cure += f", or raise {_LIMIT_KEY}"
            past = " and past the batches that were skipped"
        start = (
            "begins the run again" if is_lost else f"goes on from the last good checkpoint, at the full train.lr{past}"
        )
        raise InputError(
            f"{reason}.{report} Lower train.lr, or {cure}; then the same command {start} "
            "(docs/troubleshooting.md#loss-is-nan)."
        )

    def _write_report(self, state: RunState, reason: str, skips: list[Skip]) -> None:
        """report.json, and report.txt for people."""
        folder = self._run / REPORT
        folder.mkdir(exist_ok=True)
        suspects = [sample for skip in skips for sample in skip.suspects]
        told = {
            "step": state.step,
            "reason": reason,
            "ranks": sorted({rank for skip in skips for rank in skip.ranks}),
            "shards": sorted({sample.shard for sample in suspects}),
            "keys": sorted({sample.key for sample in suspects}),
            "excluded_batches": [*state.excluded, *(skip.batch for skip in skips)],
            "lr_scale": state.lr_scale,
            "skips": [asdict(skip) for skip in skips],
        }
        (folder / "report.json").write_text(json.dumps(without_nan(told), indent=1) + "\n", encoding="utf-8")
        lines = [reason, ""]
        for skip in skips:
            lines.append(f"step {skip.step}, batch {skip.batch}: {skip.why}; gradient norm {skip.grad_norm:.4g}")
            lines += [
                f"  loss {sample.loss:<10.4g} rank {sample.rank}  {sample.dataset}  {sample.shard} row {sample.row}  "
                f"{sample.key}"
                for sample in skip.suspects
            ]
        (folder / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _save_batch(self, state: RunState, batch: int) -> None:
        """Write this rank's rows of a batch, as they were trained on: <batch>-rank-<n>.safetensors. They are read
        again, which gives the same bytes."""
        restart_stream(self._config, self._samples, self._stream, replace(state, batch=batch, excluded=()))
        parts: dict[str, list[Tensor]] = {}
        for rows in next(self._stream):
            real = rows.weight > 0
            for name, value in vars(rows).items():
                if isinstance(value, Tensor):
                    parts.setdefault(name, []).append(value[real])
        keys = json.dumps([key for _, _, key in self._stream.own_samples()])
        path = self._run / REPORT / f"batch-{batch:08d}-rank-{self._engine.rank:05d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        tensors = {name: torch.cat(values).contiguous() for name, values in parts.items()}
        save_file(tensors, path, metadata={"batch": str(batch), "keys": keys})


def _before_skips(state: RunState) -> RunState:
    """The state before the skips in a row that it ends with. They changed no weight, so it needs no loading."""
    first = state.skipped[-state.skips]
    return replace(state, step=state.step - state.skips, batch=first, skips=0, skipped=state.skipped[: -state.skips])


def _badness(sample: TrainedSample) -> float:
    return sample.loss if math.isfinite(sample.loss) else math.inf
