"""The adapter: which layers get one, starting from an existing one, and diffusers' format on disk."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from configs.errors import InputError
from configs.schema import LoraConfig

ADAPTER = "default"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"

_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_MLP = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"
_TARGETS = {"attention": _ATTENTION, "attention+mlp": f"{_ATTENTION}|{_MLP}"}

# The 320 inputs that Fill has over dev start at zero in an expanded base: only an adapter of their full rank can learn
# them all (BFL's control LoRAs, too, adapt the input layer).
_EXPANDED_INPUT = "x_embedder"
_EXPANDED_RANK = 320


def lora_targets(transformer: nn.Module, method: LoraConfig) -> list[str]:
    """Names of the linear layers that get an adapter, in the model's order.

    The named sets lie inside the blocks: the model's own proj_out, which they also match by name, stays as it is.
    Raises InputError if a name of the config matches no linear layer.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(method.targets, str):
        inside = re.compile(rf"(single_)?transformer_blocks\.\d+\.({_TARGETS[method.targets]})")
        return [name for name in linear if inside.fullmatch(name)]
    unknown = [t for t in method.targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if unknown:
        kinds = sorted({re.sub(r"^(single_)?transformer_blocks\.\d+\.", "", name) for name in linear})
        raise InputError(
            f"method.targets: no linear layer is called {', '.join(unknown)}. There are: {', '.join(kinds)}."
        )
    return [name for name in linear if any(name == t or name.endswith(f".{t}") for t in method.targets)]


def add_lora(transformer: FluxTransformer2DModel, method: LoraConfig, *, expanded: bool, seed: int) -> None:
    """Freeze the transformer and add an adapter with output 0, or the one at `method.init_from`.

    expanded: the base was FLUX.1-dev, so the input layer is adapted too.  The adapter's parameters are fp32.
    """
    targets = lora_targets(transformer, method)
    ranks, alphas = {}, {}
    if expanded:
        targets = list(dict.fromkeys([_EXPANDED_INPUT, *targets]))
        ranks = {_EXPANDED_INPUT: max(_EXPANDED_RANK, method.rank)}
        alphas = {_EXPANDED_INPUT: method.alpha / method.rank * ranks[_EXPANDED_INPUT]}  # the same scale everywhere
    transformer.requires_grad_(False)
    config = PeftConfig(
        r=method.rank, lora_alpha=method.alpha, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same start on every rank
        transformer.add_adapter(config, adapter_name=ADAPTER)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if method.init_from is not None:
        load_adapter(transformer, method.init_from, scale=method.alpha / method.rank)


def load_adapter(transformer: FluxTransformer2DModel, source: Path, *, scale: float) -> None:
    """Copy a LoRA in any format that diffusers reads into the adapter that is there.

    Raises InputError if it is missing, or its layers, ranks or alpha / rank are not those of the config.
    """
    if not source.exists():
        raise InputError(f"method.init_from {source}: no such file or folder. Give a LoRA in diffusers' format.")
    try:
        folder, name = (source, None) if source.is_dir() else (source.parent, source.name)
        saved, alphas, metadata = FluxFillPipeline.lora_state_dict(
            str(folder), weight_name=name, return_alphas=True, return_lora_metadata=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"method.init_from {source}: not a LoRA that diffusers reads ({error}).") from error
    prefix = "transformer."
    saved = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
    own = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    problems = [f"lacks {name}" for name in own if name not in saved]
    problems += [f"has {name}, which method.targets does not" for name in saved if name not in own]
    problems += [
        f"has {name} of shape {list(saved[name].shape)}, method.rank asks for {list(own[name].shape)}"
        for name in own
        if name in saved and own[name].shape != saved[name].shape
    ]
    saved_scale = _saved_scale(alphas or {}, metadata or {}, saved)
    if not problems and abs(saved_scale - scale) > 1e-6:
        problems.append(f"was made with alpha / rank = {saved_scale:g}, the config says {scale:g}; set method.alpha")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise InputError(f"method.init_from {source} " + ";\n  ".join(problems[:5]) + more)
    set_peft_model_state_dict(transformer, saved, adapter_name=ADAPTER)


def _saved_scale(alphas: Mapping[str, float], metadata: Mapping[str, object], saved: Mapping[str, Tensor]) -> float:
    """alpha / rank of a LoRA file: from its metadata, else its alpha tensors, else 1 (diffusers' own reading)."""
    if "transformer.lora_alpha" in metadata and "transformer.r" in metadata:
        return float(metadata["transformer.lora_alpha"]) / float(metadata["transformer.r"])
    if alphas:
        name, alpha = next(iter(alphas.items()))
        down = name.removeprefix("transformer.").replace(".alpha", ".lora_A.weight")
        return float(alpha) / saved[down].shape[0] if down in saved else 1.0
    return 1.0


def save_adapter(
    transformer: FluxTransformer2DModel, folder: Path, *, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter for `FluxFillPipeline.load_lora_weights(folder)`, alpha and ranks included.

    tensors: parameter name -> value, to write instead of the live ones (an average).
    """
    own = get_peft_model_state_dict(transformer, adapter_name=ADAPTER, state_dict=dict(tensors) if tensors else None)
    FluxFillPipeline.save_lora_weights(
        folder,
        transformer_lora_layers={name: tensor.detach().cpu().contiguous() for name, tensor in own.items()},
        weight_name=WEIGHTS_NAME,
        **_collate_lora_metadata({"transformer": transformer}),
    )
