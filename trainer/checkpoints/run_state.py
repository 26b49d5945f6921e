"""The state of a run (step, place in the order, what was skipped and passed over), and its record in state.json."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema import Config
from data.batches.batch_stream import BatchStream
from data.batches.order import OrderSettings
from data.batches.row_filler import ReplacedRow, refuse_too_many
from data.storage.atomic_write import write_text_atomically
from trainer.engines.base import Engine, Update
from trainer.process.disk_room import with_room

# Of state.json; a change of it, or of the files beside it, that this code could not read gets the next number.
VERSION = 1
RECENT_LOSSES = 100  # that a loss is compared with
CALM_BATCHES = 5  # without a skip, before a checkpoint counts as good

_FILE = "state.json"
_ROLLBACKS = "rollbacks.json"


@dataclass(frozen=True)
class TrainedBase:
    """The model that a run trains on.  fingerprint: `base_fingerprint`.  precision: what model.precision is, or
    became of auto."""

    fingerprint: str
    precision: str


@dataclass(frozen=True)
class RunState:
    """Progress of a run and what its order depends on.

    step: updates done.  batch: the next global batch of the order, unless it is among the excluded, which are passed
    over.  skips: updates in a row that were not applied.  restarts: times the run was resumed.  order: what the order
    depends on; a resumed run keeps it.  replaced: damaged rows that another row stood in for, of all ranks, up to the
    last save.
    skipped: batches whose update was not applied, oldest first.  rollbacks: times the run went back to a checkpoint.
    back_to: the step that it went back to last.  lr_scale: what the schedule's learning rate is multiplied by, since.
    losses: of the last updates that were applied.  base: None in a checkpoint from before it was kept.
    """

    step: int
    batch: int
    skips: int
    restarts: int
    order: OrderSettings
    replaced: tuple[ReplacedRow, ...] = ()
    excluded: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    rollbacks: int = 0
    back_to: int | None = None
    lr_scale: float = 1.0
    losses: tuple[float, ...] = ()
    base: TrainedBase | None = None

    @property
    def is_good(self) -> bool:
        """Whether a run may go back to it: no update was skipped for some time. Weights that have diverged are finite
        between two skips, too."""
        if self.skips or not self.skipped:
            return self.skips == 0
        since = range(self.skipped[-1] + 1, self.batch)
        return len(since) - sum(batch in since for batch in self.excluded) >= CALM_BATCHES

    def after(self, update: Update) -> "RunState":
        """The state after an update; one that was skipped has used up its step and its batch."""
        batch = self.batch
        while batch in self.excluded:
            batch += 1
        done = replace(self, step=self.step + 1, batch=batch + 1)
        if update.applied:
            return replace(done, skips=0, losses=(*self.losses, update.loss)[-RECENT_LOSSES:])
        return replace(done, skips=self.skips + 1, skipped=(*self.skipped, batch))

    def exclude(self, batches: Iterable[int]) -> "RunState":
        """The state with more batches that are passed over."""
        return replace(self, excluded=tuple(sorted({*self.excluded, *batches})))


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
    fields: dict[str, Any] = saved["state"]
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    order, replaced = OrderSettings(**fields["order"]), tuple(ReplacedRow(**row) for row in fields["replaced"])
    base = TrainedBase(**fields["base"]) if fields.get("base") else None
    return RunState(**fields | {"order": order, "replaced": replaced, "base": base}), saved["engine"]


def good_checkpoints(folders: Iterable[Path]) -> list[Path]:
    """Those of the complete checkpoints whose state is good. What is damaged counts as such until it is looked at."""
    good = []
    for folder in folders:
        try:
            state, _ = read_state(folder)
        except (OSError, ValueError, LookupError, TypeError):
            good.append(folder)
            continue
        if state.is_good:
            good.append(folder)
    return good


def write_rollbacks(run: Path, state: RunState) -> None:
    """Keep beside the checkpoints what a rollback changed in the state: those before it do not know of it.

    Raises OSError, DiskFull if there is no room, kept or not.
    """
    kept = {name: getattr(state, name) for name in ("excluded", "rollbacks", "back_to", "lr_scale")}
    with_room(run, lambda: write_text_atomically(run / _ROLLBACKS, json.dumps(kept) + "\n"))


def read_rollbacks(run: Path, state: RunState) -> RunState:
    """A checkpoint's state with what the run's last rollback changed."""
    try:
        kept = json.loads((run / _ROLLBACKS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return state
    back_to = kept.get("back_to")  # None in a record from before it was kept
    state = replace(state, rollbacks=kept["rollbacks"], back_to=back_to, lr_scale=kept["lr_scale"])
    return state.exclude(kept["excluded"])


def forget_rollbacks(run: Path) -> None:
    """Of an earlier run in the same folder, whose checkpoints were removed."""
    (run / _ROLLBACKS).unlink(missing_ok=True)
