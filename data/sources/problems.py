"""What is wrong with pictures, masks and captions: gathered from all threads, stages and datasets, shown at once."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.errors import InputError, StorageFailed
from data.cache_layout import PROBLEMS
from data.storage.atomic_write import write_text_atomically

# The kinds, in the order in which they are shown: what is listed comes before what is read, and that before pixels.
LISTS, NAMES, LEFT_OUT, CAPTIONS = "lists", "names", "left out", "captions"
UNREADABLE, TRUNCATED, SIZES, MASKS = "unreadable", "truncated", "sizes", "masks"
POLARITY, MISPLACED, SOURCES, ORIENTATION = "inverted masks", "misplaced masks", "sources", "EXIF"
DUPLICATES = "duplicates"
KINDS = (
    LISTS,
    NAMES,
    LEFT_OUT,
    CAPTIONS,
    UNREADABLE,
    TRUNCATED,
    SIZES,
    MASKS,
    POLARITY,
    MISPLACED,
    SOURCES,
    ORIENTATION,
    DUPLICATES,
)

_SHOWN = 10  # of each kind; the rest stands in the file


class Problem(NamedTuple):
    """One thing that is wrong. kind: of KINDS.  where: file, row or folder, as the user calls it; "" if `what` says it.
    what: without a full stop.  cure: what to do, a sentence."""

    kind: str
    where: str
    what: str
    cure: str

    def __str__(self) -> str:
        said = f"{self.where}: {self.what}" if self.where else self.what
        return f"{said}. {self.cure}" if self.cure else said

    @classmethod
    def of(cls, error: InputError, kind: str, where: object = "") -> "Problem":
        """The problem that a message tells: "WHERE: what. What to do." """
        text = str(error).removeprefix(f"{where}: ") if where else str(error)
        what, _, cure = text.rpartition(". ")
        return cls(kind, str(where) if len(text) < len(str(error)) else "", what or cure, cure if what else "")


class ProblemsFound(InputError):
    """All that is wrong with the pictures of a config. listed_in: a file with all of them, if the message has not."""

    def __init__(self, problems: Sequence[Problem], listed_in: Path | None = None) -> None:
        self.problems, self.listed_in = sorted_by_kind(problems), listed_in
        lines = [line for _, of_kind in _by_kind(self.problems) for line in _first_lines(of_kind)]
        super().__init__("\n".join([*lines, *([f"All are listed in {listed_in}."] if listed_in else [])]))

    def show(self) -> None:
        print_found(Console(stderr=True), self)


class Findings:
    """What was found out about the pictures of all datasets: problems, which stop the run at its end, and notes, which
    do not. Any thread may add to them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[Problem] = []

    def add(self, kind: str, where: object, what: str, cure: str) -> None:
        self.problems.append(Problem(kind, str(where), what, cure))

    def note(self, kind: str, where: object, what: str, cure: str) -> None:
        self.notes.append(Problem(kind, str(where), what, cure))

    def add_error(self, error: InputError, kind: str, where: object = "") -> None:
        """What was raised, as a problem, or the problems that it carries. Raises it again if a storage failed: that is
        no fault of a picture, and the next would fail like it, after as long a wait each."""
        if isinstance(error, StorageFailed):
            raise error
        self.problems += error.problems if isinstance(error, ProblemsFound) else [Problem.of(error, kind, where)]

    def report(self, console: Console, cache: Path) -> None:
        """Print the notes, then raise one ProblemsFound of all problems if there is any. Where that is longer than what
        is shown, all stand in a file of the cache; one from before goes."""
        everything = sorted_by_kind([*self.problems, *self.notes])
        listed_in = None
        if any(len(of_kind) > _SHOWN for _, of_kind in _by_kind(everything)):
            listed_in = cache / PROBLEMS
            cache.mkdir(parents=True, exist_ok=True)
            write_text_atomically(listed_in, "".join(f"{p.kind}: {printable(str(p))}\n" for p in everything))
        else:
            (cache / PROBLEMS).unlink(missing_ok=True)
        if self.notes:
            notes = sorted_by_kind(self.notes)
            print_problems(
                console, notes, f"{len(notes)} note{'s' * (len(notes) > 1)} (no problem)", "yellow", listed_in
            )
        self.raise_problems(listed_in)

    def raise_problems(self, listed_in: Path | None = None) -> None:
        """Raise ProblemsFound if there is a problem. listed_in: a file with all."""
        if self.problems:
            raise ProblemsFound(self.problems, listed_in)


