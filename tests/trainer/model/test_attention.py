"""Which attention kernel is tried first, and that those behind it are still there."""

import logging

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from trainer.model import attention
from trainer.model.attention import choose_attention, chosen_kernel, preferred_kernel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def torchs_own():
    yield
    attention.in_force.close()


@pytest.mark.parametrize(
    "asked, capability, kernel",
    [
        ("auto", (8, 0), None),
        ("auto", (9, 0), "cudnn"),
        ("auto", (10, 3), "cudnn"),
        ("auto", (12, 0), None),
        ("auto", None, None),
        ("flash", (9, 0), "flash"),
        ("cudnn", (8, 6), "cudnn"),
    ],
)
def test_auto_prefers_cudnn_where_gpus_have_units_for_it(asked, capability, kernel):
    assert preferred_kernel(asked, capability) == kernel


def test_cudnn_is_not_preferred_where_sums_have_to_be_the_same_each_time():
    """Its gradients are added up in any order."""
    torch.use_deterministic_algorithms(True)
    try:
        assert preferred_kernel("auto", (9, 0)) is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("asked, taken", [("auto", "flash"), ("math", "flash"), ("flash", "flash"), ("cudnn", "flash")])
def test_a_kernel_is_tried_first_told_and_replaced_where_it_cannot_compute(asked, taken, caplog, monkeypatch):
    """On a CPU, which knows flash attention alone, it is told that this computes; the order is a GPU's."""
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    caplog.set_level(logging.INFO, logger="fluxfill")
    query = torch.randn(1, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    expected = scaled_dot_product_attention(query, query, query)
    before = torch._C._get_sdp_priority_order()
    choose_attention(asked, CPU, torch.float32, head=32)
    first = SDPBackend(torch._C._get_sdp_priority_order()[0]).name
    assert asked == "auto" or first.lower().startswith(asked)
    assert f"attention: {taken} (train.attention: {asked})" in caplog.text
    assert chosen_kernel(CPU, torch.float32, head=32) == taken
    torch.testing.assert_close(scaled_dot_product_attention(query, query, query), expected)
    choose_attention("auto", CPU, torch.float32, head=32)
    assert torch._C._get_sdp_priority_order() == before
