"""EMA: the moving average of the trained weights, in fp32, of the slices that lie on this rank."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from trainer.engines.base import Engine
from trainer.engines.slices import LocalSlice


class Ema:
    """Exponential moving average of this rank's slices: average += (1 - decay) (weight - average) after each update.

    The decay warms up as min(decay, (1 + n) / (10 + n)): else the random start would stay in it for thousands.
    decay None: nothing is kept, `averages` is empty.
    """

    def __init__(self, slices: Sequence[LocalSlice], decay: float | None) -> None:
        self._weights = {part.name: part.weight for part in slices} if decay is not None else {}
        self._decay = decay or 0.0
        self.averages = {name: weight.to(torch.float32, copy=True) for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Average in the weights after update number `num_updates` (from 0)."""
        if not self.averages:
            return
        decay = min(self._decay, (1 + num_updates) / (10 + num_updates))
        averages, weights = list(self.averages.values()), list(self._weights.values())
        if all(weight.dtype == torch.float32 for weight in weights):
            torch._foreach_lerp_(averages, weights, 1 - decay)
            return
        for average, weight in zip(averages, weights, strict=True):  # one at a time: each is copied to fp32
            average.lerp_(weight.float(), 1 - decay)

    @contextmanager
    def in_place(self, engine: Engine) -> Iterator[None]:
        """Within the context the model holds the averages instead of its weights. All ranks enter it."""
        # On the CPU: beside weights, gradients and moments a GPU may have no room for the weights once more.
        kept = {name: weight.to("cpu", copy=True) for name, weight in self._weights.items()}
        self._exchange(self.averages, engine)
        try:
            yield
        finally:
            self._exchange(kept, engine)

    @torch.no_grad()
    def _exchange(self, values: dict[str, torch.Tensor], engine: Engine) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
        engine.sync_after_load()
