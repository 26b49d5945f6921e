"""A merged weight is right if the plain model with it computes what the model with the adapter does."""

import pytest
import torch

from tests.trainer.adapters.live_models import METHODS, adapted, assert_same_output, lora, train_a_little, velocity_of
from trainer.adapters.files import adapter_tensors
from trainer.adapters.merge import merge
from trainer.model.flux import load_transformer

ROLES = {"lora_magnitude_vector": "magnitude"}


@pytest.mark.parametrize("method", [lora(alpha=12), *METHODS.values()], ids=["lora", *METHODS])
def test_the_model_with_merged_weights_gives_the_live_models_output(tiny_model, rows, method):
    live = adapted(tiny_model, method)
    train_a_little(live)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter_tensors(live).items():
        layer, _, role = name.removesuffix(".weight").rpartition(".")
        layers.setdefault(layer, {})[ROLES.get(role, role)] = tensor
    plain = load_transformer(tiny_model, dtype=torch.float32)
    before = velocity_of(plain, rows)
    for layer, factors in layers.items():
        plain.get_submodule(layer).weight.data = merge(plain.get_submodule(layer).weight, factors)
    assert (velocity_of(plain, rows) - before).abs().max() > 1e-2
    assert_same_output(velocity_of(plain, rows), velocity_of(live, rows))


def test_a_bf16_weight_is_merged_in_fp32():
    factors = {"lora_A": torch.full((1, 2), 1e-3), "lora_B": torch.ones(2, 1)}
    assert torch.equal(merge(torch.ones(2, 2).bfloat16(), factors), torch.full((2, 2), 1.001))
