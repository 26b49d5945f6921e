"""Planned samples -> their pixels, decoded by threads ahead of where they are used."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from configs.data_schema import DataConfig
from configs.errors import InputError, StorageFailed
from data.samples.cut_masks import describe_lack, what_lacks
from data.samples.geometry import Pixels, fit
from data.samples.masks import dilate_masks, draw_masks
from data.samples.plan import PlannedSample
from data.sources.pictures import load_mask, load_picture, read_picture
from data.sources.triples import content_of

_T = TypeVar("_T")
_Tag = TypeVar("_Tag")


def load_pixels(sample: PlannedSample, data: DataConfig, *, stop: threading.Event | None = None) -> list[Pixels]:
    """A planned sample's pictures at its bucket's size, once per mask variant; target and image are shared.

    Raises InputError, naming the file at fault, also if its pictures are not those that were planned; StorageFailed if
    what holds them keeps failing, or fails once `stop` is set.
    """
    triple, limit = sample.triple, data.max_megapixels
    files = [file for file in (triple.target, triple.mask, triple.source) if file is not None]
    read = {file: read_picture(file, max_megapixels=limit, stop=stop) for file in files}
    if content_of(read[file].content for file in files) != triple.content:
        raise InputError(
            f"{' or '.join(map(str, files))}: changed since the shards were planned. Run `fluxfill preprocess CONFIG` "
            "again."
        )
    target = load_picture(read[triple.target], max_megapixels=limit)
    source = load_picture(read[triple.source], max_megapixels=limit) if triple.source is not None else None
    if triple.mask is None:
        mask = Image.new("L", target.size)  # drawn below, at the bucket's size
    else:
        mask = load_mask(read[triple.mask], max_megapixels=limit, label=sample.recipe.label)
    pixels = fit(target, mask, source, sample.bucket)
    if triple.mask is not None and (lack := what_lacks(pixels.mask)):  # planning finds it, by the same function
        what, cure = describe_lack(lack, sample.bucket, sample.crop)
        raise InputError(f"{triple.mask}: {what}. {cure}")
    if sample.recipe.shares:
        masks = draw_masks(sample.recipe, triple.target_content, sample.bucket.height, sample.bucket.width)
    else:
        masks = dilate_masks(pixels.mask, sample.recipe, triple.target_content)
    if sample.flip:
        pixels = Pixels(*(np.ascontiguousarray(np.fliplr(part)) for part in (pixels.target, pixels.image, pixels.mask)))
        masks = [np.ascontiguousarray(np.fliplr(mask)) for mask in masks]
    return [replace(pixels, mask=mask) for mask in masks]


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
    """Batches in their order, decoded by `pool`, while the samples of the next `ahead` batches are waiting there.

    Raises StorageFailed: the next pictures would fail like that one, after as long a wait each.
    """
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
        except StorageFailed:
            raise
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
