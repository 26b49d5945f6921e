"""method.targets: which linear layers of a FLUX.1 get an adapter, by their names alone."""

import re
from collections.abc import Sequence

from configs.errors import InputError
from configs.schema import DoraConfig, LokrConfig, LoraConfig

AdapterConfig = LoraConfig | DoraConfig | LokrConfig

BLOCK = r"(single_)?transformer_blocks\.\d+\."
MODEL = "transformer."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_MLP = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"
_TARGETS = {"attention": _ATTENTION, "attention+mlp": f"{_ATTENTION}|{_MLP}"}


def choose_layers(linear: Sequence[str], method: AdapterConfig) -> list[str]:
    """Those of a model's linear layers that get an adapter, in the model's order.

    The named sets lie inside the blocks. A name in a list means every layer that ends so, as peft takes it; those
    outside the blocks only if none inside is called so: `proj_out` is the blocks', and `transformer.proj_out`, as in a
    file of diffusers, the model's last layer.  Raises InputError if a name of the list matches no linear layer.
    """
    if isinstance(method.targets, str):
        wanted = re.compile(f"{BLOCK}({_TARGETS[method.targets]})")
        return [name for name in linear if wanted.fullmatch(name)]
    chosen: set[str] = set()
    unknown = []
    for target in method.targets:
        matching = [name for name in linear if target in (name, f"{MODEL}{name}") or name.endswith(f".{target}")]
        chosen.update([name for name in matching if re.match(BLOCK, name)] or matching)
        unknown += [] if matching else [target]
    if unknown:
        kinds = sorted({re.sub(f"^{BLOCK}", "", name) for name in linear})
        raise InputError(
            f"method.targets: no linear layer is called {', '.join(unknown)}. There are: {', '.join(kinds)}."
        )
    return [name for name in linear if name in chosen]
