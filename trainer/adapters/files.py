"""Adapter files: a LoRA, DoRA or LoKr to start from is read or refused; a trained one is written as diffusers does."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from peft import LoKrConfig as PeftLokr
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from configs.errors import InputError
from data.storage.atomic_write import apply_umask
from trainer.adapters.lokr import file_settings, lokr_misfits, read_lokr

ADAPTER = "default"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"

_MAGNITUDE = ".lora_magnitude_vector"  # the part of a DoRA that a LoRA has not
# Into these a file has alpha / rank multiplied: readers differ in what they do with an alpha (ComfyUI does not look for
# diffusers' metadata), and do the same without one.
_SCALED = (".lora_B.weight", ".lokr_w1")
_TRANSFORMER = "transformer."  # before every name in a file of diffusers


def load_adapter(transformer: FluxTransformer2DModel, source: Path) -> None:
    """Copy an adapter on disk into the one that is there.

    source: a .safetensors file, or a folder that holds one; LoRA and DoRA in any format that diffusers reads, LoKr in
    peft's.  Its alpha need not be the config's: the product is what it was.  Raises InputError if it is missing, or its
    kind, layers or ranks are not those of the config.
    """
    file = _find_adapter_file(source)
    if is_lokr(transformer):
        saved = read_lokr(file, _TRANSFORMER)
        problems = lokr_misfits(get_peft_model_state_dict(transformer, adapter_name=ADAPTER), saved)
    else:
        saved, problems = _read_lora(transformer, file)
    if problems:
        raise InputError(f"method.init_from {file} does not fit:\n  " + "\n  ".join(problems))
    saved |= {name: tensor / _scale(transformer, name) for name, tensor in saved.items() if name.endswith(_SCALED)}
    set_peft_model_state_dict(transformer, saved, adapter_name=ADAPTER)


def _read_lora(transformer: FluxTransformer2DModel, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by name, alpha / rank multiplied in; what does not fit the adapter that is there) of a LoRA or DoRA.

    Raises InputError if it is neither.
    """
    try:
        # Told a name that ends in .safetensors, it never unpickles.
        tensors, alphas, metadata = FluxFillPipeline.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            return_alphas=True,
            return_lora_metadata=True,
            local_files_only=True,
        )
        with safe_open(file, "pt") as opened:
            if any("dora_scale" in name for name in opened.keys()):  # noqa: SIM118  (no dict)
                raise ValueError("a DoRA in kohya's format, whose dora_scale diffusers would leave out")
    except (OSError, ValueError, RuntimeError, KeyError, AssertionError, SafetensorError) as error:
        raise InputError(f"method.init_from {file}: not a FLUX.1 LoRA that diffusers reads ({error}).") from error
    saved = {name.removeprefix(_TRANSFORMER): t for name, t in tensors.items() if name.startswith(_TRANSFORMER)}
    problems = _misfits(transformer, saved)
    for name, tensor in saved.items():
        if name.endswith(_SCALED) and (factor := saved.get(f"{_layer(name)}.lora_A.weight")) is not None:
            saved[name] = tensor.float() * _saved_scale(_layer(name), factor.shape[0], alphas or {}, metadata or {})
    if len(saved) < len(tensors):
        problems.append("adapts text encoders too, which are not trained here")
    return saved, problems


def _find_adapter_file(source: Path) -> Path:
    """The safetensors file that is, or lies in, `source`. Raises InputError if there is none, or more than one."""
    if source.suffix == ".safetensors" and source.is_file():
        return source
    if not source.is_dir():
        what = "is no .safetensors file" if source.exists() else "no such file or folder"
        raise InputError(f"method.init_from {source}: {what}. Give a LoRA in diffusers' format, as .safetensors.")
    if (source / WEIGHTS_NAME).is_file():
        return source / WEIGHTS_NAME
    files = sorted(source.glob("*.safetensors"))
    if len(files) != 1:
        raise InputError(
            f"method.init_from {source}: holds {len(files)} .safetensors files and no {WEIGHTS_NAME}. Name the file."
        )
    return files[0]


