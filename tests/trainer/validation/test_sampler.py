import pytest
import torch
from diffusers import FluxTransformer2DModel

from data.batches.training_set import ValidationSample
from data.encoders.load import load_vae
from data.samples.plan import HOLDOUT
from trainer.model.flux import load_transformer
from trainer.validation.sampler import SIGMA_BINS, Sampler, chunk_items, make_item, stack


@pytest.fixture(scope="module")
def items(samples):
    """Those of one bucket, the largest group of the held-out pictures."""
    made = [
        make_item(sample, number) for number, sample in enumerate(samples.validation_samples(split=HOLDOUT, count=4))
    ]
    return max(chunk_items(made, 1, at_once=4), key=len)


@pytest.fixture(scope="module")
def sampler(tiny_model, config):
    vae = load_vae(tiny_model, device=torch.device("cpu"), dtype=torch.float32)
    return Sampler(tiny_model, vae, device=torch.device("cpu"), dtype=torch.float32, flow=config.flow, steps=2)


@pytest.fixture(scope="module")
def transformer(tiny_model) -> FluxTransformer2DModel:
    return load_transformer(tiny_model, dtype=torch.float32)


@torch.no_grad()
def test_a_fill_does_not_depend_on_what_is_filled_beside_it(items, sampler, transformer):
    pipeline = sampler.open(transformer)
    together = sampler.sample(pipeline, [item.request for item in items])
    alone = sampler.sample(pipeline, [items[-1].request])
    assert len(items) > 1 and torch.allclose(together[-1], alone[0], atol=1e-4)
    assert together.shape == (len(items), 3, items[0].rows.bucket.height, items[0].rows.bucket.width)


@torch.no_grad()
def test_a_seed_gives_other_noise_and_the_same_gives_the_same(items, sampler, transformer):
    pipeline, request = sampler.open(transformer), [items[0].request]
    fills = [sampler.sample(pipeline, request, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(fills[0], fills[1]) and not torch.allclose(fills[0], fills[2], atol=1e-2)


@torch.no_grad()
def test_losses_are_of_every_item_and_noise_level(items, sampler, transformer):
    losses = sampler.losses(transformer, items)
    assert losses.shape == (len(items), len(SIGMA_BINS)) and losses.isfinite().all()
    assert torch.allclose(losses[:1], sampler.losses(transformer, items[:1]), rtol=1e-3)


def test_texts_of_eight_bits_are_the_same_texts(items):
    """As a cache of int8 texts holds them; the pipeline takes numbers."""
    rows = items[0].rows
    scale = rows.t5[0].float().abs().amax(dim=-1) / 127
    codes = (rows.t5[0].float() / scale.unsqueeze(-1)).round().to(torch.int8)
    tensors = {"latents": rows.latents, "masked_latents": rows.masked_latents, "mask": rows.mask, "pooled": rows.pooled}
    stored = {name: tensor[0] for name, tensor in tensors.items()} | {"t5": codes, "t5_scale": scale}
    item = make_item(ValidationSample(items[0].item, items[0].pixels, rows.bucket, stored), 0)
    assert torch.allclose(item.request.t5.float(), rows.t5[0].float(), atol=2 * scale.max().item())
    assert stack([item, item]).t5_scale.shape == (2, len(scale))
