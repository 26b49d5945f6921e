"""Watching a run: the real FluxFillPipeline with the live weights, on held-out pictures and a few trained ones.

Text comes from the cache, so neither text encoder is loaded. All ranks sample in lockstep, the same number of calls
each; every item has noise of its own, so a picture does not depend on who samples it.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline
from torch import Tensor, nn

from configs.schema import Config
from data.cache import Cache
from data.encode import decode_latents, load_vae
from data.geometry import Bucket, Pixels
from data.manifest import HOLDOUT, TRAIN, Manifest, parse_bucket
from data.micro_batch import MicroBatch, bytes_of, row_fields
from data.noise import draw_noise
from data.picture_grid import save_grid
from data.shard_reader import ShardReader
from data.validation_items import ValidationItem, read_validation_items
from trainer.engine import Engine
from trainer.flow import flow_loss, mix_noise
from trainer.flux import pack_latents, predict_velocity
from trainer.metrics import color_shift, hole_psnr, keep_psnr, paste_back, seam_error

log = logging.getLogger("fluxfill")

SIGMA_BINS = (0.1, 0.3, 0.5, 0.7, 0.9)  # middles of fifths
_NOISE_SEED = 2024  # of validation alone: the same noise in every run and at every step
_SAMPLED_AT_ONCE = 4  # pictures per pipeline call at 1024 px; more of smaller ones
_GRID_ROWS = 12


@dataclass(frozen=True)
class _Item:
    """A watched picture as the model takes it. number: its place among all items."""

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


@dataclass(frozen=True)
class _Result:
    """One item's figures, and its fill fp32 [3, H, W] in [0, 1]."""

    number: int
    figures: dict[str, float]
    fill: Tensor


