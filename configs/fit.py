"""Micro-batch and checkpointed blocks that fit a GPU's memory and take the fewest seconds: for plans, and for `auto` of
a run that has started."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from configs.communication import Exchanges, exchanges
from configs.flux_shape import PATCH, FluxShape, checkpointed_blocks
from configs.gpu_profiles import GpuProfile
from configs.memory import GIB, USABLE, Part, base_bytes, shared_encoders, training_memory, training_state
from configs.schema import Config
from configs.step_costs import StepCost, base_pass, step_cost
from configs.step_time import StepTime, step_time


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run, all of one kind.  gpus_per_node: those that train.  others_per_node: those beside them, which
    encode for them or do nothing."""

    profile: GpuProfile
    nodes: int
    gpus_per_node: int
    others_per_node: int = 0

    @property
    def gpus(self) -> int:
        """Those that train."""
        return self.nodes * self.gpus_per_node

    @property
    def asked_gpus(self) -> int:
        """All that the run is given."""
        return self.nodes * (self.gpus_per_node + self.others_per_node)

    @property
    def usable_bytes(self) -> float:
        """Of one GPU, without what the allocator's gaps and libraries' workspaces may take."""
        return USABLE * self.profile.memory_gib * GIB


@dataclass(frozen=True)
class Fit:
    """How a step is cut up.  checkpointed: blocks, the first of the forward pass.  fits: whether its activations do; if
    not, it takes the least that was allowed."""

    micro_batch_size: int
    checkpointed: int
    cost: StepCost
    time: StepTime
    fits: bool


@dataclass(frozen=True)
class Work:
    """A config under an engine on a cluster.  tokens: of one sample of the largest bucket, text included."""

    config: Config
    base: FluxShape
    engine: str
    cluster: Cluster
    tokens: int

    @property
    def rows(self) -> int:
        """Of a global batch, on one GPU."""
        return -(-self.config.train.global_batch_size // self.cluster.gpus)

    @property
    def shards(self) -> int:
        """Processes that share what the engine shards."""
        return self.cluster.gpus_per_node if self.engine == "hsdp" else self.cluster.gpus

    @cached_property
    def exchanged(self) -> Exchanges:
        nodes, gpus = self.cluster.nodes, self.cluster.gpus_per_node
        return exchanges(self.config, self.base, self.engine, nodes=nodes, gpus_per_node=gpus)

    @cached_property
    def _states(self) -> list[Part]:
        return training_state(self.config, self.base, self.engine, self.shards)

    @cached_property
    def encoders(self) -> list[Part]:
        """Of an online run, on a GPU that trains."""
        pixels = (self.tokens - self.config.data.captions.text_length) * PATCH**2
        return shared_encoders(self.config.data, self.cluster.gpus_per_node, pixels=pixels)

    def memory(self, micro: int, checkpointed: int) -> list[Part]:
        """Of a GPU, part by part."""
        chosen = {"micro_batch_size": micro, "activation_checkpointing": checkpointed}
        config = self.config.model_copy(update={"train": self.config.train.model_copy(update=chosen)})
        training = training_memory(config, self.base, self.engine, processes=self.shards, tokens=self.tokens)
        return training + self.encoders

    @cached_property
    def fixed_bytes(self) -> float:
        """Of a GPU, beside activations: all that micro-batch and checkpointing do not change."""
        return sum(part.bytes for part in self.memory(1, 0)) - self.cost(1, 0).peak

    def cost(self, micro: int, checkpointed: int) -> StepCost:
        """Of a micro-step."""
        method, precision = self.config.method, self.config.model.precision
        size = {"tokens": self.tokens, "rows": micro}
        cost = step_cost(method, precision, self.base, checkpointed=checkpointed, **size)
        if self.config.flow.keep_target == "picture":
            return cost
        return cost.after(base_pass(precision, self.base, **size))

    def time(self, micro: int, cost: StepCost) -> StepTime:
        """Of an optimizer step in micro-steps of a cost."""
        states, gradients = self._states, self._states[1].bytes
        offloads = self.engine.endswith("-offload")
        weights = states[0].bytes + base_bytes(self.config, self.base) / self.shards
        return step_time(
            self.cluster.profile,
            cost,
            self.exchanged,
            micro_steps=-(-self.rows // micro),
            gpus_per_node=self.cluster.gpus_per_node,
            update_bytes=2 * sum(part.bytes for part in states) - gradients,
            offloaded_bytes=2 * weights + gradients if offloads else 0,
            host_update=offloads,
        )


def fit_step(
    work: Work,
    room: float,
    *,
    micro: int | None = None,
    checkpointed: int | None = None,
    at_most: int | None = None,
) -> Fit:
    """The fastest way to cut up a step whose activations fit; if none does, the one that takes the least.

    room: bytes of a GPU for activations.  micro, checkpointed: taken as they are; None: chosen here.  at_most: samples
    of a micro-batch that is chosen.
    """
    found = []
    for size in _micro_batches(work.rows, at_most) if micro is None else [micro]:
        blocks = _fewest_blocks(work, size, room) if checkpointed is None else checkpointed
        cost = work.cost(size, blocks)
        if cost.peak > room:
            break
        found.append(Fit(size, blocks, cost, work.time(size, cost), fits=True))
    if found:
        return min(found, key=lambda fit: fit.time.total)
    size = micro or 1
    allowed = range(work.base.blocks + 1) if checkpointed is None else [checkpointed]
    least = min(allowed, key=lambda count: work.cost(size, count).peak)
    cost = work.cost(size, least)
    return Fit(size, least, cost, work.time(size, cost), fits=False)


def _fewest_blocks(work: Work, micro: int, room: float) -> int:
    """To checkpoint so that a micro-batch fits; all, if it does not. Each of them takes less than one fewer, but for
    the first, where a sample is so small that computing a block again takes more than keeping it."""

    def fits(count: int) -> bool:
        return work.cost(micro, count).peak <= room

    return 0 if fits(0) else bisect_left(range(work.base.blocks), True, lo=1, key=fits)


def _micro_batches(rows: int, at_most: int | None) -> Iterator[int]:
    """The smallest that make each number of micro-steps, from 1 on: the last one is filled up as little as can be."""
    sizes = sorted({-(-rows // steps) for steps in range(1, rows + 1)})
    return (size for size in sizes if at_most is None or size <= at_most)


def named_fit(config: Config, base: FluxShape) -> tuple[int | None, int | None]:
    """(micro-batch, checkpointed blocks) of a config, None where it leaves them to be chosen. Raises InputError for
    more blocks than the model has."""
    train = config.train
    micro = None if train.micro_batch_size == "auto" else train.micro_batch_size
    setting = train.activation_checkpointing
    return micro, None if setting == "auto" else checkpointed_blocks(setting, base)
