"""Patience of tests: how long one waits for what must come."""

import time
from collections.abc import Callable

PATIENCE = 900.0
"""Seconds: many times what the busiest machine has needed, and below the limit of a test (pyproject.toml). Only what
hangs is waited for that long."""


def wait_until(is_so: Callable[[], object], complaint: str) -> None:
    """Looks fifty times a second; fails with the complaint when it is not so in time."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)
