"""The frozen base below an adapter, and what the loss holds the kept part against."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from configs.schema import FlowConfig
from data.batches.micro_batch import MicroBatch
from tests.trainer.adapters.live_models import METHODS, adapted, lora, train_a_little, velocity_of
from trainer.model.flow import mix_noise, velocity_target
from trainer.model.flux import pack_latents, predict_velocity
from trainer.model.frozen_base import without_adapter

FLOW = FlowConfig(keep_target="base")


@pytest.mark.parametrize("method", [lora(), *METHODS.values()], ids=["lora", *METHODS])
def test_without_its_adapter_a_model_is_its_base_and_trains_on_behind_it(tiny_model, pipeline, rows, method):
    transformer = adapted(tiny_model, method)
    train_a_little(transformer)
    trains = [parameter.requires_grad for parameter in transformer.parameters()]
    tuned, base = velocity_of(transformer, rows), velocity_of(pipeline.transformer, rows)
    with without_adapter(transformer):
        assert torch.equal(velocity_of(transformer, rows), base) and not torch.equal(tuned, base)
        assert [parameter.requires_grad for parameter in transformer.parameters()] == trains
    with pytest.raises(KeyError, match="in it"), without_adapter(transformer):
        raise KeyError("in it")
    assert torch.equal(velocity_of(transformer, rows), tuned)


def test_a_model_without_an_adapter_has_no_base():
    with pytest.raises(AssertionError, match="has no frozen base"), without_adapter(nn.Linear(2, 2)):
        pass


@pytest.fixture
def samples(rows) -> MicroBatch:
    """Two of the sample, of its hole and its mask ignored; a hole of whole tokens, so that no edge is mixed."""
    hole = torch.zeros_like(rows.mask)
    hole[:, :32, : hole.shape[2] // 4 * 2] = 255
    tensors = {name: value for name, value in vars(replace(rows, mask=hole)).items() if isinstance(value, torch.Tensor)}
    both = {name: torch.cat([value, value]) for name, value in tensors.items()} | {"unmasked": torch.tensor([0.0, 1.0])}
    return MicroBatch(rows.bucket, is_last=True, **both)


def test_the_kept_part_is_held_against_the_base_and_the_hole_against_the_picture(tiny_model, pipeline, samples):
    transformer = adapted(tiny_model, lora())
    train_a_little(transformer)
    sigma = torch.tensor([0.3, 0.3])
    noisy = mix_noise(samples.latents, samples.noise, sigma)
    target = velocity_target(transformer, noisy, samples, sigma, FLOW)
    own = pack_latents(samples.noise - samples.latents.float())
    with torch.no_grad():
        base = predict_velocity(pipeline.transformer, noisy, samples, sigma, FLOW)
    hole = pack_latents(samples.hole[:, :, ::8, ::8].expand_as(samples.latents)).bool()
    assert hole.any() and not hole.all() and not target.requires_grad
    torch.testing.assert_close(target[0][hole[0]], own[0][hole[0]])
    torch.testing.assert_close(target[0][~hole[0]], base[0][~hole[0]])
    torch.testing.assert_close(target[1], own[1])
    assert (own[0] - base[0]).abs().max() > 0.1
    assert torch.equal(velocity_target(transformer, noisy, samples, sigma, FlowConfig()), own)


def test_an_edge_mixes_both_by_area(tiny_model, pipeline, samples):
    hole = torch.zeros_like(samples.mask)
    hole[:, 8:12] = 255  # half of a row of latent pixels
    half = replace(samples, mask=hole, unmasked=None)
    sigma = torch.tensor([0.6, 0.6])
    noisy = mix_noise(half.latents, half.noise, sigma)
    target = velocity_target(adapted(tiny_model, lora()), noisy, half, sigma, FLOW)
    own = pack_latents(half.noise - half.latents.float())
    with torch.no_grad():
        base = predict_velocity(pipeline.transformer, noisy, half, sigma, FLOW)
    tokens = half.bucket.latent_size[1] // 2
    edge = torch.zeros(64, dtype=torch.bool)
    edge[[channel * 4 + 2 + column for channel in range(16) for column in (0, 1)]] = True  # the tokens' lower rows
    torch.testing.assert_close(target[:, :tokens, edge], ((own + base) / 2)[:, :tokens, edge], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target[:, :tokens, ~edge], base[:, :tokens, ~edge])
