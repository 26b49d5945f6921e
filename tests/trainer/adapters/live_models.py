"""Tiny models with an adapter on them, and what they and a stranger's pipeline compute."""

from pathlib import Path

import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from configs.adapter_targets import AdapterConfig
from configs.schema import DoraConfig, FlowConfig, LokrConfig, LoraConfig
from data.batches.micro_batch import MicroBatch
from trainer.adapters.build import add_adapter
from trainer.adapters.dora import DoraMagnitude
from trainer.adapters.files import ADAPTER
from trainer.adapters.lokr import Kronecker
from trainer.adapters.read import WEIGHTS_NAME
from trainer.model.flux import load_transformer, predict_velocity

RANK = 4
DORA = DoraConfig(type="dora", rank=4, alpha=8)
LOKR = LokrConfig(type="lokr", rank=2, alpha=6, factor=4)
WHOLE_LOKR = LokrConfig(type="lokr", rank=64, alpha=32)  # every matrix whole; alpha does not count
METHODS: dict[str, AdapterConfig] = {
    "dora": DORA,
    "lokr-low-rank": LOKR,
    "lokr-whole": WHOLE_LOKR,
    "lokr-auto": LokrConfig(type="lokr", rank=2, alpha=2, targets="attention"),
}
NO_TEXT = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(**({"type": "lora", "rank": RANK, "alpha": 2 * RANK, "targets": "attention+mlp"} | settings))


def adapted(
    model: Path, method: AdapterConfig, *, dtype: torch.dtype = torch.float32, expanded: bool = False, seed: int = 0
) -> FluxTransformer2DModel:
    """The model of a folder with the method's adapter on it."""
    transformer = load_transformer(model, dtype=dtype)
    add_adapter(transformer, method, expanded=expanded, seed=seed)
    return transformer


def adapter_of(transformer: FluxTransformer2DModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in get_peft_model_state_dict(transformer, adapter_name=ADAPTER).items()}


@torch.no_grad()
def train_a_little(transformer: FluxTransformer2DModel) -> None:
    """Give every tensor of the adapter a value of its own."""
    generator = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@torch.no_grad()
def velocity_of(transformer: FluxTransformer2DModel, rows: MicroBatch) -> torch.Tensor:
    return predict_velocity(transformer, rows.noise, rows, torch.tensor([0.7]), FlowConfig())


def reloaded_velocity(model: Path, adapter: Path, rows: MicroBatch) -> torch.Tensor:
    """What a user gets who follows the line in the docs, by the libraries alone.  adapter: a folder or a file."""
    fresh = FluxFillPipeline.from_pretrained(model, **NO_TEXT)
    before = velocity_of(fresh.transformer, rows)
    file = adapter / WEIGHTS_NAME if adapter.is_dir() else adapter
    if any(".lokr_" in name for name in load_file(file)):
        fresh.transformer.load_lora_adapter(adapter, use_safetensors=True)
    else:
        fresh.load_lora_weights(adapter)
    assert not any(isinstance(module, DoraMagnitude | Kronecker) for module in fresh.transformer.modules())
    after = velocity_of(fresh.transformer, rows)
    assert (after - before).abs().max() > 1e-2  # the adapter does something
    return after


def assert_same_output(given: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to fp32 rounding.

    A scale multiplied into a factor instead of behind it, or sums cut up for another number of threads, move an output
    by up to ten roundings of its largest number; an adapter read wrongly by a thousand times more.
    """
    largest = expected.abs().max().item()
    torch.testing.assert_close(given, expected, rtol=0, atol=32 * torch.finfo(torch.float32).eps * largest)
