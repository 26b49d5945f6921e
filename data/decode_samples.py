"""Planned samples -> their pixels, decoded by threads ahead of where they are used."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from configs.errors import InputError
from configs.schema import DataConfig
from data.geometry import Pixels, fit
from data.pictures import load_mask, load_picture
from data.shard_plan import PlannedSample

_T = TypeVar("_T")
_Tag = TypeVar("_Tag")


def load_pixels(sample: PlannedSample, data: DataConfig) -> list[Pixels]:
    """A planned sample's pictures at its bucket's size, once per mask variant; target and image are shared.

    Raises InputError, naming the file at fault.
    """
    triple = sample.triple
    target = load_picture(triple.target, max_megapixels=data.max_megapixels)
    mask = load_mask(triple.mask, max_megapixels=data.max_megapixels)
    source = load_picture(triple.source, max_megapixels=data.max_megapixels) if triple.source else None
    pixels = fit(target, mask, source, sample.bucket)
    if not pixels.mask.any() or pixels.mask.all():
        what = "nothing to keep" if pixels.mask.all() else "nothing to paint"
        raise InputError(
            f"{triple.mask}: at the size of its bucket, {sample.bucket}, there is {what}: that part was cut off, or is "
            "smaller than a pixel. Crop the triple yourself, or remove it."
        )
    return [pixels]


@dataclass(frozen=True)
class DecodedBatch(Generic[_Tag]):
    """Samples that could be decoded with their pixels (one per mask variant), and what is wrong with the others.

    tag: whatever its samples were given with.
    """

    tag: _Tag
    samples: list[PlannedSample]
    pixels: list[list[Pixels]]
    problems: list[str]


def decode_batches(
    batches: Iterable[tuple[_Tag, Sequence[PlannedSample]]], data: DataConfig, pool: Executor, *, ahead: int
) -> Iterator[DecodedBatch[_Tag]]:
    """Batches in their order, decoded by `pool`, while the samples of the next `ahead` batches are waiting there."""
    waiting: deque[tuple[_Tag, list[tuple[PlannedSample, Future[list[Pixels]]]]]] = deque()
    try:
        for tag, samples in batches:
            waiting.append((tag, [(sample, pool.submit(load_pixels, sample, data)) for sample in samples]))
            if len(waiting) > ahead:
                yield _gather(*waiting.popleft())
        while waiting:
            yield _gather(*waiting.popleft())
    finally:
        for _, submitted in waiting:
            for _, future in submitted:
                future.cancel()


def _gather(tag: _Tag, submitted: Iterable[tuple[PlannedSample, Future[list[Pixels]]]]) -> DecodedBatch[_Tag]:
    batch: DecodedBatch[_Tag] = DecodedBatch(tag, [], [], [])
    for sample, future in submitted:
        try:
            pixels = future.result()
        except InputError as error:
            batch.problems.append(str(error))
        else:
            batch.samples.append(sample)
            batch.pixels.append(pixels)
    return batch


def in_batches(items: Iterable[_T], size: int) -> Iterator[tuple[_T, ...]]:
    """Runs of `size` items, the last perhaps shorter."""
    rest = iter(items)
    return iter(lambda: tuple(islice(rest, size)), ())
