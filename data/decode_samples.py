"""Planned samples -> their pixels, decoded by threads ahead of where they are used."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from configs.errors import InputError
from configs.schema import DataConfig
from data.geometry import Pixels, fit
from data.pictures import load_mask, load_picture
from data.shard_plan import PlannedSample

_T = TypeVar("_T")

_DECODE_THREADS = 4  # Pillow releases the GIL, so pictures are decoded while the batch before them is encoded


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


def decode_batches(
    samples: Sequence[PlannedSample], data: DataConfig, problems: list[str]
) -> Iterator[list[tuple[PlannedSample, list[Pixels]]]]:
    """Batches of decoded samples, a batch ahead of the one in use. What cannot be decoded goes to `problems`."""
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:

        def submit(batch: Iterable[PlannedSample]) -> list[tuple[PlannedSample, Future[list[Pixels]]]]:
            return [(sample, pool.submit(load_pixels, sample, data)) for sample in batch]

        batches = batched(samples, data.encode_batch_size)
        ahead = submit(next(batches, ()))
        while ahead:
            now, ahead = ahead, submit(next(batches, ()))
            decoded = []
            for sample, future in now:
                try:
                    decoded.append((sample, future.result()))
                except InputError as error:
                    problems.append(str(error))
            yield decoded


def batched(items: Iterable[_T], size: int) -> Iterator[tuple[_T, ...]]:
    """Runs of `size` items, the last perhaps shorter."""
    rest = iter(items)
    return iter(lambda: tuple(islice(rest, size)), ())
