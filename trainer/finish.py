"""The end of a run: its weights gathered, exported, read back."""

import logging
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from configs.schema import Config
from trainer.adapter import WEIGHTS_NAME, adapter_tensors, save_adapter
from trainer.ema import Ema
from trainer.engine import Engine
from trainer.export import export_model, verify_adapter, verify_model

log = logging.getLogger("fluxfill")


def export_and_verify(config: Config, engine: Engine, model: Path, ema: Ema) -> None:
    """Write <run>/final (and <run>/final-ema if an average is kept), read it back, compare it with the live weights.

    All ranks call it; rank 0 writes. Raises RuntimeError if what was written is not what was trained.
    """
    exports = {"final": engine.full_weights()}
    if ema.averages:
        with ema.in_place(engine):
            exports["final-ema"] = engine.full_weights()
    if engine.is_main:
        transformer = engine.plain_transformer
        for name, weights in exports.items():
            folder = config.run.folder / name
            if config.method.type == "full":
                export_model(transformer, model, folder, weights=weights, dtype=engine.compute_dtype)
                verify_model(transformer, folder, weights=weights, dtype=engine.compute_dtype)
            else:
                save_adapter(transformer, folder, tensors=weights)
                verify_adapter_file(transformer, folder, weights)
                if engine.holds_whole_model and name == "final":
                    verify_adapter(transformer, model, folder)
    engine.wait()


def verify_adapter_file(transformer: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
    """Compare an exported adapter's file with the trained tensors, bit by bit. Raises RuntimeError if they differ."""
    expected = adapter_tensors(transformer, weights)
    found = load_file(folder / WEIGHTS_NAME)
    wrong = [
        name for name, tensor in expected.items() if not found.get(f"transformer.{name}", tensor[:0]).equal(tensor)
    ]
    if wrong or len(found) != len(expected):
        raise RuntimeError(f"{folder}: {len(wrong)} of {len(expected)} adapter tensors came back different")
    log.info("%s: read back, all %d adapter tensors as they were in the run", folder, len(found))
