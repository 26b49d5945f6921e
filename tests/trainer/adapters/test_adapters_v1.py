"""Adapters of the first release stay readable. format_v1/ holds one of each kind, for one layer of the tests' model, of
rank 2, as `save_adapter` wrote it; nobody rewrites them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.schema import DoraConfig, LokrConfig, LoraConfig
from tests.trainer.adapters.live_models import adapted, assert_same_output, reloaded_velocity, velocity_of
from trainer.adapters.files import WEIGHTS_NAME, save_adapter

FOLDER = Path(__file__).parent / "format_v1"
LAYER = {"targets": ["transformer_blocks.0.attn.to_v"], "rank": 2, "alpha": 4.0}
METHODS = {
    "lora": LoraConfig(type="lora", **LAYER),
    "dora": DoraConfig(type="dora", **LAYER),
    "lokr": LokrConfig(type="lokr", factor=4, **LAYER),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_an_adapter_of_version_1(tiny_model, rows, tmp_path, method):
    config = METHODS[method].model_copy(update={"init_from": FOLDER / method})
    live = adapted(tiny_model, config)
    assert_same_output(reloaded_velocity(tiny_model, FOLDER / method, rows), velocity_of(live, rows))
    save_adapter(live, tmp_path / "again")
    kept, again = (load_file(folder / WEIGHTS_NAME) for folder in (FOLDER / method, tmp_path / "again"))
    assert kept.keys() == again.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0)
