"""Everything in a config that does not go together, also where single keys of it are wrong as they stand."""

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import ValidationError

from configs.combinations import KEYS, Mismatch, find_refused
from configs.contradictions import find_contradictions, find_late_signal
from configs.errors import WhatAndCure
from configs.problems import stands_in
from configs.schema import Config
from configs.yaml_text import KeyPath

# What must be given, with values that no other key is held against.
EXAMPLE: dict[str, dict[str, Any]] = {
    "run": {"name": "example"},
    "model": {"base": "some/model"},
    "method": {"type": "lora"},
    "data": {"cache": "cache", "datasets": [{"name": "example", "target": "target", "mask": "mask"}]},
    "train": {"steps": 10**9, "global_batch_size": 10**6, "lr": 1.0},
}


def find_mismatches(config: Config) -> list[Mismatch]:
    """All of them, of what a run and its jobs do."""
    return [*find_refused(config), *_find_others(config)]


def _find_others(config: Config) -> Iterator[Mismatch]:
    yield from find_contradictions(config)
    yield from find_late_signal(config)


def find_sure_mismatches(raw: dict[str, Any], error: ValidationError, wrong: Collection[KeyPath]) -> list[Mismatch]:
    """Those of keys that are right, in a config that cannot be validated as a whole: an error that follows from
    another would send its reader astray.

    wrong: the keys that `error` is about. Where one of them is none of the schema, it may be another one misspelt, so
    only keys that are written count.
    """
    misspelt = any(details["type"] == "extra_forbidden" for details in error.errors())
    unsure = {path[: next((at for at, step in enumerate(path) if isinstance(step, int)), None)] for path in wrong}
    # A default that is wrong is so because of another key, and those that must be given set the measure of defaults.
    unsure |= {(path[0], key) for path in unsure if not stands_in(raw, path) for key in EXAMPLE.get(str(path[0]), ())}
    try:
        config = Config.model_validate(_completed(raw, unsure))
    except ValidationError as further:  # as of the keys of a method whose type is wrong
        unsure |= {details["loc"][:1] for details in further.errors()}
        try:
            config = Config.model_validate(_completed(raw, unsure))
        except ValidationError:
            return []

    def is_known(path: KeyPath) -> bool:
        return not any(path[: len(other)] == other or other[: len(path)] == path for other in unsure)

    def is_sure(key: str) -> bool:
        path = tuple(key.split("."))
        return is_known(path) and (not misspelt or stands_in(raw, path))

    refused = find_refused(config)
    if not all(is_known(tuple(key.split("."))) for key in KEYS.values()):
        # The nearest that works may not go with what takes the place of a wrong key.
        refused = [found._replace(problem=WhatAndCure(found.problem.what)) for found in refused]
    return [found for found in [*refused, *_find_others(config)] if all(map(is_sure, found.keys))]


def _completed(raw: dict[str, Any], without: Collection[KeyPath]) -> dict[str, Any]:
    """A config without some keys, and with those of EXAMPLE that it lacks then."""
    left = _without(raw, (), without)
    return left | {
        name: section | left[name] if isinstance(left.get(name), dict) else section for name, section in EXAMPLE.items()
    }


def _without(section: dict[str, Any], at: KeyPath, paths: Collection[KeyPath]) -> dict[str, Any]:
    return {
        key: _without(value, (*at, key), paths) if isinstance(value, dict) else value
        for key, value in section.items()
        if (*at, key) not in paths
    }
