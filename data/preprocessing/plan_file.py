"""The plan as a file that workers share: the specs of all shards are in memory, a shard's samples are read on demand. A
plan with all of its samples would take 5 KiB for each of them, in every worker of a machine.

    for each shard    its samples as JSON, compressed
    then              a row for each shard, where its samples are among them, compressed
    at the end        offset and size of the rows, 8 bytes each
"""

import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from configs.errors import InputError
from data.samples.geometry import Bucket
from data.samples.plan import PlannedSample
from data.samples.shard_plan import PlannedShard, ShardSpec
from data.storage.atomic_write import write_atomically
from data.storage.retry import retry_if_stale

_SAMPLES = TypeAdapter(tuple[PlannedSample, ...])


@dataclass(frozen=True)
class PlanFile:
    """specs: of all shards.  places: path of a shard -> offset and size of its samples in the file."""

    path: Path
    specs: tuple[ShardSpec, ...]
    places: dict[str, tuple[int, int]]

    def load(self, spec: ShardSpec) -> PlannedShard:
        """A shard with its samples. Raises InputError if they are damaged."""
        samples = retry_if_stale(self.path, lambda: _read(self.path, *self.places[spec.path]))
        return PlannedShard(**{name: getattr(spec, name) for name in _COLUMNS}, samples=_SAMPLES.validate_json(samples))

    def shards(self) -> Iterator[PlannedShard]:
        """All of them, one in memory at a time."""
        return map(self.load, self.specs)


_COLUMNS = ("path", "dataset", "bucket", "split", "plan", "num_samples", "num_bytes", "format_version")


def write_plan(path: Path, plans: Iterable[PlannedShard]) -> None:
    """Write a plan, atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            rows = []
            for plan in plans:
                offset = file.tell()
                size = file.write(zlib.compress(_SAMPLES.dump_json(plan.samples), level=1))
                bucket = (plan.bucket.height, plan.bucket.width)
                told = (plan.path, plan.dataset, bucket, plan.split, plan.plan, plan.num_samples, plan.num_bytes)
                rows.append((*told, plan.format_version, offset, size))
            offset = file.tell()
            size = file.write(zlib.compress(json.dumps(rows).encode(), level=1))
            file.write(offset.to_bytes(8, "little") + size.to_bytes(8, "little"))

    write_atomically(path, write)


def read_plan(path: Path) -> PlanFile:
    """Raises FileNotFoundError if it is not there, InputError if it is damaged."""

    def read() -> bytes:
        with path.open("rb") as file:
            file.seek(-min(16, file.seek(0, 2)), 2)
            footer = file.read()
        return _read(path, int.from_bytes(footer[:8], "little"), int.from_bytes(footer[8:], "little"))

    specs, places, buckets = [], {}, dict[tuple[int, ...], Bucket]()
    for name, dataset, sides, split, plan, *numbers, offset, size in json.loads(retry_if_stale(path, read)):
        bucket = buckets.setdefault(tuple(sides), Bucket(*sides))  # one for all: there may be a million shards
        specs.append(ShardSpec(name, sys.intern(dataset), bucket, sys.intern(split), plan, *numbers))
        places[name] = (offset, size)
    return PlanFile(path, tuple(specs), places)


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        try:
            if offset + size > file.seek(0, 2):
                raise ValueError("is cut off")
            file.seek(offset)
            return zlib.decompress(file.read(size))  # which checks a sum of what comes out
        except (zlib.error, ValueError) as error:
            raise InputError(
                f"{path}: the plan that the workers of this job share is damaged ({error}). Look at the disk that it "
                "lies on; start the job again once all its workers have ended, and it plans anew."
            ) from error
