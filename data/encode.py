"""Pictures and captions -> the tensors FLUX.1-Fill trains on, by the model's own VAE, CLIP and T5.

The formulas are those of diffusers' pipeline_flux_fill.py; the posterior's mean stands where the pipeline samples.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import InputError
from data.geometry import Pixels


@dataclass(frozen=True)
class TextEncoders:
    """CLIP (pooled text) and T5 (text tokens) with their tokenizers."""

    clip: Any
    clip_tokenizer: Any
    t5: Any
    t5_tokenizer: Any


def load_vae(model: Path, *, device: torch.device, dtype: torch.dtype):
    """The model's AutoencoderKL, frozen, in eval mode.  Raises InputError if it cannot be loaded."""
    from diffusers import AutoencoderKL

    folder = model / "vae"
    with _reading(folder):
        vae, report = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=dtype, output_loading_info=True)
        _refuse_gaps(folder, report["missing_keys"])
    if vae.config.latent_channels != 16 or vae.config.shift_factor is None:
        raise InputError(
            f"{folder}: {vae.config.latent_channels} latent channels, shift_factor {vae.config.shift_factor}; "
            "FLUX.1 has 16 channels and a shift. Point model.base at a FLUX.1 model."
        )
    return vae.to(device).eval().requires_grad_(False)


def load_text_encoders(model: Path, *, device: torch.device, dtype: torch.dtype) -> TextEncoders:
    """The model's CLIP and T5, frozen, in eval mode.  Raises InputError, naming the part that cannot be loaded."""
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    encoders = []
    for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", T5EncoderModel)):
        with _reading(model / part):
            encoder, report = kind.from_pretrained(model / part, dtype=dtype, output_loading_info=True)
            _refuse_gaps(model / part, report["missing_keys"])
        encoders.append(encoder.to(device).eval().requires_grad_(False))
    tokenizers = []
    for part in ("tokenizer", "tokenizer_2"):
        with _reading(model / part):
            tokenizers.append(AutoTokenizer.from_pretrained(model / part))
    (clip, t5), (clip_tokenizer, t5_tokenizer) = encoders, tokenizers
    return TextEncoders(clip, clip_tokenizer, t5, t5_tokenizer)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns whatever a library raises over a model's part into one message that names the part."""
    try:
        yield
    except (InputError, ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # safetensors, tokenizers, json and torch each have their own
        raise InputError(f"{folder}: cannot be loaded ({error}). Fetch the model again.") from error


def _refuse_gaps(folder: Path, missing: Iterable[str]) -> None:
    """The libraries fill missing weights with random numbers and go on with a warning."""
    if names := sorted(missing):
        more = ", ..." if len(names) > 3 else ""
        raise InputError(
            f"{folder}: weights are missing ({', '.join(names[:3])}{more}; {len(names)} in all). Fetch the model again."
        )


def to_signed(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1], as FluxFillPipeline's image processor scales them."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).to(torch.float32).div(255).mul(2).sub(1)


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
class EncodedPixels:
    """One sample.  latents: fp32 [16, h, w].  masked_latents: fp32 [16, h, w] per mask variant.  On the CPU."""

    latents: Tensor
    masked_latents: list[Tensor]


def encode_pixels(vae, batch: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
    """Triples of one bucket -> (latents, masked_latents), each fp32 [B, 16, h, w] on the CPU."""
    return _encode_targets(vae, batch), _encode_masked(vae, batch)


def encode_samples(vae, batch: Sequence[Sequence[Pixels]]) -> list[EncodedPixels]:
    """Samples of one bucket, each as its mask variants (all equally many, those of a sample of one target)."""
    latents = _encode_targets(vae, [variants[0] for variants in batch])
    # One variant of every sample at a time: a variant's latents do not hang on how many others there are.
    masked_latents = [_encode_masked(vae, column) for column in zip(*batch, strict=True)]
    return [EncodedPixels(latents[row], [masked[row] for masked in masked_latents]) for row in range(len(batch))]


def _encode_targets(vae, batch: Sequence[Pixels]) -> Tensor:
    return encode_images(vae, to_signed(np.stack([pixels.target for pixels in batch]))).cpu()


def _encode_masked(vae, batch: Sequence[Pixels]) -> Tensor:
    image = to_signed(np.stack([pixels.image for pixels in batch]))
    mask = torch.from_numpy(np.stack([pixels.mask for pixels in batch])).unsqueeze(1).float()
    return encode_images(vae, blank_hole(image, mask)).cpu()


@dataclass(frozen=True)
class EncodedText:
    """t5: [B, L, D] and pooled: [B, P], fp32 on the CPU; tokens: real tokens of each caption, end mark included."""

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
    return EncodedText(t5.float().cpu(), pooled.float().cpu(), tokens)
