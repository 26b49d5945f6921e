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
from data.samples.geometry import LATENT_CHANNELS, Pixels

_CPU = torch.device("cpu")


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
    if vae.config.latent_channels != LATENT_CHANNELS or vae.config.shift_factor is None:
        raise InputError(
            f"{folder}: {vae.config.latent_channels} latent channels, shift_factor {vae.config.shift_factor}; "
            f"FLUX.1 has {LATENT_CHANNELS} channels and a shift. Point model.base at a FLUX.1 model."
        )
    return vae.to(device).eval().requires_grad_(False)


def load_text_encoders(model: Path, *, device: torch.device, dtype: torch.dtype) -> TextEncoders:
    """The model's CLIP and T5 on one device, frozen, in eval mode.  Raises InputError, naming the part that cannot be
    loaded."""
    return TextEncoders(*load_clip(model, device=device, dtype=dtype), *load_t5(model, device=device, dtype=dtype))


def load_clip(model: Path, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model's CLIP and its tokenizer."""
    from transformers import CLIPTextModel

    encoder = _load_part(CLIPTextModel, model / "text_encoder", dtype=dtype).to(device)
    return encoder.eval().requires_grad_(False), _load_tokenizer(model / "tokenizer")


def load_t5(model: Path, *, device: torch.device, dtype: torch.dtype, int8: bool = False) -> tuple[Any, Any]:
    """The model's T5 and its tokenizer.  int8: weights in 8 bits (bitsandbytes' LLM.int8), half the memory of bf16."""
    from transformers import BitsAndBytesConfig, T5EncoderModel

    quantized = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if int8 else {}
    # Straight to its device: eight processes of a machine would else hold it in its memory eight times.
    placed = {"device_map": {"": device}, **quantized}
    encoder = _load_part(T5EncoderModel, model / "text_encoder_2", dtype=dtype, **placed)
    return encoder.eval().requires_grad_(False), _load_tokenizer(model / "tokenizer_2")


def _load_part(kind: Any, folder: Path, **options: Any) -> Any:
    with _reading(folder):
        encoder, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        _refuse_gaps(folder, report["missing_keys"])
    return encoder


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with _reading(folder):
        return AutoTokenizer.from_pretrained(folder)


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

    device: where they will go; for a GPU they lie in page-locked memory, from which it copies while it computes.
    """
    masks = np.stack([np.stack([pixels.mask for pixels in column]) for column in zip(*samples, strict=True)])
    tensors = [
        torch.from_numpy(np.stack([variants[0].target for variants in samples])),
        torch.from_numpy(np.stack([variants[0].image for variants in samples])),
        torch.from_numpy(masks),
    ]
    if device.type == "cuda":
        with torch.cuda.device(device):  # else every process would open the first GPU too, for half a GiB
            tensors = [tensor.pin_memory() for tensor in tensors]
    return PixelBatch(*tensors)


@dataclass(frozen=True)
class EncodedPixels:
    """latents: fp32 [B, 16, h, w].  masked_latents: fp32 [K, B, 16, h, w].  On the VAE's device."""

    latents: Tensor
    masked_latents: Tensor


def encode_pixels(vae, batch: PixelBatch) -> EncodedPixels:
    """What training needs of the pictures: latents of the targets, and of the images behind each variant's mask.

    Does not wait for the device. A sample's tensors hang on its batch by rounding alone, and not on how many variants
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


class HostCopy:
    """A tensor on its way to the host's memory: the copy is queued at once, `wait` gives it when it is there."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived = None
        if not tensor.is_cuda:
            self._tensor = tensor
            return
        self._device = tensor.device
        with torch.cuda.device(self._device):
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def num_bytes(self) -> int:
        return self._tensor.nbytes

    def wait(self) -> Tensor:
        if self._arrived is not None:
            with torch.cuda.device(self._device):  # a thread that waits would else open the first GPU too
                self._arrived.synchronize()
        return self._tensor
