"""Evaluation of a run's checkpoints against its base or another run; `fluxfill evaluate`.

python -m trainer.evaluation.evaluate RUN [--step N]... [--data holdout|train|DIR] [--against base|OTHER_RUN]

Every contender fills the same holes with the same noise, by the sampler that validation uses; so their scores are
paired by picture. Writes evaluation.json, and evaluation.html, a page that needs no other file.
"""

import argparse
import errno
import gc
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports

if __name__ == "__main__":
    quiet_libraries()
    lighten_imports()

import torch
from rich.console import Console
from torch import Tensor

from configs.best_figure import best_figure
from configs.errors import InputError, os_errors_named
from configs.schema import Config
from configs.supervision import exit_code
from data.batches.training_set import CachedTrainingSet, ValidationSample
from data.cache.open_cache import open_cache
from data.encoders.load import load_vae
from data.online.training_set import OnlineTrainingSet, plan_online
from data.preprocessing.worker import Worker
from data.samples.plan import HOLDOUT, TRAIN
from data.storage.atomic_write import write_text_atomically
from data.storage.checkpoint_folders import step_of
from data.storage.disk_full import DiskFull
from trainer.checkpoints.find import CheckpointDeleted, find_checkpoint, no_checkpoint_yet
from trainer.evaluation.compare import Contender, as_json, compare, count_pictures, judge, say_verdict
from trainer.evaluation.page import FilledPicture, as_data_uri, render_page
from trainer.evaluation.perceptual import weights_file
from trainer.evaluation.pictures import encode_prompts, encode_triples, list_triples, load_text_encoders
from trainer.evaluation.scores import SCORES, flip, measure, reinpaint_psnr, ring_of
from trainer.evaluation.tuned_model import (
    TunedModel,
    TunedSource,
    Weights,
    find_checkpoints,
    find_source,
    refuse_other_weights,
)
from trainer.validation.metrics import paste_back
from trainer.validation.sampler import SIGMA_BINS, FillRequest, Item, Sampler, chunk_items, make_item
from trainer.validation.sampling_vae import load_sampling_vae

BASE = "base"
JSON, PAGE = "evaluation.json", "evaluation.html"
_AT_ONCE = 4  # pictures of 1024 px per call of the sampler
_RING_SHARE = 8  # the surroundings that are filled again are this part of the shorter side wide
_MOST = 64  # pictures
_LEAST_BYTES = 4 << 10  # of a page

log = logging.getLogger("fluxfill")


@dataclass
class _Filled:
    """What a contender made of all items: its scores, and its pictures as a page shows them."""

    contender: Contender
    uris: list[str]


def evaluate(
    path: Path,
    *,
    steps: Sequence[int] = (),
    data: str = HOLDOUT,
    against: str = BASE,
    weights: Weights = "live",
    images: int = _MOST,
    sampler_steps: int | None = None,
    consistency: bool = True,
    by: str | None = None,
    base: str | None = None,
    out: Path | None = None,
) -> Path:
    """Write OUT/evaluation.json and OUT/evaluation.html (by default in RUN/evaluation); returns the latter's path.

    steps: none: every checkpoint of the run.  data: "holdout" or "train" pictures of its cache, or a folder with
    target/ and mask/.  against: "base", or another run, whose newest checkpoint it is.  by: the score that decides;
    None: that of checkpoint.keep_best.  Raises InputError for what the user can mend.
    """
    source = find_source(path, base=base)
    if source.run is None or source.config is None:
        raise InputError(f"{path}: an export. Give the run's folder, which has checkpoints to compare.")
    config, run = source.config, source.run
    checkpoints = find_checkpoints(source, steps)
    if not checkpoints:
        raise no_checkpoint_yet(run)
    other = None if against == BASE else find_source(Path(against), base=base)
    rival = find_checkpoint(other.path) if other is not None and other.run is not None else None
    for folder in checkpoints:  # now, not after the first fills
        refuse_other_weights(source, folder, weights)
    if other is not None:
        refuse_other_weights(other, rival, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    items = [make_item(sample, n) for n, sample in enumerate(_load_samples(source, data, images, device))]
    if not items:
        raise InputError(
            f"--data {data}: there are no such pictures: data.holdout of the run was {config.data.holdout}. "
            "Give --data train, or a folder with target/ and mask/."
        )
    out = out or run / "evaluation"
    with os_errors_named(out, cure=" Give another folder by --out."):  # now, not after the fills
        out.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out).free < _LEAST_BYTES:  # now, not after the fills
        raise DiskFull(out / PAGE, errno.ENOSPC, needed=_LEAST_BYTES)
    filled = []
    steps_each = sampler_steps or config.validation.sampler_steps  # of another run or an export, too
    model = TunedModel(source, device)
    fill = _Filler(source, model, items, steps_each, consistency)
    if other is None:
        model.load_base()
        filled.append(fill(BASE, None))
    for folder in checkpoints:
        try:
            model.load_checkpoint(folder, weights)
        except CheckpointDeleted as error:  # by the run, which goes on
            if steps:
                raise
            log.warning("%s", error)
            continue
        filled.append(fill(f"step {step_of(folder)}", step_of(folder)))
    if all(each.contender.step is None for each in filled):
        raise InputError(f"{run}: its checkpoints were deleted before they were read. Start again.")
    if other is not None:
        del model, fill
        gc.collect()
        model = TunedModel(other, device)
        if rival is not None:
            model.load_newest(rival, weights)
        name = other.name if other.name != source.name else str(other.path)
        filled.insert(0, _Filler(other, model, items, steps_each, consistency)(name, None))
    return _write(out, source, data, weights, items, filled, by or best_figure(config))


