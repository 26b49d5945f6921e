"""The errors that end a command with a message, not with a traceback."""

from collections.abc import Sequence


class InputError(Exception):
    """Something the user gave is wrong. The message says what, where, and what to do; the program exits with 2."""


class StorageFailed(InputError):
    """A disk, a server or the network keeps failing. Nothing that was given is wrong: once it is back, the same command
    goes on."""


def list_problems(problems: Sequence[str], *, limit: int = 50) -> str:
    """Problems as one message: one a line, the first `limit` of them and how many more there are."""
    more = len(problems) - limit
    return "\n".join([*problems[:limit], *([f"... and {more} more."] if more > 0 else [])])
