"""What differs between a checkpoint's config and that of the run that goes on from it, by the marks on the schema's
keys (`OnResume`)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from configs.schema import Config
from configs.section import OnResume, Section, Shapes


@dataclass(frozen=True)
class Change:
    """A key whose value is another one than the checkpoint's; None where it had none, or has none now."""

    key: str
    before: Any
    now: Any
    mark: OnResume

    def __str__(self) -> str:
        return f"{self.key} is {self.now!r}, the run has {self.before!r}"


def compare_settings(
    before: Config, now: Config, known: Mapping[str, tuple[Any, Any]]
) -> tuple[list[Change], list[Change]]:
    """(what is in force from now on, what would make it another run's state).

    known: key -> (before, now) of keys whose text tells less than is known: a model's content, what "auto" became.
    """
    old, new = (dict(_flatten(config)) for config in (before, now))
    for key, (was, becomes) in known.items():
        old[key], new[key] = was, becomes
    marks = marks_of(Config)
    changes = [
        Change(key, old.get(key), new.get(key), mark)
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and (mark := _mark_of(key, marks)) is not None
    ]
    # Where an adapter began is no longer asked: a run goes on without the file.
    refused = [c for c in changes if c.mark.kind == "another run" and (c.key, c.now) != ("method.init_from", None)]
    return [change for change in changes if change.mark.kind == "in force"], refused


def marks_of(section: type[Section], above: OnResume | None = None, prefix: str = "") -> dict[str, OnResume | None]:
    """Dotted key -> its mark, or that of its section; None where the samples themselves are compared. The entries of a
    list of sections stand below "*".

    Raises TypeError for a key without a mark.
    """
    found: dict[str, OnResume | None] = {}
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        own = next((mark for mark in field.metadata if isinstance(mark, OnResume)), above)
        if any(isinstance(mark, Shapes) and mark > Shapes.NOTHING for mark in field.metadata):
            found[key] = None
            continue
        is_list, inner = _sections_in(field.annotation)
        for below in inner:
            found |= marks_of(below, own, f"{key}.*." if is_list else f"{key}.")
        if not inner and own is None:
            raise TypeError(
                f"{section.__name__}.{name} does not say what another value means for a run that goes on. Add one of "
                "OnResume to its type: Annotated[..., NO_MATTER] if the run is the same."
            )
        if own is not None:
            found[key] = own
    return found


def _sections_in(annotation: Any) -> tuple[bool, list[type[Section]]]:
    """(whether they are a list's, the sections that a type may be)."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return False, [annotation]
    inner = [section for argument in get_args(annotation) for section in _sections_in(argument)[1]]
    return getattr(annotation, "__origin__", None) is list, inner


def _mark_of(key: str, marks: Mapping[str, OnResume | None]) -> OnResume | None:
    """Of the key, or of what it stands in."""
    words = key.split(".")
    if words[:2] == ["data", "datasets"]:
        words[2] = "*"
    while ".".join(words) not in marks:
        words.pop()
    return marks[".".join(words)]


def _flatten(config: Config) -> Iterator[tuple[str, Any]]:
    """(dotted key, value in JSON's types) of all that is no section itself; datasets by their names."""
    settings = config.model_dump(mode="json")
    settings["data"]["datasets"] = {dataset["name"]: dataset for dataset in settings["data"]["datasets"]}
    yield from _flatten_section(settings, "")


def _flatten_section(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flatten_section(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
