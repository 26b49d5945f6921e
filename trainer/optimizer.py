"""The optimizer, and the learning rate as a function of the step alone."""

import math

import torch
from torch import nn

from configs.errors import InputError
from configs.schema import TrainConfig


def build_optimizer(parameters: list[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, betas 0.9 and 0.999, eps 1e-8.

    Raises InputError if bitsandbytes is asked for and missing.
    """
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            f"train.optimizer adamw8bit needs bitsandbytes ({error}). Install it, or set train.optimizer=adamw."
        ) from error
    return AdamW8bit(parameters, lr=train.lr, weight_decay=train.weight_decay)


def learning_rate(train: TrainConfig, step: int) -> float:
    """Rate of update number `step` (from 0): a linear rise over the warm-up, then the schedule's fall towards
    lr_final_fraction, which the update after the last would have.

    Knows nothing of ranks or restarts. (A scheduler that goes through accelerator.prepare steps once per rank.)
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
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
