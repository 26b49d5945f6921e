"""FLUX.1-Fill's step before and after, counted on a pretended CUDA device: prints a line of JSON each.

    python -m benchmarks.count_flux [--sides 512 1024]

GiB are those of tensors, by the real networks on fake tensors, and of states by formula. All ways have this trainer's
layers and no autocast: peft's own, and autocast, would have the first two of each method take more. Seconds are an
estimate for an H100, by the shares of its rates that `fluxfill plan` assumes; fp32 products at the rate of its fp32
units, since torch uses no TF32 unless it is asked to. Nothing was measured.
"""

import argparse
import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from trainer.simulation import fake_cuda

if __name__ == "__main__":
    fake_cuda.load()  # before torch

from configs.communication import Exchanges
from configs.flux_shape import FluxShape, trained_parameters
from configs.gpu_profiles import load_gpu_profile
from configs.memory import CONTEXT, GIB
from configs.schema import FullConfig, LoraConfig
from configs.step_costs import StepCost
from configs.step_time import step_time
from data.samples.geometry import Bucket

if TYPE_CHECKING:
    import torch

TEXT = 512
GPU = "h100-80gb"
FP32_SHARE = 67 / 989.5  # of the bf16 rate: an H100 SXM's fp32 units, 67 TFLOP/s by its maker's data sheet
LORA, FULL = LoraConfig(type="lora", rank=16, alpha=16), FullConfig(type="full")


@dataclass(frozen=True)
class Way:
    """How the step is made.

    encoders: dtype of the text encoders in the process that trains; None: they are not there.  checkpointed: blocks;
    None: all.  state: bytes for each trained parameter beside its weight: gradient and moments.
    """

    name: str
    method: LoraConfig | FullConfig
    precision: str
    encoders: str | None
    checkpointed: int | None
    keeps_fp32: bool
    state: float


WAYS = [
    Way("naive", LORA, "fp32", "float32", 0, False, 12),
    Way("in_loop", LORA, "bf16", "bfloat16", None, False, 12),
    Way("ours", LORA, "bf16", None, 0, False, 12),
    Way("ours_least", LORA, "bf16", None, None, False, 12),
    Way("ours_nf4", LORA, "nf4", None, None, False, 4 + 2.03),
    Way("naive", FULL, "fp32", "float32", 0, True, 12),
    Way("in_loop", FULL, "bf16", "bfloat16", None, True, 12),
    Way("ours_least", FULL, "bf16", None, None, False, 6),  # train.weights: bf16_stochastic
]


@cache
def count_encoders(dtype: "torch.dtype", side: int) -> tuple[int, int]:
    """(bytes of VAE, CLIP and T5, most bytes above them while one picture is encoded). The VAE is in fp32."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.mid_size import published_parts
    from trainer.simulation.count import Count, cuda_kernels

    count = Count("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), count, torch.device("cuda"), torch.no_grad():
        parts = published_parts(names=("vae",))
        torch.set_default_dtype(dtype)
        try:
            parts |= published_parts(names=("text_encoder", "text_encoder_2"))
        finally:
            torch.set_default_dtype(torch.float32)
        weights = sum(p.numel() * p.element_size() for part in parts.values() for p in part.parameters())
        before = count.live
        with cuda_kernels(count):
            count.enter("encode")
            parts["vae"].encode(torch.zeros(2, 3, side, side))  # the picture, and that with the hole
            parts["text_encoder"](torch.zeros(1, 77, dtype=torch.long))
            parts["text_encoder_2"](torch.zeros(1, TEXT, dtype=torch.long))
    return weights, count.peaks["encode"] - before


@cache
def encoder_flops(side: int) -> int:
    """Operations of one picture's encoding."""
    import torch

    from benchmarks.mid_size import NAMES, published_parts
    from benchmarks.old_way import count_encoding

    with torch.device("meta"):
        parts = published_parts(names=NAMES[:3])
    return sum(count_encoding(parts, side=side, text_length=TEXT).values())


def count_way(way: Way, side: int) -> dict[str, Any]:
    """GiB and seconds of one picture's step."""
    import torch

    from trainer.simulation.step import StepKind, simulate_step

    shape = FluxShape()
    kind = StepKind(way.method, way.precision, way.checkpointed, way.keeps_fp32)
    step = simulate_step(shape, kind, Bucket(side, side), text=TEXT)
    trained = trained_parameters(way.method, shape)
    weights = 4 * trained if way.method.type == "full" and way.keeps_fp32 else 0
    base = max(step.weights, weights)
    if way.precision == "nf4":  # the simulation has int8 in its place
        base -= round(shape.block_weights * (1 - 0.5 - 1 / 64))
    parts = {"weights": base, "gradients and optimizer": way.state * trained, "activations": step.peak}
    encoding_flops = 0.0
    if way.encoders is not None:
        loaded, working = count_encoders(getattr(torch, way.encoders), side)
        parts |= {"encoders": loaded, "activations": max(step.peak, working)}
        encoding_flops = encoder_flops(side)
    slower = 1 / FP32_SHARE if way.precision == "fp32" else 1.0
    # The VAE is in fp32 wherever it is, and its convolutions use TF32: half of the bf16 rate.
    cost = StepCost(
        kept=step.kept,
        peak=step.peak,
        matmul_flops=slower * step.matmul_flops + (slower if way.encoders == "float32" else 1.5) * encoding_flops,
        attention_flops=slower * step.attention_flops,
        traffic=step.traffic,
        kernels=step.kernels,
    )
    update = trained * (way.state + 4)
    seconds = step_time(
        load_gpu_profile(GPU), cost, Exchanges(), micro_steps=1, gpus_per_node=1, update_bytes=update
    ).total
    return {
        "benchmark": "before_after_by_count",
        "way": way.name,
        "method": way.method.type,
        "side": side,
        "gib": round((sum(parts.values()) + CONTEXT.bytes) / GIB, 1),
        "gib_by_part": {what: round(size / GIB, 2) for what, size in parts.items()},
        "estimated_seconds": round(seconds, 2),
        "gpu": load_gpu_profile(GPU).name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    for side in parser.parse_args().sides:
        for way in WAYS:
            print(json.dumps(count_way(way, side)), flush=True)


if __name__ == "__main__":
    main()
