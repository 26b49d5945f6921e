"""Checkpointing of the first blocks: gradients that do not hang on it, and who is computed again."""

import pytest
import torch

from configs.schema import FlowConfig, FullConfig, LoraConfig
from trainer.method import build_transformer
from trainer.model.checkpointing import checkpoint_blocks
from trainer.model.flux import predict_velocity

METHODS = [FullConfig(type="full"), LoraConfig(type="lora", rank=4, alpha=4)]


@pytest.fixture(params=METHODS, ids=lambda method: method.type)
def transformer(request, config, tiny_model, engine):
    transformer = build_transformer(config.model_copy(update={"method": request.param}), tiny_model, engine)
    for name, parameter in transformer.named_parameters():
        if ".lora_B" in name:  # of zeros, which would let no gradient through
            torch.nn.init.normal_(parameter)
    return transformer


def blocks_of(transformer) -> list:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def gradients(transformer, rows) -> dict:
    transformer.zero_grad()
    velocity = predict_velocity(transformer, rows.noise, rows, torch.tensor([0.4]), FlowConfig())
    velocity.square().mean().backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.requires_grad}


def test_the_first_blocks_are_computed_twice_and_no_gradient_changes(transformer, load_triple):
    rows = load_triple(48, 80, of=(48, 80)).rows
    blocks = blocks_of(transformer)
    calls = [0] * len(blocks)
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    expected = gradients(transformer, rows)
    assert calls == [1] * len(blocks) and all(gradient.any() for gradient in expected.values())
    for count in (2, len(blocks), 1, 0):
        checkpoint_blocks(transformer, count)
        calls[:] = [0] * len(blocks)
        found = gradients(transformer, rows)
        assert calls == [2] * count + [1] * (len(blocks) - count)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        with torch.no_grad():  # nothing is computed again where nothing is learned
            calls[:] = [0] * len(blocks)
            predict_velocity(transformer, rows.noise, rows, torch.tensor([0.4]), FlowConfig())
        assert calls == [1] * len(blocks)


def test_nothing_in_a_step_draws_random_numbers(transformer, load_triple):
    """Else a block that is computed again without their state would be another one."""
    checkpoint_blocks(transformer, len(blocks_of(transformer)))
    before = torch.get_rng_state()
    gradients(transformer, load_triple(48, 80, of=(48, 80)).rows)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.p == 0 for module in transformer.modules() if isinstance(module, torch.nn.Dropout))
