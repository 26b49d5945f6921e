import math

import pytest
import torch
from torch import nn

from configs.schema import TrainConfig
from trainer.optimizers.optimizer import build_optimizer, learning_rate


def train(**settings) -> TrainConfig:
    return TrainConfig(**({"steps": 1000, "global_batch_size": 1, "lr": 2e-3, "warmup_steps": 100} | settings))


# --- learning rate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_linearly_from_above_zero_to_lr(schedule):
    config = train(lr_schedule=schedule, lr_final_fraction=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:100] == pytest.approx([2e-5 * (step + 1) for step in range(100)])
    assert rates[100] == 2e-3


@pytest.mark.parametrize(
    "schedule, quarter, half",
    [("constant", 1, 1), ("linear", 0.75, 0.5), ("cosine", 0.5 + math.sqrt(0.125), 0.5)],
)
@pytest.mark.parametrize("final", [0.0, 0.05, 1.0])
def test_schedule_falls_to_its_final_fraction(schedule, quarter, half, final):
    config = train(lr_schedule=schedule, lr_final_fraction=final)

    def between(fraction):
        return 2e-3 * (fraction if schedule == "constant" else final + (1 - final) * fraction)

    assert learning_rate(config, 100 + 225) == pytest.approx(between(quarter))
    assert learning_rate(config, 100 + 450) == pytest.approx(between(half))
    assert learning_rate(config, 1000) == pytest.approx(between(1 if schedule == "constant" else 0), abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 100, 999])
def test_no_step_is_wasted_on_a_rate_of_zero(schedule, warmup_steps):
    config = train(lr_schedule=schedule, warmup_steps=warmup_steps)
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert all(0 < rate <= config.lr for rate in rates)
    assert rates[warmup_steps] == max(rates) == config.lr


def test_rate_is_a_function_of_the_step_alone():
    config = train()
    forward = [learning_rate(config, step) for step in range(1000)]
    assert forward == [learning_rate(config, step) for step in reversed(range(1000))][::-1]


# --- optimizers -------------------------------------------------------------------------------------------------------


def plain_adamw(weight, gradients, lr, weight_decay) -> torch.Tensor:
    """AdamW as its paper writes it, in fp64."""
    weight = weight.double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.999 * second + 0.001 * gradient.double() ** 2
        weight = weight - lr * weight_decay * weight
        weight = weight - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


@pytest.mark.parametrize("name, close", [("adamw", 1e-5), ("adamw8bit", 0.1)])
def test_optimizer_follows_the_plain_reference(name, close):
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 128, generator=generator))  # above 4,096 elements: kept in 8 bits
    start = parameter.detach().clone()
    optimizer = build_optimizer([parameter], train(optimizer=name, weight_decay=0.1, lr=1e-2))
    gradients = [torch.randn(64, 128, generator=generator) for _ in range(5)]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = plain_adamw(start, gradients, 1e-2, 0.1)
    moved = (expected - start).norm()
    assert (parameter.detach() - expected).norm() < close * moved


def test_adamw8bit_keeps_its_moments_in_a_byte_each():
    parameter = nn.Parameter(torch.randn(64, 128))
    optimizer = build_optimizer([parameter], train(optimizer="adamw8bit"))
    parameter.grad = torch.randn(64, 128)
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8


def plain_adafactor(weight, gradients, lr, weight_decay) -> torch.Tensor:
    """Adafactor with a given rate and no first moment, as its paper writes it (algorithm 4), in fp64."""
    weight = weight.double()
    rows, columns = torch.zeros(weight.shape[0]).double(), torch.zeros(weight.shape[1]).double()
    for step, gradient in enumerate(gradients, start=1):
        squared = gradient.double() ** 2 + 1e-30
        kept = 1 - step**-0.8
        rows = kept * rows + (1 - kept) * squared.mean(dim=1)
        columns = kept * columns + (1 - kept) * squared.mean(dim=0)
        update = gradient.double() / (torch.outer(rows, columns) / rows.mean()).sqrt()
        update = update / max(1.0, update.square().mean().sqrt())
        weight = weight - lr * weight_decay * weight - lr * update
    return weight


def test_adafactor_follows_the_plain_reference_and_keeps_a_row_and_a_column():
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 128, generator=generator))
    start = parameter.detach().clone()
    optimizer = build_optimizer([parameter], train(optimizer="adafactor", weight_decay=0.1, lr=1e-2))
    gradients = [torch.randn(64, 128, generator=generator) for _ in range(5)]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = plain_adafactor(start, gradients, 1e-2, 0.1)
    assert (parameter.detach() - expected).norm() < 1e-5 * (expected - start).norm()
    numbers = sum(value.numel() for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor))
    assert numbers < 64 + 128 + 3
