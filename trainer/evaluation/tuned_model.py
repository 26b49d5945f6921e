"""A tuned transformer, from a run's checkpoints or from an export, and the base that it began with."""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from safetensors import safe_open
from torch import Tensor

from configs.combinations import QUANTIZED
from configs.errors import InputError
from configs.loading import load_config
from configs.schema import Config, FlowConfig
from data.encoders.model_folder import find_model, read_part_config
from data.storage.checkpoint_folders import complete_checkpoints
from trainer.adapters.build import add_adapter, prepare_layers
from trainer.adapters.files import WEIGHTS_NAME
from trainer.checkpoints.find import (
    CheckpointDeleted,
    find_checkpoint,
    intact_checkpoints,
    no_checkpoint_yet,
    read_chosen,
    refuse_unfinished,
    tell_if_deleted,
)
from trainer.checkpoints.weights import open_weights, refuse_without
from trainer.engines.base import compute_dtype
from trainer.model.base_fingerprint import is_base
from trainer.model.compute_dtype import compute_in
from trainer.model.flux import DEV_CHANNELS, load_transformer
from trainer.model.quantize import quantize_base

Weights = Literal["live", "ema"]

_EXPORTED = "exported"

log = logging.getLogger("fluxfill")


@dataclass(frozen=True)
class TunedSource:
    """Where tuned weights are.

    model: the FLUX.1 folder whose VAE, text encoders and scheduler belong to them; for all but a whole exported model
    it is also the base.  config: of the run, where it is known.  flow: as they were trained, of which a fill takes the
    guidance.  run: its folder.  adapter: an exported adapter's file.  weights: which kind an export holds, if it says.
    """

    path: Path
    model: Path
    config: Config | None = None
    flow: FlowConfig = field(default_factory=FlowConfig)
    run: Path | None = None
    adapter: Path | None = None
    weights: str | None = None

    @property
    def name(self) -> str:
        return self.config.run.name if self.config is not None else self.path.name


def find_source(path: Path, *, base: str | None = None) -> TunedSource:
    """The source of weights at a run's folder, one of its checkpoints, an exported FLUX.1-Fill folder, or an adapter.

    base: hub id or folder of the model that an adapter belongs to, where no config.yaml tells.  Raises InputError if it
    is none of them.
    """
    if re.fullmatch(r"step-\d{8,}.*", path.name) and path.parent.name == "checkpoints":
        return _of_run(path, path.parent.parent, base)
    if (path / "model_index.json").is_file():
        files = sorted((path / "transformer").glob("*.safetensors"))  # each has the metadata
        return _of_export(path, find_model(str(path)), _config_beside(path), files[0] if files else None)
    adapter = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    if adapter.is_file():
        config = _config_beside(adapter.parent)
        if base is None and config is None:
            raise InputError(f"{path}: an adapter, and nothing beside it says on which model. Give --base.")
        model = find_model(base or config.model.base)  # type: ignore[union-attr]
        source = replace(_of_export(path, model, config, adapter), adapter=adapter)
        _warn_of_another_base(adapter, model)
        return source
    if (path / "checkpoints").is_dir():
        return _of_run(path, path, base)
    if (path / "metrics.jsonl").is_file() or (path / "outcome.json").is_file():
        raise no_checkpoint_yet(path)
    what = "is no run, checkpoint or export" if path.exists() else "there is no such file or folder"
    raise InputError(
        f"{path}: {what}. Give a run's folder (it holds checkpoints/), one of its checkpoints, an exported FLUX.1-Fill "
        f"folder (model_index.json), or an adapter ({WEIGHTS_NAME})."
    )


def _of_run(path: Path, run: Path, base: str | None) -> TunedSource:
    folder = path if path != run else next(iter(reversed(complete_checkpoints(run))), None)
    if folder is None:
        raise no_checkpoint_yet(run)
    refuse_unfinished(folder)
    config = load_config(folder / "config.yaml", saved_by_a_run=True)
    return TunedSource(path, find_model(base or config.model.base), config, config.flow, run)


def _of_export(path: Path, model: Path, config: Config | None, file: Path | None) -> TunedSource:
    """Of what its file of weights says itself; of others' files, of the config beside it."""
    said = _read_metadata(file) if file is not None else {}
    guidance, weights = said.get("fluxfill.guidance"), said.get("fluxfill.weights")
    if guidance is not None:
        try:
            flow = FlowConfig(guidance=float(guidance))
        except ValueError as error:  # pydantic's too
            raise InputError(f"{file}: says fluxfill.guidance {guidance!r}, which is none. Export it again.") from error
    else:
        flow = config.flow if config is not None else FlowConfig()
        if config is None:
            log.info("%s: does not say with what guidance it was trained; %g is assumed", path, flow.guidance)
    return TunedSource(path, model, config, flow, weights=weights)


def _warn_of_another_base(adapter: Path, model: Path) -> None:
    """Another base may be meant, such as a later training of the one that the adapter was made on."""
    own = _read_metadata(adapter).get("fluxfill.base_fingerprint")
    if own and not is_base(model, own):
        log.warning("%s: was trained on another base than %s, by the weights of its transformer", adapter, model)


