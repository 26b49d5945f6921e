"""The new config while it is made, and what became of each key of the old one."""

import difflib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal

from configs.errors import InputError
from configs.legacy.secrets import is_secret, looks_secret
from configs.redact import HIDDEN

Verdict = Literal[
    "taken", "converted", "no equivalent", "ignored by the old trainer too", "unknown key", "secret, dropped"
]
MOST_KEYS = 5_000
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Line:
    """What became of one key of the old config. value, new: as text, "" where there is nothing to show."""

    key: str
    verdict: Verdict
    value: str
    new: str
    why: str


@dataclass(frozen=True)
class Imported:
    """A translated config.

    hide: how most old keys begin.  notes: dotted new key -> where its value comes from.  fill_in: dotted new key ->
    what the user has to put there, as the old config does not say it.  really_did: sentences on the old run.
    """

    program: str
    hide: str
    config: dict[str, Any]
    notes: dict[str, str]
    fill_in: dict[str, str]
    lines: tuple[Line, ...]
    really_did: tuple[str, ...]


class Draft:
    """The new config so far; its old keys are dotted, entries of lists in brackets: `process[0].train.lr`."""

    def __init__(self, tree: Any, program: str, *, hide: str = "", spelled: Mapping[str, str] | None = None) -> None:
        """hide: the beginning of old keys that comments leave out.  spelled: old key -> what the user's file calls it,
        where that is another word."""
        self.program = program
        self.leaves: dict[str, Any] = dict(_flatten(tree))
        self.config: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        self.fill_in: dict[str, str] = {}
        self.really_did: list[str] = []
        self._hide = hide
        self._spelled = spelled or {}
        self._lines: dict[str, Line] = {}
        for key, value in self.leaves.items():
            if is_secret(key, value):
                why = "secrets are never carried over: log in to the service, or set its variable of the environment"
                self._lines[key] = Line(self.name(key), "secret, dropped", "", "", why)

    def name(self, key: str) -> str:
        """What the user's file calls an old key."""
        return self._spelled.get(key, key)

    def get(self, key: str, default: Any = None) -> Any:
        """The old value; the default where there is none, or a secret."""
        value = None if self._is_secret(key) else self.leaves.get(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """A number, which may be written as text. Raises InputError for anything else."""
        value = self.get(key, default)
        return _number(self.name(key), default if value == "" else value)

    def numbers(self, key: str, default: float) -> list[float]:
        """A number, or a list of them, each of which may be written as text. Raises InputError for anything else."""
        value = self.get(key, default)
        return [_number(self.name(key), one) for one in (value if isinstance(value, list) else [value])]

    def integer(self, key: str, default: int) -> int:
        """An integer, which may be written as text. Raises InputError for anything else."""
        value = self.number(key, default)
        if value != int(value):
            raise InputError(
                f"{self.name(key)} is {show(value)}, but must be an integer. Correct it there, and import it again."
            )
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value, which may be written as text."""
        value = self.get(key, default)
        return value.strip().lower() in ("true", "yes", "on", "1") if isinstance(value, str) else bool(value)

    def has(self, key: str) -> bool:
        """Whether the old config has the key, or keys below it."""
        return key in self.leaves or any(leaf.startswith((f"{key}.", f"{key}[")) for leaf in self.leaves)

    def count(self, key: str) -> int:
        """Entries of an old list of sections."""
        number = 0
        while self.has(f"{key}[{number}]"):
            number += 1
        return number

    def put(self, key: str, new_key: str, value: Any, why: str = "") -> None:
        """Set a new key from an old one, or from the old trainer's default where the old config has none."""
        self.set(new_key, value)
        if key not in self.leaves or self._is_secret(key):
            self.notes[new_key] = f"the old trainer's default: {why}" if why else "the old trainer's default"
            return
        old = self.leaves[key]
        if old == value and isinstance(old, bool) == isinstance(value, bool) and not why:
            self.answer(key, "taken", f"{new_key}: {show(value)}")
            self.notes[new_key] = self._short(key)
            return
        if not why:
            kinds = {bool: "a truth value", int: "a number", float: "a number", type(None): "off"}
            why = kinds.get(type(value), "the word for it here")
        self.answer(key, "converted", f"{new_key}: {show(value)}", why)
        self.notes[new_key] = f"{self._short(key)} {show(old)}: {why}"

    def set(self, new_key: str, value: Any, note: str = "") -> None:
        """Set a new key that no single old key says. Entries of lists by number: data.datasets.0.name."""
        *sections, last = new_key.split(".")
        place: Any = self.config
        for name, following in pairwise([*sections, last]):
            if isinstance(place, list):
                while len(place) <= int(name):
                    place.append({})
                place = place[int(name)]
            else:
                place = place.setdefault(name, [] if following.isdecimal() else {})
        place[last] = value
        if note:
            self.notes[new_key] = note

    def ask(self, new_key: str, what: str) -> None:
        """Leave a new key for the user to fill in."""
        self.set(new_key, None, f"FILL IN: {what}")
        self.fill_in[new_key] = what

    def answer(self, key: str, verdict: Verdict, new: str = "", why: str = "") -> None:
        """Say what became of an old key, if the old config has it; a secret's line stays."""
        if key in self.leaves and not self._is_secret(key):
            assert key not in self._lines, f"{key} is answered twice"
            self._lines[key] = Line(self.name(key), verdict, show(self.leaves[key]), new, why)

    def is_answered(self, key: str) -> bool:
        """Whether it was said what became of an old key."""
        return key in self._lines

    def drop(self, key: str, why: str) -> None:
        """Say that an old key has no equivalent; one that switches something off lacks none."""
        if self._is_off(key):
            self.answer(key, "taken", "off", "off here too")
        else:
            self.answer(key, "no equivalent", "", why)

    def drop_always(self, key: str, why: str) -> None:
        """Say of an old key that switches on what is always done here that it is so; off, it has no equivalent."""
        value = self.leaves.get(key)
        is_on = str(value).strip().lower() in ("true", "yes", "on", "1", "1.0")
        self.answer(key, *(("taken", "always") if is_on or value in (None, "") else ("no equivalent", "")), why)

    def open_keys(self, prefix: str = "") -> list[str]:
        """Old keys that nobody has answered for yet."""
        return [key for key in self.leaves if key.startswith(prefix) and key not in self._lines]

    def drop_known(self, known: Mapping[str, str], prefix: str = "", always: Collection[str] = ()) -> None:
        """Drop the open keys below a prefix that the old trainer knows. known: pattern of the rest -> why.  always:
        those of the rests that say how much of what is always done here, so that false and 0 are not off here too."""
        for key in self.open_keys(prefix):
            rest = key[len(prefix) :]
            why = next((why for pattern, why in known.items() if fnmatchcase(rest, pattern)), None)
            if why is not None and rest in always:
                self.drop_always(key, why)
            elif why is not None:
                self.drop(key, why)

    def finish(self, known: Iterable[str]) -> Imported:
        """The result; keys that are open yet are unknown ones. known: patterns of known keys, to find misspellings."""
        names = sorted({pattern.rpartition(".")[2] for pattern in known if "*" not in pattern})
        for key in self.open_keys():
            near = difflib.get_close_matches(key.rpartition(".")[2], names, 1, 0.8)
            meant = f" Was {near[0]} meant?" if near and near[0] != key.rpartition(".")[2] else ""
            self.answer(
                key, "unknown key", "", f"not a key of {self.program}, nor of fluxfill: nothing reads it.{meant}"
            )
        return Imported(
            program=self.program,
            hide=self._hide,
            config=ordered(self.config),
            notes={key: one_line(note) for key, note in self.notes.items()},
            fill_in={key: one_line(what) for key, what in self.fill_in.items()},
            lines=tuple(self._lines[key] for key in self.leaves),
            really_did=tuple(map(one_line, self.really_did)),
        )

    def _is_secret(self, key: str) -> bool:
        return key in self._lines and self._lines[key].verdict == "secret, dropped"

    def _is_off(self, key: str) -> bool:
        value = self.leaves.get(key)
        return value in (None, False, 0, "", []) or (isinstance(value, str) and value.strip().lower() in ("false", "0"))

    def _short(self, key: str) -> str:
        return self.name(key).removeprefix(self._hide)


def _number(key: str, value: Any) -> float:
    try:
        number = value if isinstance(value, int | float) else float(value)
        if not math.isfinite(number):
            raise ValueError("not finite")
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{key} is {show(value)}, but must be a number. Correct it there, and import it again."
        ) from error
    return number


