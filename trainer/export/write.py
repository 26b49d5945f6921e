"""What leaves a run: a LoRA for `load_lora_weights`, or a whole model folder; read back before the run is done."""

import json
import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.encoders.model_folder import PARTS
from data.storage.atomic_write import apply_umask
from trainer.adapters.adapter import ADAPTER, WEIGHTS_NAME, adapter_tensors, is_lokr, prepare_layers

log = logging.getLogger("fluxfill")

FILE_BYTES = 4 * 2**30  # of one file of a transformer's weights, and so of what an export holds in memory

_CHECK_ADAPTER = "reloaded"
_MODEL_WEIGHTS = "diffusion_pytorch_model.safetensors"


def verify_adapter(transformer: FluxTransformer2DModel, model: Path, folder: Path) -> None:
    """Load an exported adapter beside the live one, by diffusers' own loader, and compare the two outputs.

    Raises RuntimeError if they differ.
    """
    pipeline = FluxFillPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler"),
        vae=None,
        transformer=transformer,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    live = _probe(transformer)
    with _nothing_said_of_what_is_meant():
        # In memory at once: made on the meta device first, a DoRA takes the scales of a 4-bit base there with it.
        settings = {"adapter_name": _CHECK_ADAPTER, "low_cpu_mem_usage": False}
        if is_lokr(transformer):
            transformer.load_lora_adapter(str(folder), use_safetensors=True, **settings)
        else:
            pipeline.load_lora_weights(str(folder), **settings)
    prepare_layers(transformer, _CHECK_ADAPTER)  # the file is compared here, not peft's arithmetic
    try:
        transformer.set_adapter(_CHECK_ADAPTER)
        reloaded = _probe(transformer)
    finally:
        transformer.set_adapter(ADAPTER)
        transformer.delete_adapters(_CHECK_ADAPTER)
    # The file is fp32 and its tensors were compared bit by bit. Here a card may pick another kernel for the second
    # adapter, and on a bf16 base peft rounds a DoRA's lengths.
    rounded = transformer.device.type != "cpu" or transformer.dtype != torch.float32
    _refuse_difference(live, reloaded, folder, rounded=rounded)


@contextmanager
def _nothing_said_of_what_is_meant() -> Iterator[None]:
    """Without the libraries' warnings of a second adapter, and of a file that holds nothing for a text encoder."""
    log_of_loading = logging.getLogger("diffusers.loaders.lora_base")
    level = log_of_loading.level
    log_of_loading.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            yield
    finally:
        log_of_loading.setLevel(level)


def export_model(
    transformer: FluxTransformer2DModel,
    model: Path,
    folder: Path,
    *,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a whole FLUX.1-Fill folder: the trained transformer in `dtype`, every other part from the base.

    transformer: of which only the settings are looked at.  weights: (parameter's name, tensor) of every parameter, in
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


def verify_model(
    transformer: FluxTransformer2DModel, folder: Path, *, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Read an exported folder back and compare inputs, outputs and every tensor, one at a time.

    Raises RuntimeError if anything differs.
    """
    part = folder / "transformer"
    settings = json.loads((part / "config.json").read_text(encoding="utf-8"))
    for key in ("in_channels", "out_channels"):
        if settings[key] != getattr(transformer.config, key):
            raise RuntimeError(f"{folder}: {key} came back as {settings[key]}")
    found: dict[str, Any] = {}
    for file in sorted(part.glob("*.safetensors")):
        opened = safe_open(file, "pt")
        found |= dict.fromkeys(opened.keys(), opened)
    count, wrong = 0, []
    for name, tensor in weights:
        count += 1
        if name not in found or not torch.equal(found[name].get_tensor(name), tensor.detach().to("cpu", dtype)):
            wrong.append(name)
    if wrong or len(found) != count:
        raise RuntimeError(f"{folder}: {len(wrong)} tensors came back different, {wrong[:3]} among them")
    log.info("%s: read back, all %d tensors as they were in the run", folder, count)


def verify_adapter_file(
    transformer: FluxTransformer2DModel, folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Compare an exported adapter's file with the trained tensors, bit by bit. Raises RuntimeError if they differ."""
    expected = adapter_tensors(transformer, weights, dtype)
    found = load_file(folder / WEIGHTS_NAME)
    wrong = [
        name for name, tensor in expected.items() if not found.get(f"transformer.{name}", tensor[:0]).equal(tensor)
    ]
    if wrong or len(found) != len(expected):
        raise RuntimeError(f"{folder}: {len(wrong)} of {len(expected)} adapter tensors came back different")
    log.info("%s: read back, all %d adapter tensors as they were in the run", folder, len(found))


@torch.no_grad()
def _probe(transformer: FluxTransformer2DModel) -> Tensor:
    """The model's output on a fixed small input: 4 tokens of picture, 16 of text."""
    config, device, dtype = transformer.config, transformer.device, transformer.dtype
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    was_training = transformer.training
    transformer.eval()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = transformer(
            hidden_states=random(1, 4, config.in_channels),
            encoder_hidden_states=random(1, 16, config.joint_attention_dim),
            pooled_projections=random(1, config.pooled_projection_dim),
            timestep=torch.full((1,), 0.5, device=device),
            guidance=torch.full((1,), 30.0, device=device),
            img_ids=torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]], device=device),
            txt_ids=torch.zeros(16, 3, device=device),
            return_dict=False,
        )[0]
    transformer.train(was_training)
    return output.float()


def _refuse_difference(live: Tensor, reloaded: Tensor, folder: Path, *, rounded: bool) -> None:
    difference, largest = (live - reloaded).abs().max().item(), live.abs().max().item()
    if not difference <= (2e-2 if rounded else 1e-5) * largest:  # a difference that is not a number is one
        raise RuntimeError(f"{folder}: the adapter read back gives another output (apart by {difference:.2g})")
    log.info("%s: read back by diffusers, output apart from the run's by %.1g", folder, difference)
