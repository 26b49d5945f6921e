"""Counting of what operations take: live bytes and their peaks, arithmetic, bytes moved, kernels."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MATRIX_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
# What starts no kernel: other views of a tensor, and memory without values.
_FREE = {
    *("view", "_unsafe_view", "view_as", "reshape", "as_strided", "alias", "detach", "lift_fresh", "t", "transpose"),
    *("permute", "slice", "select", "unsqueeze", "squeeze", "expand", "split", "split_with_sizes", "unbind", "chunk"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class Count(TorchDispatchMode):
    """What the operations inside it take on a device, whether their tensors are fake or real.

    live: bytes of the storages that are there now.  peaks: most of them, by phase.  Since the first phase was entered:
    matmul_flops, attention_flops; traffic: bytes that all else reads and writes; kernels: operations that start one.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.phase: str | None = None
        self.live = self.matmul_flops = self.attention_flops = self.traffic = self.kernels = 0
        self.peaks: Counter[str] = Counter()
        self._device = device
        self._sizes: dict[int, int] = {}

    def enter(self, phase: str) -> None:
        """Begin a phase, with what is live now for its first peak."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        ours = [value for value in tree_leaves(out) if self._is_ours(value)]
        for tensor in ours:
            self._hold(tensor)
        if self.phase is None or name in _FREE or func.namespace == "prim":
            return out
        # What is only written to, by `out=`, is not read.
        given = {name: value for name, value in (kwargs or {}).items() if name != "out"}
        taken = [value for value in tree_leaves((args, given)) if self._is_ours(value)]
        if not (ours or taken):
            return out
        self.kernels += 1
        if name in _MATRIX_PRODUCTS:
            matrix = taken[-2]  # of (bias,) left, right
            self.matmul_flops += 2 * ours[0].numel() * matrix.shape[-1]
            if name == "addmm_":  # what is added to is read, beside what a product reads and writes
                self.traffic += ours[0].numel() * ours[0].element_size()
        elif "attention" not in name:
            self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in (*taken, *ours))
        return out

    def _is_ours(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self._device

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        if self.phase is not None:
            self.peaks[self.phase] = max(self.peaks[self.phase], self.live)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@contextmanager
def cuda_kernels(count: Count) -> Iterator[None]:
    """Attention and RMSNorm as one operation each, which keep for the backward pass what FlashAttention's and the fused
    kernel of CUDA keep. On fake tensors torch would take them apart."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return _Attention.apply(query, key, value, count)

    # Not by a TorchFunctionMode, which is off where a checkpoint computes again in the backward pass.
    with (
        patch.object(functional, "scaled_dot_product_attention", attend),
        patch.object(functional, "rms_norm", _normalize),
    ):
        yield


class _Attention(torch.autograd.Function):
    """Two products of the square of the length in the forward pass, and four in the backward pass; those that
    FlashAttention computes again are not counted."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, count: Count) -> Tensor:
        batch, heads, length, width = query.shape
        out = query.new_empty(batch, length, heads, width).transpose(1, 2)
        logsumexp = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.count, ctx.flops = count, 4 * query.numel() * key.shape[2]
        count.attention_flops += ctx.flops
        count.kernels += 1
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.count.attention_flops += 2 * ctx.flops
        ctx.count.kernels += 1
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


_plain_rms_norm = functional.rms_norm


def _normalize(x: Tensor, normalized_shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    if x.device.type != "cuda":  # the CPU has no such kernel
        return _plain_rms_norm(x, normalized_shape, weight, eps)
    if torch.is_autocast_enabled("cuda"):  # it is on CUDA's list of fp32
        x, weight = x.float(), weight.float()
    return _RmsNorm.apply(x, weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return gradients[0] * x, torch.empty_like(weight) if ctx.needs_input_grad[1] else None
