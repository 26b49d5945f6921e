"""A few pictures of every dataset as folders, wherever they come from: enough to encode and to train on."""

import json
from collections.abc import Sequence
from pathlib import Path

from configs.data_schema import DataConfig
from configs.dataset_schema import DatasetConfig, MaskConfig
from data.samples.plan import PlannedSample
from data.sources.picture_file import PictureFile
from data.sources.pictures import read_picture
from data.sources.triples import Triple

_MOST = 16  # of a dataset


def write_few_pictures(data: DataConfig, samples: Sequence[PlannedSample], folder: Path) -> list[str]:
    """Write pictures and captions of each dataset below `folder`, those of the largest buckets: they take most memory.
    Returns the overrides by which a config trains on them alone.

    As many as are encoded at once, so that memory which is too small for that shows. Raises InputError if one is gone.
    """
    datasets = []
    for dataset in data.datasets:
        of_it = [sample for sample in samples if sample.triple.dataset == dataset.name]
        of_it.sort(key=lambda sample: (-sample.bucket.tokens, sample.key))
        triples = list({sample.triple.key: sample.triple for sample in of_it}.values())
        chosen = triples[: min(data.encode_batch_size, _MOST)]
        if chosen:
            for triple in chosen:
                _write(triple, folder / dataset.name, data)
            datasets.append(_describe(dataset, folder / dataset.name))
    return [f"data.datasets={json.dumps(datasets)}", "data.holdout=0"]


def _write(triple: Triple, folder: Path, data: DataConfig) -> None:
    pictures: dict[str, PictureFile | None] = {"target": triple.target, "mask": triple.mask, "source": triple.source}
    for role, picture in pictures.items():
        if picture is not None:
            (folder / role).mkdir(parents=True, exist_ok=True)
            read = read_picture(picture, max_megapixels=data.max_megapixels)
            (folder / role / f"{triple.key}{picture.suffix}").write_bytes(read.data)
    if triple.caption:
        (folder / "target" / f"{triple.key}.txt").write_text(triple.caption, encoding="utf-8")


def _describe(dataset: DatasetConfig, folder: Path) -> dict:
    """The dataset, its pictures in this folder; judged already, so masks are not judged again."""
    described = dataset.model_dump(mode="json", include={"name", "flip", "weight"})
    described |= {"target": str(folder / "target"), "check_masks": "off"}
    mask = dataset.mask
    if isinstance(mask, MaskConfig):
        own = {} if mask.random is not None else {"folder": str(folder / "mask")}
        described["mask"] = mask.model_dump(mode="json", exclude_defaults=True) | own
    else:
        described["mask"] = str(folder / "mask")
    if (folder / "source").is_dir():
        described["source"] = str(folder / "source")
    return described
