"""Prodigy, which finds its step size while it trains (arXiv 2306.06101), with a state that a checkpoint can hold."""

import torch
from torch import nn

try:
    from prodigyopt import Prodigy as LibraryProdigy
except ImportError as error:
    from configs.errors import InputError

    raise InputError(
        f"train.optimizer prodigy needs prodigyopt ({error}). Install it (pip install 'fluxfill[prodigy]'), or set "
        "train.optimizer=adamw."
    ) from error

# What the library learns of all weights together, and keeps among its settings.
_LEARNED = ("d", "d_max", "d_numerator", "k")


class Prodigy(LibraryProdigy):
    """Keeps what it has learned, in fp64, among the state of the first parameter, where checkpoints look for it.

    And where each weight began in full: the library keeps one number where that is 0 throughout, so that a run which
    began with method.init_from, and goes on without it, would have state of another shape than its checkpoint.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        # The two settings suit a schedule that warms up. Given to the library, a weight decay would be printed.
        super().__init__(parameters, lr=lr, use_bias_correction=True, safeguard_warmup=True)
        (self._group,) = self.param_groups
        self._group["weight_decay"] = weight_decay

    def step(self, closure: None = None) -> None:
        state = self.state[self._group["params"][0]]
        if "learned" in state:
            values = state["learned"].tolist()
            self._group.update(zip(_LEARNED, [*values[:-1], int(values[-1])], strict=True))
        super().step()
        for of_weight in self.state.values():
            if "p0" in of_weight and of_weight["p0"].ndim == 0:
                of_weight["p0"] = of_weight["p0"].expand_as(of_weight["s"]).clone()
        state["learned"] = torch.tensor([self._group[name] for name in _LEARNED], dtype=torch.float64)
