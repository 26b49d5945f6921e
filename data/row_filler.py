"""One row of a batch: its bytes from the shards, or from another row where they are damaged, and what is random in it.

All of it is a function of the row's position in the order, whoever reads it and whenever.
"""

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from configs.errors import InputError
from data.geometry import Bucket
from data.micro_batch import Rows
from data.noise import draw_dropout, draw_noise, draw_uniform, draw_variant, draw_whole_hole
from data.shard_reader import DamagedSample, DamagedShard, ShardReader

log = logging.getLogger("fluxfill")


@dataclass(frozen=True)
class RowPolicy:
    """How the stored parts of a sample are put together.

    mask_choice: of a sample's mask variants, one at random; each in turn, one an epoch; or the first.
    caption_dropout, mask_dropout: shares of the rows that get the empty caption, and a hole as large as the picture.
    max_bad_samples: damaged samples that are replaced before the run stops.
    """

    mask_choice: Literal["random", "cycle", "first"] = "random"
    caption_dropout: float = 0.0
    mask_dropout: float = 0.0
    max_bad_samples: int = 0


@dataclass(frozen=True, order=True)
class ReplacedRow:
    """A row whose sample is damaged.

    position: in the order.  shard: path below the cache.  row: the damaged one.  replacement: the row that was read.
    """

    position: int
    shard: str
    row: int
    replacement: int


def refuse_too_many(replaced: Iterable[ReplacedRow], max_bad_samples: int) -> None:
    """Raise InputError that lists the damaged samples, if they are more than so many."""
    damaged = sorted({(row.shard, row.row) for row in replaced})
    if len(damaged) > max_bad_samples:
        places = ", ".join(f"{shard} row {row}" for shard, row in damaged)
        raise InputError(
            f"{len(damaged)} damaged sample(s), guard.max_bad_samples is {max_bad_samples}: {places}. Run "
            "`fluxfill shards verify` on data.cache, with --repair to encode them anew, then start again: the run goes "
            "on from its last checkpoint."
        )


class RowFiller:
    """Fills rows; safe to call from many threads.

    empty_text: what a dropped caption becomes.  blanks: bucket -> what the mask becomes in a hole as large as the
    picture.  replaced: rows that were replaced so far, those of earlier processes of the run included.
    """

    def __init__(
        self,
        reader: ShardReader,
        seed: int,
        policy: RowPolicy,
        empty_text: Mapping[str, memoryview],
        blanks: Mapping[Bucket, Mapping[str, memoryview]],
        replaced: Iterable[ReplacedRow] = (),
    ) -> None:
        self.replaced = set(replaced)
        self._reader, self._seed, self._policy = reader, seed, policy
        self._empty_text, self._blanks = empty_text, blanks
        self._lock = threading.Lock()

    def fill(self, rows: Rows, place: int, *, shard: int, row: int, turn: int, position: int) -> None:
        """Put row `row` of a shard, met for the `turn`-th time (from 0), in a place of a micro-batch.

        Raises DamagedShard if the shard has no whole row, InputError if too many samples are damaged.
        """
        seed, policy, out = self._seed, self._policy, dict(rows.stored[place])
        if policy.caption_dropout and draw_dropout(seed, position, policy.caption_dropout):
            for name, empty in self._empty_text.items():
                out.pop(name)[:] = empty
        if policy.mask_dropout and draw_whole_hole(seed, position, policy.mask_dropout):
            for name, blank in self._blanks[rows.batch.bucket].items():
                out.pop(name)[:] = blank
        self._read(out, shard, row, self._variant(shard, row, turn, position), position)
        draw_noise(seed, position, rows.noise[place])
        rows.uniform[place] = draw_uniform(seed, position)
        rows.weight[place] = 1.0
        rows.position[place] = position

    def _variant(self, shard: int, row: int, turn: int, position: int) -> int:
        count = self._reader.num_variants(shard)
        if count == 1 or self._policy.mask_choice == "first":
            return 0
        if self._policy.mask_choice == "cycle":
            return (turn + row) % count  # not all samples of an epoch at the same variant
        return draw_variant(self._seed, position, count)

    def _read(self, out: dict[str, memoryview], shard: int, row: int, variant: int, position: int) -> None:
        """Read a row, or the next one of its shard that is whole."""
        damage = None
        count = self._reader.num_samples(shard)
        for step in range(count):
            candidate = (row + step) % count
            try:
                self._reader.read(shard, candidate, out, variant=variant)
            except DamagedSample as error:
                damage = damage or error
                continue
            if damage is not None:
                self._record(ReplacedRow(position, str(self._reader.table.path[shard]), row, candidate), damage)
            return
        raise DamagedShard(f"{damage} No other sample of the shard is whole.") from damage

    def _record(self, replaced: ReplacedRow, damage: DamagedSample) -> None:
        with self._lock:
            is_new = all((known.shard, known.row) != (replaced.shard, replaced.row) for known in self.replaced)
            self.replaced.add(replaced)
            so_far = list(self.replaced)
        try:
            refuse_too_many(so_far, self._policy.max_bad_samples)
        except InputError as error:
            raise error from damage
        if is_new:
            log.warning("%s Row %d of the shard stands in for it.", damage, replaced.replacement)
