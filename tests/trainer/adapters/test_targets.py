import re

import pytest

from configs.errors import InputError
from tests.trainer.adapters.live_models import lora
from trainer.adapters.targets import adapter_targets, name_targets


@pytest.mark.parametrize("targets, per_double, per_single", [("attention", 8, 3), ("attention+mlp", 12, 5)])
def test_named_targets_are_the_linear_layers_of_every_block(pipeline, targets, per_double, per_single):
    found = adapter_targets(pipeline.transformer, lora(targets=targets))
    assert len(found) == len(set(found)) == 2 * per_double + 4 * per_single
    assert all(re.match(r"(single_)?transformer_blocks\.\d+\.", name) for name in found)
    assert not [name for name in found if "norm" in name]


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", ["proj_out"], ["to_q", "proj_out", "ff.net.2"]])
def test_the_models_own_last_layers_are_never_adapted(pipeline, targets):
    found = adapter_targets(pipeline.transformer, lora(targets=targets))
    assert not {"proj_out", "norm_out.linear"} & set(found)


def test_a_list_takes_names_as_peft_does(pipeline):
    found = adapter_targets(
        pipeline.transformer, lora(targets=["to_k", "transformer_blocks.1.attn.to_q", "x_embedder"])
    )
    assert found == [
        "x_embedder",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.to_k",
        *(f"single_transformer_blocks.{block}.attn.to_k" for block in range(4)),
    ]


@pytest.mark.parametrize("unknown", ["to_query", "attn", "norm1", "o_q"])
def test_an_unknown_target_is_refused_with_the_names_there_are(pipeline, unknown):
    with pytest.raises(InputError, match=rf"method\.targets.*{unknown}.*attn\.to_q") as refused:
        adapter_targets(pipeline.transformer, lora(targets=["to_q", unknown]))
    assert "transformer_blocks" not in str(refused.value)


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", ["to_q", "transformer.proj_out", "norm_out.linear"]])
def test_the_names_of_layers_choose_these_layers(pipeline, targets):
    chosen = adapter_targets(pipeline.transformer, lora(targets=targets))
    assert adapter_targets(pipeline.transformer, lora(targets=name_targets(chosen))) == chosen


def test_the_models_last_layer_has_a_name_of_its_own(pipeline):
    assert adapter_targets(pipeline.transformer, lora(targets=["transformer.proj_out"])) == ["proj_out"]
