"""What a tensor of a whole model is rounded to in its file."""

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

_FP8_RANGE = torch.finfo(torch.float8_e4m3fn).max


def stored_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """`dtype`; for fp8 that of the blocks' matrices alone, nearly all of the model, and bf16 for the rest of it.

    The layers before and after the blocks, biases and norms are few, and what is rounded in them is felt everywhere.
    """
    if dtype != torch.float8_e4m3fn or ("transformer_blocks." in name and len(shape) == 2):
        return dtype
    return torch.bfloat16


def to_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as its file holds it, on the CPU."""
    kept = stored_dtype(name, tuple(tensor.shape), dtype)
    tensor = tensor.detach().cpu()
    if kept == torch.float8_e4m3fn:
        tensor = tensor.float().clamp(-_FP8_RANGE, _FP8_RANGE)  # the cast itself may give NaN
    return tensor.to(kept)


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # torch.equal knows no fp8, and to it NaN is not NaN.
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
