"""Which optimizer state reshards, and which does not: moments of one float per element, and everything else.

Of what does not, 8-bit moments can be converted: bitsandbytes keeps codes of 256 numbers with a scale, in a code book
that is a constant. A scale belongs to 256 neighbours of one rank's tensor; for another engine or number of processes
the moment is dequantized and quantized again, and differs by up to the width of a code.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

BLOCK = 256  # bitsandbytes' own, of optimizers

# Moment -> whether its numbers have a sign.
_SIGNED = {"state1": True, "state2": False}


def elementwise_state(state: Mapping[str, object], weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of the optimizer state that reshards with its weight: one float per element."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == weight.shape and value.ndim:
            yield key, value


def unreshardable_state(states: Iterable[tuple[str, Tensor, Mapping[str, object]]]) -> dict[str, Tensor]:
    """ "<tensor>//<key>" -> state that cannot be cut by element: 8-bit moments and their scales, Adafactor's rows and
    columns, what Prodigy has learned of all weights together.

    states: as `engine.optimizer_states` gives them.  Without bitsandbytes' qmaps: the code book is a constant that all
    parameters share.
    """
    return {
        f"{name}//{key}": value
        for name, weight, state in states
        for key, value in state.items()
        if isinstance(value, Tensor) and key != "step" and not key.startswith("qmap")
        if key not in dict(elementwise_state(state, weight))
    }


def scale_of(moment: str) -> str:
    """Key of the scales of a moment: "state1" -> "absmax1"."""
    return f"absmax{moment[-1]}"


def eight_bit_moments(state: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """(key, codes) of the moments that an optimizer keeps in 8 bits of one tensor; small tensors have none."""
    for moment in _SIGNED:
        codes = state.get(moment)
        if isinstance(codes, Tensor) and codes.dtype == torch.uint8 and scale_of(moment) in state:
            yield moment, codes


def dequantize(codes: Tensor, scales: Tensor, moment: str) -> Tensor:
    """fp32 numbers of a moment, in the shape of its codes."""
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(codes, absmax=scales, code=_code_book(moment, codes.device), blocksize=BLOCK)


def quantize(numbers: Tensor, moment: str) -> tuple[Tensor, Tensor]:
    """(codes, scales) of fp32 numbers."""
    from bitsandbytes.functional import quantize_blockwise

    codes, quantized = quantize_blockwise(numbers, code=_code_book(moment, numbers.device), blocksize=BLOCK)
    return codes, quantized.absmax


def _code_book(moment: str, device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=_SIGNED[moment]).to(device)
