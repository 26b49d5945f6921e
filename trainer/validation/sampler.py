"""The sampler of fills: FluxFillPipeline with a transformer's weights as they are, for validation, `fluxfill fill` and
`fluxfill evaluate`.

Every picture has noise of its own, keyed by its name: a fill does not depend on what else is sampled, nor on who does.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from configs.schema import FlowConfig
from data.batches.micro_batch import MicroBatch
from data.batches.noise import draw_noise
from data.batches.training_set import ValidationSample
from data.cache.validation_items import ValidationItem
from data.encoders.stored_text import dequantize_tokens
from data.samples.geometry import Bucket, Pixels
from trainer.model.flow import flow_loss, mix_noise
from trainer.model.flux import pack_latents, predict_velocity

if TYPE_CHECKING:
    from diffusers import FluxFillPipeline

SIGMA_BINS = (0.1, 0.3, 0.5, 0.7, 0.9)  # middles of fifths
NOISE_SEED = 2024  # the same noise in every run and at every step


@dataclass(frozen=True)
class FillRequest:
    """A hole to fill.

    key: names its noise.  image: fp32 [3, H, W] in [0, 1], sides multiples of 16.  mask: bool [H, W], True = paint.
    t5: [L, D].  pooled: [P].
    """

    key: str
    image: Tensor
    mask: Tensor
    t5: Tensor
    pooled: Tensor

    @property
    def bucket(self) -> Bucket:
        return Bucket(*self.mask.shape)


@dataclass(frozen=True)
class Item:
    """A validation sample as the model takes it.  number: its place among all items."""

    number: int
    item: ValidationItem
    pixels: Pixels
    rows: MicroBatch  # B = 1

    @cached_property
    def target(self) -> Tensor:
        return to_unit(self.pixels.target)

    @cached_property
    def image(self) -> Tensor:
        return to_unit(self.pixels.image)

    @property
    def mask(self) -> Tensor:
        return torch.from_numpy(self.pixels.mask)

    @property
    def request(self) -> FillRequest:
        t5 = self.rows.t5 if self.rows.t5_scale is None else dequantize_tokens(self.rows.t5, self.rows.t5_scale)
        return FillRequest(self.item.key, self.image, self.mask, t5[0], self.rows.pooled[0])


def to_unit(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> fp32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float().div(255)


def make_item(sample: ValidationSample, number: int) -> Item:
    """The item of a validation sample, with its fixed noise."""
    stored: dict[str, Any] = {name: tensor.unsqueeze(0) for name, tensor in sample.tensors.items()}
    rows = MicroBatch(
        sample.bucket,
        is_last=True,
        noise=_noise([sample.item.key], sample.bucket, NOISE_SEED),
        uniform=torch.full((1,), 0.5, dtype=torch.float64),
        weight=torch.ones(1),
        position=torch.tensor([number]),
        **stored,
    )
    return Item(number, sample.item, sample.pixels, rows)


def _noise_key(name: str) -> int:
    """Of a name alone: its noise stays the same when other pictures come or go."""
    return xxhash.xxh3_64_intdigest(name.encode()) >> 1


def _noise(names: Sequence[str], bucket: Bucket, seed: int) -> Tensor:
    noise = torch.empty(len(names), *bucket.latent_shape)
    for name, row in zip(names, noise, strict=True):
        draw_noise(seed, _noise_key(name), row.numpy())
    return noise


def stack(items: Sequence[Item]) -> MicroBatch:
    """Items of one bucket as one micro-batch."""
    tensors = {
        name: torch.cat([getattr(item.rows, name) for item in items])
        for name, value in vars(items[0].rows).items()
        if isinstance(value, Tensor)
    }
    return MicroBatch(items[0].rows.bucket, is_last=True, **tensors)


def chunk_items(items: Sequence[Item], world_size: int, *, at_once: int) -> list[list[Item]]:
    """Items that are sampled in one call: of one bucket, as many as fit the memory of so many 1024 px pictures, one at
    least, and no more than leave something to do for every rank."""
    by_bucket: dict[Bucket, list[Item]] = defaultdict(list)
    for item in items:
        by_bucket[item.rows.bucket].append(item)
    chunks = []
    for bucket, members in sorted(by_bucket.items()):
        size = max(1, min(16, at_once * 4096 // bucket.tokens, -(-len(items) // world_size)))
        chunks += [members[start : start + size] for start in range(0, len(members), size)]
    return chunks


class Sampler:
    """FluxFillPipeline without its text encoders.

    model: a FLUX.1 folder, for its scheduler.  vae: on `device`.  dtype: of forward passes.
    """

    def __init__(
        self, model: Path, vae: Any, *, device: torch.device, dtype: torch.dtype, flow: FlowConfig, steps: int
    ) -> None:
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
        self._vae, self._device, self._dtype, self._flow, self._steps = vae, device, dtype, flow, steps

    def open(self, transformer: nn.Module) -> "FluxFillPipeline":
        """The pipeline with a transformer's weights."""
        from diffusers import FluxFillPipeline  # with transformers: half a second that a run without validation saves

        no_text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        pipeline = FluxFillPipeline(scheduler=self._scheduler, vae=self._vae, transformer=transformer, **no_text)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def sample(
        self,
        pipeline: "FluxFillPipeline",
        requests: Sequence[FillRequest],
        *,
        after_step: Callable[..., dict[str, Tensor]] | None = None,
        seed: int = NOISE_SEED,
    ) -> Tensor:
        """Fills of holes of one size, before paste-back: fp32 [B, 3, H, W] in [0, 1], on the CPU.

        after_step: called between two steps of the sampler.
        """
        bucket, names = requests[0].bucket, [request.key for request in requests]
        t5, pooled = (torch.stack([getattr(request, name) for request in requests]) for name in ("t5", "pooled"))
        return (
            pipeline(
                image=torch.stack([request.image for request in requests]),
                mask_image=torch.stack([request.mask.float().unsqueeze(0) for request in requests]),
                height=bucket.height,
                width=bucket.width,
                prompt_embeds=t5.to(self._device, self._dtype),
                pooled_prompt_embeds=pooled.to(self._device, self._dtype),
                latents=pack_latents(_noise(names, bucket, seed).to(self._device)).to(self._dtype),
                num_inference_steps=self._steps,
                guidance_scale=self._flow.guidance,
                generator=[torch.Generator().manual_seed(_noise_key(name)) for name in names],
                output_type="pt",
                callback_on_step_end=after_step,
            )
            .images.float()
            .cpu()
        )

    def losses(self, transformer: nn.Module, items: Sequence[Item]) -> Tensor:
        """Loss of each item at each middle of SIGMA_BINS, on its fixed noise: [items, bins]."""
        rows = stack(items).to(self._device)
        # Both regions alike, whatever the run's weights: runs with other weights stay comparable.
        region = torch.ones_like(rows.latents[:, :1], dtype=torch.float32)
        target = pack_latents(rows.noise - rows.latents.float())
        columns = []
        for middle in SIGMA_BINS:
            sigma = torch.full((len(items),), middle, device=self._device)
            velocity = predict_velocity(
                transformer, mix_noise(rows.latents, rows.noise, sigma), rows, sigma, self._flow
            )
            columns.append(flow_loss(velocity, target, region).cpu())
        return torch.stack(columns, dim=1)
