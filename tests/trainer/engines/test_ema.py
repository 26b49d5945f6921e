from contextlib import nullcontext

import pytest
import torch
from torch import nn

from trainer.engines.ema import Ema
from trainer.engines.slices import LocalSlice


def slices_of(model: nn.Module) -> list[LocalSlice]:
    return [LocalSlice(n, 0, p.numel(), p.detach().view(-1), {}, of=n) for n, p in model.named_parameters()]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_average_is_the_plain_reference(model, decay):
    ema = Ema(slices_of(model), decay)
    expected = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for number in range(30):
        change(model)
        ema.update(number)
        kept = min(decay, (1 + number) / (10 + number))
        expected = {n: kept * expected[n] + (1 - kept) * p.detach().double() for n, p in model.named_parameters()}
    for name, average in expected.items():
        torch.testing.assert_close(ema.averages[name].double(), average.view(-1), rtol=1e-5, atol=1e-6)


def test_average_starts_as_a_copy_of_the_weights(model):
    ema = Ema(slices_of(model), 0.9)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    change(model)
    assert all(torch.equal(ema.averages[name], start[name].view(-1)) for name in start)


def test_nothing_is_kept_without_a_decay(model):
    ema = Ema(slices_of(model), None)
    ema.update(0)
    assert ema.averages == {}


def test_average_follows_the_weights_in_place(model):
    """An optimizer changes parameters in place; the average sees it without being told."""
    ema = Ema(slices_of(model), 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    ema.update(10**6)
    weight, average = model[0].weight.detach().view(-1), ema.averages["0.weight"]
    assert 0 < (weight - average).abs().max() < 0.1


@pytest.mark.parametrize("fails", [False, True])
def test_averages_stand_in_the_model_for_a_while_and_the_weights_come_back(model, engine, fails):
    model.device = torch.device("cpu")
    engine.prepare(model, lambda parameters: torch.optim.SGD(parameters))
    ema = Ema(engine.local_slices(), 0.9)
    start = model[0].weight.detach().clone()
    change(model)
    weight = model[0].weight.detach().clone()
    with pytest.raises(OSError, match="disk is full") if fails else nullcontext(), ema.in_place(engine):
        assert torch.equal(model[0].weight, start) and not torch.equal(weight, start)
        if fails:
            raise OSError("the disk is full")
    assert torch.equal(model[0].weight, weight)
