"""Flow matching as FLUX.1 was trained: the sigmas and the loss.

sigma in (0, 1): 0 is the clean picture, 1 is noise; x_sigma = (1 - sigma) x + sigma noise; the model predicts the
velocity d x_sigma / d sigma = noise - x.
"""

import math

import torch
from torch import Tensor, nn

from configs.flux_shape import LATENT_CHANNELS, VAE_FACTOR
from configs.schema import FlowConfig
from data.batches.micro_batch import MicroBatch
from trainer.model.flux import pack_latents, predict_velocity
from trainer.model.frozen_base import without_adapter

# Of FLUX.1's scheduler_config.json (base_shift, max_shift, base_image_seq_len, max_image_seq_len); the line through the
# two points is diffusers' pipeline_flux_fill.py `calculate_shift`.
_SHIFT_AT = ((256, 0.5), (4096, 1.15))


def dynamic_mu(tokens: int) -> float:
    """The log of the shift at a number of image tokens: 0.5 at 256 px, 1.15 at 1024 px, linear in the tokens."""
    (low, mu_low), (high, mu_high) = _SHIFT_AT
    slope = (mu_high - mu_low) / (high - low)
    return mu_low + slope * (tokens - low)


def shift_sigma(sigma: Tensor, factor: float) -> Tensor:
    """Move sigmas towards noise: s sigma / (1 + (s - 1) sigma). factor 1 changes nothing.

    FlowMatchEulerDiscreteScheduler's time_shift, s = exp(mu)."""
    return factor * sigma / (1 + (factor - 1) * sigma)


def sample_sigma(uniform: Tensor, tokens: int, flow: FlowConfig) -> Tensor:
    """uniform: fp64 [B] in [0, 1], drawn per sample.  Returns sigma fp32 [B] in (0, 1), shifted for the bucket."""
    sigma = torch.sigmoid(torch.special.ndtri(uniform)) if flow.timestep_sampling == "logit_normal" else uniform
    if flow.shift == "dynamic":
        sigma = shift_sigma(sigma, math.exp(dynamic_mu(tokens)))
    elif flow.shift != "none":
        sigma = shift_sigma(sigma, flow.shift)
    # The largest fp32 below 1, and as far from 0: rounding, or a large factor, would put sigma on the ends.
    return sigma.float().clamp(2**-24, 1 - 2**-24)


def mix_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma in fp32: latents, noise [B, 16, h, w], sigma [B]."""
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * latents.float() + sigma * noise


def velocity_target(transformer: nn.Module, noisy: Tensor, rows: MicroBatch, sigma: Tensor, flow: FlowConfig) -> Tensor:
    """What the velocity is held against: fp32, packed [B, L, 64], noise - latents.

    With flow.keep_target base, outside the hole what the frozen base predicts there; a latent pixel on the edge mixes
    both by area. All ranks of a sharded model call it together then.
    """
    target = pack_latents(rows.noise - rows.latents.float())
    if flow.keep_target == "picture":
        return target
    with torch.no_grad(), without_adapter(transformer):
        base = predict_velocity(transformer, noisy, rows, sigma, flow).float()
    hole = _without_mask(_hole_fraction(rows.hole), rows.unmasked)
    return torch.lerp(base, target, pack_latents(hole.expand_as(rows.latents)))


def region_weight(mask: Tensor, flow: FlowConfig, unmasked: Tensor | None = None) -> Tensor:
    """Loss weight of every latent pixel, mean 1 over each sample, so that small holes get whole gradients.

    mask: [B, 1, H, W], 1 = hole.  unmasked: [B], 1 for a sample that has weight 1 everywhere; None: of none.
    Returns [B, 1, H/8, W/8]; a latent pixel on the edge mixes both weights by area.
    """
    hole = _hole_fraction(mask)
    weight = flow.hole_weight * hole + flow.keep_weight * (1 - hole)
    # A sample whose whole area has weight 0 (all hole, hole_weight 0) has loss 0, not 0/0.
    return _without_mask(weight / weight.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12), unmasked)


def _hole_fraction(mask: Tensor) -> Tensor:
    """Share of every latent pixel that is hole: mask [B, 1, H, W] -> [B, 1, h, w]."""
    return torch.nn.functional.avg_pool2d(mask, VAE_FACTOR)


def _without_mask(region: Tensor, unmasked: Tensor | None) -> Tensor:
    """`region`, [B, 1, h, w], of 1 everywhere in the samples whose loss ignores the mask."""
    return region if unmasked is None else torch.where(unmasked.view(-1, 1, 1, 1) > 0, 1.0, region)


def flow_loss(velocity: Tensor, target: Tensor, region: Tensor) -> Tensor:
    """Mean squared error of the velocity of each sample, weighted by region.

    velocity, target: packed [B, L, 64].  region: [B, 1, h, w], mean 1.  Returns fp32 [B].
    """
    weight = pack_latents(region.expand(-1, LATENT_CHANNELS, -1, -1))
    return (weight * (velocity.float() - target).square()).mean(dim=(1, 2))
