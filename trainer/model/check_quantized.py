"""Check of a quantized model before the first step: sharded over the ranks, it computes what it should.

A 4-bit weight that is cast on its way between ranks (bitsandbytes' codes stored as fp16, gathered as bf16) gives
outputs as wrong as noise, and no error anywhere.  So the layers of one block of each kind are compared with ordinary
layers of the same weights.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.frozen_base import adapters_off
from trainer.model.quantize import dequantized_linear, is_quantized

# Relative, of bf16 products summed in another order: some thousandths.  The trap's error is about 1.
TOLERANCE = 0.05

_FIRST_BLOCKS = ("transformer_blocks.0.", "single_transformer_blocks.0.")

log = logging.getLogger("fluxfill")


def reference_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Name of every quantized layer in the first block of each kind -> an ordinary layer of the same weights.

    Empty for a base that is not quantized.  To be made before the model is spread over the ranks.
    """
    return {
        name: dequantized_linear(layer)
        for name, layer in transformer.named_modules()
        if is_quantized(layer) and name.startswith(_FIRST_BLOCKS)
    }


@torch.no_grad()
def check_against_reference(
    transformer: nn.Module,
    plain: nn.Module,
    references: dict[str, nn.Linear],
    device: torch.device,
) -> None:
    """Run the spread model once on random tokens and compare its layers' outputs with those of their reference layers.

    transformer: as the engine made it.  plain: the FluxTransformer2DModel in it.  All ranks call it.  Raises
    RuntimeError if a layer's output is further from its reference than TOLERANCE of the norm.
    """
    errors: dict[str, float] = {}

    def compare_with(name: str, reference: nn.Linear) -> Callable:
        def compare(_layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            expected = reference(inputs[0].to(reference.weight.dtype)).float()
            errors[name] = ((output.float() - expected).norm() / expected.norm().clamp(min=1e-12)).item()

        return compare

    hooks = [
        plain.get_submodule(name).register_forward_hook(compare_with(name, reference))
        for name, reference in references.items()
    ]
    try:
        # An adapted layer takes its base's weights into a function of its own: the base layer's hooks are not called.
        # And a compiled block would be compiled with these hooks, for this one pass.
        with adapters_off(plain), torch.compiler.set_stance("force_eager"):
            transformer(**_random_tokens(plain.config, device))
    finally:
        for hook in hooks:
            hook.remove()
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    if errors.keys() != references.keys() or not errors[worst] < TOLERANCE:
        raise RuntimeError(
            f"the quantized {worst} computes something else than its dequantized reference (relative error "
            f"{errors[worst]:.3f}; rounding makes less than {TOLERANCE}): its weights were changed on their way here, "
            "and training would learn noise. Set model.precision=bf16 or another parallel.engine, and report it."
        )
    log.info(
        "self-check: %d quantized layers agree with their dequantized references, to %.1e", len(errors), errors[worst]
    )


def _random_tokens(config: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of a forward pass on 16 picture tokens and 8 of text, alike on every rank."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "hidden_states": normal(1, 16, config.in_channels),
        "encoder_hidden_states": normal(1, 8, config.joint_attention_dim),
        "pooled_projections": normal(1, config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=device),
        "guidance": torch.full((1,), 30.0, device=device),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)).to(device),
        "txt_ids": torch.zeros(8, 3, device=device),
        "return_dict": False,
    }
