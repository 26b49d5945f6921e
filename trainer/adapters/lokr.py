"""LoKr: a weight's change as the Kronecker product of a small matrix and a larger one, the larger of low or full rank.

Named and scaled as in LyCORIS (lycoris/modules/lokr.py): alpha / rank, and 1 where neither matrix is of low rank.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoKrConfig
from peft.tuners.lokr.layer import Linear as PeftLinear
from peft.tuners.lokr.layer import factorization
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import linear

from configs.errors import InputError
from configs.schema import LokrConfig


def lokr_settings(transformer: nn.Module, method: LokrConfig, targets: list[str]) -> LoKrConfig:
    """peft's settings of a new adapter on these layers, whose output starts at 0."""
    factor = -1 if method.factor == "auto" else method.factor
    whole = {name: method.rank for name in targets if _is_whole(transformer.get_submodule(name), method.rank, factor)}
    return LoKrConfig(
        r=method.rank,
        alpha=method.alpha,
        decompose_factor=factor,
        target_modules=targets,
        alpha_pattern=whole,
        init_weights="lycoris",
    )


def _is_whole(layer: Any, rank: int, factor: int) -> bool:
    """Whether peft keeps the larger matrix of a layer at full rank: a rank of half its side would save nothing."""
    sides = factorization(layer.out_features, factor)[1], factorization(layer.in_features, factor)[1]
    return rank >= max(sides) / 2


class Kronecker(PeftLinear):
    """peft's layer, which applies the two matrices one after the other instead of making their product.

    For a factor of f that is 1/f of the base layer's arithmetic, where the product costs as much as the base layer and
    is kept for the backward pass, as large as the model.  Nor does it draw a random number whether to leave a layer
    out, as peft does whatever the dropout is: no graph can be compiled of that.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in self._available_adapters:
                result = result + self._get_delta_activations(adapter, x).to(result.dtype)
        return result

    def _get_delta_activations(self, adapter_name: str, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        small = self.lokr_w1[adapter_name]  # [l, m]: out = l k, in = m n
        x = input.unflatten(-1, (small.shape[1], -1))  # [..., in] -> [..., m, n]
        if adapter_name in self.lokr_w2:
            x = linear(x, self.lokr_w2[adapter_name])  # -> [..., m, k]
        else:
            x = linear(linear(x, self.lokr_w2_b[adapter_name]), self.lokr_w2_a[adapter_name])
        x = linear(x.transpose(-1, -2), small)  # -> [..., k, l]
        return x.transpose(-1, -2).flatten(-2) * self.scaling[adapter_name]  # -> [..., l k]


def patch_lokr_forward(transformer: nn.Module) -> None:
    """Let every LoKr layer compute as Kronecker does."""
    for module in transformer.modules():
        if type(module) is PeftLinear:
            module.__class__ = Kronecker


def file_settings(config: LoKrConfig) -> dict[str, Any]:
    """Metadata of a file whose tensors have alpha / rank multiplied in: a scale of 1 everywhere."""
    return config.to_dict() | {"alpha": config.r, "alpha_pattern": {}}


def read_lokr(file: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of a LoKr in peft's naming, "<prefix><layer>.lokr_w1", with the prefix taken off.

    Raises InputError if the file holds anything else.
    """
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no dict)
    except (OSError, SafetensorError) as error:
        raise InputError(f"method.init_from {file}: cannot be read ({error}).") from error
    strange = [name for name in tensors if not name.startswith(prefix) or ".lokr_w" not in name]
    if strange or not tensors:
        what = f"holds {strange[0]}" if strange else "is empty"
        raise InputError(
            f"method.init_from {file}: {what}, but a LoKr to start from holds {prefix}<layer>.lokr_w1 and the like, "
            "as this trainer and diffusers write it."
        )
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def lokr_misfits(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """Reasons why a LoKr's tensors do not fit the adapter that is there; empty if they do."""
    layers, theirs = {name.partition(".lokr_")[0] for name in own}, {name.partition(".lokr_")[0] for name in saved}
    if layers != theirs:
        return [f"it adapts {len(theirs)} layers, this run {len(layers)}: see method.targets"]
    shapes, their_shapes = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, saved))
    odd = sorted(dict(shapes.items() ^ their_shapes.items()))
    if odd:
        name = odd[0]
        return [
            f"{name} is {their_shapes.get(name, 'not there')}, here {shapes.get(name, 'not there')}: "
            "set method.rank and method.factor to those it was made with"
        ]
    return []