def _misfits(transformer: FluxTransformer2DModel, saved: Mapping[str, Tensor]) -> list[str]:
    """Reasons why a LoRA's tensors do not fit the adapter that is there; empty if they do."""
    own = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    layers, theirs = {_layer(name) for name in own}, {_layer(name) for name in saved}
    problems = []
    if lacking := layers - theirs:
        problems.append(f"it lacks {_some(lacking)}, which this run adapts: see method.targets")
    if surplus := theirs - layers:
        problems.append(f"it adapts {_some(surplus)}, which this run does not: see method.targets")
    common = layers & theirs
    trains_magnitude, holds_magnitude = (any(_MAGNITUDE in name for name in names) for names in (own, saved))
    if trains_magnitude != holds_magnitude:
        kind = "a DoRA: set method.type=dora" if holds_magnitude else "a plain LoRA: set method.type=lora"
        return [*problems, f"it is {kind}"]
    strange = own.keys() ^ saved.keys() | {name for name in own.keys() & saved if saved[name].ndim != own[name].ndim}
    if odd := {name for name in strange if _layer(name) in common}:
        return [*problems, f"it is no plain LoRA: {_some(odd)}"]
    ranks = {layer: saved[f"{layer}.lora_A.weight"].shape[0] for layer in common}
    shapes = {
        layer: (saved[f"{layer}.lora_B.weight"].shape[0], saved[f"{layer}.lora_A.weight"].shape[1]) for layer in common
    }
    modules = {layer: transformer.get_submodule(layer) for layer in common}
    if alien := {layer for layer, (to, of) in shapes.items() if (to, of) != tuple(modules[layer].weight.shape)}:
        problems.append(f"it was made for another model, where {_some(alien)} have other sizes")
    if other_ranks := {ranks[layer] for layer in common if ranks[layer] != modules[layer].r[ADAPTER]}:
        problems.append(f"its rank is {_listed(other_ranks)}: set method.rank to it")
    return problems


def _saved_scale(layer: str, rank: int, alphas: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> float:
    """alpha / rank of a saved layer: from its alpha tensor, else the file's metadata, else 1, as diffusers reads it."""
    if (alpha := alphas.get(f"{_TRANSFORMER}{layer}.alpha")) is not None:
        return float(alpha) / rank
    if (alpha := metadata.get(f"{_TRANSFORMER}lora_alpha")) is None:
        return 1.0
    pattern = metadata.get(f"{_TRANSFORMER}alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(list(pattern), layer), alpha)
    return alpha / (math.sqrt(rank) if metadata.get(f"{_TRANSFORMER}use_rslora") else rank)


def _layer(name: str) -> str:
    """The layer that a tensor of a LoRA belongs to."""
    return name.partition(".lora_")[0]


def _scale(transformer: nn.Module, name: str) -> float:
    """alpha / rank of the layer that a tensor of the adapter belongs to."""
    layer: Any = transformer.get_submodule(re.split(r"\.lo(?:ra|kr)_", name)[0])
    return layer.scaling[ADAPTER]


def _some(names: set[str]) -> str:
    """The first three of some names, and how many more."""
    first = ", ".join(sorted(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


def _listed(numbers: set[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


def adapter_tensors(
    transformer: FluxTransformer2DModel,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The adapter as its file holds it: "<layer>.lora_A.weight" and the like, on the CPU, in `dtype`, of a scale of 1.

    tensors: parameter name -> value, to take instead of the live ones (an average).
    """
    own = get_peft_model_state_dict(transformer, adapter_name=ADAPTER, state_dict=dict(tensors) if tensors else None)
    scaled = {name: tensor.detach().cpu() for name, tensor in own.items()}
    scaled |= {name: tensor * _scale(transformer, name) for name, tensor in scaled.items() if name.endswith(_SCALED)}
    return {name: tensor.to(dtype).contiguous() for name, tensor in scaled.items()}


def save_adapter(
    transformer: FluxTransformer2DModel,
    folder: Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter, alpha multiplied in: LoRA and DoRA for `pipeline.load_lora_weights(folder)`, LoKr for
    `pipeline.transformer.load_lora_adapter(folder, use_safetensors=True)`.

    tensors: parameter name -> value, to write instead of the live ones (an average).
    """
    config = transformer.peft_config[ADAPTER]
    settings = file_settings(config) if is_lokr(transformer) else _of_scale_one(config)
    settings["target_modules"] = sorted(settings["target_modules"])  # a set: in another order at every start
    FluxFillPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=adapter_tensors(transformer, tensors, dtype),
        transformer_lora_adapter_metadata=settings,
        weight_name=WEIGHTS_NAME,
    )
    apply_umask(folder)


def _of_scale_one(config: PeftConfig) -> dict[str, Any]:
    return config.to_dict() | {"lora_alpha": config.r, "alpha_pattern": dict(config.rank_pattern)}


def is_lokr(transformer: FluxTransformer2DModel) -> bool:
    """Whether the adapter is a LoKr, which FluxFillPipeline.load_lora_weights of diffusers 0.42 does not take."""
    return isinstance(transformer.peft_config[ADAPTER], PeftLokr)
