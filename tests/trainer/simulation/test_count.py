"""Counting on real tensors, whose bytes and operations are known."""

import torch

from trainer.simulation.count import Count


def test_bytes_live_as_long_as_their_storage_and_views_take_none():
    with Count("cpu") as count:
        count.enter("first")
        base = torch.zeros(256)
        view = base.view(16, 16)
        assert count.live == 1024
        del base
        assert count.live == 1024
        other = view + 1
        count.enter("second")
        del view, other
        assert count.live == 0
        torch.ones(8)
    assert count.peaks == {"first": 2048, "second": 2048}


def test_products_count_as_arithmetic_and_all_else_as_traffic():
    with Count("cpu") as count:
        left, right = torch.ones(4, 8), torch.ones(8, 16)
        assert count.kernels == count.traffic == 0  # nothing is counted ahead of the first phase
        count.enter("step")
        product = left @ right
        assert count.matmul_flops == 2 * 4 * 8 * 16 and count.traffic == 0
        product + 1
        assert count.traffic == 2 * 4 * 4 * 16
        torch.nn.functional.linear(left, right.T, torch.ones(16))
    assert count.matmul_flops == 2 * 2 * 4 * 8 * 16
