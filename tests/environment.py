"""The environment of the tests' own process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environment_of_before() -> Iterator[None]:
    """Restores os.environ. accelerate and DeepSpeed leave variables in it by which a later test's programs would take
    this process for their launcher, and wait for its end."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
