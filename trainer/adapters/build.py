"""Adapters on the frozen transformer: which linear layers get one, of what rank and scale, and how it starts."""

import re
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig as PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from configs.errors import InputError
from configs.schema import DoraConfig, LokrConfig, LoraConfig
from trainer.adapters.dora import init_magnitude, patch_dora_forward
from trainer.adapters.files import ADAPTER, load_adapter
from trainer.adapters.lokr import lokr_settings, patch_lokr_forward

AdapterConfig = LoraConfig | DoraConfig | LokrConfig

_BLOCK = r"(single_)?transformer_blocks\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_MLP = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"
_TARGETS = {"attention": _ATTENTION, "attention+mlp": f"{_ATTENTION}|{_MLP}"}

# The 320 inputs that Fill has over dev start at zero in an expanded base: only an adapter of their full rank can learn
# them all (BFL's control LoRAs, too, adapt the input layer).
_EXPANDED_INPUT = "x_embedder"
_EXPANDED_RANK = 320


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
        load_adapter(transformer, method.init_from)


def prepare_layers(transformer: nn.Module, adapter: str) -> None:
    """Set peft's layers up for training: their arithmetic, and no copies of their input."""
    patch_dora_forward(transformer, adapter)
    patch_lokr_forward(transformer)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            # Autocast casts the input to the compute dtype. peft would first make an fp32 copy of it for each adapter,
            # of which autocast then keeps a copy of its own for the backward pass.
            module.cast_input_dtype_enabled = False
