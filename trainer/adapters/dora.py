"""DoRA: a LoRA for the direction of each row of a weight, and a trained magnitude (arXiv 2402.09353, equation 5)."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from trainer.model.quantize import dequantized_weight


class DoraMagnitude(DoraLinearLayer):
    """peft's layer of the same tensor and name, computed in fp32.

    peft takes the row norms in its input's dtype, so that in bf16 a new adapter is not yet the base's function (0.2 %
    off), and it multiplies the two factors by an identity matrix: 450 MiB of it for FLUX.1's widest layer.
    """

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
        norms = row_norms(dequantized_weight(base_layer), lora_A.weight, lora_B.weight, scaling)
        # Where the engine hands out trained weights in bf16, the norms are rounded alike: the quotient starts at 1.
        scale = self.weight.float() / norms.to(self.weight.dtype)
        product = base_result if base_layer.bias is None else base_result - base_layer.bias
        added = (scale - 1) * product + scale * scaling * lora_B(lora_A(x))
        return added.to(base_result.dtype)


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Euclidean norm of each row of weight + scaling b a: fp32 [out]. No gradient flows through it (section 4.3).

    weight: [out, in].  a: [rank, in].  b: [out, rank].
    """
    with torch.autocast(weight.device.type, enabled=False):
        direction = torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=scaling)
    return torch.linalg.vector_norm(direction, dim=1, dtype=torch.float32)


def patch_dora_forward(transformer: nn.Module, adapter: str) -> None:
    """Let a loaded DoRA adapter compute as DoraMagnitude does."""
    for module in transformer.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_magnitude_vector:
            layer = DoraMagnitude(fan_in_fan_out=False)
            layer.weight = module.lora_magnitude_vector[adapter].weight
            module.lora_magnitude_vector[adapter] = layer


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
