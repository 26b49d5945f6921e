"""What a quickstart's config says for a GPU and a number of them: the largest choice whose memory fits, by count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import ceil, inf
from operator import itemgetter

from configs.errors import InputError
from configs.flux_shape import FluxShape
from configs.gpu_profiles import GpuProfile
from configs.loading import load_config
from configs.memory import USABLE, encoders_apart, encoding_memory, training_memory
from configs.schema import EngineName
from launch.command import REPO_ROOT
from launch.gpus import count_training_gpus
from launch.plan.asked import sample_tokens

_SPARING_BATCH = 4  # one picture of 1024 x 1024 at once, or four of 512 x 512

# (precision of the frozen transformer, whether activations are computed twice): the most exact first, and of one
# precision the fastest.
_BASES = (("bf16", False), ("bf16", True), ("int8", True), ("nf4", True))
_T5_PRECISIONS = ("auto", "int8")  # of encoders that share the GPU


@dataclass(frozen=True)
class Choices:
    """What a config is rendered from.

    num_training: training processes on each node, on its first GPUs.  encoder_devices: where an online run encodes, on
    those after them; none: on the GPU that trains. What is left does nothing.  memory: part -> GiB, of what a GPU that
    trains holds.
    """

    gpu: GpuProfile
    num_gpus: int
    num_nodes: int
    online: bool
    num_training: int
    engine: EngineName
    encoder_devices: tuple[str, ...]
    t5_precision: str
    encode_batch_size: int
    precision: str
    checkpointing: bool
    memory: Mapping[str, float]
    resolutions: tuple[int, ...]
    global_batch_size: int
    accumulation: int


def choose(gpu: GpuProfile, *, num_gpus: int, num_nodes: int, online: bool) -> Choices:
    """The choices for machines of `num_gpus` such GPUs each.

    A run that is not online trains on all of them; one that is leaves the last to the encoders where there are two or
    more, and as many as hold those of all processes. Raises InputError if nothing that is known to train fits the GPU.
    """
    apart = online and num_gpus > 1
    resolutions = (512, 768) if gpu.memory_gib < 40 else (512, 768, 1024)
    batch = _SPARING_BATCH if gpu.memory_gib < 24 or (online and not apart) else 8
    precision, checkpointing, t5_precision, memory = _fitting(gpu, resolutions, encodes=online and not apart)
    devices: tuple[str, ...] = ()
    if apart:
        devices, t5_precision, batch = _encoding_gpus(gpu, num_gpus, max(resolutions), batch)
    num_training = count_training_gpus(num_gpus, devices)
    processes = num_training * num_nodes
    accumulation = 2 if gpu.memory_gib < 40 or (gpu.memory_gib >= 80 and num_gpus == 1) else 4
    return Choices(
        gpu=gpu,
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        online=online,
        num_training=num_training,
        engine="ddp" if processes > 1 else "single",
        encoder_devices=devices,
        t5_precision=t5_precision,
        encode_batch_size=batch,
        precision=precision,
        checkpointing=checkpointing,
        memory=memory,
        resolutions=resolutions,
        global_batch_size=max(accumulation, processes),
        accumulation=accumulation,
    )


def _encoding_gpus(gpu: GpuProfile, num_gpus: int, side: int, largest: int) -> tuple[tuple[str, ...], str, int]:
    """(the fewest GPUs of a machine that hold the encoders of the processes on the others, T5's precision there, how
    much they encode at once). T5 is as exact as can be without a GPU that neither trains nor encodes; the last of an
    odd number does neither where a GPU holds the encoders of one process alone.

    largest: what is encoded at once where that fits.
    """
    batches = sorted({largest, _SPARING_BATCH}, reverse=True)
    tries = [
        *product(_T5_PRECISIONS, range(1, num_gpus // 2 + 1), batches),
        *product(_T5_PRECISIONS, [(num_gpus + 1) // 2], batches),
    ]
    for t5_precision, count, batch in tries:
        training = num_gpus - count
        devices = tuple(f"cuda:{index}" for index in range(training, min(num_gpus, 2 * training)))
        settings = ["data.mode=online", f"data.encoder_devices=[{','.join(devices)}]"]
        settings += [f"data.encode_batch_size={batch}", f"data.encoders.t5_precision={t5_precision}"]
        data = load_config(REPO_ROOT / "configs" / "fill_lora.yaml", settings).data
        held = encoders_apart(data, training, pixels=side**2).values()
        if max(sum(part.gib for part in parts) for parts in held) <= gpu.memory_gib * USABLE:
            return devices, t5_precision, batch
    raise AssertionError("a GPU that trains holds the encoders of one process")


def _fitting(
    gpu: GpuProfile, resolutions: Sequence[int], *, encodes: bool
) -> tuple[str, bool, str, Mapping[str, float]]:
    """Precision, checkpointing, T5's precision, and what all takes by part, in GiB.  encodes: whether the encoders
    share the GPU.

    Of those that fit, the one that trains on the most exact numbers, and then the fastest.
    """
    least = inf
    for precision, bases in groupby(_BASES, key=itemgetter(0)):
        for t5_precision, (_, checkpointing) in product(_T5_PRECISIONS, list(bases)):
            memory = _memory(precision, checkpointing, t5_precision, max(resolutions), encodes=encodes)
            total = sum(memory.values())
            if total <= gpu.memory_gib * USABLE:
                return precision, checkpointing, t5_precision, memory
            least = min(least, total)
    raise InputError(
        f"{gpu.name} has {gpu.memory_gib:g} GiB, and a LoRA on a base in 4 bits needs {ceil(least / USABLE)}"
        f"{' with the encoders beside it' if encodes else ''}. Take a larger GPU"
        f"{', or leave --online out: pictures are then encoded before training' if encodes else ''}."
    )


def _memory(precision: str, checkpointing: bool, t5_precision: str, side: int, *, encodes: bool) -> dict[str, float]:
    """Part -> GiB, of a GPU that trains the LoRA of the written config: one square sample of a side, in pixels; with
    the encoders and their pictures, if it encodes."""
    settings = ["train.ema_decay=0.99", f"data.resolution={side}"]
    settings += [f"model.precision={precision}", f"train.activation_checkpointing={str(checkpointing).lower()}"]
    settings += [f"data.encode_batch_size={_SPARING_BATCH}", f"data.encoders.t5_precision={t5_precision}"]
    config = load_config(REPO_ROOT / "configs" / "fill_lora.yaml", settings)
    parts = training_memory(config, FluxShape(), "single", processes=1, tokens=sample_tokens(config))
    *weights, activations, context = (part.gib for part in parts)
    encoders = sum(part.gib for part in encoding_memory(config.data, pixels=side**2)) if encodes else 0
    return {
        "weights and adapter": sum(weights),
        "activations of one sample": activations,
        **({"encoders and their pictures": encoders} if encodes else {}),
        "CUDA and NCCL": context,
    }