def _read_metadata(file: Path) -> Mapping[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except Exception as error:  # safetensors has its own
        raise InputError(f"{file}: cannot be read ({error}). Export it, or fetch it, again.") from error


def _config_beside(folder: Path) -> Config | None:
    """Of the run that a `final` or a checkpoint's adapter lies in."""
    for place in (folder, folder.parent):
        if (place / "config.yaml").is_file():
            return load_config(place / "config.yaml", saved_by_a_run=True)
    return None


def find_checkpoints(source: TunedSource, steps: Sequence[int] = ()) -> list[Path]:
    """The checkpoints of a run at these steps, oldest first; none named: that which the source is, or else all that
    are intact.

    Raises InputError as `find_checkpoint` does, and for steps of an export.
    """
    if source.run is None:
        if steps:
            raise InputError(f"{source.path}: an export has no steps. Leave --step out, or give the run's folder.")
        return []
    if steps:
        return [find_checkpoint(source.run, step) for step in sorted(set(steps))]
    if source.path != source.run:
        return [find_checkpoint(source.path)]
    return intact_checkpoints(source.run)


def refuse_other_weights(source: TunedSource, checkpoint: Path | None, weights: Weights) -> None:
    """Raises InputError where the checkpoint of a source, or the export that it is, holds no such weights. An export
    is taken for `live`, which is what is asked for where nothing is said, whatever it holds."""
    if checkpoint is not None:
        with suppress(CheckpointDeleted), tell_if_deleted(checkpoint):
            refuse_without(weights, checkpoint)
    elif weights != "live" and source.weights != weights:
        raise InputError(
            f"--weights {weights}: {source.path} is an export, which holds one kind ({source.weights or 'unknown'}). "
            "Leave --weights out, or give one of the average."
        )


class TunedModel:
    """A transformer whose weights are exchanged in place: the base's, and those of checkpoints.

    Opens with the base's; those of an export, whole or adapter, with its own.  device: a quantized base needs one that
    its library works on.
    """

    def __init__(self, source: TunedSource, device: torch.device) -> None:
        self.source, self.device = source, device
        self._is_changed = False
        config = source.config
        self.dtype = compute_dtype(config, device) if config else _usual_dtype(device)
        self.transformer = load_transformer(source.model, dtype=self.dtype)
        if source.run is not None and config is not None:
            if config.model.precision in QUANTIZED:
                quantize_base(self.transformer, config.model.precision, lambda tensor: tensor.to(device))
            if config.method.type != "full":
                expanded = (
                    read_part_config(source.model, "transformer").get("in_channels", DEV_CHANNELS) == DEV_CHANNELS
                )
                method = config.method.model_copy(update={"init_from": None})
                add_adapter(self.transformer, method, expanded=expanded, seed=0)
        self._trained = {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}
        self._start: dict[str, Tensor] = {}
        if source.run is not None and config is not None and config.method.type != "full":
            self._start = {name: p.detach().cpu().clone() for name, p in self._trained.items()}  # changes nothing yet
        if source.adapter is not None:
            _add_exported(self.transformer, source.adapter)
        compute_in(self.transformer, self.dtype)
        self.transformer.to(device).eval().requires_grad_(False)

    def load_base(self) -> None:
        """Back to the base's weights. Of a run alone."""
        if not self._is_changed:
            return
        start = self._start or dict(load_transformer(self.source.model, dtype=self.dtype).named_parameters())
        for name, parameter in self._trained.items():
            parameter.data.copy_(start[name])
        self._is_changed = False

    def load_checkpoint(self, folder: Path, weights: Weights = "live") -> None:
        """Take a checkpoint's weights, or their moving average. Raises InputError if it holds no average or was trained
        on another base, CheckpointDeleted if it goes meanwhile."""
        shapes = {name: parameter.shape for name, parameter in self._trained.items()}
        is_adapter = self.source.config is not None and self.source.config.method.type != "full"
        with tell_if_deleted(folder):
            read = open_weights(folder, weights, shapes, self.source.model, is_adapter=is_adapter)
            self._is_changed = True
            for name, parameter in self._trained.items():
                parameter.data.copy_(read(name))
        log.info("%s: %s weights", folder, weights)

    def load_newest(self, folder: Path, weights: Weights = "live") -> None:
        """`load_checkpoint` of the one that was found for the source; where that is a run, which deletes it meanwhile,
        of the newest then."""
        found = [folder]
        read_chosen(
            lambda: found.pop() if found else find_checkpoint(self.source.path),
            lambda chosen: self.load_checkpoint(chosen, weights),
            by_name=self.source.path != self.source.run,
        )


def _usual_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _add_exported(transformer: FluxTransformer2DModel, file: Path) -> None:
    """Put an exported adapter on its base, by diffusers' own loader."""
    try:
        with safe_open(file, "pt") as opened:
            has_lokr = any(".lokr_" in name for name in opened.keys())  # noqa: SIM118  (no dict: it has no iterator)
        # In memory at once, as trainer/export/verify.py says.
        settings = {"weight_name": file.name, "adapter_name": _EXPORTED, "low_cpu_mem_usage": False}
        if has_lokr:
            transformer.load_lora_adapter(str(file.parent), use_safetensors=True, **settings)
        else:
            parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
            pipeline = FluxFillPipeline(transformer=transformer, **dict.fromkeys(parts))
            pipeline.load_lora_weights(str(file.parent), use_safetensors=True, **settings)
    except Exception as error:  # safetensors, peft and diffusers each have their own
        raise InputError(f"{file}: cannot be put on its base ({error}).") from error
    if not getattr(transformer, "peft_config", None):
        raise InputError(f"{file}: holds no adapter of FLUX.1's transformer.")
    prepare_layers(transformer, _EXPORTED)
