"""Which layers get an adapter, and that a new one changes nothing yet."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from configs.errors import InputError
from configs.schema import FlowConfig, LokrConfig
from tests.trainer.adapters.live_models import (
    DORA,
    LOKR,
    METHODS,
    WHOLE_LOKR,
    adapted,
    adapter_of,
    lora,
    train_a_little,
    velocity_of,
)
from tests.trainer.adapters.other_trainers import BLOCK_TARGETS, OUTSIDE_TARGETS
from trainer.adapters.build import add_adapter
from trainer.adapters.files import ADAPTER
from trainer.adapters.lokr import lokr_shapes
from trainer.adapters.targets import adapter_targets
from trainer.model.compute_dtype import compute_in
from trainer.model.flux import load_transformer, predict_velocity

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", ["x_embedder", "to_v"]])
def test_a_new_lora_changes_nothing(tiny_model, pipeline, rows, targets):
    transformer = adapted(tiny_model, lora(targets=targets))
    assert torch.equal(velocity_of(transformer, rows), velocity_of(pipeline.transformer, rows))


@each_method
def test_a_new_adapter_changes_nothing(tiny_model, pipeline, rows, method):
    assert torch.equal(velocity_of(adapted(tiny_model, method), rows), velocity_of(pipeline.transformer, rows))


@each_method
def test_nor_does_it_in_bf16(tiny_model, rows, method):
    """peft's own DoRA is off here: it takes the rows' lengths in bf16 where its input is, and in fp32 where that is."""
    base = load_transformer(tiny_model, dtype=torch.bfloat16)
    changed = adapted(tiny_model, method, dtype=torch.bfloat16)
    for transformer in (base, changed):
        compute_in(transformer, torch.bfloat16)
    assert torch.equal(velocity_of(changed, rows), velocity_of(base, rows))


def test_only_the_adapter_trains_in_fp32(tiny_model):
    transformer = load_transformer(tiny_model, dtype=torch.bfloat16)
    add_adapter(transformer, lora(), expanded=False, seed=0)
    for name, parameter in transformer.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name


@each_method
def test_only_the_adapter_trains_and_all_of_it_gets_a_gradient(tiny_model, rows, method):
    transformer = adapted(tiny_model, method)
    train_a_little(transformer)
    predict_velocity(transformer, rows.noise, rows, torch.tensor([0.5]), FlowConfig()).square().mean().backward()
    for name, parameter in transformer.named_parameters():
        trains = ".lora_" in name or ".lokr_" in name
        assert parameter.requires_grad == trains and parameter.dtype == torch.float32, name
        assert not trains or parameter.grad.abs().sum() > 0, name


def test_the_start_depends_on_the_seed_alone(tiny_model):
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(states))
        before = torch.get_rng_state()
        states.append(adapter_of(adapted(tiny_model, lora(), seed=seed)))
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", [lora(), *METHODS.values()], ids=["lora", *METHODS])
def test_over_a_bf16_base_an_fp32_adapter_takes_and_gives_bf16_alone(tiny_model, rows, method):
    transformer = adapted(tiny_model, method, dtype=torch.bfloat16)
    compute_in(transformer, torch.bfloat16)
    seen = set()
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.register_forward_hook(lambda _, given, made: seen.update({given[0].dtype, made.dtype}))
    predict_velocity(transformer, rows.noise, rows, torch.tensor([0.5]), FlowConfig()).float().mean().backward()
    assert seen == {torch.bfloat16}
    gradients = [p.grad for p in transformer.parameters() if p.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


MIXED_LOKR = LokrConfig(type="lokr", rank=8, alpha=4)  # the last layer's larger matrix is whole, those of blocks not
# Every linear layer is among them, and layers whose names end as others' do: the last layer's is that of the blocks'.
TARGET_SETS = [
    "attention",
    "attention+mlp",
    ["to_q", "norm.linear", "x_embedder"],
    ["proj_out", "transformer.proj_out"],
]
TARGET_SETS += [["transformer.proj_out", "proj_mlp"], BLOCK_TARGETS, BLOCK_TARGETS + OUTSIDE_TARGETS]


@pytest.mark.parametrize("targets", TARGET_SETS, ids=str)
@pytest.mark.parametrize("kind", [lora(rank=6, alpha=2), DORA, LOKR, MIXED_LOKR, WHOLE_LOKR])
def test_each_layer_that_is_targeted_has_its_rank_and_scale_and_no_other_an_adapter(tiny_model, kind, targets):
    """alpha / rank; of a LoKr 1 where the larger matrix is whole, which is so where the rank is half of its side."""
    method = type(kind).model_validate(kind.model_dump() | {"targets": targets})
    plain = load_transformer(tiny_model, dtype=torch.float32)
    scales = {}
    for layer in adapter_targets(plain, method):
        is_whole = method.type == "lokr" and "lokr_w2" in lokr_shapes(plain.get_submodule(layer), method)
        scales[layer] = 1.0 if is_whole else method.alpha / method.rank
    layers = {
        name: module
        for name, module in adapted(tiny_model, method).named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    assert {name: module.scaling[ADAPTER] for name, module in layers.items()} == pytest.approx(scales)
    assert {module.r[ADAPTER] for module in layers.values()} == {method.rank}


def test_of_expanded_dev_the_input_layer_alone_has_another_rank_and_all_have_one_scale(tiny_dev_model):
    for rank in (4, 320, 400):
        method = lora(
            rank=rank, alpha=3, targets=["x_embedder", "context_embedder", "proj_out", "transformer.proj_out"]
        )
        live = adapted(tiny_dev_model, method, expanded=True)
        layers = {name: module for name, module in live.named_modules() if isinstance(module, BaseTunerLayer)}
        assert {name: module.r[ADAPTER] for name, module in layers.items() if module.r[ADAPTER] != rank} == (
            {"x_embedder": 320} if rank == 4 else {}
        )
        assert {"context_embedder", "proj_out"} <= layers.keys()
        assert [module.scaling[ADAPTER] for module in layers.values()] == pytest.approx([3 / rank] * len(layers))


def test_an_expanded_base_gets_an_adapter_for_all_its_new_inputs(tiny_dev_model, rows):
    live = adapted(tiny_dev_model, lora(), expanded=True)
    layer = live.x_embedder
    # Rank 320 over 384 inputs of which 320 are new; the same scale as elsewhere.
    assert layer.lora_A[ADAPTER].weight.shape == (320, 384)
    assert layer.scaling[ADAPTER] == live.transformer_blocks[0].attn.to_q.scaling[ADAPTER] == 2.0
    assert live.context_embedder.__class__ is torch.nn.Linear
    assert torch.equal(
        velocity_of(live, rows), velocity_of(load_transformer(tiny_dev_model, dtype=torch.float32), rows)
    )


def test_lokr_cannot_teach_dev_its_new_inputs(tiny_dev_model):
    with pytest.raises(InputError, match=r"320 inputs.*method\.type=lora"):
        adapted(tiny_dev_model, LOKR, expanded=True)
