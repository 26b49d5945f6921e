import pytest

from configs.adapter_targets import choose_layers
from configs.errors import InputError
from configs.flux_shape import FluxShape
from configs.schema import LoraConfig

LAYERS = list(FluxShape().linear_layers())


@pytest.mark.parametrize("targets, count", [("attention", 19 * 8 + 38 * 3), ("attention+mlp", 19 * 12 + 38 * 5)])
def test_named_sets_are_of_every_block(targets, count):
    chosen = choose_layers(LAYERS, LoraConfig(type="lora", targets=targets))
    assert len(chosen) == count and all("transformer_blocks." in name for name in chosen)


def test_a_name_is_a_blocks_before_it_is_the_models():
    assert len(choose_layers(LAYERS, LoraConfig(type="lora", targets=["proj_out"]))) == 38
    assert choose_layers(LAYERS, LoraConfig(type="lora", targets=["transformer.proj_out"])) == ["proj_out"]
    assert choose_layers(LAYERS, LoraConfig(type="lora", targets=["x_embedder"])) == ["x_embedder"]


def test_a_name_that_no_layer_has_is_refused():
    with pytest.raises(InputError, match=r"no linear layer is called to_query\. There are: attn\.add_k_proj"):
        choose_layers(LAYERS, LoraConfig(type="lora", targets=["to_q", "to_query"]))
