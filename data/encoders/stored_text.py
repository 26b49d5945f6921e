"""Captions as a cache stores them: bf16, or T5's tokens in 8 bits, which is half the bytes of most of a cache.

In 8 bits a token has one scale, symmetric: the error of a number is at most half of it, and it is 1/127 of the token's
largest number. T5's output has a few large channels; what this does to a trained model has not been measured.
"""

import torch
from torch import Tensor


def store_text(t5: Tensor, pooled: Tensor, text_dtype: str) -> dict[str, Tensor]:
    """Captions' fp32 tensors ([..., L, D] and [..., P]) as text members hold them: `pooled` bf16, and `t5` bf16, or
    int8 with `t5_scale` fp32 [..., L]."""
    rest = {"pooled": pooled.bfloat16().contiguous()}
    if text_dtype == "int8":
        steps, scale = quantize_tokens(t5)
        return {"t5": steps, "t5_scale": scale} | rest
    return {"t5": t5.bfloat16().contiguous()} | rest


def text_bytes(text_length: int, text_width: int, text_dtype: str) -> int:
    """Of a caption's T5 tensors in a cache."""
    return text_length * (text_width + 4 if text_dtype == "int8" else 2 * text_width)


def quantize_tokens(t5: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [..., L, D] -> (int8 [..., L, D] in -127..127, scale fp32 [..., L]); t5 is about int8 * scale."""
    scale = t5.abs().amax(dim=-1) / 127
    # A token of zeros has scale 0 and stays zeros; 0 / 0 would be NaN.
    steps = t5 / torch.where(scale > 0, scale, 1).unsqueeze(-1)
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def dequantize_tokens(t5: Tensor, scale: Tensor) -> Tensor:
    """int8 [..., L, D] and scale fp32 [..., L] -> bf16 [..., L, D], the same bits on every device."""
    return (t5.float() * scale.unsqueeze(-1)).bfloat16()
