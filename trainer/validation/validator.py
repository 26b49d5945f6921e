"""Validation of a run: FluxFillPipeline with the live weights, on held-out pictures and a few trained ones.

Text comes with the samples, so neither text encoder is needed here. All ranks sample in lockstep, the same number of
calls each; every item has noise of its own, so a picture does not depend on who samples it.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import xxhash
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from configs.schema import Config
from data.batches.micro_batch import MicroBatch
from data.batches.noise import draw_noise
from data.batches.training_set import TrainingSet, ValidationSample
from data.cache.validation_items import ValidationItem
from data.encoders.encode import decode_latents
from data.encoders.load import load_vae
from data.samples.geometry import Bucket, Pixels
from data.samples.plan import HOLDOUT, TRAIN
from data.show.picture_grid import GridItem, save_grid
from trainer.engines.base import Engine
from trainer.model.flow import flow_loss, mix_noise
from trainer.model.flux import pack_latents, predict_velocity
from trainer.validation.metrics import color_shift, hole_psnr, keep_psnr, paste_back, seam_error

if TYPE_CHECKING:
    from diffusers import FluxFillPipeline

_T = TypeVar("_T")

log = logging.getLogger("fluxfill")

SIGMA_BINS = (0.1, 0.3, 0.5, 0.7, 0.9)  # middles of fifths
_NOISE_SEED = 2024  # of validation alone: the same noise in every run and at every step
SAMPLED_AT_ONCE = 4  # pictures per pipeline call at 1024 px; more of smaller ones
_GRID_ROWS = 12


@dataclass(frozen=True)
class _Item:
    """A validation sample as the model takes it.  number: its place among all items."""

    number: int
    item: ValidationItem
    pixels: Pixels
    rows: MicroBatch  # B = 1

    @property
    def target(self) -> Tensor:
        return _to_unit(self.pixels.target)

    @property
    def image(self) -> Tensor:
        return _to_unit(self.pixels.image)

    @property
    def mask(self) -> Tensor:
        return torch.from_numpy(self.pixels.mask)


def _to_unit(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> fp32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float().div(255)


def validation_is_due(config: Config, step: int) -> bool:
    """Before the first step, every `validation.every_steps`, and after the last."""
    every = config.validation.every_steps
    return every is not None and (step % every == 0 or step == config.train.steps)


class Validator:
    """The sampler and its validation samples, built once, before the first step. Holds nothing if validation is off."""

    def __init__(self, config: Config, engine: Engine, model: Path, samples: TrainingSet) -> None:
        self._engine, self._flow, self._sampler_steps = engine, config.flow, config.validation.sampler_steps
        self._folder = config.run.folder / "samples"
        self._items: list[_Item] = []
        if config.validation.every_steps is None:
            return  # never due: the VAE need not be loaded
        self._vae = load_vae(model, device=engine.device, dtype=engine.compute_dtype)
        # Picture by picture: decoding four of 1024 px at once would take 10 GiB, more than training on them.
        self._vae.enable_slicing()
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
        chosen = [
            sample
            for split in (HOLDOUT, TRAIN)
            for sample in samples.validation_samples(split=split, count=config.validation.images)
        ]
        self._items = [
            _Item(number, sample.item, sample.pixels, _rows_of(sample, number)) for number, sample in enumerate(chosen)
        ]
        self._chunks = _chunk(self._items, engine.world_size)
        self._ceilings = self._vae_figures()

    def run(self, transformer: nn.Module, step: int) -> dict:
        """Sample all items with the weights as they are; all ranks call it.

        Returns the line for validation.jsonl, without hole_psnr_untrained, on every rank; rank 0 writes the picture
        grids.
        """
        from diffusers import FluxFillPipeline  # with transformers: half a second that a run without validation saves

        pipeline = FluxFillPipeline(
            scheduler=self._scheduler,
            vae=self._vae,
            transformer=transformer,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
        )
        pipeline.set_progress_bar_config(disable=True)
        was_training = transformer.training
        transformer.eval()
        world_size, rank = self._engine.world_size, self._engine.rank
        shown = {item.number for item in self._shown(HOLDOUT) + self._shown(TRAIN)}
        figures: dict[int, dict[str, float]] = {}
        pictures: dict[int, Tensor] = {}
        with torch.no_grad(), self._engine.autocast():
            for start in range(0, len(self._chunks), world_size):
                # A rank without a chunk of its own repeats one: a sharded model needs every rank in every call.
                chunk = self._chunks[min(start + rank, len(self._chunks) - 1)]
                fills = self._sample(pipeline, chunk)
                losses = self._losses(transformer, chunk)
                if start + rank >= len(self._chunks):
                    continue
                for item, fill, loss in zip(chunk, fills, losses, strict=True):
                    figures[item.number] = self._measure(item, fill, loss)
                    if item.number in shown:
                        pictures[item.number] = fill.mul(255).round().byte()
        transformer.train(was_training)
        everyones = _merge(self._engine.ranks.all_gather(figures))
        if (of_all := self._engine.ranks.gather(pictures)) is not None:
            self._save_grids(everyones, _merge(of_all), step)
        return {"step": step} | {split: self._summary(everyones, split) for split in (HOLDOUT, TRAIN)}

    def _sample(self, pipeline: "FluxFillPipeline", chunk: Sequence[_Item]) -> Tensor:
        rows = _stack(chunk).to(self._engine.device)
        dtype = self._engine.compute_dtype
        height, width = rows.bucket.height, rows.bucket.width
        return (
            pipeline(
                image=torch.stack([item.image for item in chunk]),
                mask_image=torch.stack([item.mask.float().unsqueeze(0) for item in chunk]),
                height=height,
                width=width,
                prompt_embeds=rows.t5.to(dtype),
                pooled_prompt_embeds=rows.pooled.to(dtype),
                latents=pack_latents(rows.noise).to(dtype),
                num_inference_steps=self._sampler_steps,
                guidance_scale=self._flow.guidance,
                generator=[torch.Generator().manual_seed(_noise_key(item.item)) for item in chunk],
                output_type="pt",
            )
            .images.float()
            .cpu()
        )

    def _losses(self, transformer: nn.Module, chunk: Sequence[_Item]) -> Tensor:
        """Loss of each item at each middle of SIGMA_BINS: [items, bins]."""
        rows = _stack(chunk).to(self._engine.device)
        # Both regions alike, whatever the run's weights: runs with other weights stay comparable.
        region = torch.ones_like(rows.latents[:, :1], dtype=torch.float32)
        columns = []
        for middle in SIGMA_BINS:
            sigma = torch.full((len(chunk),), middle, device=self._engine.device)
            velocity = predict_velocity(
                transformer, mix_noise(rows.latents, rows.noise, sigma), rows, sigma, self._flow
            )
            columns.append(flow_loss(velocity, rows.latents, rows.noise, region).cpu())
        return torch.stack(columns, dim=1)

    def _measure(self, item: _Item, fill: Tensor, losses: Tensor) -> dict[str, float]:
        pasted = paste_back(fill, item.image, item.mask)
        figures = {
            "hole_psnr": hole_psnr(fill, item.target, item.mask),
            "keep_psnr": keep_psnr(fill, item.image, item.mask),
            "seam_error": seam_error(pasted, item.target, item.mask),
            "color_shift": color_shift(pasted, item.target, item.mask),
        }
        return figures | {
            f"loss_sigma_{middle}": loss for middle, loss in zip(SIGMA_BINS, losses.tolist(), strict=True)
        }

    def _vae_figures(self) -> dict[int, dict[str, float]]:
        """Figures of the VAE's round trip of each item, the ceiling of anything sampled."""
        ceilings = {}
        with torch.no_grad():
            for chunk in self._chunks:
                decoded = decode_latents(self._vae, _stack(chunk).latents).cpu()
                for item, picture in zip(chunk, decoded, strict=True):
                    ceilings[item.number] = {
                        "hole_psnr_ceiling": hole_psnr(picture, item.target, item.mask),
                        "keep_psnr_ceiling": keep_psnr(picture, item.target, item.mask),
                    }
        return ceilings

    def _summary(self, figures_of: dict[int, dict[str, float]], split: str) -> dict[str, float]:
        """Means over the items of a split; empty if it has none.  figures_of: by the items' numbers."""
        columns: dict[str, list[float]] = defaultdict(list)
        for item in self._items:
            if item.item.split == split:
                for name, figure in (figures_of[item.number] | self._ceilings[item.number]).items():
                    if not (name.startswith("keep_psnr") and item.mask.all()):  # nothing of it is kept
                        columns[name].append(figure)
        if not columns:
            return {}
        means = {name: float(np.mean(figures)) for name, figures in columns.items()}
        return {"items": len(next(iter(columns.values())))} | means

    def _shown(self, split: str) -> list[_Item]:
        return [item for item in self._items if item.item.split == split][:_GRID_ROWS]

    def _save_grids(self, figures_of: dict[int, dict[str, float]], pictures: dict[int, Tensor], step: int) -> None:
        """pictures: the shown items' fills, uint8 [3, H, W], by the items' numbers."""
        for split in (HOLDOUT, TRAIN):
            if not (shown := self._shown(split)):
                continue
            grid = []
            for item in shown:
                hole = torch.where(item.mask, 0.5, item.image)
                filled = paste_back(pictures[item.number].float().div(255), item.image, item.mask)
                stages = [item.target, hole, filled, item.mask.float().unsqueeze(0)]
                ceiling = self._ceilings[item.number]["hole_psnr_ceiling"]
                note = f"hole {figures_of[item.number]['hole_psnr']:.1f} dB (VAE {ceiling:.1f}) · {item.item.key}"
                grid.append(GridItem([stages], [note], item.item.caption))
            save_grid(self._folder / f"step-{step:08d}-{split}.png", ("target", "hole", "filled", "mask"), grid)