def known_keys(names_of: Mapping[str, str]) -> dict[str, str]:
    """Pattern of an old key -> why it has no equivalent, from why -> patterns with spaces between them."""
    return {name: why for why, names in names_of.items() for name in names.split()}


def one_line(text: str) -> str:
    """A text on one line, without control characters: as it may stand in a comment of YAML, and on a terminal."""
    return "".join(one if one.isprintable() else "?" for one in " ".join(text.split()))


def show(value: Any) -> str:
    """A value on one line, cut where it is long; not if it looks like a secret."""
    if is_secret("", value):
        return HIDDEN
    text = one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


_SECTIONS = ("version", "run", "model", "method", "data", "train", "flow", "parallel", "validation", "checkpoint")


def ordered(config: dict[str, Any]) -> dict[str, Any]:
    """The sections of a config in the order of the recipes."""
    return {name: config[name] for name in _SECTIONS if name in config}


def _flatten(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no section. Empty ones, and lists of anything but sections, are values."""
    open_nodes = [(key, tree)]
    found = 0
    while open_nodes:
        key, value = open_nodes.pop()
        found += 1
        if found > MOST_KEYS:
            raise InputError(f"the old config holds more than {MOST_KEYS} keys. Give the file of one training run.")
        if isinstance(value, dict) and value:
            names = {name: HIDDEN if looks_secret(str(name)) else one_line(str(name)) for name in value}
            below = [(f"{key}.{names[name]}" if key else names[name], inner) for name, inner in value.items()]
            open_nodes += reversed(below)
        elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
            open_nodes += reversed([(f"{key}[{place}]", inner) for place, inner in enumerate(value)])
        else:
            yield key, value
