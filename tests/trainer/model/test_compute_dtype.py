"""bf16 from end to end, against FluxFillPipeline's own and against fp32."""

import pytest
import torch
from torch import nn

from configs.schema import FlowConfig
from trainer.model.compute_dtype import compute_in
from trainer.model.flux import load_transformer, predict_velocity

FLOW = FlowConfig(guidance=32.0)  # with sigma 0.25 it is a number that bf16 holds: the model is told both in bf16
BF16 = torch.bfloat16


def velocity_of(transformer, rows) -> torch.Tensor:
    return predict_velocity(transformer, rows.noise, rows, torch.tensor([0.25]), FLOW)


@pytest.fixture
def rows(load_triple):
    return load_triple(64, 64, of=(64, 64)).rows


def of_dtype(tiny_model, dtype: torch.dtype, *, trains: bool):
    transformer = load_transformer(tiny_model, dtype=dtype).requires_grad_(trains)
    compute_in(transformer, BF16)
    return transformer


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the CPU has no such fused kernel
def test_fp32_masters_compute_what_bf16_weights_do_and_near_fp32(tiny_model, rows):
    exact = velocity_of(load_transformer(tiny_model, dtype=torch.float32), rows)
    masters, copies = (of_dtype(tiny_model, dtype, trains=True) for dtype in (torch.float32, BF16))
    velocities = [velocity_of(transformer, rows) for transformer in (masters, copies)]
    assert velocities[0].dtype == BF16 and torch.equal(*velocities)
    assert (velocities[0].float() - exact).norm() < 0.02 * exact.norm()
    for velocity in (*velocities, exact):
        velocity.float().square().mean().backward()
    gradients = [dict(transformer.named_parameters()) for transformer in (masters, copies)]
    for name, parameter in gradients[0].items():
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad.to(BF16), gradients[1][name].grad, rtol=0.02, atol=1e-6)


def test_the_pipeline_in_bf16_calls_the_same_function(tiny_model, rows):
    """What the pipeline gives the transformer in bf16, with and without what training adds to it."""
    plain = load_transformer(tiny_model, dtype=BF16)
    trained = of_dtype(tiny_model, BF16, trains=False)
    seen = {}
    trained.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        given = velocity_of(trained, rows)
        as_pipeline = {
            name: value.to(BF16) if torch.is_tensor(value) and not name.endswith("_ids") else value
            for name, value in seen.items()
        }
        assert torch.equal(plain(**as_pipeline)[0], given)
    assert seen["img_ids"].dtype == seen["txt_ids"].dtype == torch.float32


def test_no_copy_of_an_fp32_weight_is_kept_for_the_backward_pass(tiny_model, rows):
    transformer = of_dtype(tiny_model, torch.float32, trains=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        velocity_of(transformer, rows)
    shapes = {layer.weight.shape for layer in transformer.modules() if isinstance(layer, nn.Linear)}
    tokens = {rows.bucket.tokens, rows.t5.shape[1]}
    copies = [t for t in kept if t.dtype == BF16 and t.ndim == 2 and (t.shape in shapes or t.t().shape in shapes)]
    assert not [t.shape for t in copies if not tokens & {*t.shape}]


def test_in_fp32_nothing_changes(tiny_model):
    transformer = load_transformer(tiny_model, dtype=torch.float32)
    compute_in(transformer, torch.float32)
    assert not transformer._forward_pre_hooks
    assert {type(m) for m in transformer.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
