"""Planned samples: every triple in its bucket(s), split and crop, and its mirror image where that is wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import xxhash
from rich.console import Console
from rich.progress import Progress

from configs.data_schema import DataConfig
from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from configs.mask_recipe import OWN_MASKS, MaskRecipe, recipe_of
from configs.schema import Config
from data.samples.cut_masks import find_cut_masks
from data.samples.geometry import Bucket, Crop, choose_buckets, plan_crop
from data.sources.problems import Findings
from data.sources.triples import Triple, held_out, list_triples

TRAIN, HOLDOUT = "train", "holdout"  # the splits

Found = tuple[DatasetConfig, Triple, tuple[int, int]]  # a dataset, one of its triples, its upright (width, height)


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A triple with all that is decided before its pictures are decoded.

    size: upright (width, height).  recipe: how its masks are made.  flip: it is the mirror image of its triple.
    """

    triple: Triple
    size: tuple[int, int]
    bucket: Bucket
    crop: Crop
    split: str
    recipe: MaskRecipe = OWN_MASKS
    flip: bool = False

    @property
    def key(self) -> str:
        """Its name inside a shard, at most 75 letters, digits, - and _."""
        return f"{self.triple.key}-flip" if self.flip else self.triple.key

    @property
    def text(self) -> str:
        """Name of its caption: samples of one caption share a text. In format 1 that is a member called so."""
        return text_name(self.triple.caption)


def text_name(caption: str) -> str:
    return f"text-{xxhash.xxh3_64_hexdigest(caption.encode())}"


def plan_samples(config: Config, progress: Progress, *, thorough: bool = False) -> list[PlannedSample]:
    """Every triple in its bucket(s), split and crop; no pixels are kept. Results of the scan are kept in data.cache.

    A mirror image is a sample of its own, since the latents of a mirrored picture are not its mirrored latents. It has
    its original's caption and split: a held-out picture must not be trained on the other way round.
    thorough: decode every picture in full.
    Raises one ProblemsFound of all that is wrong in any dataset, or InputError if nothing is left to train on.
    """
    findings = Findings()
    found = find_pictures(config, progress, findings, thorough=thorough)
    findings.report(progress.console, config.data.cache_folder)
    return plan_found(config, found, progress.console)


def find_pictures(config: Config, progress: Progress, findings: Findings, *, thorough: bool = False) -> list[Found]:
    """The triples of every dataset whose pictures can be read; `findings` takes what is wrong with the others, and
    masks of which a bucket's crop leaves no hole, or nothing else."""
    data = config.data
    bar = progress.add_task("reading pictures", total=None)
    crops_of = cache(partial(_crops_of, data=data))
    found = []
    for dataset in data.datasets:
        triples = list_triples(dataset, data, partial(progress.advance, bar), findings, thorough=thorough)
        find_cut_masks(dataset, triples, data, crops_of, findings)
        found += [(dataset, triple, size) for triple, size, _ in triples]
    progress.update(bar, total=len(found), completed=len(found))
    return found


def plan_found(config: Config, found: Sequence[Found], console: Console) -> list[PlannedSample]:
    """The samples of pictures that were found; `console` is told how many are left out as too small.

    Raises InputError if nothing is left to train on.
    """
    data = config.data
    crops = {size: _crops_of(size, data) for size in {size for _, _, size in found}}  # few, of however many pictures
    wanted = [entry for entry in found if crops[entry[2]]]
    if len(wanted) < len(found):
        left_out = (
            f"{len(found) - len(wanted)} of {len(found)} pictures are left out by data.min_side {data.min_side} and "
            f"data.max_enlarge {data.max_enlarge}"
        ).replace("None", "null")
        if not wanted:
            raise InputError(f"{left_out}. Lower the one, or raise the other.")
        console.print(left_out, highlight=False, soft_wrap=True)
        found = wanted
    kept = held_out((triple.target_content for _, triple, _ in found), data.holdout)
    if all(triple.target_content in kept for _, triple, _ in found):
        raise InputError(
            f"data.holdout {data.holdout} keeps back all {len(kept)} pictures and leaves none to train on. "
            f"Lower it below {len(kept)}, or add pictures."
        )
    recipes = {dataset.name: recipe_of(dataset) for dataset in data.datasets}
    return [
        PlannedSample(
            triple,
            size,
            bucket,
            crop,
            HOLDOUT if triple.target_content in kept else TRAIN,
            recipes[dataset.name],
            flip,
        )
        for dataset, triple, size in found
        for bucket, crop in crops[size]
        for flip in ((False, True) if dataset.flip else (False,))
    ]


def _crops_of(size: tuple[int, int], data: DataConfig) -> list[tuple[Bucket, Crop]]:
    """The bucket(s) of a picture of this size and its crop for each; none where it is smaller than is wanted."""
    if data.min_side is not None and min(size) < data.min_side:
        return []
    buckets = choose_buckets(*size, data.resolution, policy=data.resolution_policy)
    crops = [(bucket, plan_crop(*size, bucket)) for bucket in buckets]
    most = data.max_enlarge
    return [(bucket, crop) for bucket, crop in crops if most is None or crop.width <= most * size[0]]
