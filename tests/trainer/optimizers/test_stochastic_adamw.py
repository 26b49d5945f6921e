"""Stochastic rounding: unbiased, exact where it can be, the same twice; and an AdamW that loses no update to it."""

import pytest
import torch
from torch import nn

from configs.schema import TrainConfig
from trainer.optimizers.optimizer import build_optimizer
from trainer.optimizers.stochastic_adamw import StochasticAdamW, stochastic_round_


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adamw(weights: list[nn.Parameter], seed: int = 0, **settings) -> torch.optim.Optimizer:
    train = {"steps": 10, "global_batch_size": 1, "lr": 1e-3, "warmup_steps": 0, "optimizer": "adamw"}
    train |= {"weight_decay": 0.0, "weights": "bf16_stochastic"} | settings
    return build_optimizer(weights, TrainConfig(**train), seed=seed)


# --- the rounding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.1, -0.1, 1.00001, -3.14159, 1e-30, 65535.5, 255.99999])
def test_the_mean_of_many_roundings_is_the_value(value):
    count = 200_000
    exact = torch.tensor(value, dtype=torch.float32)
    rounded = stochastic_round_(exact.repeat(count), generator())
    low, high = rounded.min().double(), rounded.max().double()
    assert set(rounded.tolist()) <= {low.item(), high.item()}
    assert low <= exact.double() <= high and (high - low) / abs(value) <= 2**-7
    deviation = (high - low) / 2 / count**0.5
    assert (rounded.double().mean() - exact.double()).abs() <= 5 * deviation


def test_what_bf16_holds_stays_as_it_is():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()]
    assert finite.numel() > 65_000
    assert torch.equal(stochastic_round_(finite.float(), generator()).bfloat16(), finite)


def test_the_result_is_a_bf16_number_and_what_is_not_finite_stays_so():
    values = torch.randn(1000, generator=generator())
    rounded = stochastic_round_(values.clone(), generator())
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert (rounded != values).any()
    odd = stochastic_round_(torch.tensor([float("inf"), -float("inf"), float("nan")]), generator())
    assert odd[0] == float("inf") and odd[1] == -float("inf") and odd[2].isnan()


# --- the optimizer ----------------------------------------------------------------------------------------------------


def steps(weight: nn.Parameter, optimizer: torch.optim.Optimizer, gradients: torch.Tensor) -> torch.Tensor:
    for gradient in gradients:
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    return weight.detach()


def test_the_mean_over_many_seeds_is_that_of_adamw_in_fp64():
    """4,000 copies of 8 weights, each rounded its own way: their mean has the reference's weights and moments."""
    start = torch.tensor([0.5, -0.31, 2.0, 0.01, -1.5, 0.0, 0.125, 0.2]).bfloat16()
    gradients = torch.randn(20, 8, generator=generator(1)).bfloat16()
    reference = nn.Parameter(start.double())
    plain = torch.optim.AdamW([reference], lr=1e-3, weight_decay=0.1)
    expected = steps(reference, plain, gradients)
    copies = nn.Parameter(start.repeat(4000, 1))
    optimizer = adamw([copies], weight_decay=0.1)
    found = steps(copies, optimizer, gradients[:, None, :].expand(20, 4000, 8)).double()
    error = found.std(dim=0) / 4000**0.5 + 1e-4 * (expected - start.double()).abs()
    assert ((found.mean(dim=0) - expected).abs() < 5 * error).all()
    moment = optimizer.state[copies]["exp_avg_sq"].double()
    assert torch.allclose(moment.mean(dim=0), plain.state[reference]["exp_avg_sq"], rtol=2e-3)
    # A second moment that is rounded to the nearest cannot fall by a thousandth of itself.
    still = nn.Parameter(start.clone())
    optimizer = adamw([still])
    steps(still, optimizer, torch.ones(1, 8))
    before = optimizer.state[still]["exp_avg_sq"].double().sum()
    steps(still, optimizer, torch.zeros(300, 8))
    assert optimizer.state[still]["exp_avg_sq"].double().sum() < 0.85 * before


def test_updates_too_small_for_bf16_are_not_lost():
    """A step of 1e-4 is a quarter of the distance between bf16 numbers at 0.1."""
    weight = nn.Parameter(torch.full((10_000,), 0.1).bfloat16())
    start = weight.detach().double().mean()
    steps(weight, adamw([weight], lr=1e-4), torch.ones(10, 10_000))
    assert weight.dtype == torch.bfloat16
    assert weight.detach().double().mean() - start == pytest.approx(-1e-3, rel=0.03)
    nearest = nn.Parameter(torch.full((10_000,), 0.1).bfloat16())
    steps(nearest, torch.optim.AdamW([nearest], lr=1e-4, weight_decay=0.0), torch.ones(10, 10_000))
    assert nearest.detach().double().mean() == start


def test_rounding_depends_on_seed_step_and_shard_alone():
    gradients = torch.randn(4, 1000, generator=generator(2))

    def run(*, seed: int = 0, shard: int = 0, stop: int | None = None) -> torch.Tensor:
        weight = nn.Parameter(torch.linspace(-1, 1, 1000).bfloat16())
        optimizer = adamw([weight], seed=seed)
        optimizer.param_groups[0]["shard"] = shard
        torch.rand(17)  # the global generator is not asked
        if stop is None:
            return steps(weight, optimizer, gradients)
        steps(weight, optimizer, gradients[:stop])
        copy = nn.Parameter(weight.detach().clone())
        second = adamw([copy], seed=seed)
        state = optimizer.state[weight]
        second.state[copy] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        return steps(copy, second, gradients[stop:])

    assert torch.equal(run(), run())
    assert torch.equal(run(), run(stop=2))
    assert not torch.equal(run(), run(seed=1))
    assert not torch.equal(run(), run(shard=1))


def test_weights_updated_in_parts_are_all_updated(monkeypatch):
    weights = [nn.Parameter(torch.zeros(shape).bfloat16()) for shape in (5, 30, 4, 4, 1)]
    monkeypatch.setattr("trainer.optimizers.stochastic_adamw._AT_ONCE", 8)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    adamw(weights, lr=0.5).step()
    assert all((weight == -0.5).all() for weight in weights)


def test_a_step_at_rate_0_changes_no_weight():
    """So is the state made before a checkpoint is loaded into it."""
    weight = nn.Parameter(torch.randn(1000, generator=generator()).bfloat16())
    before = weight.detach().clone()
    optimizer = adamw([weight], weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    steps(weight, optimizer, torch.zeros(1, 1000))
    assert torch.equal(weight.detach(), before)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"torch\.float32, not bf16"):
        StochasticAdamW([nn.Parameter(torch.zeros(2))], lr=1e-3, weight_decay=0.0, seed=0)
