"""What a run takes of a node's host memory, by formula: for loading, for saves, and for states that wait there."""

from configs.flux_shape import FluxShape, expanded
from configs.memory import (
    TEXT_PARAMETERS,
    VAE_PARAMETERS,
    Part,
    base_bytes,
    checkpoint_bytes,
    encoders_on_host,
    training_state,
)
from configs.schema import Config


def host_memory(
    config: Config,
    base: FluxShape,
    engine: str,
    *,
    nodes: int,
    gpus_per_node: int,
    is_first: bool = True,
    text_parameters: int = TEXT_PARAMETERS,
    vae_parameters: int = VAE_PARAMETERS,
) -> list[Part]:
    """Host memory of a node at its fullest moment, loading or saving, beside states that an engine keeps there and
    encoders that an online run does; without the libraries' own, about 3 GiB a process.

    is_first: whether rank 0 is on it.  Saves that are not asynchronous copy one tensor at a time, which counts as none;
    one that has too little memory for its copies is not asynchronous.
    """
    processes = nodes * gpus_per_node
    reads_fp32 = config.method.type == "full" and config.train.weights == "fp32_master"
    in_fp32 = reads_fp32 or config.model.precision == "fp32"
    loading = Part("loading", (4 if in_fp32 else 2) * expanded(base).parameters, "rank 0 reads the model for all")
    checkpoint, _ = checkpoint_bytes(config, base)
    # hsdp's first copy, on the first node, saves for all; else every process saves its share.
    share = float(is_first) if engine == "hsdp" else gpus_per_node / processes
    copied = checkpoint if config.checkpoint.asynchronous else 0.0
    saving = Part("saving", share * copied, "copies of what the node's processes write")
    parts = [max(loading, saving, key=lambda part: part.bytes) if is_first else saving]
    parts += encoders_on_host(
        config.data, gpus_per_node, text_parameters=text_parameters, vae_parameters=vae_parameters
    )
    if engine.endswith("-offload"):
        states = sum(part.bytes for part in training_state(config, base, engine, processes))
        parts.append(
            Part("states", gpus_per_node * (states + base_bytes(config, base) / processes), "kept by offloading")
        )
    return parts
