"""LoKr: a weight's change as the Kronecker product of a small matrix and a larger one, the larger of low or full rank.

Named and scaled as in LyCORIS (lycoris/modules/lokr.py): alpha / rank, and 1 where neither matrix is of low rank.
"""

import re
from typing import Any

from peft import LoKrConfig
from peft.tuners.lokr.layer import Linear as PeftLinear
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from torch.nn.functional import linear

from configs.schema import LokrConfig


def lokr_settings(transformer: nn.Module, method: LokrConfig, targets: list[str]) -> LoKrConfig:
    """peft's settings of a new adapter on these layers, whose output starts at 0."""
    # "^": to peft a name is also the end of others, and the model's last layer is called as the blocks' proj_out.
    whole = {
        f"^{re.escape(name)}": method.rank
        for name in targets
        if "lokr_w2" in lokr_shapes(transformer.get_submodule(name), method)
    }
    return LoKrConfig(
        r=method.rank,
        alpha=method.alpha,
        decompose_factor=_factor(method),
        target_modules=targets,
        alpha_pattern=whole,
        init_weights="lycoris",
    )


def lokr_shapes(layer: Any, method: LokrConfig) -> dict[str, tuple[int, int]]:
    """Shapes of a linear layer's matrices: lokr_w1, and lokr_w2 or its two factors lokr_w2_a and lokr_w2_b."""
    (rows, inner_rows), (columns, inner_columns) = (
        factorization(side, _factor(method)) for side in (layer.out_features, layer.in_features)
    )
    if method.rank >= max(inner_rows, inner_columns) / 2:  # factors of half its side would save nothing
        return {"lokr_w1": (rows, columns), "lokr_w2": (inner_rows, inner_columns)}
    return {
        "lokr_w1": (rows, columns),
        "lokr_w2_a": (inner_rows, method.rank),
        "lokr_w2_b": (method.rank, inner_columns),
    }


def _factor(method: LokrConfig) -> int:
    return -1 if method.factor == "auto" else method.factor


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
            x = linear(x, self.lokr_w2[adapter_name].to(input.dtype))  # -> [..., m, k]
        else:
            x = linear(x, self.lokr_w2_b[adapter_name].to(input.dtype))
            x = linear(x, self.lokr_w2_a[adapter_name].to(input.dtype))
        small = (small * self.scaling[adapter_name]).to(input.dtype)
        x = linear(x.transpose(-1, -2), small)  # -> [..., k, l]
        return x.transpose(-1, -2).flatten(-2)  # -> [..., l k]


def patch_lokr_forward(transformer: nn.Module) -> None:
    """Let every LoKr layer compute as Kronecker does."""
    for module in transformer.modules():
        if type(module) is PeftLinear:
            module.__class__ = Kronecker


def file_settings(config: LoKrConfig) -> dict[str, Any]:
    """Metadata of a file whose tensors have alpha / rank multiplied in: a scale of 1 everywhere."""
    return config.to_dict() | {"alpha": config.r, "alpha_pattern": {}}
