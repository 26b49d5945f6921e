import json
import re

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.trainer.adapters.live_models import (
    LOKR,
    METHODS,
    WHOLE_LOKR,
    adapted,
    assert_same_output,
    reloaded_velocity,
    train_a_little,
    velocity_of,
)
from trainer.adapters.files import ADAPTER, WEIGHTS_NAME, save_adapter
from trainer.adapters.lokr import Kronecker, lokr_shapes


def test_a_lokrs_file_holds_its_scale_and_its_settings(tiny_model, tmp_path):
    """alpha 6 / rank 2 = 3 where the larger matrix is of low rank, 1 where it is whole, as in LyCORIS."""
    live = adapted(tiny_model, LOKR)
    train_a_little(live)
    save_adapter(live, tmp_path)
    saved = load_file(tmp_path / WEIGHTS_NAME)
    assert all(re.fullmatch(r"transformer\..+\.(lokr_w(1|2_a|2_b)|alpha)", name) for name in saved)
    for name, tensor in get_peft_model_state_dict(live, adapter_name=ADAPTER).items():
        assert torch.equal(saved[f"transformer.{name}"], tensor * 3 if name.endswith("w1") else tensor)
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert [settings[f"transformer.{key}"] for key in ("r", "alpha", "decompose_factor")] == [2, 2, 4]
    whole = adapted(tiny_model, WHOLE_LOKR)
    assert whole.transformer_blocks[0].attn.to_q.scaling == {ADAPTER: 1.0}


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.type == "lokr"])
def test_a_lokr_needs_no_metadata_to_be_read(tiny_model, tmp_path, rows, method):
    live = adapted(tiny_model, method)
    train_a_little(live)
    save_adapter(live, tmp_path)
    save_file(load_file(tmp_path / WEIGHTS_NAME), tmp_path / WEIGHTS_NAME)
    assert_same_output(reloaded_velocity(tiny_model, tmp_path, rows), velocity_of(live, rows))


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.type == "lokr"])
def test_the_shapes_are_those_that_peft_makes(tiny_model, method):
    live = adapted(tiny_model, method)
    for name, module in live.named_modules():
        if isinstance(module, Kronecker):
            parts = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
            made = {part: tuple(getattr(module, part)[ADAPTER].shape) for part in parts if getattr(module, part)}
            assert lokr_shapes(module, method) == made, name
