"""The compute dtype of a forward pass, without autocast.

CUDA's autocast computes norms in fp32, and what follows them: queries, keys and the input of every single block's last
layer. In bf16 from end to end, as FluxFillPipeline computes, a step moves less than half of that; norms and rotary
embeddings are computed in fp32 inside all the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections")


def compute_in(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Let a transformer compute in a dtype, whatever its inputs have and its trained weights are kept in.

    Positions, of which rotary tables are made, stay in fp32; timestep and guidance the model casts itself.
    """
    if dtype == torch.float32:
        return

    def cast(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {name: kwargs[name].to(dtype) for name in _INPUTS}

    transformer.register_forward_pre_hook(cast, with_kwargs=True)
    for module in transformer.modules():
        if type(module) in _MASTERS and module.weight is not None and module.weight.requires_grad:
            module.__class__ = _MASTERS[type(module)]


class _CastLinear(torch.autograd.Function):
    """x @ weight.T + bias, the weight cast in the forward pass and again in the backward pass.

    Left to autograd, or autocast, a copy of every weight would be kept from forward to backward: 22 GiB of FLUX.1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        rows = gradient.flatten(0, -2)
        of_x = gradient @ weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_bias = rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return of_x, (rows.t() @ x.flatten(0, -2)).to(weight.dtype), of_bias


class _MasterLinear(nn.Linear):
    """A trained layer whose weights may be fp32; where the engine hands them out in its input's dtype, as any other."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype == input.dtype:
            return super().forward(input)
        return _CastLinear.apply(input, self.weight, self.bias)


class _MasterRMSNorm(nn.RMSNorm):
    """The same of a norm."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


_MASTERS: dict[type, type] = {nn.Linear: _MasterLinear, nn.RMSNorm: _MasterRMSNorm}
