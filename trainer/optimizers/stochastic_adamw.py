"""AdamW in bf16 with stochastic rounding: 8 bytes a weight with its gradient and moments, where fp32 takes 16.

Rounded to the nearest bf16, most updates vanish: at a rate of 1e-4 a weight of 0.1 would have to move by 2.4e-4 to move
at all, and a second moment of decay 0.999 never falls.  So everything is computed in fp32 and rounded up or down with
the probabilities that make the mean exact (arXiv 2010.06192, section 3).

torchao's optimizers of that kind round their moments to the nearest, draw from the global generator, and are compiled.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

# Weights that are updated at once: their temporary copies in fp32 take 20 bytes each.
_AT_ONCE = 2**25


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (betas 0.9 and 0.999, eps 1e-8) of bf16 parameters with bf16 gradients and moments.

    The rounding depends on (seed, step, shard) alone, on one kind of device.  The shard, 0 unless the engine sets it in
    the parameter group, differs between ranks that hold different parts of the weights, and is the same where they hold
    copies, which must stay equal.
    """

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, weight_decay: float, seed: int) -> None:
        wrong = {parameter.dtype for parameter in parameters} - {torch.bfloat16}
        if wrong:
            raise ValueError(f"parameters are {wrong.pop()}, not bf16")
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8, "shard": 0}
        super().__init__(parameters, defaults)
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state |= {
                        "step": 0,
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
                state["step"] += 1
            if not parameters:
                continue
            step = self.state[parameters[0]]["step"]
            generator = torch.Generator(parameters[0].device)
            generator.manual_seed(_rounding_seed(self._seed, step, group["shard"]))
            for some in _in_parts(parameters):
                self._update(some, group, step, generator)

    def _update(self, parameters: list[Tensor], group: dict[str, Any], step: int, generator: torch.Generator) -> None:
        kept = [[self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq")]
        weights, first, second = ([tensor.float() for tensor in tensors] for tensors in (parameters, *kept))
        gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
        lr, (beta1, beta2) = group["lr"], group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(root, group["eps"])
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, first, root, -lr / (1 - beta1**step))
        for targets, values in ((parameters, weights), (kept[0], first), (kept[1], second)):
            for target, value in zip(targets, values, strict=True):
                target.copy_(stochastic_round_(value, generator))


def stochastic_round_(values: Tensor, generator: torch.Generator) -> Tensor:
    """Stochastic rounding of fp32 numbers to bf16, in place: to one of the two nearest, with the value itself as the
    mean over many roundings. A number that bf16 holds stays as it is.

    A bf16 is the upper half of an fp32: added to the lower half, a random number carries over just as often as that
    half is large.
    """
    bits = values.view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    bits &= -(1 << 16)
    return values


def _rounding_seed(seed: int, step: int, shard: int) -> int:
    digest = blake2b(f"rounding/{seed}/{step}/{shard}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _in_parts(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of parameters of about as many elements as are updated at once."""
    part: list[Tensor] = []
    for parameter in parameters:
        if part and sum(p.numel() for p in part) + parameter.numel() > _AT_ONCE:
            yield part
            part = []
        part.append(parameter)
    yield part
