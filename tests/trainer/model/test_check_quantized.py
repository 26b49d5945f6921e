from functools import partial

import pytest
import torch

from trainer.model.check_quantized import check_against_reference, reference_layers
from trainer.model.compiled_blocks import compile_blocks
from trainer.model.compute_dtype import compute_in
from trainer.model.flux import load_transformer
from trainer.model.quantize import quantize_base


@pytest.fixture
def quantized(tiny_model):
    """A base with 8-bit weights, and its reference layers."""
    transformer = load_transformer(tiny_model, dtype=torch.bfloat16)
    quantize_base(transformer, "int8", lambda tensor: tensor.detach())
    compute_in(transformer, torch.bfloat16)
    return transformer, reference_layers(transformer)


def check(transformer, references) -> None:
    cpu = torch.device("cpu")
    check_against_reference(transformer, transformer, references, cpu)


def test_a_base_that_came_through_unharmed_passes(quantized):
    transformer, references = quantized
    blocks = {name.split(".attn.")[0].split(".ff")[0].split(".norm")[0].split(".proj")[0] for name in references}
    assert blocks == {"transformer_blocks.0", "single_transformer_blocks.0"}
    check(transformer, references)


def test_nothing_is_compiled_for_the_check(quantized, monkeypatch):
    """Each block would be, with the hooks that look at its layers, and again without them for training."""

    def refuse(*_):
        raise AssertionError("a graph was made")

    transformer, references = quantized
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=refuse))
    compile_blocks(transformer)
    check(transformer, references)


def test_weights_that_were_cast_on_their_way_are_found(quantized):
    transformer, references = quantized
    layer = transformer.single_transformer_blocks[0].attn.to_q
    layer.weight.data = layer.weight.to(torch.float16).mul(1.7).to(torch.uint8)
    with pytest.raises(RuntimeError, match=r"single_transformer_blocks\.0\.attn\.to_q computes something else"):
        check(transformer, references)


def test_a_base_that_is_not_quantized_has_no_reference(tiny_model):
    assert reference_layers(load_transformer(tiny_model, dtype=torch.bfloat16)) == {}
