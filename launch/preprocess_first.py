"""Whether `fluxfill train` preprocesses before it trains: always, except where the cache must stay as it is.

Whether a finished cache is behind its pictures is for preprocessing itself to find: its plan is the truth, it keeps
what it has read of the pictures, and ends soon when nothing is to be done.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from configs.errors import InputError
from configs.mask_recipe import mask_folder
from configs.schema import Config
from configs.urls import is_url
from data.cache.manifest import cache_errors_named, read_manifest, refuse_other_settings
from data.cache_layout import MANIFEST
from data.encoders.model_folder import find_model
from data.storage.checkpoint_folders import complete_checkpoints


def reason_to_train_at_once(config: Config, config_path: str, *, begins: bool = False) -> str | None:
    """Why the cache is left as it is, for people; None: preprocess first.  begins: whatever checkpoints there are.

    Raises InputError if there is no finished cache and data.preprocess is never, or if preprocessing would replace a
    finished cache by one of other settings or encoders: hours of work, which only `fluxfill preprocess` itself undoes.
    """
    data = config.data
    if data.mode == "online":
        return "with data.mode online the run encodes its pictures itself"
    if not isinstance(data.cache, Path):
        return "data.cache is a URL, and caches are made in a folder"
    with cache_errors_named(data.cache):
        is_finished = (data.cache / MANIFEST).is_file()
    if data.preprocess == "never":
        if not is_finished:
            raise InputError(
                f"data.cache {data.cache}: no finished cache is there, and data.preprocess is never. Run `fluxfill "
                f"preprocess {config_path}` first, or set data.preprocess=auto."
            )
        return "data.preprocess is never"
    if not is_finished:
        return None
    if has_checkpoint(config.run.folder) and not begins:
        return (
            f"{config.run.folder} goes on from a checkpoint, with the pictures that it began with; a run of another "
            "name takes new ones"
        )
    if missing := missing_place(config):
        return f"the cache is complete, and its pictures are not on this machine ({missing})"
    with cache_errors_named(data.cache):
        manifest = read_manifest(data.cache)
    refuse_other_settings(config, find_model(config.model.base), manifest, pictures=False)
    if not os.access(data.cache, os.W_OK):
        return f"the cache is complete, and {data.cache} cannot be written to: pictures that changed are not looked for"
    return None


def has_checkpoint(run: Path) -> bool:
    """Whether a run has a complete checkpoint: its order is fixed then, and other training pictures would end it."""
    return bool(complete_checkpoints(run))


def missing_place(config: Config) -> Path | None:
    """The first folder or file that the datasets' pictures come from and that is not on this machine; None: all are."""
    return next((place for place in picture_places(config) if not place.exists()), None)


def picture_places(config: Config) -> Iterator[Path]:
    """Every folder and file on this machine that the datasets' pictures come from; of tars their folders."""
    for dataset in config.data.datasets:
        yield from (place for place in (dataset.target, dataset.source, mask_folder(dataset)) if place is not None)
        if dataset.table is not None and not is_url(dataset.table):
            yield Path(dataset.table)
        # Of photos-{000..127}.tar the part before the braces; one that is missing alone is preprocessing's to name.
        yield from (Path(os.path.dirname(tar.partition("{")[0])) for tar in dataset.tars or [] if not is_url(tar))
