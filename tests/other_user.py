"""Another user than root, who may read everything."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def as_nobody() -> Iterator[None]:
    """Within the context root is another user."""
    user = os.geteuid()
    try:
        os.seteuid(65534 if user == 0 else user)
    except OSError as error:
        pytest.skip(f"root cannot become another user here: {error}")
    try:
        yield
    finally:
        os.seteuid(user)
