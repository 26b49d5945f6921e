import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from configs.errors import InputError
from configs.schema import FullConfig, LoraConfig
from trainer.method import build_transformer

FULL = FullConfig(type="full")
LORA = LoraConfig(type="lora", rank=4, alpha=4)


@pytest.fixture
def changed(config):
    """changed(method=..., train={...}): the config with another method or other train settings."""

    def change(*, method=FULL, **train):
        return config.model_copy(update={"method": method, "train": config.train.model_copy(update=train)})

    return change


def test_full_trains_every_weight_in_fp32(changed, tiny_model, engine):
    transformer = build_transformer(changed(), tiny_model, engine)
    assert transformer.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in transformer.parameters())


def test_lora_trains_the_adapter_alone(changed, tiny_model, engine):
    transformer = build_transformer(changed(method=LORA), tiny_model, engine)
    trained = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert not any("x_embedder" in name for name in trained)


@pytest.mark.parametrize("channels_in_config", [True, False])
def test_lora_on_dev_adapts_the_new_inputs_too(changed, tiny_dev_model, engine, tmp_path, channels_in_config):
    """64 is diffusers' own default: a config may leave it out."""
    shutil.copytree(tiny_dev_model / "transformer", tmp_path / "transformer")
    path = tmp_path / "transformer" / "config.json"
    settings = json.loads(path.read_text())
    if not channels_in_config:
        del settings["in_channels"]
        path.write_text(json.dumps(settings))
    transformer = build_transformer(changed(method=LORA), tmp_path, engine)
    assert transformer.config.in_channels == 384
    assert transformer.x_embedder.lora_A["default"].weight.requires_grad


def test_dev_is_no_base_to_hold_the_kept_part_against(changed, tiny_dev_model, engine):
    config = changed(method=LORA)
    config = config.model_copy(update={"flow": config.flow.model_copy(update={"keep_target": "base"})})
    with pytest.raises(InputError, match=r"FLUX\.1-dev, but flow\.keep_target is base.*Set flow\.keep_target=picture"):
        build_transformer(config, tiny_dev_model, engine)


def test_more_checkpointed_blocks_than_there_are_are_refused_before_any_weights_are_read(changed, tiny_model, engine):
    with pytest.raises(InputError, match=r"train\.activation_checkpointing is 1000, and the model has .* blocks"):
        build_transformer(changed(activation_checkpointing=1000), tiny_model, engine)


def test_an_adapter_that_does_not_fit_is_refused_before_any_weights_are_read(changed, tiny_model, engine, tmp_path):
    shutil.copytree(tiny_model / "transformer", tmp_path / "transformer")
    for weights in (tmp_path / "transformer").glob("*.safetensors"):
        weights.unlink()
    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(4, 384)}, tmp_path / "lora.safetensors")
    method = LORA.model_copy(update={"init_from": tmp_path / "lora.safetensors"})
    with pytest.raises(InputError, match=r"method\.init_from .*lora\.safetensors does not fit"):
        build_transformer(changed(method=method), tmp_path, engine)
