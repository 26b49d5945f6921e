"""A plan as people read it, and as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from configs.fit import Cluster
from configs.flux_shape import FluxShape
from configs.memory import GIB, Part, checkpoint_bytes, encoders_apart
from configs.plan import Plan, Planned
from configs.schema import Config
from configs.step_time import ASSUMPTIONS, NIC_GBIT_S
from launch.gpus import idle_gpus
from launch.plan.asked import sample_bytes

_NOT_MEASURED = "By formula and by simulation with fake tensors; nothing here was measured on a GPU."


def engine_lines(planned: Planned) -> Iterator[str]:
    """The best plan of each engine, the fastest first, and why it is or is not the one."""
    reasons = {rejection.engine: rejection.reason for rejection in planned.rejections}
    yield f"{'engine':14} {'micro-batch':>11}  {'checkpointed':15}  {'GiB a GPU':>9}  {'s a step':>8}"
    for plan in planned.plans:
        blocks = f"{plan.checkpointed} of {plan.blocks} blocks"
        seconds = f"{plan.time.total:.2f}" if plan.fits else ""
        best = "the fastest that fits" if plan is planned.plans[0] else "the simplest of the fastest"
        reason = f"chosen: {best}" if plan is planned.best else reasons[plan.engine]
        numbers = f"{plan.micro_batch_size:>11}  {blocks:15}  {plan.bytes / GIB:>9.1f}  {seconds:>8}"
        yield f"{plan.engine:14} {numbers}  {reason}"
    for rejection in planned.rejections:
        if rejection.plan is None:
            yield f"{rejection.engine:14} not here: {rejection.reason}"


def place(config: Config, cluster: Cluster) -> str:
    """The GPUs that a run is given, and what those do that do not train."""
    gpus = f"{cluster.nodes} x {cluster.gpus_per_node + cluster.others_per_node} x {cluster.profile.name}"
    if not cluster.others_per_node:
        return gpus
    encoding = encoders_apart(config.data, cluster.gpus_per_node, pixels=1)
    doing = [f"{' and '.join(encoding)} encode{'s' if len(encoding) == 1 else ''}"] if encoding else []
    if idle := cluster.others_per_node - len(encoding):
        doing.append(f"{idle} {'does' if idle == 1 else 'do'} nothing")
    trains = f"{cluster.gpus_per_node} train{'s' if cluster.gpus_per_node == 1 else ''}"
    return f"{gpus}, of which{' on each node' if cluster.nodes > 1 else ''} {trains}, {', '.join(doing)}"


def fullest_apart(config: Config, cluster: Cluster) -> tuple[str, list[Part]] | None:
    """(device, what it holds) of the GPU that encodes for others and holds most; None: there is none."""
    pixels = max(config.data.resolution) ** 2
    apart = encoders_apart(config.data, cluster.gpus_per_node, pixels=pixels)
    return max(apart.items(), key=lambda item: sum(part.bytes for part in item[1]), default=None)


def plan_lines(config: Config, base: FluxShape, planned: Planned, plan: Plan) -> Iterator[str]:
    """What a plan takes: memory, host, network, time and disk."""
    cluster = planned.cluster
    yield f"Memory of a GPU, {cluster.profile.memory_gib:g} GiB:"
    yield from map(_part_line, plan.memory)
    total = sum(part.bytes for part in plan.memory)
    headroom = cluster.profile.memory_gib - total / GIB
    yield f"{total / GIB:9.2f} GiB  together; headroom {headroom:.2f} GiB, of which a plan leaves a tenth of the card"
    if apart := fullest_apart(config, cluster):
        device, parts = apart
        yield f"Memory of {device}, which encodes for others:"
        yield from map(_part_line, parts)
        yield f"{sum(part.gib for part in parts):9.2f} GiB  together"
    yield "Host memory of the first node, beside the libraries' own:"
    yield from map(_part_line, plan.host)
    time, cost = plan.time, plan.cost
    yield (
        f"A step: {plan.micro_steps} x {plan.micro_batch_size} samples a GPU, "
        f"{plan.micro_steps * (cost.matmul_flops + cost.attention_flops) / 1e12:,.0f} TFLOP; about {time.total:.2f} s: "
        f"{plan.micro_steps * time.work:.2f} work, {time.exposed:.2f} waiting for transfers, {time.update:.2f} update"
    )
    if idle := idle_gpus(config, cluster.gpus):
        yield idle
    exchanged = plan.exchanged
    yield (
        f"Each GPU gets {exchanged.node / 1e9:,.2f} GB a step from the others of its node (NVLink or PCIe), "
        f"{exchanged.network / 1e9:,.2f} GB over the network"
    )
    if cluster.nodes > 1 and cluster.profile.nic_gbit_s is None:
        yield (
            f"The network's rate is not known, and {NIC_GBIT_S:.0f} Gbit/s a node a guess: seconds may be far off, and "
            "another engine the fastest. `fluxfill gpus detect` on a node finds it"
        )
    taken = _hours(config, cluster, plan)
    yield (
        f"The run, {config.train.steps:,} steps: about {taken['hours']:,.1f} hours, {taken['gpu_hours']:,.1f} GPU-hours"
    )
    one, end = checkpoint_bytes(config, base)
    yield f"Disk: a checkpoint {_size(one)}, what the end writes {_size(end)}"
    samples = ", ".join(f"{_size(sample_bytes(config, base, side))} at {side} px" for side in config.data.resolution)
    yield f"Cache, a sample with a caption of its own: {samples}"
    yield ASSUMPTIONS
    yield _NOT_MEASURED


def run_hours(config: Config, plan: Plan) -> float:
    """Of all steps, without validation and saves."""
    return config.train.steps * plan.time.total / 3600


def render_json(config: Config, base: FluxShape, planned: Planned) -> str:
    """The whole plan; sizes in bytes."""
    one, end = checkpoint_bytes(config, base)
    best = planned.best
    apart = fullest_apart(config, planned.cluster)
    made = {
        "gpu": planned.cluster.profile.name,
        "nodes": planned.cluster.nodes,
        "gpus_per_node": planned.cluster.gpus_per_node + planned.cluster.others_per_node,
        "training_gpus_per_node": planned.cluster.gpus_per_node,
        "best": None if best is None else _plan_dict(best) | _hours(config, planned.cluster, best),
        "as_written": None if planned.as_written is None else _plan_dict(planned.as_written),
        "others": [
            {
                "engine": rejection.engine,
                "reason": rejection.reason,
                "plan": rejection.plan and _plan_dict(rejection.plan),
            }
            for rejection in planned.rejections
        ],
        "encoding": None if apart is None else {"gpu": apart[0], "memory": [asdict(part) for part in apart[1]]},
        "checkpoint_bytes": one,
        "final_bytes": end,
        "sample_bytes": {side: sample_bytes(config, base, side) for side in config.data.resolution},
        "assumptions": ASSUMPTIONS,
        "measured": False,
    }
    return json.dumps(made, indent=2)


def _hours(config: Config, cluster: Cluster, plan: Plan) -> dict[str, float]:
    hours = run_hours(config, plan)
    return {"hours": hours, "gpu_hours": hours * cluster.asked_gpus}


def _plan_dict(plan: Plan) -> dict[str, Any]:
    raw = asdict(plan)
    del raw["start_bytes"], raw["limit"]
    return raw | {"gpu_bytes": plan.bytes, "fits": plan.fits}


def _part_line(part: Part) -> str:
    return f"{part.gib:9.2f} GiB  {part.what} ({part.source})"


def _size(size: float) -> str:
    return f"{size / 2**20:,.2f} MiB" if size < GIB else f"{size / GIB:,.1f} GiB"