def _noise_key(item: ValidationItem) -> int:
    """Of the item's name alone: its noise stays the same when other items come or go."""
    return xxhash.xxh3_64_intdigest(item.key.encode()) >> 1


def _rows_of(sample: ValidationSample, number: int) -> MicroBatch:
    """One sample as a micro-batch of one, with the item's fixed noise."""
    stored: dict[str, Any] = {name: tensor.unsqueeze(0) for name, tensor in sample.tensors.items()}
    noise = torch.empty(1, *sample.bucket.latent_shape)
    draw_noise(_NOISE_SEED, _noise_key(sample.item), noise.numpy())
    return MicroBatch(
        sample.bucket,
        is_last=True,
        noise=noise,
        uniform=torch.full((1,), 0.5, dtype=torch.float64),
        weight=torch.ones(1),
        position=torch.tensor([number]),
        **stored,
    )


def _stack(chunk: Sequence[_Item]) -> MicroBatch:
    """Items of one bucket as one micro-batch."""
    tensors = {
        name: torch.cat([getattr(item.rows, name) for item in chunk])
        for name, value in vars(chunk[0].rows).items()
        if isinstance(value, Tensor)
    }
    return MicroBatch(chunk[0].rows.bucket, is_last=True, **tensors)


def _merge(of_ranks: Iterable[dict[int, _T]]) -> dict[int, _T]:
    return {number: value for part in of_ranks for number, value in part.items()}


def _chunk(items: Sequence[_Item], world_size: int) -> list[list[_Item]]:
    """Items that are sampled in one call: of one bucket, as many as fit the memory of a few 1024 px pictures, and no
    more than leave something to do for every rank."""
    by_bucket: dict[Bucket, list[_Item]] = defaultdict(list)
    for item in items:
        by_bucket[item.rows.bucket].append(item)
    chunks = []
    for bucket, members in sorted(by_bucket.items()):
        size = max(1, min(16, SAMPLED_AT_ONCE * 4096 // bucket.tokens, -(-len(items) // world_size)))
        chunks += [members[start : start + size] for start in range(0, len(members), size)]
    return chunks
