"""Adapters on the frozen transformer: which linear layers get one, of what rank and scale, and how it starts."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig as PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from configs.adapter_targets import AdapterConfig
from configs.errors import InputError
from trainer.adapters.dora import init_magnitude, patch_dora_forward
from trainer.adapters.files import ADAPTER, INPUT_LAYER
from trainer.adapters.init_from import read_start, start_from
from trainer.adapters.lokr import lokr_settings, patch_lokr_forward
from trainer.adapters.lora import patch_lora_forward
from trainer.adapters.targets import adapter_targets

# The 320 inputs that Fill has over dev start at zero in an expanded base: only an adapter of their full rank can learn
# them all (BFL's control LoRAs, too, adapt the input layer).
_EXPANDED_RANK = 320


def adapter_ranks(transformer: nn.Module, method: AdapterConfig, *, expanded: bool) -> dict[str, int]:
    """Layers that get an adapter -> its rank. Raises InputError if a target is no layer, or a LoKr cannot do the work.

    expanded: the base was FLUX.1-dev, so the input layer is adapted too.
    """
    ranks = dict.fromkeys(adapter_targets(transformer, method), method.rank)
    if not expanded:
        return ranks
    if method.type == "lokr":
        raise InputError(
            "method.type lokr cannot teach FLUX.1-dev the 320 inputs that it lacks: its product of two matrices "
            "ties them to each other. Set method.type=lora, or model.base to FLUX.1-Fill-dev."
        )
    return {INPUT_LAYER: max(_EXPANDED_RANK, method.rank)} | {
        layer: rank for layer, rank in ranks.items() if layer != INPUT_LAYER
    }


def add_adapter(transformer: FluxTransformer2DModel, method: AdapterConfig, *, expanded: bool, seed: int) -> None:
    """Freeze the transformer and add an adapter that changes nothing yet, or the one at `method.init_from`.

    The adapter's parameters are fp32, and cast to its input's dtype where a layer computes.  On the meta device
    `method.init_from` is not read: rank 0 sends its values with the rest.
    """
    ranks = adapter_ranks(transformer, method, expanded=expanded)
    reads = method.init_from is not None and transformer.device.type != "meta"
    start = read_start(transformer, method, ranks, expanded=expanded) if reads else None
    transformer.requires_grad_(False)
    if method.type == "lokr":
        config: Any = lokr_settings(transformer, method, [*ranks])
    else:
        # Expanded, the input layer is named also where its rank is the others': `widens_input` goes by the name.
        wider = {INPUT_LAYER: ranks[INPUT_LAYER]} if expanded else {}
        config = PeftConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            target_modules=[*ranks],
            rank_pattern=wider,
            alpha_pattern={layer: method.alpha / method.rank * rank for layer, rank in wider.items()},  # one scale
            use_dora=method.type == "dora",
        )
    if "proj_out" in ranks:  # the model's last layer; to peft also every layer whose name ends so
        linear = (name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
        config.exclude_modules = [name for name in linear if name.endswith(".proj_out") and name not in ranks]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same start on every rank
        transformer.add_adapter(config, adapter_name=ADAPTER)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    init_magnitude(transformer, ADAPTER)
    prepare_layers(transformer, ADAPTER)
    if start is not None:
        start_from(transformer, start, method)


def prepare_layers(transformer: nn.Module, adapter: str) -> None:
    """Set peft's layers up for training: their arithmetic, and no copies of their input."""
    patch_dora_forward(transformer, adapter)
    patch_lora_forward(transformer)
    patch_lokr_forward(transformer)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            # Where peft's own arithmetic is left, as under ZeRO 3, adapters have the dtype of their input, or cast to
            # it. peft would first make an fp32 copy of the input for each adapter.
            module.cast_input_dtype_enabled = False
