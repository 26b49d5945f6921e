"""DoRA: a LoRA for the direction of each row of a weight, and a trained magnitude (arXiv 2402.09353, equation 5)."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from trainer.model.quantize import dequantized_weight


class DoraMagnitude(DoraLinearLayer):
    """peft's layer of the same tensor and name, computed in fp32.

    peft takes the row norms in its input's dtype, so that in bf16 a new adapter is not yet the base's function (0.2 %
    off), and it multiplies the two factors by an identity matrix: 450 MiB of it for FLUX.1's widest layer.
    """

    def __init__(self) -> None:
        super().__init__(fan_in_fan_out=False)
        self._base_norms: Tensor | None = None

    def base_norms(self, base_layer: nn.Module) -> Tensor:
        """Norms of the base's rows, fp32 [out]: taken once, where the weight lies whole before this rank."""
        if self._base_norms is None:
            self._base_norms = _norms(dequantized_weight(base_layer))
        return self._base_norms

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: nn.Linear,
        base_result: Tensor,
        adapter_name: str,
    ) -> Tensor:
        """The adapter's addition to `base_result`, the base layer's own output: [..., out]."""
        return self.addition(x, lora_A.weight, lora_B.weight, scaling, base_layer, base_result)

    def addition(
        self, x: Tensor, a: Tensor, b: Tensor, scaling: float, base_layer: nn.Linear, base_result: Tensor
    ) -> Tensor:
        """`forward`, of the two factors themselves."""
        norms = row_norms(dequantized_weight(base_layer), a, b, scaling, self.base_norms(base_layer))
        # Where the engine hands out trained weights in bf16, the norms are rounded alike: the quotient starts at 1.
        ratio = self.weight.float() / norms.to(self.weight.dtype).float()
        dtype = base_result.dtype
        factor = (b.float() * scaling * ratio.unsqueeze(1)).to(dtype)
        product: Any = base_result if base_layer.bias is None else base_result - base_layer.bias
        return (ratio - 1).to(dtype) * product + linear(linear(x, a.to(dtype)), factor)


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float, base_norms: Tensor | None = None) -> Tensor:
    """Euclidean norm of each row of weight + scaling b a: fp32 [out]. No gradient flows through it (section 4.3).

    weight: [out, in].  a: [rank, in].  b: [out, rank].  base_norms: those of the weight's rows, where they are known.
    """
    projected = (weight @ a.to(weight.dtype).t()).float()
    return changed_norms(_norms(weight) if base_norms is None else base_norms, projected, a, b, scaling)


def changed_norms(base_norms: Tensor, projected: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`row_norms` without the sum of weight and adapter, which would be as large as the model.

    |w + s c a|^2 = |w|^2 + 2 s c (a w) + s^2 c (a a^T) c^T, row by row.  projected: weight a^T, fp32 [out, rank].
    """
    a, b = a.float(), b.float()
    more = scaling * (b * torch.addmm(projected, b, a @ a.t(), beta=2, alpha=scaling)).sum(dim=1)
    # As a factor, so that an adapter of 0 leaves the norms as they are, to the last bit.
    return base_norms * (1 + more / base_norms.square()).clamp_min(0).sqrt()


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)


def patch_dora_forward(transformer: nn.Module, adapter: str) -> None:
    """Let a loaded DoRA adapter compute as DoraMagnitude does."""
    for module in transformer.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_magnitude_vector:
            layer = DoraMagnitude()
            layer.weight = module.lora_magnitude_vector[adapter].weight
            module.lora_magnitude_vector[adapter] = layer


def take_norms_before_graphs(transformer: FluxTransformer2DModel) -> None:
    """Have each block, which is to be compiled, take its bases' norms before its first forward pass.

    Taken in a graph, they would be there from the second pass on only, and every graph be made twice.
    """
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        _take_norms_once(block)


def _take_norms_once(block: nn.Module) -> None:
    def take(block: nn.Module, _inputs: Any) -> None:
        hook.remove()
        for module in block.modules():
            if isinstance(module, LoraLayer):
                for magnitude in module.lora_magnitude_vector.values():
                    magnitude.base_norms(module.get_base_layer())

    # FSDP's hook, which gathers the block's weights, comes before it.
    hook = block.register_forward_pre_hook(take)


@torch.no_grad()
def init_magnitude(transformer: nn.Module, adapter: str) -> None:
    """Set a new adapter's magnitudes to the norms of the base's rows, in fp32: the output is the base's.

    On the meta device nothing is set: rank 0 sends the magnitudes with the rest.
    """
    for module in transformer.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_magnitude_vector:
            weight = dequantized_weight(module.get_base_layer())
            if not weight.is_meta:
                a: Any = module.lora_A[adapter].weight
                b: Any = module.lora_B[adapter].weight
                norms = row_norms(weight, a, b, module.scaling[adapter])
                module.lora_magnitude_vector[adapter].weight.data = norms
