"""VAE, CLIP and T5 on the devices that a config names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.data_schema import EncodersConfig
from configs.errors import InputError
from data.encoders.encode import TextEncoders, load_clip, load_t5, load_vae


@dataclass(frozen=True)
class Encoders:
    """All that turns pictures and captions into tensors."""

    vae: Any
    text: TextEncoders

    @property
    def text_has_its_own_device(self) -> bool:
        """Whether text can be encoded while the VAE is at work. Not so where both share a device, or are on the CPU."""
        return self.vae.device not in (self.text.t5.device, self.text.clip.device)


def load_encoders(model: Path, config: EncodersConfig, *, device_index: int) -> Encoders:
    """The VAE in fp32 (latents are the training target), text encoders in bf16 on a GPU as FLUX is used, fp32 on a CPU.

    device_index: of this process's own GPU, modulo how many there are; used where the config says auto.
    Raises InputError if a device is not there, or its memory does not hold them.
    """
    vae, clip, t5 = (_find_device(key, vars(config)[key], device_index) for key in ("vae", "clip", "t5"))
    if vae.type == "cuda":
        torch.cuda.set_device(vae)
    int8 = config.t5_precision == "int8"
    try:
        return Encoders(
            load_vae(model, device=vae, dtype=torch.float32),
            TextEncoders(
                *load_clip(model, device=clip, dtype=_text_dtype(clip)),
                *load_t5(model, device=t5, dtype=_text_dtype(t5), int8=int8),
            ),
        )
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the encoders do not fit the memory of {', '.join(sorted({str(d) for d in (vae, clip, t5)}))} ({error}). "
            "Set data.encoders.t5 to another device (cuda:1, or cpu), or data.encoders.t5_precision to int8."
        ) from error


def _find_device(key: str, name: str, index: int) -> torch.device:
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", index % count) if count else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(
            f"data.encoders.{key} is {name}, but of CUDA devices there are here: {cuda_devices()}. Name another."
        )
    return device


def cuda_devices() -> str:
    """Those that are here, for people."""
    count = torch.cuda.device_count()
    return f"{count} ({', '.join(f'cuda:{n}' for n in range(count))})" if count else "none"


def _text_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
