"""Which layers get an adapter, and that a new one changes nothing yet."""

import re

import pytest
import torch

from configs.errors import InputError
from configs.schema import FlowConfig
from tests.trainer.adapters.live_models import (
    DORA,
    LOKR,
    METHODS,
    adapted,
    adapter_of,
    assert_same_output,
    lora,
    train_a_little,
    velocity_of,
)
from trainer.adapters.build import adapter_targets, add_adapter
from trainer.adapters.files import ADAPTER
from trainer.model.flux import load_transformer, predict_velocity

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.mark.parametrize("targets, per_double, per_single", [("attention", 8, 3), ("attention+mlp", 12, 5)])
def test_named_targets_are_the_linear_layers_of_every_block(pipeline, targets, per_double, per_single):
    found = adapter_targets(pipeline.transformer, lora(targets=targets))
    assert len(found) == len(set(found)) == 2 * per_double + 4 * per_single
    assert all(re.match(r"(single_)?transformer_blocks\.\d+\.", name) for name in found)
    assert not [name for name in found if "norm" in name]


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", ["proj_out"], ["to_q", "proj_out", "ff.net.2"]])
def test_the_models_own_last_layers_are_never_adapted(pipeline, targets):
    found = adapter_targets(pipeline.transformer, lora(targets=targets))
    assert not {"proj_out", "norm_out.linear"} & set(found)


def test_a_list_takes_names_as_peft_does(pipeline):
    found = adapter_targets(
        pipeline.transformer, lora(targets=["to_k", "transformer_blocks.1.attn.to_q", "x_embedder"])
    )
    assert found == [
        "x_embedder",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.to_k",
        *(f"single_transformer_blocks.{block}.attn.to_k" for block in range(4)),
    ]


@pytest.mark.parametrize("unknown", ["to_query", "attn", "norm1", "o_q"])
def test_an_unknown_target_is_refused_with_the_names_there_are(pipeline, unknown):
    with pytest.raises(InputError, match=rf"method\.targets.*{unknown}.*attn\.to_q") as refused:
        adapter_targets(pipeline.transformer, lora(targets=["to_q", unknown]))
    assert "transformer_blocks" not in str(refused.value)


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
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            velocity_of(adapted(tiny_model, method, dtype=torch.bfloat16), rows), velocity_of(base, rows)
        )


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


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_adapters_input_is_not_copied_to_fp32(tiny_model, rows):
    """Under autocast to_q, to_k and to_v read one bf16 tensor; so must their adapters, in forward and backward."""
    transformer = load_transformer(tiny_model, dtype=torch.bfloat16)
    add_adapter(transformer, lora(), expanded=False, seed=0)
    inputs = []
    attention = transformer.single_transformer_blocks[0].attn
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.lora_A[ADAPTER].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = predict_velocity(transformer, rows.noise, rows, torch.tensor([0.5]), FlowConfig())
    assert len({tensor.data_ptr() for tensor in inputs}) == 1
    velocity.float().square().mean().backward()
    gradient = attention.to_q.lora_B[ADAPTER].weight.grad
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


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
        assert_same_output(velocity_of(transformer, rows), plain)
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    finally:
        torch._dynamo.reset()
