"""The memory of a GPU against what training, and preprocessing before it, would hold there by configs/memory.py."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from configs.data_schema import DataConfig
from configs.flux_shape import PATCH, FluxShape
from configs.memory import CONTEXT, GIB, USABLE, Part, encoders_apart, encoding_memory, shared_encoders, training_memory
from configs.schema import Config
from configs.this_machine import memory_bytes
from data.samples.plan import PlannedSample
from launch.check.cures import cure_of_encoding, cure_of_training
from launch.check.model import Sizes
from launch.check.result import Check, ok
from launch.check.situation import Situation
from launch.gpus import count_training_gpus

LARGE = 1e9  # parameters of a model that nobody trains on a CPU


def check_memory(
    situation: Situation,
    sizes: Sizes,
    samples: Sequence[PlannedSample] | None,
    *,
    gpu_gib: float | None,
    encodes: bool,
) -> Iterator[Check]:
    """Whether the memory of a GPU holds training, and preprocessing before it, by formula.

    gpu_gib: of the GPU that is to train; None: the smallest of this machine.  encodes: something is to be preprocessed
    on the same GPUs first.
    """
    config = situation.config
    gpu_gib = gpu_gib or min((gpu.memory_gib for gpu in situation.gpus if gpu.memory_gib), default=None)
    tokens = largest_tokens(situation, samples)
    encoders = {
        "text_parameters": sizes.text,
        "vae_parameters": sizes.vae,
        "vae_width": sizes.vae_width,
        "pixels": tokens * PATCH**2,
    }

    def training_gpus(data: DataConfig, processes: int) -> int:
        gpus = min(processes, len(situation.gpus) or processes)  # processes: of all nodes
        return count_training_gpus(gpus, data.encoder_devices)

    def shared(config: Config, processes: int) -> list[Part]:
        return shared_encoders(config.data, training_gpus(config.data, processes), **encoders)

    def apart(data: DataConfig) -> dict[str, list[Part]]:
        return encoders_apart(data, training_gpus(data, situation.processes), **encoders)

    def training(config: Config, engine: str, processes: int) -> list[Part]:
        sharing = processes
        if engine == "hsdp" and situation.gpus:  # every node holds a copy, in parts
            sharing = min(sharing, len(situation.gpus))
        sample = tokens + config.data.captions.text_length
        parts = training_memory(config, sizes.shape, engine, processes=sharing, tokens=sample)
        return parts + shared(config, processes)

    def encoding(data: DataConfig) -> list[Part]:
        return [*encoding_memory(data, **encoders), CONTEXT]

    parts = training(config, situation.engine, situation.processes)
    if gpu_gib is None:
        yield _without_gpu(sizes.shape, parts)
        return
    shares = bool(shared(config, situation.processes))
    cure = partial(cure_of_training, situation, lambda *run: _sum(training(*run)), gpu_gib, encodes=shares)
    yield _compare("training", parts, gpu_gib, cure, least=_decides_itself(situation))
    if held := apart(config.data):
        device, parts = max(held.items(), key=lambda item: _sum(item[1]))
        cure = partial(
            cure_of_encoding, config.data, lambda data: max(map(_sum, apart(data).values()), default=0), gpu_gib
        )
        yield _compare(f"encoding for others, on {device},", parts, gpu_gib, cure)
    if encodes and config.data.encoders.vae != "cpu":
        parts = encoding(config.data)
        cure = partial(cure_of_encoding, config.data, lambda data: _sum(encoding(data)), gpu_gib)
        yield _compare("preprocessing", parts, gpu_gib, cure)


def largest_tokens(situation: Situation, samples: Sequence[PlannedSample] | None) -> int:
    """Image tokens of the largest bucket: of the pictures, or of a square of data.resolution where there are none."""
    if samples:
        return max(sample.bucket.tokens for sample in samples)
    return (max(situation.config.data.resolution) // PATCH) ** 2


def _decides_itself(situation: Situation) -> bool:
    """Whether the run fills what is free: the formula counts one sample and all blocks where a key is auto."""
    train = situation.config.train
    return "auto" in (train.micro_batch_size, train.activation_checkpointing)


def _compare(
    work: str, parts: Sequence[Part], gpu_gib: float, cure: Callable[[], str], *, least: bool = False
) -> Check:
    """cure: asked only where the work does not fit."""
    needed = _sum(parts) / GIB
    what = f"{work} takes about {needed:.1f} of {gpu_gib:.1f} GiB by formula"
    found = tuple(f"{part.gib:8.2f} GiB  {part.what} ({part.source})" for part in parts)
    if needed > gpu_gib:
        return Check("memory", "error", what, cure(), found)
    if needed > USABLE * gpu_gib:
        return Check("memory", "warning", f"{what}, which is tight", cure(), found)
    return ok("memory", f"{what}; auto takes more where that is faster (fluxfill plan)" if least else what, found)


def _sum(parts: Sequence[Part]) -> float:
    return sum(part.bytes for part in parts)


def _without_gpu(base: FluxShape, parts: Sequence[Part]) -> Check:
    """On a machine without a GPU the run would be a CPU's, in fp32."""
    needed = _sum(parts) / GIB
    found = tuple(f"{part.gib:8.2f} GiB  {part.what} ({part.source})" for part in parts)
    if base.parameters > LARGE:
        what = f"no GPU here to compare with; one takes about {needed:.1f} GiB by formula"
        return Check("memory", "warning", what, "Name the one that will train: --gpu 80GB.", found)
    have = memory_bytes()
    return ok("memory", "a small model on a CPU" + (f"; the machine has {have / GIB:.1f} GiB" if have else ""))
