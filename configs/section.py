"""The base of a config's sections, the types of their keys, and the marks that say what a key shapes."""

import ast
import inspect
import os
import sys
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, PlainValidator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

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


def expand_home(value: object) -> object:
    """A place with ~ or ~user in front as the folder that it stands for; anything else as it is."""
    if not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    expanded = os.path.expanduser(value)
    if str(expanded).startswith("~"):
        raise ValueError("begins with ~, but no such home folder is known: write the whole path")
    return expanded


def list_of_one(value: object) -> object:
    return [value] if isinstance(value, int) else value


def _path_or_url(value: object) -> Path | str:
    if not isinstance(value, str | Path) or value == "":
        raise ValueError("must be a path or a URL, and not empty")
    if not is_url(value):
        return Path(str(expand_home(value)))
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
PathText = Annotated[
    Path, BeforeValidator(expand_home), BeforeValidator(_refuse_empty), Field(json_schema_extra={"minLength": 1})
]
PlaceText = Annotated[str, BeforeValidator(expand_home), Field(min_length=1)]
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
        serialize_by_alias=True,  # one key is a word of Python
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """With the text below each key as its description. Read now: pydantic's use_attribute_docstrings would read the
        sources at every start of the program."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name, text in read_descriptions(cls).items():
            key = properties[cls.model_fields[name].alias or name]
            if handler.resolve_ref_schema(key).get("description") != text:  # which a section may say of itself
                key["description"] = text
        return schema


def read_descriptions(section: type[Section]) -> dict[str, str]:
    """Name of a field -> the text that stands below it in the source of its class."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if issubclass(kind, Section):
            for above, below in pairwise(_definitions_in(kind.__module__)[kind.__name__].body):
                match above, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = inspect.cleandoc(text)
    return found


@cache
def _definitions_in(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


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


@dataclass(frozen=True)
class OnResume:
    """What becomes of a run that goes on from a checkpoint of another value of a key.

    Every key says it, in its Annotated, or its section for all of them; keys of `data` that shape the cache need not:
    the samples themselves are compared. configs/resume_settings.py derives from it what is told and what is refused.
    effect: of a value in force, what it changes.
    """

    kind: Literal["no matter", "in force", "another run"]
    effect: str = ""


NO_MATTER = OnResume("no matter")
ANOTHER_RUN = OnResume("another run")
"""The checkpoint's state would be that of another run: refused."""


def in_force(effect: str) -> OnResume:
    """The mark of a key whose new value counts from the next step on; told, with both values and what it changes."""
    return OnResume("in force", effect)
