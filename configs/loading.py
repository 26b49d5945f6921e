"""Loading of a config: YAML and command line -> a frozen Config, or one error that lists everything wrong with it."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema

from configs.errors import InputError, StorageFailed, WhatAndCure, is_of_storage
from configs.mismatches import find_mismatches, find_sure_mismatches
from configs.problems import explain_errors, render_value
from configs.schema import Config
from configs.suggest import REMOVED
from configs.urls import problem_with_url, shown
from configs.yaml_text import Document, KeyPath, YamlError, dotted, dump_yaml, parse_yaml

VERSION = 1
# Places of keys are lines of the file, from 1; two are none, and come behind all lines.
_WHOLE_FILE, _COMMAND_LINE = float(sys.maxsize), math.inf


def load_config(path: Path | str, overrides: Sequence[str] = (), *, saved_by_a_run: bool = False) -> Config:
    """The run that a YAML file describes, with `key=value` overrides on top, validated and frozen.

    overrides: dotted keys and YAML values, as in train.lr=5e-5, data.resolution=[512,768], data.datasets.0.weight=2;
    the last one for a key counts.  saved_by_a_run: the file lies in a checkpoint, perhaps of an earlier release; keys
    that are gone since are passed over.  Raises one InputError with a line for every problem, in the order of the
    file's: where (file and line, or the command line), key, value, limit, and what to do.
    """
    document = read_document(Path(path))
    if not isinstance(document.value, dict):
        found = "is empty" if document.value is None else f"holds {render_value(document.value)}, not keys with values"
        cure = "Start from a recipe, such as configs/fill_lora.yaml."
        raise InputError(WhatAndCure(f"{path}: the file {found}", cure))
    raw: dict[str, Any] = document.value
    places: dict[KeyPath, float] = dict(document.lines)
    problems: list[tuple[float, WhatAndCure]] = [(line, WhatAndCure(text)) for line, text in document.problems]
    if saved_by_a_run:
        for section, _, name in (key.rpartition(".") for key in REMOVED):
            if isinstance(raw.get(section), dict):
                raw[section].pop(name, None)
        _forget_what_says_nothing(raw)
    for override in overrides:
        try:
            _apply_override(raw, override, places)
        except InputError as error:
            problems.append((_COMMAND_LINE, *error.args))

    version = raw.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        problem = _line_of(("version",), places), _explain_version(version)
        if type(version) is int and version > VERSION:  # its other keys are not this version's to judge
            raise InputError(_placed(path, *problem))
        problems.append(problem)
        del raw["version"]
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        explained = explain_errors(error, raw, json_schema(), anchors=document.anchors)
        problems += [(_line_of(key, places), problem) for key, problem in explained]
        mismatches = find_sure_mismatches(raw, error, [key for key, _ in explained])
    else:
        mismatches = find_mismatches(config)
    for key, _, mismatch in mismatches:
        if not saved_by_a_run or not key.startswith("slurm."):  # which matters to jobs alone
            problems.append((_line_of(tuple(key.split(".")), places), mismatch))
    if problems:
        problems.sort(key=lambda problem: problem[0])
        raise InputError(*(_placed(path, *problem) for problem in problems))
    return config


def _forget_what_says_nothing(raw: dict[str, Any]) -> None:
    """Take the members of a dataset without tars, and the columns of one without a table, out of a config that a run
    wrote with all defaults: they were the defaults of its release, and another one's would refuse them there."""
    data = raw.get("data")
    datasets = data.get("datasets") if isinstance(data, dict) else None
    for dataset in datasets if isinstance(datasets, list) else []:
        for place, names in (("tars", "members"), ("table", "columns")):
            if isinstance(dataset, dict) and dataset.get(place) is None:
                dataset.pop(names, None)


def dump_config(config: Config) -> str:
    """The config as YAML, every default written out; `load_config` reads it back equal, but for the queries of URLs:
    they may be signatures, and what a run stores is shown to others."""
    dumped = config.model_dump(mode="json")
    return dump_yaml(dumped | {"data": _without_queries(dumped["data"])})


