"""A FLUX.1-Fill folder: the trained transformer in files of a few gigabytes, every other part from the base."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from data.encoders.model_folder import PARTS
from data.storage.disk_full import FINISHED_IS_KEPT
from data.storage.new_folder import new_folder
from data.storage.safetensors_file import write_tensor_dict
from trainer.export.dtypes import stored_dtype, to_stored

FILE_BYTES = 4 * 2**30  # of one file of a transformer's weights, and so of what an export holds in memory

MODEL_WEIGHTS = "diffusion_pytorch_model.safetensors"


def export_model(
    transformer: FluxTransformer2DModel,
    model: Path,
    folder: Path,
    *,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    file_bytes: int = FILE_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`write_model` into a folder of that name, in the place of one that is there; if it fails, nothing is left."""
    with new_folder(folder, replace=True, kept=FINISHED_IS_KEPT) as temporary:
        write_model(
            transformer, model, temporary, weights=weights, dtype=dtype, file_bytes=file_bytes, metadata=metadata
        )


def write_model(
    transformer: FluxTransformer2DModel,
    model: Path,
    folder: Path,
    *,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    file_bytes: int = FILE_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Make of an empty folder one of FLUX.1-Fill: the trained transformer in `dtype`, every other part from the base.

    transformer: only its config is used.  weights: (parameter's name, tensor) of every parameter, in the model's order;
    no more than one file of them is held at a time.  metadata: of those files.  The other parts are hard links where
    the disk allows it.  Raises RuntimeError if the weights are not those of the model.
    """
    part = folder / "transformer"
    part.mkdir()
    with torch.device("meta"):
        # Without the folder that the base lay in, which says nothing to others.
        own = {key: value for key, value in transformer.config.items() if key != "_name_or_path"}
        exported = FluxTransformer2DModel.from_config(own)
    exported.save_config(part)
    shapes = {name: tensor.shape for name, tensor in exported.state_dict().items()}
    _write_weights(part, plan_files(shapes, dtype, file_bytes), shapes, weights, dtype, metadata)
    for name in PARTS:
        if name != "transformer":
            link_part(model / name, folder / name)
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    # Also when the base was FLUX.1-dev; an image encoder that FluxPipeline may name has no place in FluxFillPipeline.
    index = {name: part for name, part in index.items() if name.startswith("_") or name in PARTS}
    index["_class_name"] = "FluxFillPipeline"
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def plan_files(shapes: Mapping[str, torch.Size], dtype: torch.dtype, file_bytes: int) -> dict[str, str]:
    """Tensor -> the file that holds it, in order, by diffusers' names. A file is full at `file_bytes`."""
    numbers, size, number = {}, 0, 1
    for name, shape in shapes.items():
        tensor_bytes = _bytes_of(name, shape, dtype)
        if size and size + tensor_bytes > file_bytes:
            size, number = 0, number + 1
        size += tensor_bytes
        numbers[name] = number
    stem, end = MODEL_WEIGHTS.split(".")
    files = (
        {n: f"{stem}-{n:05d}-of-{number:05d}.{end}" for n in range(1, number + 1)} if number > 1 else {1: MODEL_WEIGHTS}
    )
    return {name: files[number] for name, number in numbers.items()}


def _bytes_of(name: str, shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * stored_dtype(name, tuple(shape), dtype).itemsize


def _write_weights(
    part: Path,
    places: Mapping[str, str],
    shapes: Mapping[str, torch.Size],
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None,
) -> None:
    lacking = set(places)
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in places.values()}
    numbers = Counter(places.values())
    for name, tensor in weights:
        if name not in lacking or tensor.shape != shapes[name]:
            raise RuntimeError(f"{part}: {name} {list(tensor.shape)} does not belong to the model, or was given twice")
        lacking.remove(name)
        file = places[name]
        waiting[file][name] = to_stored(name, tensor, dtype)
        if len(waiting[file]) == numbers[file]:
            write_tensor_dict(part / file, waiting.pop(file), metadata)
    if lacking:
        raise RuntimeError(f"{part}: {len(lacking)} tensors were not given, {sorted(lacking)[:3]} among them")
    write_index(part, places, shapes, dtype)


def write_index(part: Path, places: Mapping[str, str], shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> None:
    """Write the index of a part's weights, which several files need.  places: of `plan_files`."""
    if len(set(places.values())) > 1:
        size = sum(_bytes_of(name, shape, dtype) for name, shape in shapes.items())
        index = {"metadata": {"total_size": size}, "weight_map": dict(places)}
        (part / f"{MODEL_WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def link_part(source: Path, target: Path) -> None:
    """The files of a model's part in a new folder: hard links, else copies, for T5 alone is nine gigabytes.

    Links into a hub cache are followed to the file itself.  shutil.copytree would go on after an error, and hide that
    the disk is full.
    """
    for folder, _, names in os.walk(source, followlinks=True):
        inside = target / Path(folder).relative_to(source)
        inside.mkdir()
        for name in names:
            real = os.path.realpath(Path(folder, name))
            try:
                os.link(real, inside / name)
            except OSError:
                shutil.copy2(real, inside / name)
