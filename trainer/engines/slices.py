"""Slices: a rank's share of weights and optimizer state, described alike under all engines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainer.optimizers.state import elementwise_state

# The state layout of engines whose ranks each hold all of it.
REPLICATED = "whole tensors"


@dataclass(frozen=True)
class LocalSlice:
    """The part of one trained parameter whose state lies on this rank.

    name: the parameter.  start: of the part, in the flattened parameter.  numel: of the full parameter.
    weight: [n], fp32, or bf16 by train.weights; a view: writing to it changes the weight the optimizer works on (then
    call `engine.sync_after_load`).  moments: the optimizer's state of the same elements, in the same dtype, views too.
    of, at: the tensor among `engine.optimizer_states` that holds the part, and where in it the part begins.  owned:
    this rank writes it to checkpoints (the other ranks that hold the same part do not).
    """

    name: str
    start: int
    numel: int
    weight: Tensor
    moments: dict[str, Tensor]
    of: str
    at: int = 0
    owned: bool = True


def sliced_layout(engine: str, world_size: int) -> str:
    """The state layout of an engine whose ranks hold slices; only its like can read 8-bit state that was cut so."""
    return f"slices of {engine} on {world_size} processes"


def trained(transformer: nn.Module) -> list[Any]:
    """The parameters that train, in the model's order."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def trained_parameters(transformer: nn.Module) -> dict[str, Any]:
    """Name -> parameter of everything that trains; Any, as each engine makes something of its own of a parameter."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def flat_moments(state: Mapping[str, object], weight: Tensor) -> dict[str, Tensor]:
    """Key -> [n] view of each moment that has one number per element of `weight`."""
    return {key: moment.view(-1) for key, moment in elementwise_state(state, weight)}


def assign_owners(sizes: list[int], world_size: int) -> list[int]:
    """The rank that writes each of the tensors, of these sizes in order; all ranks write about as much."""
    total, before, owners = max(1, sum(sizes)), 0, []
    for size in sizes:
        owners.append(min(world_size - 1, (before + size // 2) * world_size // total))
        before += size
    return owners
