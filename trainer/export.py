"""What leaves a run: a LoRA for `load_lora_weights`, or a whole model folder; read back before the run is done."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
from torch import Tensor

from data.model_folder import PARTS
from trainer.adapter import ADAPTER, is_lokr, prepare_layers

log = logging.getLogger("fluxfill")

_CHECK_ADAPTER = "reloaded"


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
    transformer: FluxTransformer2DModel, model: Path, folder: Path, *, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write a whole FLUX.1-Fill folder: the trained transformer in `dtype`, every other part from the base.

    weights: parameter name -> tensor, the ones to write.  The other parts are hard links where the disk allows it.
    """
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with torch.device("meta"):  # save_pretrained writes a model's own tensors, so these get a model of their own
        exported = FluxTransformer2DModel.from_config(transformer.config)
    stored = transformer.state_dict() | dict(weights)
    exported.load_state_dict({name: t.detach().to("cpu", dtype) for name, t in stored.items()}, assign=True)
    exported.save_pretrained(temporary / "transformer")
    for part in PARTS:
        if part != "transformer":
            shutil.copytree(model / part, temporary / part, copy_function=_link_or_copy)
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    # Also when the base was FLUX.1-dev; an image encoder that FluxPipeline may name has no place in FluxFillPipeline.
    index = {name: part for name, part in index.items() if name.startswith("_") or name in PARTS}
    index["_class_name"] = "FluxFillPipeline"
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _link_or_copy(source: str, target: str) -> str:
    """Hard link, else copy: T5 alone is nine gigabytes. Links into a hub cache are followed to the file itself."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:
        shutil.copy2(real, target)
    return target


def verify_model(
    transformer: FluxTransformer2DModel, folder: Path, *, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Read an exported folder back and compare every tensor and the inputs and outputs with the live model's.

    Raises RuntimeError if anything differs.
    """
    reloaded = FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype, use_safetensors=True
    )
    for key in ("in_channels", "out_channels"):
        if getattr(reloaded.config, key) != getattr(transformer.config, key):
            raise RuntimeError(f"{folder}: {key} came back as {getattr(reloaded.config, key)}")
    expected = transformer.state_dict() | dict(weights)
    found = reloaded.state_dict()
    wrong = [name for name in expected if name not in found or not _equal(expected[name], found[name], dtype)]
    if wrong or len(found) != len(expected):
        raise RuntimeError(f"{folder}: {len(wrong)} tensors came back different, {wrong[:3]} among them")
    log.info("%s: read back, all %d tensors as they were in the run", folder, len(found))


def _equal(live: Tensor, stored: Tensor, dtype: torch.dtype) -> bool:
    # diffusers leaves a tensor that the file lacks on the meta device
    return not stored.is_meta and torch.equal(live.detach().to("cpu", dtype), stored)


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
