"""The memory that a process takes on its GPU, and a run on disk, by formula. Every number says where it comes from, and
none was measured on a GPU yet. `fluxfill check` compares it with the GPU at hand.

Activations are those of configs/step_costs.json, which a simulation of FLUX.1's real blocks with fake tensors made.
"""

from dataclasses import dataclass

from configs.combinations import FSDP, QUANTIZED, ZERO, ZERO3
from configs.data_schema import DataConfig
from configs.flux_shape import FluxShape, checkpointed_blocks, expanded, trained_parameters
from configs.schema import Config
from configs.step_costs import step_cost

GIB = 2**30

USABLE = 0.9  # of a GPU's memory: the allocator's gaps and libraries' workspaces are in no formula
_SIMULATED = "simulated with fake tensors"
# Elements that DeepSpeed reduces at once: its own 5e8 are held three times, twice in bf16 and once in fp32.
ZERO_BUCKET = 200_000_000
# Elements of weights that ZeRO 3 has gathered at once, and so keeps from the forward pass to the backward pass.
ZERO3_LIVE = 1_000_000_000
_VAE_COUNT = "counted with fake tensors on FLUX.1's VAE, by pixels"
_VAE_PICTURE_GIB = 2.53  # the fp32 VAE on a picture of 1024 x 1024: (20.54 of eight - 2.84 of one) / 7
# FLUX.1's encoders: its VAE's first block_out_channels, and parameters.
VAE_WIDTH, VAE_PARAMETERS, TEXT_PARAMETERS = 128, 83_819_683, 123_060_480 + 4_762_310_656

# Bytes of optimizer state for each trained parameter that is kept in fp32.
_STATE_BYTES = {
    "adamw": (8.0, "two moments in fp32"),
    "adamw8bit": (2 + 2 * 4 / 256, "two moments in 8 bits, and a scale for 256 of them"),
    "adafactor": (0.01, "one row and one column a weight"),
    "prodigy": (16.0, "two moments, the start and its sum, in fp32"),
}


@dataclass(frozen=True)
class Part:
    """What takes memory.  source: where the number comes from."""

    what: str
    bytes: float
    source: str

    @property
    def gib(self) -> float:
        return self.bytes / GIB


CONTEXT = Part("CUDA's context and NCCL", 1.5 * GIB, "assumed")


def training_memory(config: Config, base: FluxShape, engine: str, *, processes: int, tokens: int) -> list[Part]:
    """What one training process holds on its GPU at its fullest moment.

    processes: that share what the engine shards: all of the run, under hsdp those of a node.  tokens: of one sample of
    the largest bucket, text included.
    """
    micro = config.train.micro_batch_size
    samples = 1 if micro == "auto" else micro
    in_host = engine.endswith("-offload")
    states = [_weights(config, base, engine, processes), *training_state(config, base, engine, processes)]
    parts = [
        *([] if in_host else states),
        _activations(config, base, tokens, samples),
        CONTEXT,
    ]
    if engine in (*FSDP, *ZERO3) and (processes > 1 or in_host):
        block = base.double_block_parameters
        gradient = 4 * block if config.method.type == "full" else 0
        parts.append(
            Part("gathered blocks", 3 * 2 * block + gradient, "three double blocks in bf16, and a gradient in fp32")
        )
    if engine in ZERO:
        parts.append(_zero_buffers(config, base, engine, processes))
    return [part for part in parts if part.bytes]


def _zero_buffers(config: Config, base: FluxShape, engine: str, processes: int) -> Part:
    """What DeepSpeed holds beside states: two buckets of gradients in bf16, one in fp32 while it is reduced; and from
    stage 2 on, where gradients are summed in fp32, what that takes over bf16."""
    count = trained_parameters(config.method, base)
    bucket = min(ZERO_BUCKET, count) * (2 * 2 + 4)
    more = 0 if engine == "zero1" or engine.endswith("-offload") else 2 * count / processes
    return Part("ZeRO's buffers", bucket + more, "buckets of 2e8 elements, gradients in fp32")


def base_bytes(config: Config, base: FluxShape) -> float:
    """The frozen base of an adapter, whole; the weights of a full fine-tune are part of its state."""
    if config.method.type == "full":
        return 0
    shape, precision = expanded(base), config.model.precision
    if precision not in QUANTIZED:
        return shape.parameters * (4.0 if precision == "fp32" else 2.0)
    rest = 2.0 * (shape.parameters - shape.block_weights)
    if precision == "nf4":
        # A code of 4 bits; a scale of 8 bits for 64 of them, and one of 32 bits for 256 of those.
        return rest + shape.block_weights * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    scales = 4.0 * shape.block_rows if precision == "int8" else 0  # fp8 has one for a whole weight
    return rest + shape.block_weights + scales


