"""A frozen base in 4 or 8 bits: less memory for its weights, the same arithmetic in bf16.

nf4: bitsandbytes' 4-bit layers.  int8, fp8: torchao's scales, one per output row and one per weight.  All keep weights
only: matmuls run in bf16 on weights dequantized on the fly, so any GPU generation works.
"""

import logging
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from configs.combinations import QuantizedPrecision
from configs.errors import InputError

# The blocks' linear layers are 99.5 % of FLUX.1's weights; what lies outside of them is small and sensitive.
_IN_A_BLOCK = re.compile(r"(single_)?transformer_blocks\.\d+\..+")

log = logging.getLogger("fluxfill")


class _DequantizedLinear(torch.autograd.Function):
    """factor * x @ weight.T + bias, the weight dequantized in the forward pass and again in the backward pass.

    Left to autograd, dequantized weights would be kept from forward to backward: more memory than they take in bf16.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numbers: Tensor, bias: Tensor | None, scale: Tensor | None, factor: float
    ) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        ctx.factor = factor
        product = base_product(x.flatten(0, -2), matrix_of(numbers, scale, x.dtype), factor, bias)
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        numbers, scale = ctx.saved_tensors
        (gradient,) = gradients
        matrix = matrix_of(numbers, scale, gradient.dtype)
        of_x = base_product(gradient.flatten(0, -2), matrix.t(), ctx.factor)
        return of_x.view(*gradient.shape[:-1], -1), None, None, None, None


def matrix_of(numbers: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A linear layer's matrix [out, in] in a dtype: its weight as it is, or numbers of 8 bits times a scale.

    In one operation over the weight, which is three times the bytes of the product's: a scale of int8 numbers is
    multiplied as they are cast. torch multiplies no fp8 numbers: a scale of theirs is left to the product.
    """
    if numbers.dtype != torch.int8:
        numbers = numbers.to(dtype)
    if scale is None:
        return numbers
    return torch.mul(numbers, scale, out=torch.empty(numbers.shape, dtype=dtype, device=numbers.device))


def base_product(x: Tensor, matrix: Tensor, factor: float, bias: Tensor | None = None) -> Tensor:
    """factor * x @ matrix.T + bias, [n, out]: multiplied in fp32 where the product's sums are, for nothing."""
    if bias is not None:
        return torch.addmm(bias, x, matrix.t(), alpha=factor)
    if factor == 1:
        return x @ matrix.t()
    return torch.addmm(x.new_empty(()), x, matrix.t(), beta=0, alpha=factor)


