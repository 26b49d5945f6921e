"""Which of torch's attention kernels computes: cuDNN's first where GPUs have Hopper's or Blackwell's units for it.

torch tries flash, memory-efficient and plain attention before cuDNN's. Those behind the first are still there for what
it cannot take: fp32, or gradients where train.deterministic asks for the same sums each time.
"""

import logging
from contextlib import ExitStack
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger("fluxfill")

_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
in_force = ExitStack()  # torch puts its own order back when this is closed


def choose_attention(
    asked: Literal["auto", "cudnn", "flash", "efficient", "math"],
    device: torch.device,
    dtype: torch.dtype,
    *,
    head: int,
) -> None:
    """From now on have torch try this kernel first, in every process-wide call; and tell which one FLUX's takes.

    dtype, head: of what is attended to: the compute dtype, and a head's width.
    """
    first = preferred_kernel(asked, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)
    in_force.close()
    if first is not None:
        order = [_KERNELS[first], *(kernel for name, kernel in _KERNELS.items() if name not in (first, "cudnn"))]
        in_force.enter_context(sdpa_kernel(order, set_priority=True))
    log.info("attention: %s (train.attention: %s)", chosen_kernel(device, dtype, head=head), asked)


def preferred_kernel(asked: str, capability: tuple[int, int] | None) -> str | None:
    """The kernel to try first; None: torch's own order.  capability: of the GPU; None: a CPU."""
    if asked != "auto":
        return asked
    if capability is None or capability[0] not in (9, 10) or torch.are_deterministic_algorithms_enabled():
        return None
    return "cudnn"


def chosen_kernel(device: torch.device, dtype: torch.dtype, *, head: int) -> str:
    """What torch takes for a query that needs a gradient, by name."""
    query = torch.zeros(1, 1, 128, head, dtype=dtype, device=device, requires_grad=True)
    kernel = SDPBackend(torch._fused_sdp_choice(query, query, query))
    return next((name for name, known in _KERNELS.items() if known == kernel), kernel.name)
