"""The amount of training: updates and samples per update, from each trainer's way of counting steps."""

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Amount:
    """Optimizer updates, and the samples whose gradients make one."""

    steps: int
    global_batch_size: int

    @property
    def samples(self) -> int:
        """Samples whose gradients reached the weights."""
        return self.steps * self.global_batch_size


def accumulated(steps: int, batch_size: int, accumulation: int) -> Amount:
    """Of a trainer that counts updates, each of `accumulation` batches."""
    return Amount(steps, batch_size * accumulation)


def thrown_away(micro_steps: int, batch_size: int, accumulation: int) -> tuple[Amount, Amount]:
    """(what the run did, what its author meant) of ai-toolkit's `gradient_accumulation_steps`.

    Its step counter counts batches, of which every `accumulation`-th makes an update; gradients are zeroed before each
    batch, so an update is that of its last batch alone. Updates are the same in both, and of the samples that went
    through the model the run used one in `accumulation`.
    """
    updates = max(1, micro_steps // accumulation)
    return Amount(updates, batch_size), Amount(updates, batch_size * accumulation)


def of_epochs(epochs: int, samples_per_epoch: int, global_batch_size: int) -> Amount:
    """Of a run that is counted in passes over its samples; the last batch of each may be smaller."""
    return Amount(epochs * ceil(samples_per_epoch / max(1, global_batch_size)), global_batch_size)


def every(old_steps: int, accumulation: int) -> int:
    """An interval of the old step counter in updates, where one makes an update of `accumulation` steps."""
    return max(1, old_steps // accumulation)
