"""A frozen weight and an adapter's change of it, as one weight."""

import torch
from torch import Tensor

from trainer.adapters.read import Factors


@torch.no_grad()
def merge(weight: Tensor, factors: Factors) -> Tensor:
    """A linear layer's weight with its LoRA, DoRA or LoKr in it: fp32 [out, in].

    weight: the base's.  factors: of a scale of 1, as `read_adapter` gives them.
    """
    weight = weight.float()
    if "lokr_w1" in factors:
        larger = factors["lokr_w2"] if "lokr_w2" in factors else factors["lokr_w2_a"] @ factors["lokr_w2_b"]
        return weight + torch.kron(factors["lokr_w1"], larger)
    merged = torch.addmm(weight, factors["lora_B"], factors["lora_A"])
    if "magnitude" not in factors:
        return merged
    return merged * (factors["magnitude"].flatten() / torch.linalg.vector_norm(merged, dim=1))[:, None]