class _Filler:
    """Fills all items with the weights that the model has at the moment, and scores them."""

    def __init__(
        self, source: TunedSource, model: TunedModel, items: Sequence[Item], steps: int, consistency: bool
    ) -> None:
        self._model, self._items, self._consistency = model, items, consistency
        self._vae = load_sampling_vae(source.model, device=model.device, dtype=model.dtype)
        self._sampler = Sampler(
            source.model, self._vae, device=model.device, dtype=model.dtype, flow=source.flow, steps=steps
        )

    @torch.no_grad()
    def __call__(self, label: str, step: int | None) -> _Filled:
        scores: list[dict[str, float]] = [{} for _ in self._items]
        uris = [""] * len(self._items)
        pipeline = self._sampler.open(self._model.transformer)
        for chunk in chunk_items(self._items, 1, at_once=_AT_ONCE):
            fills = self._sampler.sample(pipeline, [item.request for item in chunk])
            losses = self._sampler.losses(self._model.transformer, chunk)
            second = self._fill_surroundings(pipeline, chunk, fills) if self._consistency else {}
            for item, picture, loss in zip(chunk, fills, losses, strict=True):
                found = measure(picture, item.target, item.image, item.mask) | second.get(item.number, {})
                found["loss"] = loss.mean().item()
                found |= {f"loss_sigma_{mid}": value for mid, value in zip(SIGMA_BINS, loss.tolist(), strict=True)}
                scores[item.number] = found
                uris[item.number] = as_data_uri(paste_back(picture, item.image, item.mask))
        log.info("%s: %s filled", label, count_pictures(len(uris)))
        return _Filled(Contender(label, step, scores), uris)

    def _fill_surroundings(self, pipeline: Any, chunk: Sequence[Item], fills: Tensor) -> dict[int, dict[str, float]]:
        """Each item's fill taken as given, its hole's surroundings filled again."""
        rings, requests = [], []
        for item, fill in zip(chunk, fills, strict=True):
            ring = ring_of(item.mask, max(8, min(item.mask.shape) // _RING_SHARE))
            if ring.any():
                request, pasted = item.request, paste_back(fill, item.image, item.mask)
                rings.append((item, ring))
                requests.append(FillRequest(f"{request.key}/ring", pasted, ring, request.t5, request.pooled))
        if not requests:
            return {}
        again = self._sampler.sample(pipeline, requests)
        return {
            item.number: {"reinpaint_psnr": reinpaint_psnr(picture, item.image, ring)}
            for (item, ring), picture in zip(rings, again, strict=True)
        }


def _load_samples(source: TunedSource, data: str, count: int, device: torch.device) -> Sequence[ValidationSample]:
    """The pictures of an evaluation, encoded."""
    config = source.config
    assert config is not None
    if data in (HOLDOUT, TRAIN):
        return _training_set(config, source.model, device).validation_samples(split=data, count=count)
    pairs = list_triples(Path(data))[:count]
    encoders = load_text_encoders(source.model, device)
    texts = encode_prompts(encoders, [pair.caption for pair in pairs], text_length=config.data.captions.text_length)
    del encoders
    vae = load_vae(source.model, device=device, dtype=torch.float32)
    return encode_triples(pairs, vae, texts, resolutions=config.data.resolution)


def _training_set(config: Config, model: Path, device: torch.device) -> CachedTrainingSet | OnlineTrainingSet:
    if config.data.mode == "cached":
        return CachedTrainingSet(open_cache(config, model))
    return OnlineTrainingSet(config, model, plan_online(config, model, Console()), device=device, worker=Worker())


def _write(
    out: Path,
    source: TunedSource,
    data: str,
    weights: Weights,
    items: Sequence[Item],
    filled: Sequence[_Filled],
    by: str,
) -> Path:
    contenders = [each.contender for each in filled]
    fractions = [float(item.pixels.mask.mean()) for item in items]
    tables = compare(contenders, fractions, against=contenders[0].label)
    by = by if by in tables else "hole_psnr"
    verdict = judge(contenders, by)
    said = say_verdict(verdict, tables)
    absent = say_absent()
    result = {
        "version": 1,
        "run": source.name,
        "data": data,
        "weights": weights,
        "pictures": [
            {
                "key": item.item.key,
                "caption": item.item.caption,
                "hole_fraction": fraction,
                "scores": {each.label: each.scores[item.number] for each in contenders},
            }
            for item, fraction in zip(items, fractions, strict=True)
        ],
        "against": contenders[0].label,
        "steps": {each.label: each.step for each in contenders},
        "scores": as_json(tables),
        "best": {"by": by, "step": verdict.best, "says": said},
        "left_out": absent,
    }
    pictures = [
        FilledPicture(
            key=item.item.key,
            caption=item.item.caption,
            hole_fraction=fraction,
            shown=as_data_uri(torch.where(item.mask, 0.5, item.image)),
            target=as_data_uri(item.target),
            fills={each.contender.label: each.uris[item.number] for each in filled},
            scores={each.label: each.scores[item.number] for each in contenders},
        )
        for item, fraction in zip(items, fractions, strict=True)
    ]
    page = render_page(source.name, f"{data}; {weights} weights", contenders, tables, verdict, said, pictures, absent)
    with os_errors_named(out):
        write_text_atomically(out / JSON, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        write_text_atomically(out / PAGE, page)
    for line in said:
        print(line)
    return out / PAGE


def say_absent() -> list[str]:
    """The scores that are left out, and why."""
    said = []
    if flip(*(torch.zeros(3, 8, 8),) * 2, torch.ones(8, 8, dtype=torch.bool)) is None:
        said.append("FLIP: its package is not installed (pip install 'fluxfill[evaluate]').")
    if weights_file() is None:
        said.append("ST-LPIPS: its weights are not installed (pip install 'fluxfill[perceptual]', 64 MB).")
    said.append(
        "LPIPS, CLIP score and ReMOVE need weights that no package carries and that must be downloaded; they are not "
        "computed."
    )
    return said


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluation.evaluate", description=evaluate.__doc__)
    parser.add_argument("path", type=Path, metavar="RUN")
    parser.add_argument("--step", dest="steps", type=int, action="append", default=[])
    parser.add_argument("--data", default=HOLDOUT)
    parser.add_argument("--against", default=BASE)
    parser.add_argument("--weights", choices=["live", "ema"], default="live")
    parser.add_argument("--images", type=int, default=_MOST)
    parser.add_argument("--sampler-steps", type=int, default=None)
    parser.add_argument("--consistency", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--by", choices=[*SCORES], default=None)
    parser.add_argument("--base", default=None)
    parser.add_argument("--out", type=Path, default=None)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        print(evaluate(**vars(parser.parse_args(arguments))))
    except InputError as error:
        error.show()
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
