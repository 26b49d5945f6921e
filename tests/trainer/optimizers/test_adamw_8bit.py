"""The library's own updates, bit for bit, with no wait for the device between two tensors."""

import builtins
import sys

import bitsandbytes.optim.optimizer
import pytest
import torch
from bitsandbytes.optim import AdamW8bit as LibraryAdamW8bit
from torch import nn

from configs.errors import InputError
from configs.schema import TrainConfig
from trainer.optimizers.adamw_8bit import AdamW8bit
from trainer.optimizers.optimizer import build_optimizer


def updated(optimizer_class: type) -> list[torch.Tensor]:
    """Weights and state after three updates of a large tensor, a small one (kept in 32 bits) and one without gradients,
    at a rate that changes."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((64, 128), (10,), (5,))]
    optimizer = optimizer_class(parameters, lr=1e-2, weight_decay=0.1)
    for lr in (1e-2, 5e-3, 1e-3):
        optimizer.param_groups[0]["lr"] = lr
        for parameter in parameters[:2]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    states = [value for p in parameters for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
    return [*(parameter.detach() for parameter in parameters), *states]


def test_updates_are_those_of_the_library():
    ours, expected = updated(AdamW8bit), updated(LibraryAdamW8bit)
    assert len(ours) == len(expected) > 3
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_it_never_waits_for_the_device(monkeypatch):
    def wait(*_) -> None:
        raise AssertionError("waited")

    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", wait)
    updated(AdamW8bit)
    with pytest.raises(AssertionError, match="waited"):
        updated(LibraryAdamW8bit)


def test_missing_bitsandbytes_is_told_with_what_to_do(monkeypatch):
    real_import = builtins.__import__

    def without_bitsandbytes(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError("No module named 'bitsandbytes'")
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "trainer.optimizers.adamw_8bit", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_bitsandbytes)
    with pytest.raises(InputError, match=r"train\.optimizer adamw8bit needs bitsandbytes.*train\.optimizer=adamw"):
        build_optimizer(
            [nn.Parameter(torch.zeros(2))], TrainConfig(steps=1000, global_batch_size=1, lr=2e-3, optimizer="adamw8bit")
        )
