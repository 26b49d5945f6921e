"""One row of a batch: the parts of its sample that it takes, the replacement of a damaged sample, and the row's random
draws.

All of it is a function of the row's position in the order, whoever fills it and whenever.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from configs.errors import InputError
from data.batches.batch_memory import BatchViews
from data.batches.noise import (
    draw_caption_dropout,
    draw_mask_dropout,
    draw_noise,
    draw_uniform,
    draw_unmasked,
    draw_variant,
)
from data.batches.shard_reader import Buffers, DamagedSample, DamagedShard
from data.samples.geometry import Bucket

_T = TypeVar("_T")

log = logging.getLogger("fluxfill")


@dataclass(frozen=True)
class RowPolicy:
    """How the stored parts of a sample are put together.

    mask_choice: of a sample's mask variants, one at random; each in turn, one an epoch; or the first.
    caption_dropout, mask_dropout: shares of the rows that get the empty caption, and a hole as large as the picture.
    unmasked_probability: share of the rows whose loss ignores the mask.
    max_bad_samples: damaged samples that are replaced before the run stops.
    """

    mask_choice: Literal["random", "cycle", "first"] = "random"
    caption_dropout: float = 0.0
    mask_dropout: float = 0.0
    unmasked_probability: float = 0.0
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
            "`fluxfill shards verify` on data.cache, with --repair to encode them again (with data.mode online mend "
            "the pictures that were named), then start again: the run goes on from its last checkpoint."
        )


class RowFiller:
    """Random draws, dropped parts and replacements of damaged samples, row by row; safe to call from many threads.

    empty_caption: tensors of a dropped caption.  full_masks: bucket -> mask and latents of a hole as large as the
    picture.  replaced: rows that were replaced so far, those of earlier processes of the run included.
    """

    def __init__(
        self,
        seed: int,
        policy: RowPolicy,
        empty_caption: Buffers,
        full_masks: Mapping[Bucket, Buffers],
        replaced: Iterable[ReplacedRow] = (),
    ) -> None:
        self.replaced = set(replaced)
        self._seed, self._policy = seed, policy
        self._empty_caption, self._full_masks = empty_caption, full_masks
        self._lock = threading.Lock()

    def begin(self, rows: BatchViews, place: int, position: int) -> dict[str, memoryview]:
        """Draw a row's noise and dropout, and fill in what was dropped. Returns the buffers that are still to be filled
        from its sample, by name."""
        seed, policy, out = self._seed, self._policy, dict(rows.stored[place])
        if policy.caption_dropout and draw_caption_dropout(seed, position, policy.caption_dropout):
            for name, empty in self._empty_caption.items():
                out.pop(name)[:] = empty
        if policy.mask_dropout and draw_mask_dropout(seed, position, policy.mask_dropout):
            for name, full in self._full_masks[rows.batch.bucket].items():
                out.pop(name)[:] = full
        draw_noise(seed, position, rows.noise[place])
        rows.uniform[place] = draw_uniform(seed, position)
        rows.weight[place] = 1.0
        rows.position[place] = position
        chance = policy.unmasked_probability
        rows.unmasked[place] = chance > 0 and draw_unmasked(seed, position, chance)
        return out

    def choose_variant(self, num_variants: int, *, row: int, stream_epoch: int, position: int) -> int:
        """Which of its sample's mask variants a row has."""
        if num_variants == 1 or self._policy.mask_choice == "first":
            return 0
        if self._policy.mask_choice == "cycle":
            return (stream_epoch + row) % num_variants  # not all samples of an epoch at the same variant
        return draw_variant(self._seed, position, num_variants)

    def first_intact(
        self, read: Callable[[int], _T], *, shard: str, num_samples: int, row: int, position: int
    ) -> tuple[int, _T]:
        """(row, outcome of `read`) of a row, or of the next intact one of its shard.

        shard: its path.  read: raises DamagedSample for a row that is not.
        Raises DamagedShard if no row of the shard is intact, InputError if too many samples are damaged.
        """
        damage = ""  # not the error: kept in a frame that it passed, it would hold the shard's file for a while
        for step in range(num_samples):
            candidate = (row + step) % num_samples
            try:
                found = read(candidate)
            except DamagedSample as error:
                damage = damage or str(error)
                continue
            if damage:
                self._record(ReplacedRow(position, shard, row, candidate), damage)
            return candidate, found
        raise DamagedShard(f"{damage} No other sample of the shard is intact.")

    def _record(self, replaced: ReplacedRow, damage: str) -> None:
        with self._lock:
            is_new = all((known.shard, known.row) != (replaced.shard, replaced.row) for known in self.replaced)
            self.replaced.add(replaced)
            so_far = list(self.replaced)
        try:
            refuse_too_many(so_far, self._policy.max_bad_samples)
        except InputError as error:
            raise InputError(f"{damage}\n{error}") from error
        if is_new:
            log.warning("%s Row %d of the shard stands in for it.", damage, replaced.replacement)
