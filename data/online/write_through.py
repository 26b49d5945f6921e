"""Shards of what a run encodes while it trains (data.write_through), made beside the training and read as soon as they
are there.

Each training process is a member of the cache's group, as any `fluxfill preprocess` worker: it claims whole shards and
makes them by the same code, from the same batches. So their bytes are the same, all processes and workers share them,
and whoever is killed leaves nothing wrong. The encoders are those that encode for the training, and it comes first.
"""

import logging
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rich.progress import Progress

from configs.errors import InputError, StorageFailed
from data.batches.order import Order
from data.cache.manifest import Manifest, ShardTable
from data.cache_layout import CREW
from data.encoders.load import Encoders
from data.online.batch_encoder import BatchEncoder
from data.online.encoder_turns import TurnsOver, refuse_if_over
from data.online.finished_shards import FinishedShards
from data.preprocess import Job, complete, encode_what_is_left, manifest_stamp
from data.preprocessing.plan_file import PlanFile
from data.preprocessing.shard_queue import ShardQueue
from data.preprocessing.share_plan import agree_on_plan
from data.preprocessing.worker import Worker
from data.preprocessing.worker_group import Evicted, WorkerGroup, join
from data.samples.shard_plan import PlannedShard, ShardSpec
from data.storage.disk_full import raise_disk_full

log = logging.getLogger("fluxfill")

_HORIZON = 2048  # batches whose shards are made first, in the order in which they are needed
_PAUSE_SECONDS = 1.0  # about, while another one has what is left


class WriteThrough:
    """Makes the shards of a run's plan in the background, from `begin` on.

    finished: those that are there, by whomever.  encoder: of the training, whose turns come first.
    """

    def __init__(
        self,
        job: Job,
        plans: Sequence[PlannedShard],
        manifest: Manifest,
        table: ShardTable,
        order: Order,
        encoders: Encoders,
        encoder: BatchEncoder,
        worker: Worker,
    ) -> None:
        self.finished = FinishedShards(job.config.data.cache_folder, plans, manifest, table)
        self._job, self._plans, self._order = job, plans, order
        self._encoders, self._encoder, self._worker = encoders, encoder, worker
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, batch: int) -> None:
        """Start, unless it has: the training is at this global batch."""
        if self._thread is None:
            # No daemon: one that computes while the process ends would take it down with it.
            self._thread = threading.Thread(target=self._run, args=(batch,), name="write-through")
            self._thread.start()

    def close(self) -> None:
        """Stop after the batch that is being encoded, and give back what is not finished."""
        self._stop.set()
        self.finished.stop()
        if self._thread is not None:
            self._thread.join()
        self.finished.close()

    def _run(self, batch: int) -> None:
        """Whatever fails here, the training goes on without it."""
        cache = self._job.config.data.cache_folder
        try:
            self._encoder.own_thread()
            self._take_part(_soonest_first(self._plans, self._order, batch))
        except TurnsOver:
            return
        except Exception as error:
            if self._stop.is_set() or "interpreter shutdown" in str(error):
                return  # closed meanwhile; or the run has failed, and says why itself
            is_input = isinstance(error, InputError)
            # What is wrong with pictures the first of the processes finds too; what befalls this one it does not.
            told_by_the_first = is_input and not isinstance(error, StorageFailed | Evicted)
            level = logging.INFO if told_by_the_first and self._worker.rank > 0 else logging.WARNING
            log.log(
                level,
                "data.write_through: no more shards are written to %s (%s)\nThe training goes on and encodes what is "
                "not there. Run `fluxfill preprocess CONFIG` for the rest once this is mended.",
                cache,
                error if is_input else f"{type(error).__name__}: {error}",
                exc_info=not isinstance(error, InputError | OSError),
            )
        else:
            log.info(
                "data.write_through: %s is complete, and read from now on. With data.mode=cached no encoder is loaded",
                cache,
            )
        self.finished.look_again()

    def _take_part(self, soonest_first: tuple[ShardSpec, ...]) -> None:
        """Be one of the cache's workers until it is complete. Raises as `preprocess` does, and TurnsOver."""
        job, worker = self._job, self._worker
        cache = job.config.data.cache_folder
        with raise_disk_full(cache), join(cache / CREW, job.settings) as group:
            before = manifest_stamp(cache)
            plan = self._share_plan(group)
            backlog = ShardQueue(cache, replace(plan, heads=soonest_first), group, worker)
            try:
                encode_what_is_left(
                    job,
                    plan,
                    backlog,
                    group,
                    lambda: self._encoders,
                    self._pause,
                    threads=max(1, worker.decode_threads // 2),  # the training's own need as many
                    turn=partial(self._encoder.turns.between, self._stop),
                )
            except FileNotFoundError:
                group.touch()  # which tells if others took what it had half written for a dead worker's
                raise
            complete(job, plan, group, worker, _NoBars(self._stop), self._pause, before=before)

    def _share_plan(self, group: WorkerGroup) -> PlanFile:
        """This run's plan, for all to work by. Raises InputError if others work by another."""
        shared = agree_on_plan(group, lambda: self._plans, help_planning=lambda: None, waiting=self._pause)
        if [(head.path, head.plan) for head in shared.heads] != [(plan.path, plan.plan) for plan in self._plans]:
            raise InputError(
                "another job is at work there by another plan: pictures changed since one of the two was started"
            )
        return shared

    def _pause(self, for_whom: str) -> None:
        self._stop.wait(_PAUSE_SECONDS * random.uniform(0.5, 1.5))  # not in step with the others
        refuse_if_over(self._stop)


class _NoBars(Progress):
    """Shows nothing; ends the work that tells it of progress, once it is to stop."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(disable=True)
        self._stop = stop

    def advance(self, *_: object) -> None:
        refuse_if_over(self._stop)


def _soonest_first(plans: Sequence[PlannedShard], order: Order, batch: int) -> tuple[ShardSpec, ...]:
    """Shards in the order in which a run at this batch comes to them, as far as the horizon; the others behind."""
    needed: dict[int, None] = {}
    for index in range(batch, batch + _HORIZON):
        needed |= dict.fromkeys(order.batch(index).shards.tolist())
    rest = [number for number in range(len(plans)) if number not in needed]
    return tuple(plans[number] for number in [*needed, *rest])