class WeightOnlyLinear(nn.Linear):
    """A frozen linear layer with weights of 8 bits: int8 with a scale per output row, fp8 with one scale.

    weight: uint8 [out, in], the bits of int8 or float8_e4m3fn numbers: engines move and cut bytes as they are, where
    they would round or refuse those types.  scale_bits: int32 [out, 1] or [1, 1], those of fp32 scales, which a cast of
    the whole model to bf16 (by older versions of DeepSpeed) would round.  Computes in the dtype of its input.
    """

    scale_bits: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, precision: Literal["int8", "fp8"]) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        numbers, scale = quantize_weight(weight, precision)
        self._layout = numbers.dtype
        self.weight = nn.Parameter(numbers.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale_bits", scale.view(torch.int32))
        self._factor = scale.item() if precision == "fp8" else None
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return _DequantizedLinear.apply(input, self.numbers, bias, *self.scales)

    @property
    def numbers(self) -> Tensor:
        """int8 or float8_e4m3fn [out, in]."""
        return self.weight.view(self._layout)

    @property
    def scales(self) -> tuple[Tensor | None, float]:
        """(by what the matrix is to be multiplied: fp32 [out, 1] or [1, 1]; by what the product).

        fp8's scale is the product's. But for a compiler, which would make a graph for each such number, and multiplies
        as it casts.
        """
        if torch.compiler.is_compiling() or self._factor is None:
            return self.scale_bits.view(torch.float32), 1.0
        return None, self._factor

    def dequantized(self) -> Tensor:
        """fp32 [out, in]."""
        return self.numbers.float() * self.scale_bits.view(torch.float32)


def quantize_weight(weight: Tensor, precision: Literal["int8", "fp8"]) -> tuple[Tensor, Tensor]:
    """(int8 or float8_e4m3fn [out, in], fp32 scale [out, 1] or [1, 1]) of a weight [out, in], as torchao quantizes it.

    A scale per row would make fp8 no more exact: the precision of its numbers is the same over a range of 2^15, in
    which the rows of a weight lie.
    """
    try:
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, PerTensor
    except ImportError as error:
        raise InputError(
            f"model.precision {precision} needs torchao ({error}). Install it, or set model.precision=bf16."
        ) from error
    if precision == "int8":
        quantized = Int8Tensor.from_hp(weight, granularity=PerRow())
    else:
        quantized = Float8Tensor.from_hp(weight, granularity=PerTensor())
    return quantized.qdata, quantized.scale.float()


def _nf4_layer(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """bitsandbytes' 4-bit layer of a bf16 weight. Its codes are stored as bf16 numbers, four in one, since that is what
    FSDP2 can cut; its scales are quantized once more."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise InputError(
            f"model.precision nf4 needs bitsandbytes ({error}). Install it, or set model.precision=bf16."
        ) from error
    out_features, in_features = weight.shape
    settings = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": weight.dtype}
    layer = _nf4_class()(
        in_features, out_features, bias is not None, compute_dtype=weight.dtype, device="meta", **settings
    )
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **settings).to(weight.device)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    # On some CPUs it would repack the weights in place when it is not training: a shard could not be gathered again.
    layer.support_avx512bf16_for_cpu = False
    return layer


@cache
def _nf4_class() -> Any:
    """One for all layers: graphs that are compiled of blocks are told apart by their layers' classes."""
    import bitsandbytes as bnb

    class Nf4Linear(bnb.nn.Linear4bit):
        """By whose name `is_quantized` knows it."""

    return Nf4Linear


def is_quantized(module: nn.Module) -> bool:
    """Whether `quantize_base` made the layer."""
    return isinstance(module, WeightOnlyLinear) or type(module).__name__ == "Nf4Linear"


def dequantized_weight(layer: Any) -> Tensor:
    """[out, in] of a linear layer, dequantized where it is quantized. (peft has one that breaks a compiled graph.)"""
    if not is_quantized(layer):
        return layer.weight
    if isinstance(layer, WeightOnlyLinear):
        return layer.dequantized()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def dequantized_linear(layer: Any) -> nn.Linear:
    """The ordinary linear layer, in bf16, that a quantized one stands for."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(dequantized_weight(layer).to(torch.bfloat16), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return plain


def quantizable_layers(transformer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of the linear layers inside the blocks."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and _IN_A_BLOCK.fullmatch(name):
            yield name, module


@torch.no_grad()
def quantize_base(transformer: nn.Module, precision: QuantizedPrecision, from_main: Callable[[Tensor], Tensor]) -> None:
    """Quantize the blocks' linear layers in place, and bring the model to this rank's device. All ranks call it.

    transformer: bf16, on rank 0 with its weights, elsewhere on the meta device.  from_main: rank 0's tensor on every
    rank's device.  Layer by layer: a rank never holds more than one of them unquantized.
    """
    before = sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())
    for name, layer in list(quantizable_layers(transformer)):
        weight = from_main(layer.weight)
        bias = None if layer.bias is None else from_main(layer.bias)
        quantized = _nf4_layer(weight, bias) if precision == "nf4" else WeightOnlyLinear(weight, bias, precision)
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, quantized)
    for module in transformer.modules():
        if is_quantized(module):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(from_main(parameter), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, from_main(buffer))
    if precision == "nf4":
        setattr(transformer, "is_loaded_in_4bit", True)  # noqa: B010  (peft asks for it before it adapts such layers)
    after = sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())
    log.info(
        "model.precision %s: the base's weights take %.2f GiB, in bf16 %.2f", precision, after / 2**30, before / 2**30
    )
