import json
import shutil

import pytest
import torch

from configs.schema import FlowConfig, FullConfig, LoraConfig
from trainer.method import build_transformer, checkpoints_activations
from trainer.model.flux import predict_velocity

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


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
def test_activation_checkpointing_changes_no_gradient(changed, tiny_model, engine, load_triple, method):
    rows = load_triple(48, 80, of=(48, 80)).rows
    gradients = []
    for checkpointing in (False, True):
        config = changed(method=method, activation_checkpointing=checkpointing)
        transformer = build_transformer(config, tiny_model, engine)
        assert transformer.gradient_checkpointing == checkpointing
        velocity = predict_velocity(transformer, rows.noise, rows, torch.tensor([0.4]), FlowConfig())
        velocity.square().mean().backward()
        gradients.append({n: p.grad for n, p in transformer.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert all(gradient is not None for gradient in checkpointed.values())
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("chosen, expected", [("auto", False), (True, True), (False, False)])
def test_auto_keeps_activations_on_a_cpu(changed, engine, chosen, expected):
    assert checkpoints_activations(changed(activation_checkpointing=chosen), engine) is expected
