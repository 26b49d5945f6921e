"""Models with other weights than those of their folder, as after training, and files with one number changed."""

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.model.flux import load_transformer


def trained_model(folder: Path) -> FluxTransformer2DModel:
    """The model of a folder with other weights than there, as after training, and files with one number changed."""
    transformer = load_transformer(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.25)
    return transformer


def change_one_number(file: Path, value: float) -> None:
    """Replace the first number of the last tensor; the file keeps its metadata."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[list(tensors)[-1]].view(-1)[0] = value
    save_file(tensors, file, metadata=metadata)
