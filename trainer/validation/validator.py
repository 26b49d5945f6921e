"""Validation of a run: FluxFillPipeline with the weights as they are, or their average, on pictures held out and some
trained ones.

Text comes with the samples, so neither text encoder is needed here. All ranks sample in lockstep, the same number of
calls each; every item has noise of its own, so a picture does not depend on who samples it.

It never costs a step: ranks agree between two steps of the sampler to leave it, when one was told to stop, or lacks
memory. It is then done picture by picture, or left out.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from configs.schema import Config
from data.batches.training_set import TrainingSet
from data.encoders.encode import decode_latents
from data.samples.plan import HOLDOUT, TRAIN
from data.show.picture_grid import GridItem, save_grid
from trainer.engines.base import Engine
from trainer.engines.ema import Ema
from trainer.engines.memory_limit import FILE, read_memory_limit, validate_less
from trainer.process.json_lines import write_event
from trainer.process.out_of_memory import is_out_of_memory
from trainer.process.stop_signals import stop_signal
from trainer.process.watchdog import beat
from trainer.validation.metrics import color_shift, hole_psnr, keep_psnr, paste_back, seam_error
from trainer.validation.sampler import SIGMA_BINS, Item, Sampler, chunk_items, make_item, stack
from trainer.validation.sampling_vae import load_sampling_vae

_T = TypeVar("_T")

log = logging.getLogger("fluxfill")

SAMPLED_AT_ONCE = 4  # pictures per pipeline call at 1024 px; more of smaller ones
_GRID_ROWS = 12


class _ToldToStop(Exception):
    """To a rank."""


class _DoesNotFit(Exception):
    """On a rank."""


def validation_is_due(config: Config, step: int) -> bool:
    """Before the first step, every `validation.every_steps`, and after the last."""
    every = config.validation.every_steps
    return every is not None and (step % every == 0 or step == config.train.steps)


class Validator:
    """The sampler and its validation samples, built once, before the first step. Holds nothing if validation is off.

    meanwhile: called by all ranks between two steps of the sampler.  ema: what validation.weights ema samples with.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        model: Path,
        samples: TrainingSet,
        meanwhile: Callable[[], None] = lambda: None,
        ema: Ema | None = None,
    ) -> None:
        self._config, self._ema, self._meanwhile = config, ema, meanwhile
        self._engine = engine
        self._folder = config.run.folder
        self._items: list[Item] = []
        self._chunks: list[list[Item]] = []
        self._is_left_out = False
        if config.validation.every_steps is None:
            return  # never due: the VAE need not be loaded
        most = read_memory_limit(config, engine).validation_images  # at once, if more did not fit
        self._is_left_out = most == 0
        if self._is_left_out:
            if engine.is_main:
                log.warning("no validation: it did not fit the memory. Delete %s to try it again", self._folder / FILE)
            return
        chosen = [
            sample
            for split in (HOLDOUT, TRAIN)
            for sample in samples.validation_samples(split=split, count=config.validation.images)
        ]
        self._items = [make_item(sample, number) for number, sample in enumerate(chosen)]
        self._chunks = chunk_items(self._items, engine.world_size, at_once=SAMPLED_AT_ONCE if most is None else 0)
        fits, ceilings = True, {}
        try:
            self._vae = load_sampling_vae(model, device=engine.device, dtype=engine.compute_dtype)
            self._sampler = Sampler(
                model,
                self._vae,
                device=engine.device,
                dtype=engine.compute_dtype,
                flow=config.flow,
                steps=config.validation.sampler_steps,
            )
            ceilings = self._vae_figures()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if engine.ranks.all_reduce_sum(not fits):
            self._leave_out("the VAE does not fit the memory")
        self._ceilings = _merge(engine.ranks.all_gather(ceilings))

    def run_if_due(self, transformer: nn.Module, step: int) -> dict | None:
        """`run`, where the config asks for it at a step; else None."""
        if self._is_left_out or not validation_is_due(self._config, step):
            return None
        if self._config.validation.weights == "live":
            return self.run(transformer, step)
        assert self._ema is not None
        with self._ema.in_place(self._engine):
            return self.run(transformer, step)

    def run(self, transformer: nn.Module, step: int) -> dict | None:
        """Sample all items with the weights as they are; all ranks call it.

        Returns the line for validation.jsonl, without hole_psnr_untrained, on every rank; rank 0 writes the picture
        grids.  None if it was cut short by a stop signal to any rank, or if it does not fit the memory, whatever is
        tried: then it is left out from then on.
        """
        if self._is_left_out:
            return None
        was_training = transformer.training
        transformer.eval()
        try:
            return self._sample_all(transformer, step)
        except _ToldToStop:
            log.info("validation at step %d is cut short: the run was told to stop", step)
            return None
        except _DoesNotFit:
            pass  # what its frames hold is free behind this
        finally:
            transformer.train(was_training)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if _is_one_by_one(self._chunks):
            self._leave_out(f"at step {step} a single picture does not fit the memory")
            return None
        if self._engine.is_main:
            log.warning("validation at step %d does not fit the memory: again, one picture at a time", step)
        self._chunks = chunk_items(self._items, self._engine.world_size, at_once=0)
        return self.run(transformer, step)

    def _leave_out(self, why: str) -> None:
        self._is_left_out = True
        if self._engine.is_main:
            log.warning("no more validation: %s", why)
            write_event(self._folder, "validation left out", why=why)

    def _sample_all(self, transformer: nn.Module, step: int) -> dict:
        pipeline = self._sampler.open(transformer)
        world_size, rank = self._engine.world_size, self._engine.rank
        shown = {item.number for item in self._shown(HOLDOUT) + self._shown(TRAIN)}
        figures: dict[int, dict[str, float]] = {}
        pictures: dict[int, Tensor] = {}
        with torch.no_grad():
            for start in range(0, len(self._chunks), world_size):
                # A rank without a chunk of its own repeats one: a sharded model needs every rank in every call.
                chunk = self._chunks[min(start + rank, len(self._chunks) - 1)]
                with self._agreeing_at_the_end():
                    fills = self._sampler.sample(
                        pipeline, [item.request for item in chunk], after_step=self._after_sampler_step
                    )
                    losses = self._sampler.losses(transformer, chunk)
                if start + rank >= len(self._chunks):
                    continue
                for item, fill, loss in zip(chunk, fills, losses, strict=True):
                    figures[item.number] = self._measure(item, fill, loss)
                    if item.number in shown:
                        pictures[item.number] = fill.mul(255).round().byte()
        everyones = _merge(self._engine.ranks.all_gather(figures))
        if (of_all := self._engine.ranks.gather(pictures)) is not None:
            try:
                self._save_grids(everyones, _merge(of_all), step)
            except OSError as error:  # a full disk
                log.error("the pictures of the validation at step %d are not written: %s", step, error)
        return {"step": step} | {split: self._summary(everyones, split) for split in (HOLDOUT, TRAIN)}

    def _agree(self, *, lacks_memory: bool = False) -> None:
        """Between two steps of the sampler, and after the last: raises _ToldToStop or _DoesNotFit, on all ranks, if one
        of them has to leave."""
        beat("validation")
        told = torch.tensor([stop_signal() is not None, lacks_memory], dtype=torch.float32, device=self._engine.device)
        self._engine.ranks.all_reduce_sum_(told)
        stops, lacking = told.tolist()
        if stops:
            raise _ToldToStop
        if lacking:
            raise _DoesNotFit
        self._meanwhile()

    def _after_sampler_step(self, *_: Any) -> dict[str, Tensor]:
        self._agree()
        return {}  # nothing of the pipeline's is changed

    @contextmanager
    def _agreeing_at_the_end(self) -> Iterator[None]:
        """What a rank samples in one go. Raises what `_agree` does, also for want of memory here."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self._engine.world_size > 1 and not self._engine.rank0_has_full_model:
                # The others wait for this rank in the middle of a forward pass: no word reaches them there.
                less = 0 if _is_one_by_one(self._chunks) else 1
                raise validate_less(self._config, self._engine, error, images=less) from error
        else:
            return self._agree()
        self._agree(lacks_memory=True)

    def _measure(self, item: Item, fill: Tensor, losses: Tensor) -> dict[str, float]:
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
        """Figures of the VAE's round trip of this rank's items, the ceiling of anything sampled."""
        ceilings = {}
        with torch.no_grad():
            for chunk in self._chunks[self._engine.rank :: self._engine.world_size]:
                decoded = decode_latents(self._vae, stack(chunk).latents).cpu()
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

    def _shown(self, split: str) -> list[Item]:
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
            save_grid(
                self._folder / "samples" / f"step-{step:08d}-{split}.png",
                ("target", "hole", "filled", "mask"),
                grid,
            )


def _merge(of_ranks: Iterable[dict[int, _T]]) -> dict[int, _T]:
    return {number: value for part in of_ranks for number, value in part.items()}


def _is_one_by_one(chunks: Sequence[Sequence[Item]]) -> bool:
    return all(len(chunk) == 1 for chunk in chunks)
