"""LoRA and DoRA layers whose forward and backward pass are one function each.

Layer by layer, an adapter's output is added to the base layer's, and in the backward pass its gradient to the base's:
passes over [tokens, features] that move more bytes than the adapter itself. Here its matrix products add onto the
base's. A base in 8 bits is dequantized once for all of them, and nothing of it is kept for the backward pass.
"""

from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from trainer.adapters.dora import changed_norms
from trainer.model.quantize import WeightOnlyLinear, base_product, is_quantized, matrix_of


class _Adapted(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T; of a DoRA all but the bias times magnitude / norm, row by row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor | None,
        scaling: float,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        base_factor: float,
        base_norms: Tensor | None,
    ) -> Tensor:
        rows, low = x.flatten(0, -2), a.to(x.dtype)
        matrix = matrix_of(weight, scale, x.dtype)
        out, inner = base_product(rows, matrix, base_factor, bias), rows @ low.t()
        ratio: Tensor | None = None
        factor: float | Tensor = scaling
        if magnitude is not None:
            assert base_norms is not None
            projected = base_product(matrix, low, base_factor).float()  # [out, rank]
            norms = changed_norms(base_norms, projected, a, b, scaling)
            # Where the engine hands out magnitudes in bf16, the norms are rounded alike: the quotient starts at 1.
            ratio = magnitude.float() / norms.to(magnitude.dtype).float()
            out = _scale_columns(out, ratio, None if bias is None else (1 - ratio) * bias)  # the bias is not scaled
            factor = scaling * ratio.unsqueeze(1)
        out.addmm_(inner, _scaled(b, factor, x.dtype).t())
        out = out.view(*x.shape[:-1], -1)
        ctx.save_for_backward(x, inner, a, b, magnitude, weight, scale, bias, ratio, None if ratio is None else out)
        ctx.scaling, ctx.base_factor = scaling, base_factor
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b, magnitude, weight, scale, bias, ratio, out = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        rows, dtype = x.flatten(0, -2), gradient.dtype
        factor = ctx.scaling if ratio is None else ctx.scaling * ratio.unsqueeze(1)
        of_inner = gradient @ _scaled(b, factor, dtype)
        of_a = (of_inner.t() @ rows).to(a.dtype)
        of_b = _scaled(gradient.t() @ inner, factor, b.dtype)
        of_x = of_magnitude = None
        if ctx.needs_input_grad[0]:
            matrix = matrix_of(weight, scale, dtype)
            of_product = gradient if ratio is None else torch.mul(gradient, ratio, out=torch.empty_like(gradient))
            of_x = base_product(of_product, matrix.t(), ctx.base_factor).addmm_(of_inner, a.to(dtype)).view_as(x)
        if ratio is not None:
            # out = ratio * direction + bias, so the sums of gradient * direction need nothing that is not kept anyway.
            products, sums = _column_sums(gradient, out.flatten(0, -2))
            of_ratio = products if bias is None else products - bias.float() * sums
            of_magnitude = (of_ratio / magnitude.float()).to(magnitude.dtype)
        return of_x, of_a, of_b, of_magnitude, None, None, None, None, None, None


def _scale_columns(product: Tensor, by: Tensor, bias: Tensor | None) -> Tensor:
    """product * by + bias, in place, computed in fp32.  by: fp32 [out]."""
    if bias is None:
        return torch.mul(product, by, out=product)
    return torch.addcmul(bias, product, by, out=product)


def _scaled(b: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """B, or its gradient, times all that its product is multiplied by: small, where the product is not."""
    if isinstance(factor, float | int) and factor == 1:
        return b.to(dtype)
    return torch.mul(b, factor, out=torch.empty(b.shape, dtype=dtype, device=b.device))


def _column_sums(gradient: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 sums over the rows of gradient * out, and of gradient: [n, features] -> 2 x [features].

    By the kernel that has them for the gradients of a layer norm's weight and bias, with mean 0 and deviation 1: it
    reads both once, where a product and its sum write and read a third.
    """
    weight_dtype = torch.float32 if gradient.device.type == "cpu" else gradient.dtype  # CUDA's takes one dtype alone
    weight = torch.ones(out.shape[1:], dtype=weight_dtype, device=out.device)
    mean = torch.zeros(len(out), 1, dtype=torch.float32, device=out.device)
    _, products, sums = torch.ops.aten.native_layer_norm_backward(
        gradient, out, out.shape[1:], mean, mean + 1, weight, weight, [False, True, True]
    )
    return products.float(), sums.float()


@cache
def _layer_class(kind: Any) -> type:
    """peft's class of a linear layer, which with one adapter on computes by `_Adapted`, else as peft does."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, active = self.get_base_layer(), self.active_adapters
        # ZeRO 3 gathers parameters for calls of the modules that hold them.
        if self.disable_adapters or self.merged or len(active) != 1 or hasattr(base.weight, "ds_id"):
            return kind.forward(self, x, *args, **kwargs)
        (name,) = active
        # An adapter of another trainer may have a bias of its own, or drop some of its input.
        if name not in self.lora_A or self.lora_bias[name] or not isinstance(self.lora_dropout[name], nn.Identity):
            return kind.forward(self, x, *args, **kwargs)
        return _adapt(self, base, name, x)

    return type(f"Fused{kind.__name__}", (kind,), {"__module__": __name__, "forward": forward, "is_fused": True})


def _adapt(layer: Any, base: Any, name: str, x: Tensor) -> Tensor:
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    dora: Any = None
    if name in layer.lora_magnitude_vector:
        dora = layer.lora_magnitude_vector[name]
    if is_quantized(base) and not isinstance(base, WeightOnlyLinear):  # nf4: bitsandbytes has a function of its own
        result = base(x)
        if dora is not None:
            return result + dora.addition(x, a, b, scaling, base, result)
        return result + linear(linear(x, a.to(x.dtype)), (b * scaling).to(x.dtype))
    weight, scales = (base.numbers, base.scales) if isinstance(base, WeightOnlyLinear) else (base.weight, (None, 1.0))
    magnitude, norms = (None, None) if dora is None else (dora.weight, dora.base_norms(base))
    return _Adapted.apply(x, a, b, magnitude, scaling, weight, base.bias, *scales, norms)


def patch_lora_forward(transformer: nn.Module) -> None:
    """Let every LoRA and DoRA layer compute in one function."""
    for module in transformer.modules():
        if isinstance(module, LoraLayer) and not hasattr(module, "is_fused"):
            kind: type = type(module)
            module.__class__ = _layer_class(kind)
