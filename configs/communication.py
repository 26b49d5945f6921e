"""Bytes that a GPU exchanges with others, by engine: over the links of its node, and over the network between nodes.

A model, not measured: what a GPU gets of a tensor that n GPUs hold in parts is (n - 1) / n of it, from each an equal
share, so that of another node comes over the network. NCCL's rings do better where the GPUs of a node share its ports.
"""

from dataclasses import dataclass

from configs.combinations import FSDP, ZERO, ZERO3
from configs.flux_shape import FluxShape, expanded, trained_parameters
from configs.memory import ZERO3_LIVE, ZERO_BUCKET, base_bytes, gradient_bytes
from configs.schema import Config


@dataclass(frozen=True)
class Exchange:
    """Bytes that one GPU gets from others.  node: over its node's links.  network: between nodes."""

    node: float = 0
    network: float = 0

    def __add__(self, other: "Exchange") -> "Exchange":
        return Exchange(self.node + other.node, self.network + other.network)

    def times(self, factor: float) -> "Exchange":
        return Exchange(self.node * factor, self.network * factor)


@dataclass(frozen=True)
class Exchanges:
    """each_micro_step: in every micro-step, beside its work.  gradients: in the backward pass of the last one.
    weights: after the update, beside nothing."""

    each_micro_step: Exchange = Exchange()
    gradients: Exchange = Exchange()
    weights: Exchange = Exchange()

    def of_step(self, micro_steps: int) -> Exchange:
        """All of an optimizer step's."""
        return self.each_micro_step.times(micro_steps) + self.gradients + self.weights


def reduces_to_owners(trained: int, processes: int) -> bool:
    """Whether ZeRO 1 and 2 send a bucket of gradients to the rank that keeps them, in place of summing it on all ranks
    at twice the bytes: where a rank keeps a bucket or more.

    Else a bucket belongs to several ranks. DeepSpeed lets the GPU run dry before it sends each its part, so that none
    but the last one's is sent beside the backward pass, and the parts are small.
    """
    return trained >= processes * ZERO_BUCKET


def exchanges(config: Config, base: FluxShape, engine: str, *, nodes: int, gpus_per_node: int) -> Exchanges:
    """What the trainer's engines exchange (trainer/engines/): weights are gathered in every forward pass and again in
    the backward pass, gradients of FSDP and ZeRO are summed in fp32."""
    processes = nodes * gpus_per_node
    if processes == 1:
        return Exchanges()

    def among_all(size: float) -> Exchange:
        return Exchange(size * (gpus_per_node - 1) / processes, size * (processes - gpus_per_node) / processes)

    count = trained_parameters(config.method, base)
    is_full = config.method.type == "full"
    # DeepSpeed has an adapter in bf16 beside its fp32 parts.
    adapter_bytes = 2 if engine in ZERO3 else 4
    gathered = 2 * expanded(base).parameters if is_full else base_bytes(config, base) + adapter_bytes * count
    passes = 2 if config.flow.keep_target == "picture" else 3
    if engine == "hsdp":
        in_node = Exchange((passes * gathered + 4 * count * is_full) * (gpus_per_node - 1) / gpus_per_node)
        shard = 4 * count / gpus_per_node
        across = Exchange(0, 2 * shard * (nodes - 1) / nodes)
        adapter = Exchange(0 if is_full else 4 * count * (gpus_per_node - 1) / gpus_per_node)
        return Exchanges(in_node, across + adapter)
    # With a pass of the base between, DeepSpeed does not foresee what comes next, and keeps nothing. Where blocks are
    # not checkpointed it gathers an adapter's base 0.3 times less than this says: no layer whose input takes no
    # gradient (the modulation) is gathered in the backward pass.
    kept = min(1, ZERO3_LIVE / expanded(base).parameters) * gathered if engine in ZERO3 and passes == 2 else 0
    if engine in (*FSDP, *ZERO3):
        if is_full:  # gradients are scattered each time: whole ones would not fit
            return Exchanges(among_all(passes * gathered - kept + 4 * count))
        return Exchanges(among_all(passes * gathered - kept), among_all(4 * count))
    if engine in ZERO:
        once = reduces_to_owners(count, processes)
        gradients, weights = among_all((1 if once else 2) * 4 * count), among_all(2 * count)
        return Exchanges(Exchange(), gradients, weights) if engine == "zero1" else Exchanges(gradients, weights=weights)
    return Exchanges(gradients=among_all(2 * gradient_bytes(config, base)))  # ddp: all-reduced, there and back
