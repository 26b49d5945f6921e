"""The nearest that fits where a plan does not: the smallest change of the config, of the GPUs, or of both."""

from collections.abc import Iterator
from dataclasses import replace

from configs.combinations import find_refused
from configs.fit import Cluster, Work
from configs.flux_shape import FluxShape
from configs.gpu_profiles import gpu_names, load_gpu_profile
from configs.memory import GIB
from configs.plan import Plan, plan_run
from configs.schema import Config
from launch.gpus import count_training_gpus
from launch.plan.asked import sample_tokens
from launch.plan.settings import cached_settings, smaller_settings, with_settings, written

_MOST_NODES = 64


def nearest_that_fits(config: Config, base: FluxShape, cluster: Cluster) -> str | None:
    """What to change, and what then takes how much; None where nothing that is tried fits."""
    for change, tried, where in _changes(config, base, cluster):
        if not find_refused(tried):
            best = plan_run(tried, base, where, tokens=sample_tokens(tried)).best
            if best is not None:
                return f"{change}: {describe(best)}"
    return None


def describe(plan: Plan) -> str:
    """A plan in a line."""
    word = f"{plan.checkpointed} of {plan.blocks} blocks checkpointed" if plan.checkpointed else "no checkpointing"
    return f"{plan.engine}, micro-batches of {plan.micro_batch_size}, {word}, {plan.bytes / GIB:.1f} GiB a GPU"


def _changes(config: Config, base: FluxShape, cluster: Cluster) -> Iterator[tuple[str, Config, Cluster]]:
    """The smaller ones first: precision and optimizer, more GPUs, other GPUs, and then several of them."""
    settings = list(smaller_settings(config))
    if Work(config, base, "single", cluster, sample_tokens(config)).encoders:
        settings.insert(0, cached_settings(config))
    smaller = [(" ".join(written(each)), with_settings(config, each)) for each in settings]
    yield from ((change, tried, cluster) for change, tried in smaller)
    more = list(_more_gpus(config, cluster))
    for change, where in more:
        yield change, config, where
    for name, where in more:
        for change, tried in smaller:
            yield f"{change} on {name.removeprefix('--')}", tried, where


def _more_gpus(config: Config, cluster: Cluster) -> Iterator[tuple[str, Cluster]]:
    gpus = cluster.gpus_per_node
    while (gpus := 2 * gpus) <= 8 and count_training_gpus(gpus, config.data.encoder_devices) == gpus:
        yield f"--gpus-per-node {gpus}", replace(cluster, gpus_per_node=gpus)
    nodes = cluster.nodes
    while (nodes := 2 * nodes) <= _MOST_NODES:
        yield f"--nodes {nodes}", replace(cluster, nodes=nodes)
    named = {name: load_gpu_profile(name) for name in gpu_names()}
    larger = [name for name, profile in named.items() if profile.memory_gib > cluster.profile.memory_gib]
    for name in sorted(larger, key=lambda name: named[name].memory_gib):
        yield f"--gpu {name}", replace(cluster, profile=named[name])
