"""Export at the end of a run: weights gathered, written, read back and compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from configs.schema import Config
from trainer.engines.base import Engine
from trainer.engines.ema import Ema
from trainer.export.write import export_model


def export_and_verify(config: Config, engine: Engine, model: Path, ema: Ema) -> None:
    """Write <run>/final (and <run>/final-ema if an average is kept), read it back, compare it with the live weights.

    All ranks call it; rank 0 writes. Raises RuntimeError if what was written is not what was trained.
    """
    export = _export_model if config.method.type == "full" else _export_adapter
    export(engine, model, config.run.folder / "final")
    if ema.averages:
        with ema.in_place(engine):
            export(engine, model, config.run.folder / "final-ema")
    engine.ranks.barrier()


def _export_model(engine: Engine, model: Path, folder: Path) -> None:
    from trainer.export.verify import verify_model  # with peft and transformers: half a second, at the end alone

    transformer, dtype = engine.unwrap(), engine.compute_dtype
    with _gathered(engine) as weights:
        if engine.is_main:
            export_model(transformer, model, folder, weights=weights, dtype=dtype)
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


def _export_adapter(engine: Engine, model: Path, folder: Path) -> None:
    from trainer.adapters.files import save_adapter
    from trainer.export.verify import verify_adapter, verify_adapter_file

    weights = engine.full_weights()
    if engine.is_main:
        transformer = engine.unwrap()
        save_adapter(transformer, folder, tensors=weights)
        verify_adapter_file(transformer, folder, weights)
        if engine.rank0_has_full_model:
            verify_adapter(transformer, model, folder)