def _weights(config: Config, base: FluxShape, engine: str, processes: int) -> Part:
    word = "bf16" if config.model.precision == "auto" else config.model.precision
    sharded = engine in (*FSDP, *ZERO3)
    size = base_bytes(config, base) / (processes if sharded else 1)
    return Part(f"base in {word}", size, f"{expanded(base).parameters / 1e9:.2f} B parameters")


def training_state(config: Config, base: FluxShape, engine: str, processes: int) -> list[Part]:
    """Trained weights, gradients, optimizer and average of one process, wherever the engine keeps them."""
    count = trained_parameters(config.method, base)
    source = f"{count / 1e6:,.1f} M trained parameters"
    n = processes
    moments, moments_source = _moments(config)
    if engine in ZERO:  # bf16 copies for the forward pass, an fp32 partition that the optimizer works on
        weights = 2 * count / (n if engine in ZERO3 else 1) + 4 * count / n
        gradients = 2 * count / (1 if engine == "zero1" else n)
        share = n
    else:
        share = n if engine in FSDP else 1
        weights, gradients = count * _trained_bytes(config) / share, gradient_bytes(config, base) / share
    average = 4 * count / share if config.train.ema_decay is not None else 0
    return [
        Part("trained weights", weights, source),
        Part("gradients", gradients, source),
        Part(f"{config.train.optimizer}'s state", moments * count / share, moments_source),
        Part("moving average", average, "fp32"),
    ]


def gradient_bytes(config: Config, base: FluxShape) -> float:
    """Of all gradients, in the dtype of the weights that they are of."""
    return trained_parameters(config.method, base) * _trained_bytes(config)


def _trained_bytes(config: Config) -> int:
    return 2 if config.train.weights == "bf16_stochastic" and config.method.type == "full" else 4


def optimizer_state_bytes(config: Config) -> float:
    """Of a trained parameter."""
    return _moments(config)[0]


def _moments(config: Config) -> tuple[float, str]:
    """Bytes of optimizer state a trained parameter, and of what."""
    if config.train.weights == "bf16_stochastic" and config.method.type == "full":
        return 4.0, "two moments in bf16"
    return _STATE_BYTES[config.train.optimizer]


def _activations(config: Config, base: FluxShape, tokens: int, rows: int) -> Part:
    """tokens: of one sample.  rows: of a micro-batch. auto counts as all blocks: so much fits at least, or nothing."""
    setting = config.train.activation_checkpointing
    blocks = checkpointed_blocks(setting == "auto" or setting, base)
    cost = step_cost(config.method, config.model.precision, base, checkpointed=blocks, tokens=tokens, rows=rows)
    word = f", {blocks} of {base.blocks} blocks checkpointed" if blocks else ""
    return Part(f"activations of {rows * tokens:,} tokens{word}", cost.peak, _SIMULATED)


def encoding_memory(
    data: DataConfig,
    *,
    pixels: int,
    text_parameters: int = TEXT_PARAMETERS,
    vae_parameters: int = VAE_PARAMETERS,
    vae_width: int = VAE_WIDTH,
) -> list[Part]:
    """What the encoders hold on a GPU, with as many pictures as they are given at once; without CUDA's own context.

    text_parameters: of T5 and CLIP.  vae_width: the VAE's first block_out_channels.  pixels: of the largest bucket.
    """
    vae = _vae_memory(data, pixels, vae_parameters, vae_width)
    own = {"auto", "cuda"}  # the process's
    devices = {data.encoders.vae, data.encoders.t5}
    together = devices <= own or len(devices) == 1  # else text has a device of its own
    return [*vae, _text_memory(data, text_parameters)] if together else vae


def shared_encoders(
    data: DataConfig,
    training_gpus: int,
    *,
    pixels: int,
    text_parameters: int = TEXT_PARAMETERS,
    vae_parameters: int = VAE_PARAMETERS,
    vae_width: int = VAE_WIDTH,
) -> list[Part]:
    """What encoders of an online run hold on a GPU that trains: on the one that has most of them.

    training_gpus: of a machine, cuda:0 and those after it, with a process each, whose encoders are its own.  The other
    arguments are those of `encoding_memory`.
    """
    sizes = (pixels, text_parameters, vae_parameters, vae_width)
    training = _training_devices(training_gpus)
    held = [parts for name, parts in _by_device(data, training_gpus, *sizes).items() if name in training]
    return max(held, key=lambda parts: sum(part.bytes for part in parts), default=[])


