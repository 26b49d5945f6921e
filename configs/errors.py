"""The one error a user can cause: bad input or a bad config."""


class InputError(Exception):
    """Something the user gave is wrong. The message says what, where, and what to do; the program exits with 2."""