def _without_queries(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_queries(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_queries(entry) for entry in value]
    return shown(value) if isinstance(value, str) and problem_with_url(value) is None else value


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, which gives editors completion, limits and descriptions."""
    schema = Config.model_json_schema(schema_generator=_Schema)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "fluxfill config"}


class _Schema(GenerateJsonSchema):
    """pydantic's, without a title for every field, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def read_document(path: Path, wanted: str = "a config, such as a copy of a recipe") -> Document:
    """A YAML file, parsed. Raises InputError, with what is wanted there, if it cannot be read, or is not YAML."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(WhatAndCure(f"{path}: there is no such file", f"Give the path of {wanted}.")) from error
    except OSError as error:
        kind = StorageFailed if is_of_storage(error) else InputError
        what = f"{path}: cannot be read ({error.strerror})"
        raise kind(WhatAndCure(what, "Give the path of a readable YAML file.")) from error
    except UnicodeDecodeError as error:
        what = f"{path}: is not UTF-8 text (byte {error.start})"
        raise InputError(WhatAndCure(what, "Save it as UTF-8.")) from error
    except YamlError as error:
        place = path if error.line is None else f"{path}:{error.line}"
        what = f"{place}: is not YAML: {error.reason}"
        raise InputError(WhatAndCure(what, "Check indentation, colons and quotes there.")) from error


def _apply_override(raw: dict[str, Any], override: str, places: dict[KeyPath, float]) -> None:
    """Set one dotted key in `raw`, in place; `places` learns where the value came from."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(WhatAndCure(f"{override!r} is not key=value", "Write for example train.lr=5e-5."))
    try:
        document = parse_yaml(text)
    except YamlError as error:
        what = f"{override!r} has a value that is not YAML: {error.reason}"
        raise InputError(WhatAndCure(what, "Put text in quotes.")) from error
    if document.problems:
        raise InputError(WhatAndCure(f"{override!r}: {document.problems[0][1]}"))

    path: KeyPath = ()
    current: Any = {"": raw}
    step: str | int = ""
    for name in key.split("."):
        if current[step] is None:
            current[step] = {}
        current = current[step]
        step = _step_into(current, name, path, override)
        path = (*path, step)
        if isinstance(current, dict):
            current.setdefault(step, None)
        places.setdefault(path, _COMMAND_LINE)
    # Nothing behind the = is no null: more often it is a variable of the shell that is not set.
    current[step] = document.value if text.strip() else ""
    for inner in [place for place in places if place[: len(path)] == path]:
        places[inner] = _COMMAND_LINE


def _step_into(current: Any, name: str, path: KeyPath, override: str) -> str | int:
    if isinstance(current, dict):
        return name
    if not isinstance(current, list):
        what = f"{override!r}: {dotted(path)} is {render_value(current)} and has no keys"
        raise InputError(WhatAndCure(what, "Override it whole."))
    if not name.isdecimal() or int(name) >= len(current):
        entries = "no entries" if not current else f"the entries 0 to {len(current) - 1}"
        what = f"{override!r}: {dotted(path)} is a list with {entries}, not {name}"
        raise InputError(WhatAndCure(what, "Override the list whole."))
    return int(name)


def _line_of(key: KeyPath, places: dict[KeyPath, float]) -> float:
    """Where the key stands, or the section it should stand in."""
    while key and key not in places:
        key = key[:-1]
    return places[key] if key else _WHOLE_FILE


def _placed(path: Path | str, place: float, problem: WhatAndCure) -> WhatAndCure:
    where = str(path) if place == _WHOLE_FILE else f"{path}:{place:.0f}"
    return WhatAndCure(f"{'command line' if place == _COMMAND_LINE else where}: {problem.what}", problem.cure)


def _explain_version(version: object) -> WhatAndCure:
    if type(version) is int and version > VERSION:
        what = f"version is {version}, but this fluxfill reads configs of version {VERSION}"
        return WhatAndCure(what, f"Upgrade fluxfill, or write a config of version {VERSION}.")
    return WhatAndCure(f"version is {render_value(version)}, but must be {VERSION}", f"Write version: {VERSION}")
