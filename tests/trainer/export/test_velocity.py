from pathlib import Path

import pytest
import torch

from tests.trainer.adapters.live_models import METHODS, adapted, assert_same_output, lora, train_a_little
from trainer.adapters.build import add_adapter
from trainer.export.velocity import TOLERANCE, refuse_other_velocity, streamed_velocity, velocity
from trainer.model.flux import empty_transformer, load_transformer

SOME = [lora(), METHODS["dora"], METHODS["lokr-low-rank"]]


@pytest.mark.parametrize("method", SOME, ids=["lora", "dora", "lokr"])
def test_read_layer_by_layer_the_velocity_is_that_of_the_model_in_memory(tiny_model, method):
    live = adapted(tiny_model, method)
    train_a_little(live)
    parameters = dict(live.named_parameters())
    empty = empty_transformer(tiny_model, dtype=torch.float32)
    add_adapter(empty, method, expanded=False, seed=0)
    held = []

    def read(name):
        held.append(sum(p.numel() for p in empty.parameters() if not p.is_meta))
        return parameters[name].detach()

    found = streamed_velocity(empty, read)
    assert_same_output(found, velocity(live))
    assert max(held) < sum(p.numel() for p in live.parameters()) / 20
    assert all(p.is_meta for p in empty.parameters())


def test_a_bf16_model_is_run_as_it_trains(tiny_model):
    live = load_transformer(tiny_model, dtype=torch.bfloat16).train()
    found, exact = velocity(live), velocity(load_transformer(tiny_model, dtype=torch.float32))
    assert live.training and found.dtype == torch.float32
    assert 0 < (found - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_another_velocity_is_refused(factor):
    live = torch.ones(1, 4, 64)
    for dtype in TOLERANCE:
        refuse_other_velocity(live, live.clone(), Path("out"), dtype)
        with pytest.raises(RuntimeError, match="out: read back, it gives another velocity"):
            refuse_other_velocity(live, live * factor, Path("out"), dtype)
    with pytest.raises(RuntimeError, match=r"apart by 0\.02"):  # bf16's roundings are none of fp32's
        refuse_other_velocity(live, live * 1.02, Path("out"), torch.float32)
    refuse_other_velocity(live, live * 1.02, Path("out"), torch.bfloat16)
