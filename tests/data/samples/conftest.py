import json

import pytest

from tests.data.samples.made_pictures import SIDE


@pytest.fixture
def config_of(demo_config, tmp_path):
    def make(dataset, *overrides, cache="cache"):
        sizes = [f"data.resolution={SIDE}", "data.holdout=1"]
        return demo_config(tmp_path / cache, f"data.datasets=[{json.dumps(dataset)}]", *sizes, *overrides)

    return make
