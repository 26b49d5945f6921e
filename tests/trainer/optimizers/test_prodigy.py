"""Prodigy, whose step size is what it has learned of all weights together."""

import sys

import pytest
import torch
from torch import nn

from configs.errors import InputError
from configs.schema import TrainConfig
from trainer.optimizers.optimizer import build_optimizer


def train(**settings) -> TrainConfig:
    return TrainConfig(
        **({"steps": 1000, "global_batch_size": 1, "warmup_steps": 100, "optimizer": "prodigy"} | settings)
    )


def descend(optimizer, weights, steps) -> list[float]:
    """Go down a bowl around 1; the loss at each step."""
    losses = []
    for _ in range(steps):
        loss = sum((weight - 1).square().sum() for weight in weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_prodigy_goes_on_exactly_from_its_state_alone():
    """Also from what the library keeps among its settings: its step size, once lost, is found again from the start."""
    settings = train(lr=1, weight_decay=0.0)
    weights = [nn.Parameter(torch.full((4, 5), 3.0)), nn.Parameter(torch.zeros(7))]
    optimizer = build_optimizer(weights, settings)
    descend(optimizer, weights, 60)
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    second = build_optimizer(copies, settings)
    for mine, copy in zip(weights, copies, strict=True):
        state = optimizer.state[mine].items()
        second.state[copy] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state}
    losses = descend(optimizer, weights, 30)
    assert losses == descend(second, copies, 30)
    assert losses[-1] < losses[0] / 2
    learned = optimizer.state[weights[0]]["learned"]
    assert learned.dtype == torch.float64 and learned[0] > 100 * 1e-6 and learned[-1] == 90


def test_where_a_weight_began_is_kept_in_full_also_of_zeros():
    """The library keeps one number of zeros, whose shape would tell how a run began."""
    weights = [nn.Parameter(torch.full((4, 5), 3.0)), nn.Parameter(torch.zeros(2, 7)), nn.Parameter(torch.zeros(3))]
    unused = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer([*weights, unused], train(lr=1, weight_decay=0.0))
    descend(optimizer, weights, 2)
    assert [optimizer.state[weight]["p0"].shape for weight in weights] == [(20,), (14,), (3,)]
    assert not optimizer.state[weights[1]]["p0"].any() and unused not in optimizer.state


def test_prodigy_at_an_ordinary_rate_is_refused():
    with pytest.raises(
        ValueError, match=r"multiplies the step size that it finds by train\.lr, 0\.0001: set train\.lr=1"
    ):
        train(lr=1e-4)


def test_missing_prodigyopt_is_told_with_what_to_do(monkeypatch):
    monkeypatch.delitem(sys.modules, "trainer.optimizers.prodigy", raising=False)
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(InputError, match=r"train\.optimizer prodigy needs prodigyopt.*fluxfill\[prodigy\]"):
        build_optimizer([nn.Parameter(torch.zeros(2))], train(lr=1))
