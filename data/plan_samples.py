"""What becomes a sample: every triple in its bucket(s), split and crop, from headers and masks alone."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from rich.progress import Progress

from configs.errors import InputError
from configs.schema import Config
from data.geometry import choose_buckets, plan_crop
from data.manifest import HOLDOUT, TRAIN
from data.pictures import load_mask, picture_size
from data.shard_plan import PlannedSample
from data.sources import Triple, held_out, list_triples, listed

_DECODE_THREADS = 4  # Pillow releases the GIL


def plan_samples(config: Config, progress: Progress) -> list[PlannedSample]:
    """Every triple in its bucket(s), split and crop, from headers and masks alone.

    Raises one InputError that lists every triple at fault, or says that nothing is left to train on.
    """
    data = config.data
    bar = progress.add_task("reading", total=None)
    triples = [triple for dataset in data.datasets for triple in list_triples(dataset, data.captions)]
    progress.update(bar, total=len(triples), completed=len(triples))
    bar = progress.add_task("checking", total=len(triples))
    sizes: list[tuple[int, int]] = []
    problems: list[str] = []
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        for outcome in pool.map(lambda triple: _size_or_problem(triple, data.max_megapixels), triples):
            if isinstance(outcome, InputError):
                problems.append(str(outcome))
            else:
                sizes.append(outcome)
            progress.advance(bar)
    if problems:
        raise InputError(listed(problems))
    kept = held_out((triple.target_content for triple in triples), data.holdout)
    if all(triple.target_content in kept for triple in triples):
        raise InputError(
            f"data.holdout {data.holdout} keeps back all {len(kept)} pictures and leaves none to train on. "
            f"Lower it below {len(kept)}, or add pictures."
        )
    return [
        PlannedSample(
            triple, size, bucket, plan_crop(*size, bucket), HOLDOUT if triple.target_content in kept else TRAIN
        )
        for triple, size in zip(triples, sizes, strict=True)
        for bucket in choose_buckets(*size, data.resolution, policy=data.resolution_policy)
    ]


def _size_or_problem(triple: Triple, max_megapixels: float) -> tuple[int, int] | InputError:
    try:
        return check_triple(triple, max_megapixels)
    except InputError as error:
        return error


def check_triple(triple: Triple, max_megapixels: float) -> tuple[int, int]:
    """Upright (width, height) of a triple whose pictures agree in size and whose mask has something to paint and
    something to keep. Raises InputError otherwise."""
    width, height = picture_size(triple.target, max_megapixels=max_megapixels)
    partners = [("mask", triple.mask)] + ([("source", triple.source)] if triple.source else [])
    for role, path in partners:
        size = picture_size(path, max_megapixels=max_megapixels)
        if size != (width, height):
            raise InputError(
                f"{path}: the {role} is {size[0]}x{size[1]}, its target {triple.target} is {width}x{height}. "
                f"Make the {role} anew at the target's size: stretching it would shift the hole."
            )
    levels = np.asarray(load_mask(triple.mask, max_megapixels=max_megapixels))
    if levels.max() < 128:
        raise InputError(
            f"{triple.mask}: the mask is all black (its brightest pixel is {levels.max()} of 255): nothing to paint. "
            "White marks the hole; is it inverted?"
        )
    if levels.min() >= 128:
        raise InputError(
            f"{triple.mask}: the mask is all white (its darkest pixel is {levels.min()} of 255): nothing to keep. "
            "White marks the hole; is it inverted?"
        )
    return width, height
