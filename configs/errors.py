"""The errors that end a command with a message, not with a traceback."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# What a system call says of the path it was given: who may go there, what is there. Anything else is the storage's.
_OF_THE_PATH = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}


class WhatAndCure(NamedTuple):
    """A line of a message in its two parts, for those who show them apart: values in it may hold what ends a sentence.

    what: without a full stop.  cure: what to do, "" where `what` says it too.
    """

    what: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.what}. {self.cure}" if self.cure else f"{self.what}."


class InputError(Exception):
    """Something the user gave is wrong. The message says what, where, and what to do; the program exits with 2.

    Each argument is a line of it, or several: text, or a WhatAndCure.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))

    def show(self) -> None:
        print_error(str(self))


class StorageFailed(InputError):
    """A disk, a server or the network keeps failing. Nothing that was given is wrong: once it is back, the same command
    goes on."""


class AlreadyRunning(InputError):
    """The run folder belongs to another start of the run, which lives. Nothing in it was touched; the program exits
    with 3."""


def is_of_storage(error: OSError) -> bool:
    """Whether a disk or a server failed (or is full), and no path that was given is wrong."""
    return error.errno not in _OF_THE_PATH


@contextmanager
def os_errors_named(path: Path, what: str = "written", cure: str = "", *, path_cure: str = "") -> Iterator[None]:
    """A time in which an OSError becomes the message that `path` cannot be `what`; others, as of a full disk, stay.

    cure: what to do.  path_cure: what to do where a path is wrong, and no disk or server has failed.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        kind = StorageFailed if is_of_storage(error) else InputError
        more = cure + (path_cure if kind is InputError else "")
        raise kind(f"{path}: cannot be {what} ({error.strerror}).{more}") from error


def list_problems(problems: Sequence[str], *, limit: int = 50) -> str:
    """Problems as one message: one a line, the first `limit` of them and how many more there are."""
    more = len(problems) - limit
    return "\n".join([*problems[:limit], *([f"... and {more} more."] if more > 0 else [])])


def print_error(message: str) -> None:
    """On standard error; in red where that is a terminal."""
    from rich.console import Console  # a command's, and not needed to list the commands

    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
