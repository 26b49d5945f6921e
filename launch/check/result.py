"""The result of one check: what was looked at, whether it is right, and what to do if it is not."""

from dataclasses import dataclass
from typing import Literal

from configs.errors import InputError, WhatAndCure
from configs.redact import redact

State = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line of the report.

    name: of its subject, a word or two.  what: without a full stop.  cure: what to do, a sentence; "" if it is ok.
    found: the single things that `what` counts, such as every picture at fault.
    """

    name: str
    state: State
    what: str
    cure: str = ""
    found: tuple[str, ...] = ()

    def redacted(self) -> "Check":
        """The check without secrets: what a launcher prints, for one, quotes the command line."""
        what, cure, *found = (redact(text, home="") for text in (self.what, self.cure, *self.found))
        return Check(self.name, self.state, what, cure, tuple(found))


def ok(name: str, what: str, found: tuple[str, ...] = ()) -> Check:
    return Check(name, "ok", what, "", found)


def skipped(name: str, why: str) -> Check:
    """Something that cannot be looked at before another thing is right."""
    return Check(name, "skipped", why)


def error_of(name: str, error: InputError) -> Check:
    """The check of a message "what. What to do."; of several lines, the first is `what` and the others are `found`."""
    match error.args:
        case [WhatAndCure() as problem]:
            return Check(name, "error", *problem)
    first, *others = str(error).splitlines()
    if others:
        what, _, cure = first, "", ""
        if not others[-1].startswith(" "):
            cure = others.pop()
        return Check(name, "error", what.rstrip(":"), cure, tuple(line.strip() for line in others))
    what, _, cure = first.rpartition(". ")
    return Check(name, "error", what or cure, cure if what else "")
