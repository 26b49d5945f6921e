"""One micro-step of training as the trainer runs it, on fake tensors: seconds and no memory, for any FLUX.1."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from configs.combinations import QUANTIZED
from configs.flux_shape import DEV_CHANNELS, FluxShape, expanded
from configs.schema import FlowConfig, FullConfig
from data.batches.micro_batch import MicroBatch
from data.samples.geometry import Bucket
from trainer.adapters.build import AdapterConfig, add_adapter
from trainer.model.checkpointing import checkpoint_blocks
from trainer.model.compute_dtype import compute_in
from trainer.model.flow import flow_loss, mix_noise, region_weight, sample_sigma, velocity_target
from trainer.model.flux import predict_velocity
from trainer.model.quantize import quantize_base
from trainer.simulation.count import Count, cuda_kernels


@dataclass(frozen=True)
class StepKind:
    """What decides what a step takes, beside sizes.

    precision: one of a config's but auto.  checkpointed: blocks, the first of the forward pass; None: all.
    keeps_fp32: full training's weights are fp32 in the forward pass too, as under single and ddp, and cast layer by
    layer; else in the compute dtype, as FSDP gathers them.  base_pass: flow.keep_target is base.
    """

    method: AdapterConfig | FullConfig
    precision: str = "bf16"
    checkpointed: int | None = None
    keeps_fp32: bool = False
    base_pass: bool = False


@dataclass(frozen=True)
class Counted:
    """Of one micro-step.  weights: bytes before it.  kept: of activations, from the forward to the backward pass.
    single_peak, double_peak: most bytes above the weights until the backward pass has left the single blocks, and from
    there on.  traffic: bytes that all but matrix products and attention read and write.

    A gradient is gone as soon as it is whole, as if it were scattered: what is kept of them is the engine's to say.
    """

    weights: int
    kept: int
    single_peak: int
    double_peak: int
    matmul_flops: int
    attention_flops: int
    traffic: int
    kernels: int

    @property
    def peak(self) -> int:
        return max(self.single_peak, self.double_peak)


def simulate_step(
    shape: FluxShape,
    kind: StepKind,
    bucket: Bucket,
    *,
    text: int,
    rows: int = 1,
    device: str = "cuda",
    real: bool = False,
) -> Counted:
    """Memory and work of one micro-step.

    text: tokens of it.  rows: of the micro-batch.  device: cuda, fake or not, or cpu.  real: allocate, on a small
    model, what is else only counted.
    """
    tensors: AbstractContextManager = nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)
    count = Count(device)
    kernels: AbstractContextManager = nullcontext() if real else cuda_kernels(count)
    with tensors, count, torch.device(device):
        transformer = _build(shape, kind)
        weights = count.live
        batch = _micro_batch(shape, bucket, text, rows)
        with kernels:
            kept = _step(transformer, kind, batch, count) - weights
    return Counted(
        weights,
        kept,
        max(count.peaks["forward"], count.peaks["single"]) - weights,
        count.peaks["double"] - weights,
        count.matmul_flops,
        count.attention_flops,
        count.traffic,
        count.kernels,
    )


def _build(shape: FluxShape, kind: StepKind) -> FluxTransformer2DModel:
    """As trainer/method.py builds it, without values."""
    method, is_full = kind.method, kind.method.type == "full"
    in_fp32 = kind.precision == "fp32" or (is_full and kind.keeps_fp32)
    torch.set_default_dtype(torch.float32 if in_fp32 else torch.bfloat16)
    try:
        transformer = FluxTransformer2DModel(
            in_channels=expanded(shape).in_channels,
            out_channels=DEV_CHANNELS,
            num_layers=shape.double_blocks,
            num_single_layers=shape.single_blocks,
            attention_head_dim=shape.head_width,
            num_attention_heads=shape.width // shape.head_width,
            joint_attention_dim=shape.text_width,
            pooled_projection_dim=shape.pooled_width,
            guidance_embeds=True,
            axes_dims_rope=_rope_widths(shape.head_width),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    if kind.precision in QUANTIZED:
        # bitsandbytes' 4-bit layer cannot be made of a fake tensor. It, too, keeps its weights alone for backward.
        precision = "int8" if kind.precision == "nf4" else kind.precision
        with patch.object(torch.Tensor, "item", lambda _: 1.0):  # nor has a fake tensor a number to give
            quantize_base(transformer, precision, lambda tensor: tensor)
    if method.type != "full":
        # peft moves what it adds to the base's device, where all is; a fake parameter cannot be moved in place.
        with patch.object(torch.nn.Module, "_apply", lambda module, *_, **__: module):
            add_adapter(transformer, method, expanded=shape.in_channels == DEV_CHANNELS, seed=0)
    compute_in(transformer, torch.float32 if kind.precision == "fp32" else torch.bfloat16)
    checkpoint_blocks(transformer, shape.blocks if kind.checkpointed is None else kind.checkpointed)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    return transformer.train()


def _rope_widths(head_width: int) -> tuple[int, int, int]:
    """FLUX.1's shares, 16, 56 and 56 of 128."""
    side = head_width * 7 // 16 // 2 * 2
    return head_width - 2 * side, side, side


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _micro_batch(shape: FluxShape, bucket: Bucket, text: int, rows: int) -> MicroBatch:
    latents = torch.zeros(rows, *bucket.latent_shape, dtype=torch.bfloat16)
    return MicroBatch(
        bucket=bucket,
        is_last=True,
        latents=latents,
        masked_latents=torch.zeros_like(latents),
        mask=torch.zeros(rows, bucket.height, bucket.width // 8, dtype=torch.uint8),
        t5=torch.zeros(rows, text, shape.text_width, dtype=torch.bfloat16),
        pooled=torch.zeros(rows, shape.pooled_width, dtype=torch.bfloat16),
        noise=torch.zeros(rows, *bucket.latent_shape),
        uniform=torch.full((rows,), 0.5, dtype=torch.float64),
        weight=torch.ones(rows),
        position=torch.zeros(rows, dtype=torch.int64),
    )


def _step(transformer: Any, kind: StepKind, batch: MicroBatch, count: Count) -> int:
    """The lines of trainer/main.py; returns the bytes that are live between the two passes."""
    flow = FlowConfig(keep_target="base") if kind.base_pass else FlowConfig()
    count.enter("forward")
    watch = transformer.transformer_blocks[-1].register_forward_hook(
        lambda *made: _enter_at_gradient(count, made[-1][-1])
    )
    sigma = sample_sigma(batch.uniform, batch.bucket.tokens, flow)
    noisy = mix_noise(batch.latents, batch.noise, sigma)
    target = velocity_target(transformer, noisy, batch, sigma, flow)
    velocity = predict_velocity(transformer, noisy, batch, sigma, flow)
    watch.remove()
    region = region_weight(batch.hole, flow)
    loss = (flow_loss(velocity, target, region) * batch.weight).sum()
    kept = count.live
    count.enter("single")
    loss.backward()
    return kept


def _enter_at_gradient(count: Count, hidden_states: Tensor) -> None:
    """When the gradient of the last double block's output is there, the single blocks are done."""
    if hidden_states.requires_grad:
        hidden_states.register_hook(lambda _: count.enter("double"))
