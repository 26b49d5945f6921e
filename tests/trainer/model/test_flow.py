import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from scipy.special import ndtr

from configs.schema import FlowConfig
from trainer.model.flow import dynamic_mu, flow_loss, mix_noise, region_weight, sample_sigma, shift_sigma
from trainer.model.flux import pack_latents

SIDES = {256: (0.500, 1.649), 512: (0.630, 1.878), 768: (0.847, 2.332), 1024: (1.150, 3.158), 1536: (2.017, 7.513)}


# --- which sigmas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, expected", SIDES.items())
def test_shift_of_a_square_picture_is_flux1s(side, expected):
    mu = dynamic_mu((side // 16) ** 2)
    assert mu == pytest.approx(expected[0], abs=5e-4)
    assert math.exp(mu) == pytest.approx(expected[1], abs=5e-4 * expected[1])


@pytest.mark.parametrize("tokens", [16, 256, 1024, 3000, 4096, 16384])
def test_dynamic_mu_is_the_pipelines(tokens):
    assert dynamic_mu(tokens) == pytest.approx(calculate_shift(tokens), rel=1e-12)


@pytest.mark.parametrize("mu", [0.5, 1.15, 3.23])
def test_shift_is_the_schedulers(mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigma = torch.linspace(0.001, 1, 200, dtype=torch.float64)
    shifted = shift_sigma(sigma, math.exp(mu))
    torch.testing.assert_close(shifted, scheduler.time_shift(mu, 1.0, sigma), rtol=1e-12, atol=0)


def test_the_pipelines_sampler_visits_our_shifted_sigmas(pipeline):
    """What is trained most is what the sampler visits: both go through one shift."""
    tokens, steps = 4096, 28
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
    uniform = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
    ours = sample_sigma(uniform, tokens, FlowConfig(timestep_sampling="uniform"))
    torch.testing.assert_close(ours, pipeline.scheduler.sigmas[:-1], rtol=0, atol=1e-6)


def test_unshifted_logit_normal_quantiles_are_exact():
    z = np.linspace(-4, 4, 81)
    sigma = sample_sigma(torch.from_numpy(ndtr(z)), 4096, FlowConfig(shift="none"))
    np.testing.assert_allclose(sigma.numpy(), 1 / (1 + np.exp(-z)), rtol=1e-6)


@pytest.mark.parametrize("tokens", [16, 1024, 4096])
def test_median_is_the_shifted_half(tokens):
    sigma = sample_sigma(torch.tensor([0.5], dtype=torch.float64), tokens, FlowConfig())
    factor = math.exp(dynamic_mu(tokens))
    assert sigma.item() == pytest.approx(factor / (1 + factor), rel=1e-6)


@pytest.mark.parametrize("shift, median", [("none", 0.5), (3.0, 0.75), (1.0, 0.5)])
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_a_fixed_shift_is_the_same_in_every_bucket(shift, median, sampling):
    flow = FlowConfig(shift=shift, timestep_sampling=sampling)
    half = torch.tensor([0.5], dtype=torch.float64)
    assert sample_sigma(half, 256, flow).item() == sample_sigma(half, 4096, flow).item() == pytest.approx(median)


def test_uniform_without_shift_is_the_draw_itself():
    uniform = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    sigma = sample_sigma(uniform, 256, FlowConfig(timestep_sampling="uniform", shift="none"))
    assert torch.equal(sigma, uniform.float())


def test_distribution_of_many_draws_is_logit_normal():
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = sample_sigma(uniform, 1024, FlowConfig()).double()
    logits = torch.log(sigma / (1 - sigma))  # the shift moves the normal by mu and leaves its width
    assert logits.mean().item() == pytest.approx(dynamic_mu(1024), abs=0.01)
    assert logits.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("shift", ["none", "dynamic", 1e-6, 1e6])
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_sigma_never_reaches_the_ends(shift, sampling):
    ends = [0.0, 5e-324, 2**-54, 2**-24, 1 - 2**-24, 1 - 2**-53, 1.0]
    flow = FlowConfig(shift=shift, timestep_sampling=sampling)
    sigma = sample_sigma(torch.tensor(ends, dtype=torch.float64), 16384, flow)
    assert sigma.dtype == torch.float32
    assert ((sigma > 0) & (sigma < 1)).all()
    assert (sigma.diff() >= 0).all()


def test_mixing_goes_from_picture_to_noise():
    latents, noise = torch.randn(3, 16, 4, 4).bfloat16(), torch.randn(3, 16, 4, 4)
    mixed = mix_noise(latents, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[0], latents[0].float())
    torch.testing.assert_close(mixed[1], 0.75 * latents[1].float() + 0.25 * noise[1])
    assert torch.equal(mixed[2], noise[2])


# --- the loss ---------------------------------------------------------------------------------------------------------


def unpack(packed: np.ndarray, h: int, w: int) -> np.ndarray:
    """Velocity [B, L, 64] as [B, 16, h, w], pixel by pixel."""
    latents = np.empty((len(packed), 16, h, w))
    for channel, y, x in np.ndindex(16, h, w):
        latents[:, channel, y, x] = packed[:, (y // 2) * (w // 2) + x // 2, channel * 4 + (y % 2) * 2 + x % 2]
    return latents


def reference_loss(velocity, latents, noise, mask, hole_weight, keep_weight) -> np.ndarray:
    """The definition, in fp64: sum of weight x squared error / sum of weight, of each sample."""
    velocity, latents, noise, mask = (tensor.double().numpy() for tensor in (velocity, latents, noise, mask))
    batch, _, h, w = latents.shape
    error = (unpack(velocity, h, w) - (noise - latents)) ** 2
    weight = np.empty((batch, 1, h, w))
    for y, x in np.ndindex(h, w):
        area = mask[:, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean(axis=(2, 3))
        weight[:, :, y, x] = hole_weight * area + keep_weight * (1 - area)
    return (weight * error).sum(axis=(1, 2, 3)) / (16 * weight.sum(axis=(1, 2, 3)))


def target_of(latents, noise) -> torch.Tensor:
    """The velocity of the pictures themselves, packed."""
    return pack_latents(noise - latents.float())


@pytest.fixture
def batch():
    """Three samples of 48 x 80 px: velocity, latents (bf16), noise, mask with holes of very different size."""
    generator = torch.Generator().manual_seed(3)
    velocity = torch.randn(3, 15, 64, generator=generator)
    latents = torch.randn(3, 16, 6, 10, generator=generator).bfloat16()
    noise = torch.randn(3, 16, 6, 10, generator=generator)
    mask = torch.zeros(3, 1, 48, 80)
    mask[0, :, 3:40, 11:70] = 1
    mask[1, :, 20, 30] = 1  # a single pixel
    mask[2] = 1
    mask[2, :, 40:] = 0
    return velocity, latents, noise, mask


@pytest.mark.parametrize("hole_weight, keep_weight", [(1, 1), (3, 1), (1, 0), (0, 1), (0.25, 0.25), (1, 1e-3)])
def test_loss_is_the_plain_fp64_reference(batch, hole_weight, keep_weight):
    velocity, latents, noise, mask = batch
    region = region_weight(mask, FlowConfig(hole_weight=hole_weight, keep_weight=keep_weight))
    losses = flow_loss(velocity, target_of(latents, noise), region)
    assert losses.dtype == torch.float32
    expected = reference_loss(velocity, latents, noise, mask, hole_weight, keep_weight)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=2e-6)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_equal_weights_give_the_plain_mean_squared_error(batch, weight):
    velocity, latents, noise, mask = batch
    region = region_weight(mask, FlowConfig(hole_weight=weight, keep_weight=weight))
    expected = (velocity - target_of(latents, noise)).square().mean(dim=(1, 2))
    torch.testing.assert_close(flow_loss(velocity, target_of(latents, noise), region), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("hole_weight, keep_weight", [(1, 1), (5, 1), (1, 0), (0, 2)])
def test_region_weight_has_mean_one_in_every_sample(batch, hole_weight, keep_weight):
    region = region_weight(batch[3], FlowConfig(hole_weight=hole_weight, keep_weight=keep_weight))
    torch.testing.assert_close(region.mean(dim=(1, 2, 3)), torch.ones(3), rtol=0, atol=1e-5)


def test_a_sample_whose_mask_is_ignored_weighs_all_of_its_picture_alike(batch):
    flow = FlowConfig(hole_weight=5, keep_weight=0)
    masked = region_weight(batch[3], flow)
    region = region_weight(batch[3], flow, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(region[1], torch.ones_like(region[1]))
    assert torch.equal(region[::2], masked[::2]) and not torch.equal(masked[1], region[1])
    all_hole = torch.ones_like(batch[3])
    no_weight = region_weight(all_hole, FlowConfig(hole_weight=0), torch.ones(3))
    assert torch.equal(no_weight, torch.ones_like(no_weight)), "nor is one left out whose hole has no weight"


def test_a_sample_without_any_weight_has_loss_zero_and_no_gradient(batch):
    velocity, latents, noise, _ = batch
    velocity = velocity.requires_grad_()
    all_hole = torch.ones(3, 1, 48, 80)
    losses = flow_loss(
        velocity, target_of(latents, noise), region_weight(all_hole, FlowConfig(hole_weight=0, keep_weight=1))
    )
    losses.sum().backward()
    assert not losses.any()
    assert not velocity.grad.any()


@pytest.mark.parametrize("hole_weight, keep_weight", [(1, 1), (1, 0), (0, 1)])
def test_idle_rows_change_neither_loss_nor_gradient(pipeline, load_triple, hole_weight, keep_weight):
    """A row that fills up is all zeros, with weight 0 (data/batches/batch_stream.py)."""
    from data.batches.micro_batch import MicroBatch, unpack_mask
    from trainer.model.flux import predict_velocity

    flow = FlowConfig(hole_weight=hole_weight, keep_weight=keep_weight)
    real = load_triple(64, 64, of=(64, 64)).rows
    tensors = {name: value for name, value in vars(real).items() if isinstance(value, torch.Tensor)}
    padded = MicroBatch(
        real.bucket, is_last=True, **{n: torch.cat([v, torch.zeros_like(v)]) for n, v in tensors.items()}
    )
    padded.uniform[1] = 0.5
    results = []
    for rows in (real, padded):
        sigma = sample_sigma(rows.uniform, rows.bucket.tokens, flow)
        noisy = mix_noise(rows.latents, rows.noise, sigma)
        velocity = predict_velocity(pipeline.transformer, noisy, rows, sigma, flow)
        region = region_weight(unpack_mask(rows.mask), flow)
        loss = (flow_loss(velocity, target_of(rows.latents, rows.noise), region) * rows.weight).sum()
        gradient = torch.autograd.grad(loss, pipeline.transformer.proj_out.weight)[0]
        results.append((loss.detach(), gradient))
    (loss, gradient), (padded_loss, padded_gradient) = results
    torch.testing.assert_close(padded_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(padded_gradient, gradient, rtol=1e-4, atol=1e-7)
