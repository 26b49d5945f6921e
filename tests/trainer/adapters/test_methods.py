"""DoRA and LoKr: the base at first; a stranger's pipeline reads what was trained; a run begins where another ended."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from configs.schema import DoraConfig, FlowConfig, LokrConfig, LoraConfig
from trainer.adapters.adapter import ADAPTER, WEIGHTS_NAME, AdapterConfig, add_adapter, save_adapter
from trainer.adapters.dora import DoraMagnitude, row_norms
from trainer.adapters.lokr import Kronecker
from trainer.export.write import verify_adapter
from trainer.model.flux import load_transformer, predict_velocity

NO_TEXT = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
DORA = DoraConfig(type="dora", rank=4, alpha=8)
LOKR = LokrConfig(type="lokr", rank=2, alpha=6, factor=4)
WHOLE_LOKR = LokrConfig(type="lokr", rank=64, alpha=32)  # every matrix whole; alpha does not count
METHODS = [DORA, LOKR, WHOLE_LOKR, LokrConfig(type="lokr", rank=2, alpha=2, targets="attention")]
NAMES = ["dora", "lokr-low-rank", "lokr-whole", "lokr-auto"]
each_method = pytest.mark.parametrize("method", METHODS, ids=NAMES)


def adapted(model: Path, method: AdapterConfig, *, dtype=torch.float32, expanded=False) -> FluxTransformer2DModel:
    transformer = load_transformer(model, dtype=dtype)
    add_adapter(transformer, method, expanded=expanded, seed=0)
    return transformer


@torch.no_grad()
def train_a_little(transformer: FluxTransformer2DModel) -> None:
    """Give every tensor of the adapter a value of its own."""
    generator = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@pytest.fixture
def rows(load_triple):
    return load_triple(64, 64, of=(64, 64)).rows


@torch.no_grad()
def velocity_of(transformer: FluxTransformer2DModel, rows) -> torch.Tensor:
    return predict_velocity(transformer, rows.noise, rows, torch.tensor([0.7]), FlowConfig())


@each_method
def test_a_new_adapter_changes_nothing(tiny_model, pipeline, rows, method):
    assert torch.equal(velocity_of(adapted(tiny_model, method), rows), velocity_of(pipeline.transformer, rows))


@each_method
def test_nor_does_it_in_bf16(tiny_model, rows, method):
    """peft's own DoRA is off here: it takes the rows' lengths in bf16 where its input is, and in fp32 where that is."""
    base = load_transformer(tiny_model, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            velocity_of(adapted(tiny_model, method, dtype=torch.bfloat16), rows), velocity_of(base, rows)
        )


@each_method
def test_only_the_adapter_trains_and_all_of_it_gets_a_gradient(tiny_model, rows, method):
    transformer = adapted(tiny_model, method)
    train_a_little(transformer)
    predict_velocity(transformer, rows.noise, rows, torch.tensor([0.5]), FlowConfig()).square().mean().backward()
    for name, parameter in transformer.named_parameters():
        trains = ".lora_" in name or ".lokr_" in name
        assert parameter.requires_grad == trains and parameter.dtype == torch.float32, name
        assert not trains or parameter.grad.abs().sum() > 0, name


def reloaded_velocity(model: Path, adapter: Path, rows) -> torch.Tensor:
    """What a user gets who follows the line in the docs, by the libraries alone."""
    fresh = FluxFillPipeline.from_pretrained(model, **NO_TEXT)
    before = velocity_of(fresh.transformer, rows)
    if any(".lokr_" in name for name in load_file(adapter / WEIGHTS_NAME)):
        fresh.transformer.load_lora_adapter(adapter, use_safetensors=True)
    else:
        fresh.load_lora_weights(adapter)
    assert not any(isinstance(module, DoraMagnitude | Kronecker) for module in fresh.transformer.modules())
    after = velocity_of(fresh.transformer, rows)
    assert (after - before).abs().max() > 1e-2
    return after


@each_method
def test_a_fresh_pipeline_with_the_adapter_gives_the_live_models_output(tiny_model, tmp_path, rows, method):
    live = adapted(tiny_model, method)
    train_a_little(live)
    save_adapter(live, tmp_path)
    torch.testing.assert_close(
        reloaded_velocity(tiny_model, tmp_path, rows), velocity_of(live, rows), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("method", METHODS[1:], ids=NAMES[1:])
def test_a_lokr_needs_no_metadata_to_be_read(tiny_model, tmp_path, rows, method):
    live = adapted(tiny_model, method)
    train_a_little(live)
    save_adapter(live, tmp_path)
    save_file(load_file(tmp_path / WEIGHTS_NAME), tmp_path / WEIGHTS_NAME)
    torch.testing.assert_close(
        reloaded_velocity(tiny_model, tmp_path, rows), velocity_of(live, rows), rtol=0, atol=2e-6
    )


def test_dora_on_dev_adapts_the_new_inputs_too(tiny_dev_model, tmp_path, rows):
    live = adapted(tiny_dev_model, DORA, expanded=True)
    base = load_transformer(tiny_dev_model, dtype=torch.float32)
    assert torch.equal(velocity_of(live, rows), velocity_of(base, rows))
    assert live.x_embedder.lora_A[ADAPTER].weight.shape == (320, 384)


def test_lokr_cannot_teach_dev_its_new_inputs(tiny_dev_model):
    with pytest.raises(InputError, match=r"320 inputs.*method\.type=lora"):
        adapted(tiny_dev_model, LOKR, expanded=True)


def test_lengths_are_those_of_the_changed_rows():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((6, 5), (2, 5), (6, 2)))
    expected = (weight.double() + 3 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(weight, a, b, 3).double(), expected)
    assert row_norms(weight.bfloat16(), a, b, 3).dtype == torch.float32


def test_a_lokrs_file_holds_its_scale_and_its_settings(tiny_model, tmp_path):
    """alpha 6 / rank 2 = 3 where the larger matrix is of low rank, 1 where it is whole, as in LyCORIS."""
    live = adapted(tiny_model, LOKR)
    train_a_little(live)
    save_adapter(live, tmp_path)
    saved = load_file(tmp_path / WEIGHTS_NAME)
    assert all(re.fullmatch(r"transformer\..+\.lokr_w(1|2_a|2_b)", name) for name in saved)
    for name, tensor in get_peft_model_state_dict(live, adapter_name=ADAPTER).items():
        assert torch.equal(saved[f"transformer.{name}"], tensor * 3 if name.endswith("w1") else tensor)
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert [settings[f"transformer.{key}"] for key in ("r", "alpha", "decompose_factor")] == [2, 2, 4]
    whole = adapted(tiny_model, WHOLE_LOKR)
    assert whole.transformer_blocks[0].attn.to_q.scaling == {ADAPTER: 1.0}


@each_method
def test_init_from_takes_an_adapter_over(tiny_model, tmp_path, rows, method):
    first = adapted(tiny_model, method)
    train_a_little(first)
    save_adapter(first, tmp_path)
    second = adapted(tiny_model, method.model_copy(update={"init_from": tmp_path}))
    assert any(isinstance(module, DoraMagnitude | Kronecker) for module in second.modules())
    torch.testing.assert_close(velocity_of(second, rows), velocity_of(first, rows), rtol=0, atol=1e-6)
    verify_adapter(second, tiny_model, tmp_path)
    assert [p.requires_grad for p in second.parameters()] == [p.requires_grad for p in first.parameters()]


@pytest.mark.parametrize(
    "of, to, words",
    [
        (DORA, LoraConfig(type="lora", rank=4, alpha=8), r"it is a DoRA: set method\.type=dora"),
        (LoraConfig(type="lora", rank=4, alpha=8), DORA, r"it is a plain LoRA: set method\.type=lora"),
        (DORA, LOKR, r"holds transformer\..*lora_.*, but a LoKr .*lokr_w1"),
        (LOKR, DORA, "lacks"),
        (LOKR, LOKR.model_copy(update={"rank": 3}), r"lokr_w2_. is \(.*set method\.rank and method\.factor"),
        (LOKR, LOKR.model_copy(update={"factor": 8}), r"lokr_w.* is \(.*set method\.rank and method\.factor"),
        (LOKR, LOKR.model_copy(update={"targets": "attention"}), r"adapts 44 layers, this run 28: see method\.targets"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_with_what_to_set(tiny_model, tmp_path, of, to, words):
    save_adapter(adapted(tiny_model, of), tmp_path)
    with pytest.raises(InputError, match=words):
        adapted(tiny_model, to.model_copy(update={"init_from": tmp_path}))


@pytest.mark.slow
@pytest.mark.parametrize("method", [DORA, LOKR], ids=["dora", "lokr"])
def test_blocks_are_compiled_whole_and_compute_the_same(tiny_model, rows, method):
    """train.compile: regional. peft's own layers break each block into a dozen graphs."""
    transformer = adapted(tiny_model, method)
    train_a_little(transformer)
    plain = velocity_of(transformer.train(), rows)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    transformer.compile_repeated_blocks(dynamic=True, backend="eager")
    try:
        torch.testing.assert_close(velocity_of(transformer, rows), plain, rtol=0, atol=1e-6)
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    finally:
        torch._dynamo.reset()
