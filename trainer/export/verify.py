"""Exports read back and compared with the run's live weights: adapters by tensors and by output, models by tensors."""

import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from data.storage.safetensors_file import TensorFiles
from trainer.adapters.build import prepare_layers
from trainer.adapters.files import ADAPTER, WEIGHTS_NAME, adapter_tensors, file_tensors, is_lokr
from trainer.export.dtypes import is_same, to_stored
from trainer.export.velocity import velocity

log = logging.getLogger("fluxfill")

_CHECK_ADAPTER = "reloaded"


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
    found = TensorFiles(*sorted(part.glob("*.safetensors")))
    verify_tensors(folder, found, weights, dtype)


def verify_tensors(
    place: Path, found: TensorFiles, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
) -> None:
    """Compare files with what they should hold, bit by bit.  dtype: None: the tensors are given as they are stored.

    Raises RuntimeError if anything differs.
    """
    names, count, wrong = set(found.names()), 0, []
    for name, tensor in weights:
        count += 1
        expected = tensor if dtype is None else to_stored(name, tensor, dtype)
        if name not in names or not is_same(found.read(name), expected):
            wrong.append(name)
    if wrong or len(names) != count:
        raise RuntimeError(f"{place}: {len(wrong)} tensors came back different, {wrong[:3]} among them")
    log.info("%s: read back, all %d tensors as they were in the run", place, count)


def verify_adapter_file(
    transformer: FluxTransformer2DModel, folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Compare an exported adapter's file with the trained tensors, bit by bit. Raises RuntimeError if they differ."""
    expected = file_tensors(transformer, adapter_tensors(transformer, weights, dtype))
    found = load_file(folder / WEIGHTS_NAME)
    wrong = [name for name, tensor in expected.items() if name not in found or not torch.equal(found[name], tensor)]
    if wrong or len(found) != len(expected):
        raise RuntimeError(f"{folder}: {len(wrong)} of {len(expected)} adapter tensors came back different")
    log.info("%s: read back, all %d adapter tensors as they were in the run", folder, len(found))


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
    live = velocity(transformer)
    with _nothing_said_of_what_is_meant():
        # In memory at once: made on the meta device first, a DoRA takes the scales of a 4-bit base there with it.
        settings = {"adapter_name": _CHECK_ADAPTER, "low_cpu_mem_usage": False}
        if is_lokr(transformer):
            transformer.load_lora_adapter(str(folder), use_safetensors=True, **settings)
        else:
            pipeline.load_lora_weights(str(folder), use_safetensors=True, **settings)
    prepare_layers(transformer, _CHECK_ADAPTER)  # the file is compared here, not peft's arithmetic
    try:
        transformer.set_adapter(_CHECK_ADAPTER)
        reloaded = velocity(transformer)
    finally:
        transformer.set_adapter(ADAPTER)
        transformer.delete_adapters(_CHECK_ADAPTER)
    # The file is fp32 and its tensors were compared bit by bit. Here a card may pick another kernel for the second
    # adapter, and on a bf16 base peft rounds a DoRA's norms.
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


def _refuse_difference(live: Tensor, reloaded: Tensor, folder: Path, *, rounded: bool) -> None:
    difference, largest = (live - reloaded).abs().max().item(), live.abs().max().item()
    if not difference <= (2e-2 if rounded else 1e-5) * largest:  # a difference that is not a number is one
        raise RuntimeError(f"{folder}: the adapter read back gives another output (apart by {difference:.2g})")
    log.info("%s: read back by diffusers, output apart from the run's by %.1g", folder, difference)
