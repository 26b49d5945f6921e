"""The settings that shape a cache, derived from the marks on the schema's keys (`Shapes`): what workers compare, what
the manifest stores and a run compares, and what every shard's hash holds."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from configs.data_schema import DataConfig
from configs.dataset_schema import DatasetConfig
from configs.mask_recipe import mask_folder, recipe_of
from configs.section import Section, Shapes
from configs.urls import shown


def keys_that_shape(least: Shapes, section: type[Section] = DataConfig) -> dict[str, Any]:
    """The keys of a section marked with at least `least`, as pydantic's `include` takes them.

    Raises TypeError for a key without a mark; one that holds a section, or a list of them, needs none: its keys do.
    """
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Shapes)]
        if len(marks) == 1:
            if marks[0] >= least:
                found[name] = True
            continue
        is_list = get_origin(field.annotation) is list
        inner = get_args(field.annotation)[0] if is_list else field.annotation
        if marks or not (isinstance(inner, type) and issubclass(inner, Section)):
            raise TypeError(
                f"{section.__name__}.{name} does not say what it shapes. Add one of Shapes to its type: "
                f"Annotated[..., Shapes.NOTHING] if a cache is the same whatever its value."
            )
        if below := keys_that_shape(least, inner):
            found[name] = {"__all__": below} if is_list else below
    return found


def worker_settings(data: DataConfig) -> dict[str, object]:
    """The settings in which all workers on one cache must agree: "data.<key>" -> value in JSON's types."""
    dumped = data.model_dump(mode="json", include=keys_that_shape(Shapes.PLAN))
    return _without_later_keys({f"data.{key}": value for key, value in dumped.items()})


def manifest_settings(data: DataConfig) -> dict[str, object]:
    """The settings in which a run must agree with the cache that it trains on: dotted key -> value in JSON's types.

    Not which pictures these were (`picture_settings`), nor an order of datasets or resolutions.
    """
    dumped = data.model_dump(mode="json", include=keys_that_shape(Shapes.SAMPLES))
    datasets = {entry.pop("name"): entry for entry in dumped.pop("datasets")}
    for dataset in data.datasets:
        datasets[dataset.name]["mask"] = str(recipe_of(dataset))
    dumped["resolution"].sort()
    settings = {
        "data.datasets": sorted(datasets),
        **dict(_flatten(dumped, "data")),
        **dict(_flatten(datasets, "data.datasets")),
    }
    return _without_later_keys(settings)


LATER_KEYS = frozenset({"data.min_side", "data.max_enlarge"})  # than format 1


def _without_later_keys(settings: dict[str, object]) -> dict[str, object]:
    """Without the later keys where they are not set: caches that were made before them stay as they are."""
    return {key: value for key, value in settings.items() if key not in LATER_KEYS or value is not None}


def picture_settings(dataset: DatasetConfig) -> dict[str, object]:
    """Which pictures a dataset's samples are made of, as what: dotted key -> value in JSON's types, None where a key is
    at its default. Places without the query of a URL, which may hold a token."""
    given = dataset.model_dump(mode="json", include=set(_PICTURES), exclude_defaults=True)
    folder = mask_folder(dataset)
    values = {name: given.get(name) for name in _PICTURES} | {"mask.folder": folder and str(folder)}
    return {f"data.datasets.{dataset.name}.{name}": _without_queries(value) for name, value in values.items()}


def is_place(key: str) -> bool:
    """Whether a key of `picture_settings` says where pictures are; else it says what they are called."""
    return key.split(".", 3)[-1] in ("tars", "table", "target", "source", "mask.folder")


def plan_settings(data: DataConfig, dataset: DatasetConfig) -> dict[str, object]:
    """All else that shapes a dataset's shards, in JSON's types; keys at their defaults are left out."""
    shared = data.model_dump(mode="json", include=keys_that_shape(Shapes.PLAN), exclude_defaults=True)
    own = dataset.model_dump(mode="json", include=set(_OWN) - {"name"}, exclude_defaults=True)
    # Flat: of a section that differs from its default in what shapes nothing, an empty one would be left.
    return dict(_flatten({**shared, "datasets": {**own, "mask": str(recipe_of(dataset))}}, "data"))


def _without_queries(value: Any) -> object:
    if isinstance(value, list):
        return [shown(place) for place in value]
    return shown(value) if isinstance(value, str) else value


def tensor_settings(data: DataConfig) -> dict[str, object]:
    """The settings that shape the tensors of any sample, by their last names; hashed for every shard.

    A key that format 1 did not begin with is left out at its default: caches that were made before it stay good.
    """
    changed = data.model_dump(mode="json", include=keys_that_shape(Shapes.TENSORS), exclude_defaults=True)
    first = {"text_length": data.captions.text_length, "text_dtype": data.captions.text_dtype}
    return first | {key.rpartition(".")[2]: value for key, value in _flatten(changed, "data")}


def _flatten(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    """(dotted key, value) of all that is no section itself."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


_OWN = keys_that_shape(Shapes.SAMPLES, DatasetConfig)
_PICTURES = sorted(keys_that_shape(Shapes.PICTURES, DatasetConfig).keys() - _OWN.keys())
