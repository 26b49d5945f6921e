"""What ComfyUI makes of an adapter's file, by its rules: each layer's weight, one after the other.

comfy/lora.py and comfy/weight_adapter/: an alpha over the rank of what has one, `.diff` added, an input layer widened
with zeros to a `reshape_weight` where a LoRA of it asks for that, and no magnitudes.
"""

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from trainer.model.flux import expand_to_fill


@torch.no_grad()
def patch(transformer: FluxTransformer2DModel, file: Path) -> FluxTransformer2DModel:
    """The model, its weights patched as ComfyUI would. Every key of the file must have been of use."""
    tensors = load_file(file)
    used: set[str] = set()

    def take(name: str) -> Tensor | None:
        used.update({name} & tensors.keys())
        return tensors.get(name)

    shape = take("transformer.x_embedder.reshape_weight")
    if shape is not None:
        assert shape.tolist() == [transformer.x_embedder.out_features, 384]
        expand_to_fill(transformer)
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            change = _change(f"transformer.{name}", take)
            if change is not None:
                module.weight += change.reshape(module.weight.shape)
    assert used == tensors.keys(), sorted(tensors.keys() - used)[:3]
    return transformer


def _change(name: str, take) -> Tensor | None:
    alpha = take(f"{name}.alpha")
    down, up = take(f"{name}.lora_A.weight"), take(f"{name}.lora_B.weight")
    if up is not None and down is not None:
        return up.float() @ down.float() * (1.0 if alpha is None else alpha.item() / down.shape[0])
    small = take(f"{name}.lokr_w1")
    if small is not None:
        whole, a, b = (take(f"{name}.lokr_w2{end}") for end in ("", "_a", "_b"))
        if a is not None and b is not None:
            whole = a @ b * (1.0 if alpha is None else alpha.item() / b.shape[0])
        return torch.kron(small, whole)
    difference = take(f"{name}.diff")
    return None if difference is None else difference.float()
