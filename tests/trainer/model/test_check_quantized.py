import pytest
import torch

from trainer.model.check_quantized import check_against_reference, reference_layers
from trainer.model.flux import load_transformer
from trainer.model.quantize import quantize_base


@pytest.fixture
def quantized(tiny_model):
    """A base with 8-bit weights, and its reference layers."""
    transformer = load_transformer(tiny_model, dtype=torch.bfloat16)
    quantize_base(transformer, "int8", lambda tensor: tensor.detach())
    return transformer, reference_layers(transformer)


def check(transformer, references) -> None:
    cpu = torch.device("cpu")
    check_against_reference(transformer, transformer, references, cpu, lambda: torch.autocast("cpu", torch.bfloat16))


def test_a_base_that_came_through_unharmed_passes(quantized):
    transformer, references = quantized
    blocks = {name.split(".attn.")[0].split(".ff")[0].split(".norm")[0].split(".proj")[0] for name in references}
    assert blocks == {"transformer_blocks.0", "single_transformer_blocks.0"}
    check(transformer, references)


def test_weights_that_were_cast_on_their_way_are_found(quantized):
    transformer, references = quantized
    layer = transformer.single_transformer_blocks[0].attn.to_q
    layer.weight.data = layer.weight.to(torch.float16).mul(1.7).to(torch.uint8)
    with pytest.raises(RuntimeError, match=r"single_transformer_blocks\.0\.attn\.to_q computes something else"):
        check(transformer, references)


def test_a_base_that_is_not_quantized_has_no_reference(tiny_model):
    assert reference_layers(load_transformer(tiny_model, dtype=torch.bfloat16)) == {}