def sorted_by_kind(problems: Sequence[Problem]) -> list[Problem]:
    """Each once, in the order of KINDS; those that need the same beside each other, in the order of their files."""
    return sorted(set(problems), key=lambda problem: (KINDS.index(problem.kind), problem.cure, *problem[1:]))


def _by_kind(problems: Sequence[Problem]) -> Iterator[tuple[str, list[Problem]]]:
    for kind, of_kind in groupby(problems, key=lambda problem: problem.kind):
        yield kind, list(of_kind)


def _first_lines(of_kind: Sequence[Problem]) -> list[str]:
    more = len(of_kind) - _SHOWN
    return [*map(str, of_kind[:_SHOWN]), *([f"... and {more} more of the kind {of_kind[0].kind}."] if more > 0 else [])]


def print_found(console: Console, error: ProblemsFound) -> None:
    """All that ended a run, by kind, with counts, the first of each kind and what to do: a table on a terminal; in a
    log a line each, so that a search finds it."""
    count = len(error.problems)
    print_problems(console, error.problems, f"{count} problem{'s' * (count > 1)}", "red", error.listed_in)


def print_problems(
    console: Console, problems: Sequence[Problem], title: str, style: str, listed_in: Path | None
) -> None:
    """A table on a terminal; in a log a line each.

    problems: sorted by kind, of which the first of each are shown.  style: of the title.  listed_in: a file with all.
    """
    shown = dict(_by_kind(problems))
    if console.is_terminal:
        console.print(_table_of(shown, title, style))
    else:
        console.print(Text(f"{title}:"), soft_wrap=True)
        for kind, of_kind in shown.items():
            lines = [f"{kind}, {len(of_kind)}:", *(f"  {line}" for line in _first_lines(of_kind))]
            console.print(Text("\n".join(map(printable, lines))), soft_wrap=True)
    if listed_in is not None and any(len(of_kind) > _SHOWN for of_kind in shown.values()):
        console.print(Text(f"All are listed in {printable(str(listed_in))}."), soft_wrap=True)


def _table_of(shown: Mapping[str, Sequence[Problem]], title: str, style: str) -> Table:
    """shown: kind -> its problems. What to do is said once for those in a row that need the same."""
    folder = _folder_of_all([problem for of_kind in shown.values() for problem in of_kind])
    below = f", all below {printable(folder)}" if folder else ""
    table = Table(title=Text(f"{title}{below}", style=f"bold {style}"), title_justify="left")
    table.add_column("kind", style=f"bold {style}")
    table.add_column("where", overflow="fold", ratio=2)
    table.add_column("what, and what to do", overflow="fold", ratio=3)
    for kind, of_kind in shown.items():
        first = of_kind[:_SHOWN]
        for number, problem in enumerate(first):
            what = Text(_below(problem.what, folder))
            if number + 1 == len(first) or first[number + 1].cure != problem.cure:
                what.append(f"\n{printable(problem.cure)}", style="green")
            table.add_row(f"{kind} ({len(of_kind)})" if number == 0 else "", Text(_below(problem.where, folder)), what)
        if len(of_kind) > len(first):
            table.add_row("", f"... and {len(of_kind) - len(first)} more", "")
        table.add_section()
    return table


def _folder_of_all(problems: Sequence[Problem]) -> str:
    """The folder below which all that are files lie; "" if there is none but the root."""
    files = [os.path.dirname(problem.where) for problem in problems if problem.where.startswith("/")]
    folder = os.path.commonpath(files) if files else ""
    return "" if folder == "/" else folder


def _below(text: str, folder: str) -> str:
    """A text with paths as they are called from a folder."""
    return printable(text.replace(f"{folder}/", "") if folder else text)


def printable(text: str) -> str:
    """A text in which nothing moves a terminal's cursor, and that any encoding of UTF-8 takes."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
