"""The base of a config's sections, the types of their keys, and the marks that say what a key shapes."""

from enum import IntEnum
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from configs.urls import is_url, problem_with_url

Count = Annotated[int, Field(strict=True, ge=0)]
PositiveInt = Annotated[int, Field(strict=True, gt=0)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Side = Annotated[int, Field(strict=True, ge=32, le=4096, multiple_of=16)]


def _refuse_empty(value: object) -> object:
    if value == "":
        raise ValueError("must not be empty: give a path")
    return value


def list_of_one(value: object) -> object:
    return [value] if isinstance(value, int) else value


def _path_or_url(value: object) -> Path | str:
    if not isinstance(value, str | Path) or value == "":
        raise ValueError("must be a path or a URL, and not empty")
    if not is_url(value):
        return Path(value)
    if problem := problem_with_url(str(value)):
        raise ValueError(problem)
    if "?" in str(value) or "#" in str(value):
        raise ValueError(
            "it has a ? or #, and the names of files could not be put behind it: give the folder's URL alone"
        )
    return str(value).rstrip("/")


FolderOrUrl = Annotated[
    Path | str, PlainValidator(_path_or_url, json_schema_input_type=Annotated[str, Field(min_length=1)])
]


def list_of_word(value: object) -> object:
    return [value] if isinstance(value, str) else value


Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+)$", examples=["cuda:1"])]
NamedDevice = Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$", examples=["cuda:1"])]
PathText = Annotated[Path, BeforeValidator(_refuse_empty), Field(json_schema_extra={"minLength": 1})]
Word = Annotated[str, Field(min_length=1)]
Suffix = Annotated[str, Field(pattern=r"^[a-z0-9_-]+(\.[a-z0-9_-]+)*$")]
Names = Annotated[
    list[Suffix],
    BeforeValidator(list_of_word, json_schema_input_type=Suffix | list[Suffix]),
    Field(min_length=1),
]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, nothing changes after loading, text is never taken for a number.

    A check that needs two keys is a field validator of the later one, so it still runs when a third key is wrong. Its
    message ends the sentence "<key> is <value>, but ...".
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,  # one key is a word of Python
    )


class Shapes(IntEnum):
    """How much of a cache a key of `data` shapes; each includes those before it.

    Every key says it, in its Annotated: one that shaped the cache unmarked would train on what another config encoded.
    configs/cache_settings.py derives from the marks what has to be compared, stored and hashed.
    """

    NOTHING = 0
    PLAN = 1
    """How samples are dealt to shards. All workers on one cache must agree."""
    PICTURES = 2
    """Which pictures are read, as what. A run that trains on the cache must agree, but may find the same pictures at
    another place."""
    SAMPLES = 3
    """What the samples are. A run must agree."""
    TENSORS = 4
    """The stored tensors of any sample. Part of every shard's hash too: another value encodes all of them again."""
