"""What a checkpoint trained, to be put into a model: live weights or their average, of the model that it is for."""

from collections.abc import Mapping
from pathlib import Path

import torch

from configs.errors import InputError
from data.storage.safetensors_file import ReadTensor
from trainer.checkpoints.run_state import read_state
from trainer.checkpoints.tensor_files import StateFiles
from trainer.model.base_fingerprint import is_base

KINDS = {"live": "weight", "ema": "ema"}


def open_weights(
    folder: Path, weights: str, shapes: Mapping[str, torch.Size], model: Path, *, is_adapter: bool
) -> ReadTensor:
    """Reader of a checkpoint's trained tensors by parameter name, in the dtype that they trained in.

    weights: of KINDS.  shapes: of the parameters that train.  model: the base they go with; an adapter goes with the
    one it trained on alone.  Raises InputError if it holds no such weights, or was trained on another base.
    """
    refuse_without(weights, folder)
    files, kind = StateFiles(folder), KINDS[weights]
    cure = "Put the base back that the run began with, where model.base of its config.yaml says, or give it by --base."
    if {name: shape.numel() for name, shape in shapes.items()} != files.sizes:
        raise InputError(f"{folder}: trained another model than {model}: their tensors differ. {cure}")
    base = read_state(folder)[0].base if is_adapter else None
    if base is not None and not is_base(model, base.fingerprint):
        raise InputError(
            f"{folder}: its adapter was trained on other weights than those of {model}, though of the same shapes. "
            f"{cure}"
        )
    return lambda name: files.read(kind, name, 0, shapes[name].numel()).view(shapes[name])


def refuse_without(weights: str, folder: Path) -> None:
    """Raises InputError if a checkpoint holds no such weights, of KINDS."""
    if KINDS[weights] not in StateFiles(folder).kinds():
        raise InputError(f"{folder}: holds no moving average: the run had train.ema_decay=null. Give --weights live.")
