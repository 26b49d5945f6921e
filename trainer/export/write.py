"""A FLUX.1-Fill folder: the trained transformer in files of a few gigabytes, every other part from the base."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from data.encoders.model_folder import PARTS
from data.storage.atomic_write import apply_umask

FILE_BYTES = 4 * 2**30  # of one file of a transformer's weights, and so of what an export holds in memory

_MODEL_WEIGHTS = "diffusion_pytorch_model.safetensors"


def export_model(
    transformer: FluxTransformer2DModel,
    model: Path,
    folder: Path,
    *,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a FLUX.1-Fill folder: the trained transformer in `dtype`, every other part from the base.

    transformer: only its config is used.  weights: (parameter's name, tensor) of every parameter, in
    the model's order; no more than one file of them is held at a time.  The other parts are hard links where the disk
    allows it.  Raises RuntimeError if the weights are not those of the model.
    """
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    part = temporary / "transformer"
    part.mkdir(parents=True)
    with torch.device("meta"):
        exported = FluxTransformer2DModel.from_config(transformer.config)
    exported.save_config(part)
    shapes = {name: tensor.shape for name, tensor in exported.state_dict().items()}
    _write_weights(part, plan_files(shapes, dtype, file_bytes), shapes, weights, dtype)
    apply_umask(part)
    for name in PARTS:
        if name != "transformer":
            shutil.copytree(model / name, temporary / name, copy_function=_link_or_copy)
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    # Also when the base was FLUX.1-dev; an image encoder that FluxPipeline may name has no place in FluxFillPipeline.
    index = {name: part for name, part in index.items() if name.startswith("_") or name in PARTS}
    index["_class_name"] = "FluxFillPipeline"
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def plan_files(shapes: Mapping[str, torch.Size], dtype: torch.dtype, file_bytes: int) -> dict[str, str]:
    """Tensor -> the file that holds it, in order, by diffusers' names. A file is full at `file_bytes`."""
    numbers, size, number = {}, 0, 1
    for name, shape in shapes.items():
        tensor_bytes = shape.numel() * dtype.itemsize
        if size and size + tensor_bytes > file_bytes:
            size, number = 0, number + 1
        size += tensor_bytes
        numbers[name] = number
    stem, end = _MODEL_WEIGHTS.split(".")
    files = (
        {n: f"{stem}-{n:05d}-of-{number:05d}.{end}" for n in range(1, number + 1)}
        if number > 1
        else {1: _MODEL_WEIGHTS}
    )
    return {name: files[number] for name, number in numbers.items()}


def _write_weights(
    part: Path,
    places: Mapping[str, str],
    shapes: Mapping[str, torch.Size],
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    lacking = set(places)
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in places.values()}
    numbers = Counter(places.values())
    for name, tensor in weights:
        if name not in lacking or tensor.shape != shapes[name]:
            raise RuntimeError(f"{part}: {name} {list(tensor.shape)} does not belong to the model, or was given twice")
        lacking.remove(name)
        file = places[name]
        waiting[file][name] = tensor.detach().to("cpu", dtype).contiguous()
        if len(waiting[file]) == numbers[file]:
            save_file(waiting.pop(file), part / file, metadata={"format": "pt"})
    if lacking:
        raise RuntimeError(f"{part}: {len(lacking)} tensors were not given, {sorted(lacking)[:3]} among them")
    if len(numbers) > 1:
        size = sum(shape.numel() * dtype.itemsize for shape in shapes.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(places)}
        (part / f"{_MODEL_WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _link_or_copy(source: str, target: str) -> str:
    """Hard link, else copy: T5 alone is nine gigabytes. Links into a hub cache are followed to the file itself."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:
        shutil.copy2(real, target)
    return target
