"""Export at the end of a run: weights gathered, written, read back and compared."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import Config
from data.storage.disk_full import FINISHED_IS_KEPT
from data.storage.new_folder import new_folder
from trainer.engines.base import Engine
from trainer.engines.ema import Ema
from trainer.export.write import export_model
from trainer.model.base_fingerprint import base_fingerprint
from trainer.process.json_lines import write_event
from trainer.process.run_owner import confirm_ownership


def export_and_verify(config: Config, engine: Engine, model: Path, ema: Ema) -> None:
    """Write <run>/final (and <run>/final-ema if an average is kept), read it back, compare it with the live weights;
    nothing where `checkpoint.at_end` is false.

    All ranks call it; rank 0 writes. Raises RuntimeError if what was written is not what was trained.
    """
    if config.checkpoint.at_end:
        if engine.is_main:
            confirm_ownership()
        _export(config, engine, model, "final", "live")
        if ema.averages:
            with ema.in_place(engine):
                _export(config, engine, model, "final-ema", "ema")
        elif engine.is_main:  # of an earlier end of the run, with other weights
            shutil.rmtree(config.run.folder / "final-ema", ignore_errors=True)
        if engine.is_main:
            write_event(config.run.folder, "exported", step=config.train.steps)
    engine.ranks.barrier()


def _export(config: Config, engine: Engine, model: Path, name: str, weights: str) -> None:
    # With peft and transformers: half a second, at the end alone.
    from trainer.export.card import metadata_of, write_card
    from trainer.export.dtypes import DTYPES
    from trainer.export.formats import usage_in_diffusers
    from trainer.export.trained import Origin

    is_whole, folder = config.method.type == "full", config.run.folder / name
    dtype = engine.compute_dtype if is_whole else torch.float32
    metadata: dict[str, str] = {}
    if engine.is_main:
        origin = Origin(config, config.run.folder, config.train.steps, weights, model, base_fingerprint(model))
        of_dtype = next(known for known, stored in DTYPES.items() if stored == dtype)
        metadata = metadata_of(origin, "diffusers", of_dtype)
    (_export_model if is_whole else _export_adapter)(engine, model, folder, metadata)
    if engine.is_main:
        write_card(origin, folder, metadata, usage_in_diffusers(None if is_whole else engine.unwrap()))


def _export_model(engine: Engine, model: Path, folder: Path, metadata: Mapping[str, str]) -> None:
    from trainer.export.verify import verify_model

    transformer, dtype = engine.unwrap(), engine.compute_dtype
    with _gathered(engine) as weights:
        if engine.is_main:
            export_model(transformer, model, folder, weights=weights, dtype=dtype, metadata=metadata)
    with _gathered(engine) as weights:
        if engine.is_main:
            verify_model(transformer, folder, weights=weights, dtype=dtype)


@contextmanager
def _gathered(engine: Engine) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Every trained parameter, one at a time, on rank 0. The other ranks take part in gathering all of them, also
    those that rank 0 did not ask for because it failed."""
    weights = engine.iter_full_weights()
    try:
        yield weights
    finally:
        for _ in weights:
            pass


def _export_adapter(engine: Engine, model: Path, folder: Path, metadata: Mapping[str, str]) -> None:
    from trainer.adapters.files import save_adapter
    from trainer.export.verify import verify_adapter, verify_adapter_file

    weights = engine.full_weights()
    if engine.is_main:
        transformer = engine.unwrap()
        with new_folder(folder, replace=True, kept=FINISHED_IS_KEPT) as temporary:
            save_adapter(transformer, temporary, tensors=weights, metadata=metadata)
        verify_adapter_file(transformer, folder, weights)
        if engine.rank0_has_full_model:
            verify_adapter(transformer, model, folder)
