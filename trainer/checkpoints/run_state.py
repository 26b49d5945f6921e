"""The state of a run (step, place in the order, skips, restarts, replaced rows), and its record in state.json."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from configs.errors import InputError
from configs.schema import Config
from data.batches.batch_stream import BatchStream
from data.batches.order import OrderSettings
from data.batches.row_filler import ReplacedRow, refuse_too_many
from trainer.engines.base import Engine, Update

MAX_SKIPS = 5
# Of state.json; a change of it, or of the files beside it, that this code could not read gets the next number.
VERSION = 1

_FILE = "state.json"


@dataclass(frozen=True)
class RunState:
    """Progress of a run and what its order depends on.

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


def write_state(folder: Path, state: RunState, engine: dict) -> None:
    """Write a checkpoint's state.json.  engine: `save.describe_engine`."""
    text = json.dumps({"version": VERSION, "state": asdict(state), "engine": engine}, indent=1)
    (folder / _FILE).write_text(text, encoding="utf-8")


def read_state(folder: Path) -> tuple[RunState, dict]:
    """A checkpoint's (state, engine that saved it).

    A file without a version is of version 1, from before there was one.  Raises InputError for any other version.
    """
    path = folder / _FILE
    saved = json.loads(path.read_text(encoding="utf-8"))
    if (version := saved.get("version", VERSION)) != VERSION:
        raise InputError(
            f"{path}: version {version!r}, but this fluxfill reads checkpoints of version {VERSION}. Go on with the "
            "fluxfill that saved it, or start a new run (run.name)."
        )
    fields = saved["state"]
    order, replaced = OrderSettings(**fields["order"]), tuple(ReplacedRow(**row) for row in fields["replaced"])
    return RunState(**fields | {"order": order, "replaced": replaced}), saved["engine"]
