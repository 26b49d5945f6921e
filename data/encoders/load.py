"""VAE, CLIP and T5 on the devices that a config names."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.data_schema import EncodersConfig
from configs.errors import InputError
from configs.flux_shape import LATENT_CHANNELS


@dataclass(frozen=True)
class TextEncoders:
    """CLIP (pooled text) and T5 (text tokens) with their tokenizers."""

    clip: Any
    clip_tokenizer: Any
    t5: Any
    t5_tokenizer: Any


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

    device_index: of this process's own GPU, modulo how many there are; used where the config says auto or cuda.
    Raises InputError if a device is not there, or its memory does not hold them.
    """
    vae, clip, t5 = (find_device(key, vars(config)[key], device_index) for key in ("vae", "clip", "t5"))
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


def find_device(key: str, name: str, index: int) -> torch.device:
    """The device `name` of data.encoders.<key>; cuda: GPU number `index` of those here, counted round; auto: that, or
    the CPU where there is none.

    Raises InputError if it is not here.
    """
    count = torch.cuda.device_count()
    own = torch.device("cuda", index % count) if count else torch.device("cpu")
    if name == "auto" or (name == "cuda" and count):
        return own
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


def load_vae(model: Path, *, device: torch.device, dtype: torch.dtype):
    """The model's AutoencoderKL, frozen, in eval mode.  Raises InputError if it cannot be loaded."""
    from diffusers import AutoencoderKL

    folder = model / "vae"
    with _reading(folder):
        vae, report = AutoencoderKL.from_pretrained(
            model, subfolder="vae", torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        _refuse_gaps(folder, report["missing_keys"])
    if vae.config.latent_channels != LATENT_CHANNELS or vae.config.shift_factor is None:
        raise InputError(
            f"{folder}: {vae.config.latent_channels} latent channels, shift_factor {vae.config.shift_factor}; "
            f"FLUX.1 has {LATENT_CHANNELS} channels and a shift. Point model.base at a FLUX.1 model."
        )
    return vae.to(device).eval().requires_grad_(False)


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
        # Else of a folder without safetensors its .bin is read, a pickle.
        encoder, report = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
        _refuse_gaps(folder, report["missing_keys"])
    return encoder


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with _reading(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # else a terminal is asked


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
