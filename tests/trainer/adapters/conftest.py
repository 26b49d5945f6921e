"""The input that the adapters' tests compare outputs on."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from data.batches.micro_batch import MicroBatch


@pytest.fixture
def rows(load_triple: "Callable") -> "MicroBatch":
    return load_triple(64, 64, of=(64, 64)).rows
