"""Parameters counted from config.json alone, against the models that diffusers and peft build."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from configs.adapter_targets import AdapterConfig
from configs.flux_shape import FluxShape, trained_parameters
from configs.schema import DoraConfig, FullConfig, LokrConfig, LoraConfig


def build(model, *, expand=False):
    """(shape, transformer on the meta device) of a model folder."""
    config = json.loads((model / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
        if expand:
            transformer.x_embedder = nn.Linear(384, transformer.inner_dim)
    return FluxShape.of(config), transformer


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_dev_model"])
def test_layers_and_parameters_are_those_of_diffusers(kind, request):
    shape, transformer = build(request.getfixturevalue(kind))
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    assert shape.linear_layers() == {name: (layer.in_features, layer.out_features) for name, layer in linear.items()}
    assert shape.parameters == sum(parameter.numel() for parameter in transformer.parameters())
    in_blocks = [layer.weight for name, layer in linear.items() if "transformer_blocks." in name]
    assert shape.block_weights == sum(weight.numel() for weight in in_blocks)
    assert shape.block_rows == sum(len(weight) for weight in in_blocks)


def test_the_published_models_have_the_parameters_that_are_published():
    assert FluxShape().parameters == 11_902_391_360
    assert FluxShape(in_channels=64).parameters == 11_901_408_320
    assert FluxShape() == FluxShape.of({"in_channels": 384})


METHODS: list[AdapterConfig] = [
    LoraConfig(type="lora", rank=3, targets="attention"),
    LoraConfig(type="lora", rank=3, targets="attention+mlp"),
    LoraConfig(type="lora", rank=2, targets=["proj_out", "norm1.linear"]),
    DoraConfig(type="dora", rank=3),
    LokrConfig(type="lokr", rank=2),
    LokrConfig(type="lokr", rank=64, factor=4),
    LokrConfig(type="lokr", rank=5, factor=7),
]


# LoKr cannot teach FLUX.1-dev the inputs that it lacks, and is refused.
@pytest.mark.parametrize(
    "method, is_dev",
    [(method, is_dev) for method in METHODS for is_dev in (False, True) if method.type != "lokr" or not is_dev],
)
def test_an_adapter_trains_what_is_counted(method, is_dev, tiny_model, tiny_dev_model):
    from trainer.adapters.build import add_adapter

    shape, _ = build(tiny_dev_model if is_dev else tiny_model)
    transformer = FluxTransformer2DModel.from_pretrained((tiny_dev_model if is_dev else tiny_model) / "transformer")
    if is_dev:
        from trainer.model.flux import expand_to_fill

        expand_to_fill(transformer)
    add_adapter(transformer, method, expanded=is_dev, seed=0)
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    assert trained_parameters(method, shape) == trained


def test_full_training_of_dev_trains_fills_inputs():
    assert trained_parameters(FullConfig(type="full"), FluxShape(in_channels=64)) == FluxShape().parameters
