"""Files of trained adapters: LoRA, DoRA and LoKr, written as diffusers does."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoKrConfig as PeftLokr
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from data.storage.safetensors_file import write_tensor_dict
from trainer.adapters.lokr import file_settings

ADAPTER = "default"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"

# Into these a file has alpha / rank multiplied: readers differ in what they do with an alpha (ComfyUI does not look for
# diffusers' metadata), and do the same without one.
_SCALED = (".lora_B.weight", ".lokr_w1")
_MAGNITUDE = ".lora_magnitude_vector"
INPUT_LAYER = "x_embedder"


def _scale(transformer: nn.Module, name: str) -> float:
    """alpha / rank of the layer that a tensor of the adapter belongs to."""
    layer: Any = transformer.get_submodule(re.split(r"\.lo(?:ra|kr)_", name)[0])
    return layer.scaling[ADAPTER]


def adapter_tensors(
    transformer: FluxTransformer2DModel,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The adapter's factors: "<layer>.lora_A.weight" and the like, on the CPU, in `dtype`, of a scale of 1.

    tensors: parameter name -> value, to take instead of the live ones (an average).
    """
    own = get_peft_model_state_dict(transformer, adapter_name=ADAPTER, state_dict=dict(tensors) if tensors else None)
    scaled = {name: tensor.detach().cpu() for name, tensor in own.items()}
    scaled |= {name: tensor * _scale(transformer, name) for name, tensor in scaled.items() if name.endswith(_SCALED)}
    return {name: tensor.to(dtype).contiguous() for name, tensor in scaled.items()}


def file_tensors(transformer: FluxTransformer2DModel, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file holds of an adapter: its factors under the names that most readers know, and what only some look for.

    factors: of `adapter_tensors`.  OneTrainer wants a DoRA's magnitudes to end in `.weight`, and LoKr's alpha (the
    rank: a scale of 1), as does LyCORIS.  ComfyUI must be told that an adapter widens FLUX.1-dev's input layer.
    """
    names = {name: f"{name}.weight" if name.endswith(_MAGNITUDE) else name for name in factors}
    more: dict[str, Tensor] = {}
    if is_lokr(transformer):
        rank = torch.tensor(float(transformer.peft_config[ADAPTER].r))
        more = {name.replace(".lokr_w1", ".alpha"): rank.clone() for name in factors if name.endswith(".lokr_w1")}
    elif widens_input(transformer):
        layer: Any = transformer.get_submodule(INPUT_LAYER)  # its weight may be sharded, or packed in 4 bits
        more = {f"{INPUT_LAYER}.reshape_weight": torch.tensor([layer.out_features, layer.in_features])}
    found = more | {names[name]: tensor for name, tensor in factors.items()}
    return {f"transformer.{name}": tensor for name, tensor in found.items()}


def widens_input(transformer: FluxTransformer2DModel) -> bool:
    """Whether the adapter is of an expanded FLUX.1-dev, whose input layer alone is named with its rank."""
    return INPUT_LAYER in getattr(transformer.peft_config[ADAPTER], "rank_pattern", {})


def save_adapter(
    transformer: FluxTransformer2DModel,
    folder: Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter, alpha multiplied in: LoRA and DoRA for `pipeline.load_lora_weights(folder)`, LoKr for
    `pipeline.transformer.load_lora_adapter(folder, use_safetensors=True)`.

    tensors: parameter name -> value, to write instead of the live ones (an average).  metadata: of the file, beside
    peft's settings.
    """
    settings = {f"transformer.{name}": value for name, value in peft_settings(transformer).items()}
    folder.mkdir(parents=True, exist_ok=True)
    packed = {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    found = file_tensors(transformer, adapter_tensors(transformer, tensors, dtype))
    write_tensor_dict(folder / WEIGHTS_NAME, found, packed | dict(metadata or {}))


def peft_settings(transformer: FluxTransformer2DModel) -> dict[str, Any]:
    """peft's settings of the adapter whose factors have a scale of 1."""
    config = transformer.peft_config[ADAPTER]
    settings = file_settings(config) if is_lokr(transformer) else _of_scale_one(config)
    # Sets are in another order at every start.
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


def _of_scale_one(config: PeftConfig) -> dict[str, Any]:
    return config.to_dict() | {"lora_alpha": config.r, "alpha_pattern": dict(config.rank_pattern)}


def is_lokr(transformer: FluxTransformer2DModel) -> bool:
    """Whether the adapter is a LoKr, which FluxFillPipeline.load_lora_weights of diffusers 0.42 does not take."""
    return isinstance(transformer.peft_config[ADAPTER], PeftLokr)
