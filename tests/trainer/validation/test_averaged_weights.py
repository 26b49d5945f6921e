"""validation.weights ema: the moving average is sampled with, and the live weights train on behind it."""

import pytest
import torch
from torch import nn

from trainer.engines.ema import Ema
from trainer.validation.validator import Validator


@pytest.mark.parametrize("weights", ["live", "ema"])
def test_the_weights_that_are_asked_for_are_sampled_with(config, engine, tiny_model, monkeypatch, weights):
    model = nn.Linear(3, 3)
    model.device = torch.device("cpu")
    engine.prepare(model, lambda parameters: torch.optim.SGD(parameters))
    ema = Ema(engine.local_slices(), 0.9)
    average = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    sampled = []
    monkeypatch.setattr(Validator, "run", lambda self, model, step: sampled.append(model.weight.detach().clone()))
    validation = config.validation.model_copy(update={"weights": weights, "every_steps": None})
    wanted = config.model_copy(update={"validation": validation})
    validator = Validator(wanted, engine, tiny_model, None, ema=ema)  # never due: nothing is loaded
    validator._config = config.model_copy(update={"validation": validation.model_copy(update={"every_steps": 2})})
    for step in (1, 2):
        validator.run_if_due(model, step)
    assert len(sampled) == 1 and torch.equal(sampled[0], average if weights == "ema" else average + 1)
    assert torch.equal(model.weight, average + 1)
