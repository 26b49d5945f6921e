"""The memory of a GPU against what training, and preprocessing before it, would hold there by configs/memory.py."""

from collections.abc import Iterator, Sequence

from configs.combinations import FSDP, ZERO3
from configs.flux_shape import PATCH, FluxShape
from configs.memory import CONTEXT, GIB, USABLE, Part, encoding_memory, shared_encoders, training_memory
from configs.this_machine import memory_bytes
from data.samples.plan import PlannedSample
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
    sample = tokens + config.data.captions.text_length
    sharing = situation.processes
    if situation.engine == "hsdp" and situation.gpus:  # every node holds a copy, in parts
        sharing = min(sharing, len(situation.gpus))
    parts = training_memory(config, sizes.shape, situation.engine, processes=sharing, tokens=sample)
    gpus = min(situation.processes, len(situation.gpus) or situation.processes)  # processes: of all nodes
    here = count_training_gpus(gpus, config.data.encoder_devices)
    encoders = shared_encoders(
        config.data,
        here,
        text_parameters=sizes.text,
        vae_parameters=sizes.vae,
        vae_width=sizes.vae_width,
        pixels=tokens * PATCH**2,
    )
    parts += encoders
    if gpu_gib is None:
        yield _without_gpu(sizes.shape, parts)
        return
    encoding = encoding_memory(
        config.data,
        text_parameters=sizes.text,
        vae_parameters=sizes.vae,
        vae_width=sizes.vae_width,
        pixels=tokens * PATCH**2,
    )
    cure = _cure_of_training(situation, encodes=bool(encoders))
    yield _compare("memory", "training", parts, gpu_gib, cure, least=_decides_itself(situation))
    if encodes and config.data.encoders.vae != "cpu":
        cure = "Lower data.encode_batch_size, set data.encoders.t5_precision=int8, or data.encoders.t5=cpu."
        yield _compare("memory", "preprocessing", [*encoding, CONTEXT], gpu_gib, cure)


def largest_tokens(situation: Situation, samples: Sequence[PlannedSample] | None) -> int:
    """Image tokens of the largest bucket: of the pictures, or of a square of data.resolution where there are none."""
    if samples:
        return max(sample.bucket.tokens for sample in samples)
    return (max(situation.config.data.resolution) // PATCH) ** 2


def _decides_itself(situation: Situation) -> bool:
    """Whether the run fills what is free: the formula counts one sample and all blocks where a key is auto."""
    train = situation.config.train
    return "auto" in (train.micro_batch_size, train.activation_checkpointing)


def _compare(name: str, work: str, parts: Sequence[Part], gpu_gib: float, cure: str, *, least: bool = False) -> Check:
    needed = sum(part.gib for part in parts)
    what = f"{work} takes about {needed:.1f} of {gpu_gib:.1f} GiB by formula"
    found = tuple(f"{part.gib:8.2f} GiB  {part.what} ({part.source})" for part in parts)
    if needed > gpu_gib:
        return Check(name, "error", what, cure, found)
    if needed > USABLE * gpu_gib:
        return Check(name, "warning", f"{what}, which is tight", cure, found)
    return ok(name, f"{what}; auto takes more where that is faster (fluxfill plan)" if least else what, found)


def _cure_of_training(situation: Situation, *, encodes: bool) -> str:
    """What helps most, in the order of what it costs.  encodes: whether encoders share the GPU."""
    config, engine = situation.config, situation.engine
    cures = []
    if encodes:
        also = " with data.encoder_devices=null" if config.data.encoder_devices else ""
        cures.append(f"data.mode=cached{also}")
    if config.train.micro_batch_size not in ("auto", 1):
        cures.append("train.micro_batch_size=1")
    if config.train.activation_checkpointing is False:
        cures.append("train.activation_checkpointing=true")
    if config.method.type == "full" and engine in ("single", "ddp"):
        cures.append("parallel.engine=fsdp2 on several GPUs, or fsdp2-offload")
    if engine in (*FSDP, *ZERO3) and not engine.endswith("-offload"):
        cures.append("--num-processes to more GPUs, which share the state")
    if config.method.type == "full" and config.train.optimizer == "adamw" and config.train.weights == "fp32_master":
        cures.append("train.optimizer=adamw8bit")
    if config.method.type != "full" and config.model.precision not in ("nf4", "int8", "fp8"):
        cures.append("model.precision=int8 or nf4")
    return f"Set {', or '.join(cures or ['a smaller data.resolution'])}; or train on a larger GPU."


def _without_gpu(base: FluxShape, parts: Sequence[Part]) -> Check:
    """On a machine without a GPU the run would be a CPU's, in fp32."""
    needed = sum(part.gib for part in parts)
    found = tuple(f"{part.gib:8.2f} GiB  {part.what} ({part.source})" for part in parts)
    if base.parameters > LARGE:
        what = f"no GPU here to compare with; one takes about {needed:.1f} GiB by formula"
        return Check("memory", "warning", what, "Name the one that will train: --gpu 80GB.", found)
    have = memory_bytes()
    return ok("memory", "a small model on a CPU" + (f"; the machine has {have / GIB:.1f} GiB" if have else ""))
