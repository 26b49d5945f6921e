import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from trainer.adapters.layer_names import LayerPart, flat_name, is_of_text_encoder, parts_by_name


@pytest.fixture(scope="module")
def flux():
    with torch.device("meta"):
        return FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True)


def test_every_linear_layer_of_flux_has_both_names_and_every_row_of_bfls_one_layer(flux):
    found = parts_by_name(flux)
    linear = {name for name, module in flux.named_modules() if isinstance(module, nn.Linear)}
    assert {part.layer for parts in found.values() for part in parts} == linear
    for name in linear:
        assert [part.layer for part in found[flat_name(name)]] == [name]
    for parts in found.values():
        stops = [part.rows.stop for part in parts]
        assert [part.rows.start for part in parts] == [0, *stops[:-1]]
        assert [part.rows.stop - part.rows.start for part in parts] == [
            flux.get_submodule(part.layer).out_features for part in parts
        ]
    bfl = [name for name in found if "transformer_blocks" not in name and "_blocks" in name]
    assert len(bfl) == 19 * 10 + 38 * 3


def test_the_fused_layers_and_the_swapped_one(flux):
    found = parts_by_name(flux)
    linear1 = found["single_blocks_37_linear1"]
    assert [part.layer.removeprefix("single_transformer_blocks.37.") for part in linear1] == [
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "proj_mlp",
    ]
    assert linear1[-1].rows == slice(9216, 21504)
    assert found["final_layer_adaLN_modulation_1"] == [LayerPart("norm_out.linear", slice(0, 6144), swapped=True)]
    assert found["norm_out_linear"] == [LayerPart("norm_out.linear", slice(0, 6144), swapped=False)]


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.attn.to_q",
        "transformer.transformer_blocks.0.attn.to_q",
        "base_model.model.transformer_blocks.0.attn.to_q",
        "base_model.model.transformer.transformer_blocks.0.attn.to_q",
        "diffusion_model.transformer_blocks.0.attn.to_q",
        "lycoris_transformer_blocks_0_attn_to_q",
        "lora_unet_transformer_blocks_0_attn_to_q",
        "lora_transformer_transformer_blocks_0_attn_to_q",
    ],
)
def test_a_layer_is_known_whatever_stands_before_it(name):
    assert flat_name(name) == "transformer_blocks_0_attn_to_q"
    assert not is_of_text_encoder(name)


@pytest.mark.parametrize(
    "name",
    [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
        "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
        "t5xxl.encoder.block.0.layer.0.SelfAttention.q.lora_up.weight",
    ],
)
def test_text_encoders_are_told_from_the_transformer(name):
    assert is_of_text_encoder(name)
