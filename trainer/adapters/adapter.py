"""The adapter: which layers get one, starting from an existing one, and diffusers' format on disk."""

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
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from configs.errors import InputError
from configs.schema import DoraConfig, LokrConfig, LoraConfig
from data.storage.atomic_write import apply_umask
from trainer.adapters.dora import init_magnitude, patch_dora_forward
from trainer.adapters.lokr import file_settings, lokr_misfits, lokr_settings, patch_lokr_forward, read_lokr

AdapterConfig = LoraConfig | DoraConfig | LokrConfig

ADAPTER = "default"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"

_BLOCK = r"(single_)?transformer_blocks\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_MLP = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"
_TARGETS = {"attention": _ATTENTION, "attention+mlp": f"{_ATTENTION}|{_MLP}"}

# The 320 inputs that Fill has over dev start at zero in an expanded base: only an adapter of their full rank can learn
# them all (BFL's control LoRAs, too, adapt the input layer).
_EXPANDED_INPUT = "x_embedder"
_EXPANDED_RANK = 320

_LENGTHS = ".lora_magnitude_vector"  # the part of a DoRA that a LoRA has not
# Into these a file has alpha / rank multiplied: readers differ in what they do with an alpha (ComfyUI does not look for
# diffusers' metadata), and do the same without one.
_SCALED = (".lora_B.weight", ".lokr_w1")
_TRANSFORMER = "transformer."  # before every name in a file of diffusers


def adapter_targets(transformer: nn.Module, method: AdapterConfig) -> list[str]:
    """Names of the linear layers that get an adapter, in the model's order.

    The named sets lie inside the blocks. A name in a list means every layer that ends so, as peft takes it; those
    outside the blocks only if none inside is called so: `proj_out` is the blocks', not also the model's last layer.
    Raises InputError if a name of the list matches no linear layer.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(method.targets, str):
        wanted = re.compile(f"{_BLOCK}({_TARGETS[method.targets]})")
        return [name for name in linear if wanted.fullmatch(name)]
    chosen: set[str] = set()
    unknown = []
    for target in method.targets:
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        chosen.update([name for name in matching if re.match(_BLOCK, name)] or matching)
        unknown += [] if matching else [target]
    if unknown:
        kinds = sorted({re.sub(f"^{_BLOCK}", "", name) for name in linear})
        raise InputError(
            f"method.targets: no linear layer is called {', '.join(unknown)}. There are: {', '.join(kinds)}."
        )
    return [name for name in linear if name in chosen]


def add_adapter(transformer: FluxTransformer2DModel, method: AdapterConfig, *, expanded: bool, seed: int) -> None:
    """Freeze the transformer and add an adapter that changes nothing yet, or the one at `method.init_from`.

    expanded: the base was FLUX.1-dev, so the input layer is adapted too.  The adapter's parameters are fp32; over a
    base in another dtype the model runs under autocast only.
    """
    targets = adapter_targets(transformer, method)
    ranks, alphas = {}, {}
    if expanded:
        if method.type == "lokr":
            raise InputError(
                "method.type lokr cannot teach FLUX.1-dev the 320 inputs that it lacks: its product of two matrices "
                "ties them to each other. Set method.type=lora, or model.base to FLUX.1-Fill-dev."
            )
        targets = list(dict.fromkeys([_EXPANDED_INPUT, *targets]))
        ranks = {_EXPANDED_INPUT: max(_EXPANDED_RANK, method.rank)}
        alphas = {_EXPANDED_INPUT: method.alpha / method.rank * ranks[_EXPANDED_INPUT]}  # the same scale everywhere
    transformer.requires_grad_(False)
    if method.type == "lokr":
        config: Any = lokr_settings(transformer, method, targets)
    else:
        config = PeftConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            target_modules=targets,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_dora=method.type == "dora",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same start on every rank
        transformer.add_adapter(config, adapter_name=ADAPTER)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    init_magnitude(transformer, ADAPTER)
    prepare_layers(transformer, ADAPTER)
    if method.init_from is not None:
        load_adapter(transformer, method)


def prepare_layers(transformer: nn.Module, adapter: str) -> None:
    """Set peft's layers up for training: their arithmetic, and no copies of their input."""
    patch_dora_forward(transformer, adapter)
    patch_lokr_forward(transformer)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            # Autocast casts the input to the compute dtype. peft would first make an fp32 copy of it for each adapter,
            # of which autocast then keeps a copy of its own for the backward pass.
            module.cast_input_dtype_enabled = False


def load_adapter(transformer: FluxTransformer2DModel, method: AdapterConfig) -> None:
    """Copy the adapter at `method.init_from` into the one that is there: a .safetensors file, or a folder that holds
    one; LoRA and DoRA in any format that diffusers reads, LoKr in peft's.

    Its alpha need not be the config's: the product is what it was.  Raises InputError if it is missing, or its kind,
    layers or ranks are not those of the config.
    """
    assert method.init_from is not None
    file = _find_adapter_file(method.init_from)
    if method.type == "lokr":
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
    """Why a LoRA's tensors do not belong to the adapter that is there; empty if they do."""
    own = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    layers, theirs = {_layer(name) for name in own}, {_layer(name) for name in saved}
    problems = []
    if lacking := layers - theirs:
        problems.append(f"it lacks {_some(lacking)}, which this run adapts: see method.targets")
    if surplus := theirs - layers:
        problems.append(f"it adapts {_some(surplus)}, which this run does not: see method.targets")
    common = layers & theirs
    trains_lengths, holds_lengths = (any(_LENGTHS in name for name in names) for names in (own, saved))
    if trains_lengths != holds_lengths:
        kind = "a DoRA: set method.type=dora" if holds_lengths else "a plain LoRA: set method.type=lora"
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
    whole = {name: tensor.detach().cpu() for name, tensor in own.items()}
    whole |= {name: tensor * _scale(transformer, name) for name, tensor in whole.items() if name.endswith(_SCALED)}
    return {name: tensor.to(dtype).contiguous() for name, tensor in whole.items()}


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