def _to_unit(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> fp32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float().div(255)


def validation_is_due(config: Config, step: int) -> bool:
    """Before the first step, every `validation.every_steps`, and after the last."""
    every = config.validation.every_steps
    return every is not None and (step % every == 0 or step == config.train.steps)


class Validator:
    """Samples and measures the watched items; built once, before the first step. Holds nothing if validation is off."""

    def __init__(self, config: Config, engine: Engine, model: Path, cache: Cache) -> None:
        manifest, table = cache.manifest, cache.table
        self._engine, self._flow, self._sampler_steps = engine, config.flow, config.validation.sampler_steps
        self._folder = config.run.folder / "samples"
        self._items: list[_Item] = []
        if config.validation.every_steps is None:
            return  # never due: the VAE need not be loaded
        self._vae = load_vae(model, device=engine.device, dtype=engine.compute_dtype)
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
        reader = ShardReader(cache)
        watched = [
            entry
            for split in (HOLDOUT, TRAIN)
            for entry in read_validation_items(cache.folder, split=split, count=config.validation.images)
        ]
        shards = {str(path): number for number, path in enumerate(table.path)}
        self._items = [
            _Item(number, item, pixels, _read_rows(reader, manifest, shards[item.shard], item, number))
            for number, (item, pixels) in enumerate(watched)
        ]
        self._chunks = _chunk(self._items)
        self._ceilings = self._vae_figures()

    def run(self, transformer: nn.Module, step: int) -> dict:
        """Sample all items with the weights as they are; all ranks call it.

        Returns the line for validation.jsonl, without hole_psnr_untrained, on every rank; rank 0 writes the picture
        grids.
        """
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
        results: dict[int, _Result] = {}
        with torch.no_grad(), self._engine.autocast():
            for start in range(0, len(self._chunks), world_size):
                # A rank without a chunk of its own repeats one: a sharded model needs every rank in every call.
                chunk = self._chunks[min(start + rank, len(self._chunks) - 1)]
                fills = self._sample(pipeline, chunk)
                losses = self._losses(transformer, chunk)
                results |= {
                    i.number: self._measure(i, fill, loss) for i, fill, loss in zip(chunk, fills, losses, strict=True)
                }
        transformer.train(was_training)
        everyone: dict[int, _Result] = {}
        for part in self._engine.gather(results):
            everyone |= part
        if self._engine.is_main:
            self._save_grids(everyone, step)
        return {"step": step} | {split: self._summary(everyone, split) for split in (HOLDOUT, TRAIN)}

    def _sample(self, pipeline: FluxFillPipeline, chunk: Sequence[_Item]) -> Tensor:
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

    def _measure(self, item: _Item, fill: Tensor, losses: Tensor) -> _Result:
        pasted = paste_back(fill, item.image, item.mask)
        figures = {
            "hole_psnr": hole_psnr(fill, item.target, item.mask),
            "keep_psnr": keep_psnr(fill, item.image, item.mask),
            "seam_error": seam_error(pasted, item.target, item.mask),
            "color_shift": color_shift(pasted, item.target, item.mask),
        }
        figures |= {f"loss_sigma_{middle}": loss for middle, loss in zip(SIGMA_BINS, losses.tolist(), strict=True)}
        return _Result(item.number, figures, fill)

    def _vae_figures(self) -> dict[int, dict[str, float]]:
        """What the VAE alone reaches on each item: nothing sampled can be better."""
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

    def _summary(self, results: dict[int, _Result], split: str) -> dict[str, float]:
        """Means over the items of a split; empty if it has none."""
        columns: dict[str, list[float]] = defaultdict(list)
        for item in self._items:
            if item.item.split == split:
                for name, figure in (results[item.number].figures | self._ceilings[item.number]).items():
                    if not (name.startswith("keep_psnr") and item.mask.all()):  # nothing of it is kept
                        columns[name].append(figure)
        if not columns:
            return {}
        means = {name: float(np.mean(figures)) for name, figures in columns.items()}
        return {"items": len(next(iter(columns.values())))} | means

    def _save_grids(self, results: dict[int, _Result], step: int) -> None:
        for split in (HOLDOUT, TRAIN):
            shown = [item for item in self._items if item.item.split == split][:_GRID_ROWS]
            if not shown:
                continue
            rows, notes = [], []
            for item in shown:
                result = results[item.number]
                hole = torch.where(item.mask, 0.5, item.image)
                filled = paste_back(result.fill, item.image, item.mask)
                rows.append([item.target, hole, filled, item.mask.float().unsqueeze(0)])
                ceiling = self._ceilings[item.number]["hole_psnr_ceiling"]
                caption = item.item.caption if len(item.item.caption) <= 60 else f"{item.item.caption[:57]}..."
                notes.append(f"hole {result.figures['hole_psnr']:.1f} dB (VAE {ceiling:.1f})   {caption}")
            save_grid(self._folder / f"step-{step:08d}-{split}.png", ("target", "hole", "filled", "mask"), rows, notes)


def _noise_key(item: ValidationItem) -> int:
    """Of the item's name alone: its noise stays the same when other items come or go."""
    return xxhash.xxh3_64_intdigest(item.key.encode()) >> 1


def _read_rows(reader: ShardReader, manifest: Manifest, shard: int, item: ValidationItem, number: int) -> MicroBatch:
    """One stored sample (its first mask variant) as a micro-batch of one, with the item's fixed noise."""
    bucket = parse_bucket(str(reader.table.bucket[shard]))
    fields = row_fields(bucket, manifest)
    tensors: dict[str, Any] = {field.name: torch.empty(1, *field.shape, dtype=field.dtype) for field in fields}
    stored = {field.name: bytes_of(tensors[field.name]) for field in fields if field.is_stored}
    reader.read(shard, item.row, stored)
    rows = MicroBatch(bucket, is_last=True, **tensors)
    rows.uniform[:], rows.weight[:], rows.position[:] = 0.5, 1, number
    draw_noise(_NOISE_SEED, _noise_key(item), rows.noise.numpy())
    return rows


def _stack(chunk: Sequence[_Item]) -> MicroBatch:
    """Items of one bucket as one micro-batch."""
    tensors = {
        name: torch.cat([getattr(item.rows, name) for item in chunk])
        for name, value in vars(chunk[0].rows).items()
        if isinstance(value, Tensor)
    }
    return MicroBatch(chunk[0].rows.bucket, is_last=True, **tensors)


def _chunk(items: Sequence[_Item]) -> list[list[_Item]]:
    """Items that are sampled in one call: of one bucket, as many as fit the memory of a few 1024 px pictures."""
    by_bucket: dict[Bucket, list[_Item]] = defaultdict(list)
    for item in items:
        by_bucket[item.rows.bucket].append(item)
    chunks = []
    for bucket, members in sorted(by_bucket.items()):
        size = max(1, min(16, _SAMPLED_AT_ONCE * 4096 // bucket.tokens))
        chunks += [members[start : start + size] for start in range(0, len(members), size)]
    return chunks
