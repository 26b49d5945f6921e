"""The plan of a run on GPUs that need not be there: engine, micro-batch and checkpointing that fit and take the fewest
seconds, what they take, and why the others lost. Pure arithmetic, without torch.

Everything is by formula and simulation; nothing was measured on a GPU.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

from configs.combinations import ENGINES, ZERO3, combination_of, refuse, started_engine
from configs.communication import Exchange
from configs.fit import Cluster, Work, fit_step, named_fit
from configs.flux_shape import FluxShape, expanded, trained_parameters
from configs.host_memory import host_memory
from configs.memory import GIB, Part
from configs.schema import Config, EngineName
from configs.step_costs import StepCost
from configs.step_time import StepTime

_TIE = 1.03  # of seconds, which estimates cannot tell apart: the engine that comes first in ENGINES is the simpler one
_EIGHT_BIT_LIMIT = 2**31  # elements that bitsandbytes takes as one tensor


@dataclass(frozen=True)
class Plan:
    """One way to train.  checkpointed: blocks of the model's, the first of the forward pass.  memory: of a GPU; host:
    of the first node.  limit: bytes of a GPU that may be filled.  start_bytes: of a GPU while the weights load."""

    engine: EngineName
    micro_batch_size: int
    checkpointed: int
    blocks: int
    micro_steps: int
    memory: tuple[Part, ...]
    host: tuple[Part, ...]
    cost: StepCost
    exchanged: Exchange
    time: StepTime
    limit: float
    start_bytes: float

    @property
    def choices(self) -> tuple[str, int, int]:
        """What was decided: engine, micro-batch and checkpointed blocks."""
        return self.engine, self.micro_batch_size, self.checkpointed

    @property
    def bytes(self) -> float:
        """Of a GPU, at its fullest moment, which may be the start."""
        return max(sum(part.bytes for part in self.memory), self.start_bytes)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit


@dataclass(frozen=True)
class Rejection:
    """Why an engine was not chosen.  plan: its best one; None where it cannot train the config at all."""

    engine: EngineName
    reason: str
    plan: Plan | None = None


@dataclass(frozen=True)
class Planned:
    """Of a config on a cluster.  best: None where nothing fits.  plans: the best of each engine that can train it, the
    fastest first, those that do not fit last.  rejections: for every engine but the best one's.  engine: the one
    that the config is started with.  as_written: of that one, with the micro-batch and checkpointing that the config
    names, as far as it does; None where that engine cannot train it."""

    cluster: Cluster
    best: Plan | None
    plans: tuple[Plan, ...]
    rejections: tuple[Rejection, ...]
    engine: EngineName
    as_written: Plan | None

    @cached_property
    def smallest(self) -> Plan:
        """What takes the least memory of a GPU."""
        return min(self.plans, key=lambda plan: plan.bytes)


def plan_run(config: Config, base: FluxShape, cluster: Cluster, *, tokens: int) -> Planned:
    """The best plan of a config on a cluster, and why the other engines lost.  tokens: of one sample of the largest
    bucket, text included.  Raises InputError for more checkpointed blocks than the model has."""
    micro, checkpointed = named_fit(config, base)
    able: list[Work] = []
    refused = []
    for engine in ENGINES:
        if reason := _reason_against(config, base, engine, cluster):
            refused.append(Rejection(engine, reason))
        else:
            able.append(Work(config, base, engine, cluster, tokens))
    plans = sorted(map(_plan, able), key=lambda plan: (not plan.fits, plan.time.total))
    fastest = [plan for plan in plans if plan.fits and plan.time.total <= _TIE * plans[0].time.total]
    best = min(fastest, key=lambda plan: ENGINES.index(plan.engine), default=None)
    slower = [Rejection(plan.engine, _why_it_lost(plan, best), plan) for plan in plans if plan is not best]
    engine = started_engine(config.parallel.engine, cluster.gpus)
    as_written = next((_plan(work, micro, checkpointed) for work in able if work.engine == engine), None)
    return Planned(cluster, best, tuple(plans), (*slower, *refused), engine, as_written)


def _plan(work: Work, micro: int | None = None, checkpointed: int | None = None) -> Plan:
    """The fastest plan of an engine that fits, else the smallest.  micro, checkpointed: taken as they are, if given."""
    cluster = work.cluster
    fit = fit_step(work, cluster.usable_bytes - work.fixed_bytes, micro=micro, checkpointed=checkpointed)
    nodes, gpus = cluster.nodes, cluster.gpus_per_node
    micro_steps = -(-work.rows // fit.micro_batch_size)
    return Plan(
        cast(EngineName, work.engine),
        fit.micro_batch_size,
        fit.checkpointed,
        work.base.blocks,
        micro_steps,
        tuple(work.memory(fit.micro_batch_size, fit.checkpointed)),
        tuple(host_memory(work.config, work.base, work.engine, nodes=nodes, gpus_per_node=gpus)),
        fit.cost,
        work.exchanged.of_step(micro_steps),
        fit.time,
        cluster.usable_bytes,
        2 * expanded(work.base).parameters if work.engine in ZERO3 else 0,  # each GPU holds all of it while it starts
    )


def _reason_against(config: Config, base: FluxShape, engine: str, cluster: Cluster) -> str | None:
    """Why an engine cannot train the config there, whatever it would take."""
    if refusal := refuse(combination_of(config, engine)):
        return refusal.rules[0].text
    if engine == "single" and cluster.gpus > 1:
        return "it is one process"
    if engine not in ("single", "fsdp2-offload", "zero3-offload") and cluster.gpus == 1:
        return "one GPU trains, and there is nothing to share"
    if engine == "hsdp" and (cluster.nodes < 2 or cluster.gpus_per_node < 2):
        return "it needs two nodes or more, of two GPUs or more that train"
    partition = trained_parameters(config.method, base) / cluster.gpus
    if engine in ("zero1", "zero2") and config.train.optimizer == "adamw8bit" and partition >= _EIGHT_BIT_LIMIT:
        return f"bitsandbytes takes no partition of {partition:,.0f} elements as one tensor"
    return None


def _why_it_lost(plan: Plan, best: Plan | None) -> str:
    if not plan.fits:
        return f"takes {plan.bytes / GIB:.1f} GiB at least, of {plan.limit / GIB:.1f} that a plan may fill"
    assert best is not None
    if plan.time.total <= _TIE * best.time.total:
        return f"about as fast, and not as simple as {best.engine}"
    waits = plan.time.exposed > 0.05 * plan.time.total
    waiting = f", {plan.time.exposed:.2f} s of it waiting for transfers" if waits else ""
    return f"{plan.time.total:.2f} against {best.time.total:.2f} s a step{waiting}"
