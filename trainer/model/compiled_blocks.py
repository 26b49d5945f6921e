"""torch.compile of the transformer's blocks, one graph for all of a kind."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from configs.errors import InputError

# Of a kind of block. torch's own 8 are the double blocks of an adapter with flow.keep_target base and validation: with
# the adapter, without it, both without gradients, with them behind a block that trains, and each of one sample alone.
GRAPHS = 32

log = logging.getLogger("fluxfill")


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """Have each block's forward pass compiled when it is first called; parameters keep their names.

    Before the engine prepares the model.  It is the function that is compiled, not the module, which would have the
    module's hooks in its graph (`compile_repeated_blocks` of diffusers does so): FSDP gathers and frees a block's
    weights in them, and does less when activation checkpointing computes a block again.

    A block is one graph: what would break it raises InputError when it is first called.
    """
    calls = dict.fromkeys(transformer.transformer_blocks, _call)
    for block, call in (calls | dict.fromkeys(transformer.single_transformer_blocks, _call_single)).items():
        # Dynamic from the start: were the first sizes taken for fixed, a later one could be compiled again between a
        # forward pass and its recomputation, which then do not match.
        block.forward = _with_settings(partial(call, torch.compile(block.forward, dynamic=True, fullgraph=True)))


def _with_settings(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, by settings of torch's compiler that it needs.

    Set around each, for some 50 microseconds: torch keeps settings thread by thread, and a CUDA device's backward pass,
    with the blocks that are computed again in it, has a thread of its own, where they would be torch's.
    """
    from torch._functorch import config as partitioner
    from torch.fx.experimental import _config as sizes

    for setting in (
        # optimize_ddp cuts graphs where DDP's messages begin.
        torch._dynamo.config.patch(recompile_limit=GRAPHS, optimize_ddp=False),
        # Or sizes that are alike at first, as of 512 tokens of text and a picture of as many, are taken for the same.
        sizes.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        # Or a weight that one function casts or dequantizes in its forward pass, and again in its backward pass, is
        # made once and kept in bf16, 22 GiB of FLUX.1: the two are one in the graph, and what a matrix product reads is
        # not made again. Without, no product or attention is; a few passes over activations are, which it need not
        # keep. (With `cse` off the weights are not kept either, but every expression is computed as often as written.)
        partitioner.patch(ban_recompute_materialized_backward=False),
    ):
        call = setting(call)
    return call


def _call_single(
    forward: Callable[..., Any],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    *args: Any,
    **named: Any,
) -> Any:
    """Of a single block, which takes what another one returns, slices of one tensor: the first one gets such, too, or
    would have a graph of its own."""
    text, tokens = encoder_hidden_states.shape[1], encoder_hidden_states.shape[1] + hidden_states.shape[1]
    if encoder_hidden_states.stride(0) != tokens * hidden_states.shape[2]:
        joined = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        encoder_hidden_states, hidden_states = joined[:, :text], joined[:, text:]
    return _call(forward, hidden_states, encoder_hidden_states, temb, *args, **named)


def _call(
    forward: Callable[..., Any],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    *args: Any,
    **named: Any,
) -> Any:
    """What a compiled block makes of inputs that are no views. FSDP's hooks hand it views, and so does a single block
    the next one, but not when they are computed again, for which another graph would be made.

    Raises InputError if no graph can be made of the block.
    """
    inputs = [_NoView.apply(x) for x in (hidden_states, encoder_hidden_states, temb)]
    try:
        return forward(*inputs, *args, **named)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        log.warning(
            "train.compile: a kind of block has its %d graphs, and was to have another. From now on what fits none of "
            "them is computed without, slower; please report it, with the config",
            torch._dynamo.config.recompile_limit,
        )
        torch.compiler.set_stance("eager_on_recompile")
        return forward(*inputs, *args, **named)
    except torch._dynamo.exc.Unsupported as error:
        raise InputError(
            f"train.compile regional: no graph can be made of a block as it is here ({str(error).splitlines()[0]}). "
            "Set train.compile=off."
        ) from error


class _NoView(torch.autograd.Function):
    """The same numbers, where they lie, as no view of a tensor to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
