"""The device that benchmarks/gpu.py measures on, and its rate in matrix products. Needs torch alone."""

import os
import time
from typing import Any

import torch

GIB = 2**30


def describe() -> dict[str, Any]:
    """Name and memory of the device, versions, settings of the allocator."""
    found: dict[str, Any] = {
        "device": "cpu",
        "memory_gib": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF"),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "memory_gib": round(card.total_memory / GIB, 1)}
        found["capability"] = f"{card.major}.{card.minor}"
    return found


def matmul_rate(side: int = 8192, seconds: float = 1.5) -> float:
    """TFLOP/s of bf16 products of side x side matrices, sustained: what MFU is a share of.

    Of random numbers: a card draws less power for zeros, and is faster.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)

    def products(count: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(left, right, out=out)
        _wait(device)
        return time.perf_counter() - start

    products(3)
    count = max(3, int(seconds / max(products(3) / 3, 1e-6)))
    return 2 * side**3 * count / products(count) / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