def encoders_apart(
    data: DataConfig,
    training_gpus: int,
    *,
    pixels: int,
    text_parameters: int = TEXT_PARAMETERS,
    vae_parameters: int = VAE_PARAMETERS,
    vae_width: int = VAE_WIDTH,
) -> dict[str, list[Part]]:
    """GPU, as cuda:1 -> what is held there, of those that encode for others while an online run trains, in order. The
    arguments are `shared_encoders`'."""
    sizes = (pixels, text_parameters, vae_parameters, vae_width)
    held = _by_device(data, training_gpus, *sizes)
    apart = held.keys() - {"cpu", *_training_devices(training_gpus)}
    users = list(zip(*_encoders_devices(data, training_gpus), strict=True))  # a pair of devices for each process
    return {
        name: [*held[name], _times(sum(name in devices for devices in users), CONTEXT)]
        for name in sorted(apart, key=lambda name: (len(name), name))
    }


def _by_device(
    data: DataConfig, training_gpus: int, pixels: int, text_parameters: int, vae_parameters: int, vae_width: int
) -> dict[str, list[Part]]:
    """Device -> what encoders of an online run hold there: those of all processes of a machine."""
    if data.mode != "online":
        return {}
    parts = (_vae_memory(data, pixels, vae_parameters, vae_width), [_text_memory(data, text_parameters)])
    found: dict[str, list[Part]] = {}
    for devices, held in zip(_encoders_devices(data, training_gpus), parts, strict=True):
        for name in set(devices):
            found.setdefault(name, []).extend(_times(devices.count(name), part) for part in held)
    return found


def _training_devices(count: int) -> list[str]:
    return [f"cuda:{index}" for index in range(count)]


def encoders_on_host(
    data: DataConfig,
    training_gpus: int,
    *,
    text_parameters: int = TEXT_PARAMETERS,
    vae_parameters: int = VAE_PARAMETERS,
) -> list[Part]:
    """What encoders of an online run hold of a machine's own memory, in fp32; the arguments are `shared_encoders`'."""
    if data.mode != "online":
        return []
    vae, text = (devices.count("cpu") for devices in _encoders_devices(data, training_gpus))
    parts = [
        _times(vae, Part("VAE", 4 * vae_parameters, "of each process, in fp32")),
        _times(text, Part("T5 and CLIP", 4 * text_parameters, "of each process, in fp32")),
    ]
    return [part for part in parts if part.bytes]


def _encoders_devices(data: DataConfig, training_gpus: int) -> tuple[list[str], list[str]]:
    """Where an online run's VAE and its T5 are: of each training process, which has the GPU at the same place."""
    named, gpus = data.encoder_devices, _training_devices(training_gpus)
    homes = gpus if named is None else [named[rank % len(named)] for rank in range(len(gpus))]
    choices = {"auto": homes, "cuda": gpus}
    vae, t5 = (choices.get(device, [device] * len(gpus)) for device in (data.encoders.vae, data.encoders.t5))
    return vae, t5


def _vae_memory(data: DataConfig, pixels: int, parameters: int, width: int) -> list[Part]:
    at_once = data.pixels_at_once(pixels)
    pictures = at_once / 2**20 * width / VAE_WIDTH
    return [
        Part("VAE in fp32", 4 * parameters, f"{parameters / 1e6:.0f} M parameters"),
        Part(f"{at_once / 1e6:.3g} megapixels in it", pictures * _VAE_PICTURE_GIB * GIB, _VAE_COUNT),
    ]


def _text_memory(data: DataConfig, parameters: int) -> Part:
    each = 1 if data.encoders.t5_precision == "int8" else 2
    return Part("T5 and CLIP", each * parameters, f"{parameters / 1e9:.2f} B parameters")


def _times(count: int, part: Part) -> Part:
    return Part(f"{count} x {part.what}" if count > 1 else part.what, count * part.bytes, part.source)


def checkpoint_bytes(config: Config, base: FluxShape) -> tuple[float, float]:
    """(bytes of one checkpoint, bytes of what the end writes): trained weights, moments and average; final/ and
    final-ema/, as adapters in fp32 or whole transformers in bf16."""
    count = trained_parameters(config.method, base)
    has_average = config.train.ema_decay is not None
    moments, _ = _moments(config)
    weights = _trained_bytes(config)
    checkpoint = count * (weights + moments + (4 if has_average else 0))
    if config.method.type != "full":
        checkpoint += 4 * count  # the adapter as others load it
    export = count * (2 if config.method.type == "full" and config.model.precision != "fp32" else 4)
    return checkpoint, export * (2 if has_average else 1)
