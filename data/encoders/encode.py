"""Pictures and captions -> the tensors FLUX.1-Fill trains on, by the model's own VAE, CLIP and T5.

The formulas are those of diffusers' pipeline_flux_fill.py; the posterior's mean stands where the pipeline samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.errors import InputError
from data.encoders.device import on_device
from data.encoders.load import TextEncoders
from data.samples.geometry import Pixels

_CPU = torch.device("cpu")


class NotFinite(InputError):
    """An encoder gave NaN or infinity: trained on, it would be in every weight a step later."""


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1], as FluxFillPipeline's image processor scales them."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div(255).mul(2).sub(1)


def blank_hole(image: Tensor, mask: Tensor) -> Tensor:
    """The picture with its hole filled by mid-grey: image [B, 3, H, W] in [-1, 1], mask [B, 1, H, W], 1 = hole."""
    return image * (1 - mask)


@torch.no_grad()
def encode_images(vae, images: Tensor) -> Tensor:
    """fp32 [B, 3, H, W] in [-1, 1] -> latents fp32 [B, 16, H/8, W/8], shifted and scaled (mean of the posterior)."""
    mean = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode().float()
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae, latents: Tensor) -> Tensor:
    """Latents [B, 16, h, w], shifted and scaled -> fp32 pictures [B, 3, 8h, 8w] in [0, 1]."""
    raw = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(raw.to(vae.device, vae.dtype)).sample.float().add(1).div(2).clamp(0, 1)


@dataclass(frozen=True)
class PixelBatch:
    """B samples of one bucket with K mask variants each, in the host's memory.

    target, image: uint8 [B, H, W, 3].  masks: bool [K, B, H, W], True = hole.
    """

    target: Tensor
    image: Tensor
    masks: Tensor


def collate_pixels(samples: Sequence[Sequence[Pixels]], *, device: torch.device = _CPU) -> PixelBatch:
    """Samples of one bucket, each as its mask variants (all equally many, those of a sample of one target and image).

    device: where they will go; for a GPU they are in page-locked memory, from which it copies while it computes.
    """
    masks = np.stack([np.stack([pixels.mask for pixels in column]) for column in zip(*samples, strict=True)])
    tensors = [
        torch.from_numpy(np.stack([variants[0].target for variants in samples])),
        torch.from_numpy(np.stack([variants[0].image for variants in samples])),
        torch.from_numpy(masks),
    ]
    if device.type == "cuda":
        with on_device(device):
            tensors = [tensor.pin_memory() for tensor in tensors]
    return PixelBatch(*tensors)


@dataclass(frozen=True)
class EncodedPixels:
    """latents: fp32 [B, 16, h, w].  masked_latents: fp32 [K, B, 16, h, w].  On the VAE's device."""

    latents: Tensor
    masked_latents: Tensor


def encode_pixels(vae, batch: PixelBatch) -> EncodedPixels:
    """What training needs of the pictures: latents of the targets, and of the images behind each variant's mask.

    Does not wait for the device. A sample's tensors depend on its batch by rounding alone, and not on how many variants
    there are: each variant of all samples is one batch.
    """
    device = vae.device
    image = to_signed(batch.image.to(device, non_blocking=True))
    masks = batch.masks.to(device, non_blocking=True).unsqueeze(2).float()  # [K, B, 1, H, W]
    return EncodedPixels(
        encode_images(vae, to_signed(batch.target.to(device, non_blocking=True))),
        torch.stack([encode_images(vae, blank_hole(image, mask)) for mask in masks]),
    )


@dataclass(frozen=True)
class EncodedText:
    """t5: fp32 [B, L, D] and pooled: fp32 [B, P], each on its encoder's device; tokens: real tokens of each caption,
    end mark included."""

    t5: Tensor
    pooled: Tensor
    tokens: list[int]


@torch.no_grad()
def encode_captions(encoders: TextEncoders, captions: Sequence[str], *, text_length: int) -> EncodedText:
    """Text tensors as FluxFillPipeline.encode_prompt makes them: T5 padded to `text_length` without an attention mask
    (FLUX was trained so: pad rows differ from caption to caption), CLIP's pooled output over 77 tokens."""
    t5_input = encoders.t5_tokenizer(
        list(captions), padding="max_length", max_length=text_length, truncation=True, return_tensors="pt"
    )
    clip_input = encoders.clip_tokenizer(
        list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    t5 = encoders.t5(t5_input.input_ids.to(encoders.t5.device))[0]
    pooled = encoders.clip(clip_input.input_ids.to(encoders.clip.device)).pooler_output
    tokens = t5_input.attention_mask.sum(dim=1).tolist()
    return EncodedText(t5.float(), pooled.float(), tokens)
