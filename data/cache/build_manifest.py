"""The manifest and the shard table of a cache that is about to be complete, and the deletion of what no plan names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from configs.cache_settings import manifest_settings, picture_settings
from configs.errors import InputError
from configs.mask_recipe import recipe_of
from configs.schema import Config
from data.cache.manifest import Manifest, ShardTable, hash_files, read_manifest, read_shard_table
from data.cache.shard_index import ShardSummary
from data.cache.validation_items import validation_items_are_there
from data.cache_layout import EMPTY_TEXT, files_of_plans, full_mask_name, index_path
from data.encoders.model_folder import read_part_number
from data.samples.plan import HOLDOUT, TRAIN
from data.samples.shard_plan import ShardSpec


def delete_unplanned(cache: Path, plans: Sequence[ShardSpec]) -> None:
    """Delete shards that no plan names (their pictures went elsewhere) and what an interrupted job left."""
    planned = {cache / plan.path for plan in plans}
    planned |= {index_path(cache / plan.path, plan.format_version) for plan in plans}
    planned |= {cache / full_mask_name(str(plan.bucket)) for plan in plans}
    for path in files_of_plans(cache):
        if path not in planned:
            path.unlink()


def describe_cache(
    config: Config,
    model: Path,
    encoders: dict[str, str],
    plans: Sequence[ShardSpec],
    shards: Sequence[ShardSummary],
) -> tuple[Manifest, ShardTable]:
    """The manifest and the shard table of the finished cache."""
    holes = {dataset.name: _count_holes(plans, shards, dataset.name) for dataset in config.data.datasets}
    return describe_samples(config, model, encoders, plans, holes), shard_table(plans, shards)


def describe_samples(
    config: Config,
    model: Path,
    encoders: dict[str, str],
    plans: Sequence[ShardSpec],
    hole_fractions: dict[str, list[int]],
) -> Manifest:
    """The manifest of a plan, whether its samples are encoded yet or not."""
    names = [dataset.name for dataset in config.data.datasets]
    settings = manifest_settings(config.data)
    for dataset in config.data.datasets:
        settings |= picture_settings(dataset)
    return Manifest(
        format_version=plans[0].format_version,
        order_version=1,  # of format 1; a run's own state says by which order it goes
        settings=settings,
        encoders=encoders,
        vae_shift=read_part_number(model, "vae", "shift_factor"),
        vae_scale=read_part_number(model, "vae", "scaling_factor"),
        text_length=config.data.captions.text_length,
        text_dtype=config.data.captions.text_dtype,
        text_width=int(read_part_number(model, "text_encoder_2", "d_model")),
        pooled_width=int(read_part_number(model, "text_encoder", "hidden_size")),
        mask_variants={dataset.name: recipe_of(dataset).variants for dataset in config.data.datasets},
        samples={name: _count_splits(plans, name) for name in names},
        hole_fractions=hole_fractions,
    )


def is_current(cache: Path, manifest: Manifest, table: ShardTable) -> bool:
    """Whether a cache has this very manifest and table, its dropout tensors and its validation items."""
    try:
        found, found_table = read_manifest(cache), read_shard_table(cache)
    except InputError:
        return False
    dropout_tensors = [cache / EMPTY_TEXT, *(cache / full_mask_name(bucket) for bucket in np.unique(table.bucket))]
    return (
        found == replace(manifest, files=hash_files(cache, found.files))
        and all(np.array_equal(column, vars(found_table)[name]) for name, column in vars(table).items())
        and all(path.is_file() for path in dropout_tensors)
        and validation_items_are_there(cache)
    )


def shard_table(plans: Sequence[ShardSpec], shards: Sequence[ShardSummary]) -> ShardTable:
    return ShardTable(
        path=np.array([plan.path for plan in plans]),
        dataset=np.array([plan.dataset for plan in plans]),
        bucket=np.array([str(plan.bucket) for plan in plans]),
        split=np.array([plan.split for plan in plans]),
        samples=np.array([shard.num_samples for shard in shards], dtype=np.int64),
        bytes=np.array([shard.tar_bytes for shard in shards], dtype=np.int64),
        sha256=np.array([shard.tar_sha256 for shard in shards]),
        plan=np.array([plan.plan for plan in plans]),
    )


def _count_holes(plans: Sequence[ShardSpec], shards: Sequence[ShardSummary], dataset: str) -> list[int]:
    """Masks of a dataset, all variants, per tenth of the area that is painted."""
    counts = [shard.hole_counts for plan, shard in zip(plans, shards, strict=True) if plan.dataset == dataset]
    return np.sum(counts, axis=0).tolist() if counts else [0] * 10


def _count_splits(plans: Sequence[ShardSpec], dataset: str) -> dict[str, int]:
    counts = Counter({TRAIN: 0, HOLDOUT: 0})
    for plan in plans:
        if plan.dataset == dataset:
            counts[plan.split] += plan.num_samples
    return dict(counts)
