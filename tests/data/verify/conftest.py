from pathlib import Path

import pytest

from tests.data.verify.verified import SHARDS


@pytest.fixture
def folder(make_cache) -> Path:
    """A finished cache of two mask variants, to be damaged."""
    return make_cache(SHARDS, num_variants=2).folder
