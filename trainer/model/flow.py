"""Flow matching as FLUX.1 was trained: the sigmas and the loss.

sigma in (0, 1): 0 is the clean picture, 1 is noise; x_sigma = (1 - sigma) x + sigma noise; the model predicts the
velocity d x_sigma / d sigma = noise - x.
"""

import math

import torch
from torch import Tensor

from configs.schema import FlowConfig
from data.samples.geometry import VAE_FACTOR
from trainer.model.flux import pack_latents

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


def region_weight(mask: Tensor, flow: FlowConfig) -> Tensor:
    """Loss weight of every latent pixel, mean 1 over each sample, so that small holes get whole gradients.

    mask: [B, 1, H, W], 1 = hole.  Returns [B, 1, H/8, W/8]; a latent pixel on the edge mixes both weights by area.
    """
    hole = torch.nn.functional.avg_pool2d(mask, VAE_FACTOR)  # [B, 1, H, W] -> [B, 1, h, w]
    weight = flow.hole_weight * hole + flow.keep_weight * (1 - hole)
    # A sample whose whole area has weight 0 (all hole, hole_weight 0) has loss 0, not 0/0.
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)


def flow_loss(velocity: Tensor, latents: Tensor, noise: Tensor, region: Tensor) -> Tensor:
    """Mean squared error of the velocity of each sample, weighted by region.

    velocity: packed [B, L, 64].  latents, noise: [B, 16, h, w].  region: [B, 1, h, w], mean 1.  Returns fp32 [B].
    """
    target = pack_latents(noise - latents.float())
    weight = pack_latents(region.expand_as(latents))
    return (weight * (velocity.float() - target).square()).mean(dim=(1, 2))
