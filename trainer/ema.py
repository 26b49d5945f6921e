"""A moving average of the trained weights, in fp32 beside them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Average of named parameters: average += (1 - decay) (weight - average) after every update.

    The first updates count more, min(decay, (1 + n) / (10 + n)): else the random start would stay in it for thousands.
    decay None: nothing is kept.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float | None) -> None:
        self._parameters = dict(parameters) if decay is not None else {}
        self._decay = decay or 0.0
        self.averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after update number `num_updates` (from 0)."""
        if not self.averages:
            return
        decay = min(self._decay, (1 + num_updates) / (10 + num_updates))
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take over saved averages of the same names."""
        for name, average in self.averages.items():
            average.copy_(averages[name])
