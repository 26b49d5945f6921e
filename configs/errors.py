"""The errors that end a command with a message, not with a traceback."""


class InputError(Exception):
    """Something the user gave is wrong. The message says what, where, and what to do; the program exits with 2."""


class StorageFailed(InputError):
    """A disk, a server or the network keeps failing. Nothing that was given is wrong: once it is back, the same command
    goes on."""
