"""The optimizer, and the learning rate as a function of the step alone."""

import math

import torch
from torch import nn

from configs.schema import TrainConfig
from trainer.optimizers.stochastic_adamw import StochasticAdamW


def build_optimizer(parameters: list[nn.Parameter], train: TrainConfig, *, seed: int = 0) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters; AdamW's betas are 0.9 and 0.999, its eps 1e-8.

    seed: of stochastic rounding.  Raises InputError if a package is missing.
    """
    match train.optimizer:
        case "adamw":
            if train.weights == "bf16_stochastic":
                return StochasticAdamW(parameters, lr=train.lr, weight_decay=train.weight_decay, seed=seed)
            return torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=True)
        case "adamw8bit":
            from trainer.optimizers.adamw_8bit import AdamW8bit

            return AdamW8bit(parameters, lr=train.lr, weight_decay=train.weight_decay)
        case "adafactor":
            # transformers', not torch's: its rate is the schedule's, where torch's is multiplied by the size of the
            # weights, which is 0 for half of a new adapter.
            from transformers.optimization import Adafactor

            settings = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
            return Adafactor(parameters, lr=train.lr, weight_decay=train.weight_decay, **settings)
        case "prodigy":
            from trainer.optimizers.prodigy import Prodigy

            return Prodigy(parameters, train.lr, train.weight_decay)


def learning_rate(train: TrainConfig, step: int) -> float:
    """Rate of update number `step` (from 0): a linear rise over the warm-up, then the schedule's fall towards
    lr_final_fraction, which the update after the schedule's last has, and all that follow.

    Knows nothing of ranks or restarts. (A scheduler that goes through accelerator.prepare steps once per rank.)
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    end = train.schedule_steps or train.steps
    progress = min(1.0, (step - train.warmup_steps) / max(1, end - train.warmup_steps))
    match train.lr_schedule:
        case "constant":
            remaining = 1.0
        case "linear":
            remaining = 1.0 - progress
        case "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    if train.lr_schedule != "constant":
        remaining = train.lr_final_fraction + (1.0 - train.lr_final_fraction) * remaining
    return train.lr * remaining
