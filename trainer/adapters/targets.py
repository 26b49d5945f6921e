"""The linear layers of a transformer that get an adapter, and the names that a config gives them by."""

import re
from collections.abc import Iterable

from torch import nn

from configs.adapter_targets import BLOCK, MODEL, AdapterConfig, choose_layers


def adapter_targets(transformer: nn.Module, method: AdapterConfig) -> list[str]:
    """Names of the linear layers that get an adapter, as `choose_layers` says."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return choose_layers(linear, method)


def name_targets(layers: Iterable[str]) -> list[str]:
    """Names for method.targets that choose these layers, in every block."""
    inside: set[str] = set()
    outside: set[str] = set()
    for layer in layers:
        kind, count = re.subn(f"^{BLOCK}", "", layer)
        (inside if count else outside).add(kind)
    return [*sorted(inside), *sorted(f"{MODEL}{name}" for name in outside)]
