"""Activation checkpointing of a number of blocks."""

from typing import Any

from diffusers import FluxTransformer2DModel
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(transformer: FluxTransformer2DModel, count: int) -> None:
    """Compute the activations of the first `count` blocks of the forward pass again in the backward pass; the others
    keep theirs. The last blocks' are the first that the backward pass needs.

    Before or after the engine has prepared the model: it is decided call by call.
    """
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    chosen = {id(block) for block in blocks[:count]}

    def call(block: nn.Module, *args: Any) -> Any:
        if id(block) not in chosen:
            return block(*args)
        # Nothing in a block draws random numbers, and saving their state at each of 57 is for nothing.
        return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=False)

    if chosen:
        transformer.enable_gradient_checkpointing(call)
    else:
        transformer.disable_gradient_checkpointing()
    transformer.all_checkpointed = len(chosen) == len(blocks)


def all_checkpointed(model: nn.Module) -> bool:
    """Whether `checkpoint_blocks` has chosen all blocks of a transformer, or of the one that a model wraps."""
    return any(getattr(module, "all_checkpointed", False) for module in model.modules())
