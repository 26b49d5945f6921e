"""What a run is: every section, key, default and limit of a config. Frozen once validated.

A dataset's own keys are in configs/dataset_schema.py, what all sections are made of in configs/section.py.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from configs.section import (
    Count,
    Device,
    FolderOrUrl,
    Fraction,
    NamedDevice,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Side,
    list_of_one,
    list_of_word,
)


class RunConfig(Section):
    """Name, place and seed of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", examples=["sofa-removal"])]
    """The run's folder under `dir`: letters, digits, dots, underscores and hyphens."""

    dir: PathText = Path("runs")
    """Folder that holds the runs."""

    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 42
    """Of everything random: order of the samples, noise, new weights."""

    @property
    def folder(self) -> Path:
        """Where this run writes: dir / name."""
        return self.dir / self.name


class ModelConfig(Section):
    """The model that training starts from."""

    base: Annotated[str, Field(min_length=1, examples=["black-forest-labs/FLUX.1-Fill-dev"])]
    """Hub id, or folder in diffusers' layout. FLUX.1-Fill-dev; or FLUX.1-dev, expanded from 64 to 384 inputs."""

    precision: Literal["auto", "fp32", "bf16", "int8", "nf4", "fp8"] = "auto"
    """Of the transformer's weights and arithmetic. auto: bf16 on a GPU, fp32 on a CPU. int8, nf4 and fp8 keep the
    frozen weights in 8 or 4 bits and compute in bf16: less memory, not more speed. Which go with which method and
    engine: docs/combinations.md."""


class _AdapterSection(Section):
    """What all adapters have in common; the base's weights stay as they are."""

    rank: PositiveInt = 32
    """Width of the adapter's two factors."""

    alpha: PositiveFloat = 32.0
    """The adapter's output is scaled by alpha / rank."""

    targets: (
        Literal["attention", "attention+mlp"]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    ) = "attention+mlp"
    """Which linear layers get an adapter: those of the attention, also those of the feed-forward parts, or a list of
    module names as peft takes them."""

    init_from: PathText | None = None
    """Adapter of the same type to start from, as .safetensors. null: start at the base's output."""


class LoraConfig(_AdapterSection):
    """Train a low-rank adapter; the base's weights stay as they are."""

    type: Literal["lora"]
    """lora: train a low-rank adapter."""


class DoraConfig(_AdapterSection):
    """Train a low-rank adapter and the length of every row of the weights it adapts."""

    type: Literal["dora"]
    """dora: train a low-rank adapter, and the lengths of the weights' rows beside it."""


class LokrConfig(_AdapterSection):
    """Train an adapter that is a Kronecker product, as LyCORIS' LoKr."""

    type: Literal["lokr"]
    """lokr: train a Kronecker product of a small and a larger matrix."""

    factor: Annotated[int, Field(strict=True, ge=2)] | Literal["auto"] = "auto"
    """Side of the small matrix; the larger one has the layer's sides divided by it, and is whole where `rank` is at
    least half of them. auto: about the square root of the layer's sides (LyCORIS' factor -1)."""


class FullConfig(Section):
    """Train every weight of the transformer."""

    type: Literal["full"]
    """full: train every weight of the transformer."""


class CaptionsConfig(Section):
    """The text that goes with a picture."""

    default: str = ""
    """Caption of a picture without a .txt file."""

    trigger: Annotated[str, Field(min_length=1)] | None = None
    """Put in front of every caption that does not hold it already."""

    dropout: Fraction = 0.1
    """Share of the samples that are trained with an empty caption."""

    text_length: Annotated[int, Field(strict=True, ge=16, le=512)] = 512
    """Tokens of T5's text; longer captions are cut, shorter ones padded."""

    text_dtype: Literal["bf16", "int8"] = "bf16"
    """How the cache stores T5's text. int8: half the bytes, with a scale per token; what that does to the trained model
    has not been measured."""


class EncodersConfig(Section):
    """Where the VAE and the text encoders run: all on one device, or spread."""

    vae: Device = "auto"
    """Device of the VAE. auto: in preprocessing the process's own GPU (cpu if there is none), with mode online one of
    encoder_devices; or cpu, cuda:0, cuda:1, ..."""

    clip: Device = "auto"
    """Device of CLIP. auto: as for the VAE."""

    t5: Device = "auto"
    """Device of T5, which takes 9.5 GB in bf16. auto: as for the VAE."""

    t5_precision: Literal["auto", "int8"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. int8: weights in 8 bits (bitsandbytes), for GPUs that hold no more; the text
    tensors differ from those of bf16, so the cache says that it was so, and all workers must agree."""


class DataConfig(Section):
    """The pictures, and the cache of encoded samples that is made from them."""

    mode: Literal["cached", "online"] = "cached"
    """cached: train from what `fluxfill preprocess` encoded. online: encode pictures and captions while training, with
    the same outcome; nothing has to be preprocessed. Shards that are finished in `cache` are read, so that `fluxfill
    preprocess` may run before or beside it; without them every epoch encodes again."""

    encoder_devices: Annotated[
        Annotated[list[NamedDevice], Field(min_length=1)] | None,
        BeforeValidator(
            list_of_word, json_schema_input_type=NamedDevice | Annotated[list[NamedDevice], Field(min_length=1)] | None
        ),
    ] = None
    """With mode online: devices of the encoders, dealt to the training processes of a machine in turn. `fluxfill
    train` trains on the GPUs before the first of them: cuda:0 where it is [cuda:1]. null: each process encodes on the
    GPU that it trains on."""

    cache: Annotated[FolderOrUrl, Field(examples=["/data/cache/removal"])]
    """Folder of the encoded samples: written by `fluxfill preprocess`, read by the trainer. For training also an
    https://, s3:// or gs:// URL of such a folder. A run with mode online keeps there what it found out about the
    pictures, and writes no shards."""

    local_cache: PathText | None = None
    """With a URL as `cache`: folder on each node that shards are copied to, shared by the node's processes."""

    local_cache_gib: PositiveFloat = 100.0
    """What the copies in `local_cache` may take, in GiB; those that were not used for the longest time go first."""

    datasets: Annotated[list[DatasetConfig], Field(min_length=1)]
    """The sets of triples, each with a name of its own."""

    resolution: Annotated[
        list[Side],
        BeforeValidator(list_of_one, json_schema_input_type=Side | list[Side]),
        Field(min_length=1, validate_default=True),
    ] = [1024]
    """Side in pixels of a square picture; others get a bucket of about the same area. One number or several."""

    resolution_policy: Literal["one", "each"] = "one"
    """With several resolutions. one: each picture in the bucket that suits it best; each: once per resolution."""

    captions: CaptionsConfig = CaptionsConfig()
    """The text that goes with a picture."""

    mask_choice: Literal["random", "cycle", "first"] = "random"
    """Where samples have several masks. random: one drawn each time; cycle: each in turn, one an epoch; first: always
    the first."""

    mask_dropout: Fraction = 0.0
    """Share of the samples that are trained with a hole as large as the picture."""

    holdout: Count = 64
    """Pictures kept out of training for validation, chosen by a stable hash of the target's content."""

    shard_size_mib: PositiveInt = 256
    """A shard is closed once its samples reach this size, in MiB."""

    max_megapixels: PositiveFloat = 64.0
    """Pictures of more megapixels are refused, not decoded."""

    copies_gib: NonNegativeFloat = 100.0
    """Room beside the cache, in GiB, for copies of remote pictures until they are encoded; those beyond it are fetched
    twice."""

    encode_batch_size: PositiveInt = 8
    """Pictures that go through the VAE at once, and captions through T5."""

    encoders: EncodersConfig = EncodersConfig()
    """Where the VAE and the text encoders run: all on one device, or spread."""

    reader_threads: PositiveInt = 2
    """Threads that read samples, in each training process."""

    streams: PositiveInt = 1
    """Shares that the shards of each bucket are dealt to; each global batch takes as many samples from one as from the
    other. One per node lets a node fetch only its own share from remote storage; 1 mixes best. A run keeps the number
    that it began with."""

    @field_validator("encoder_devices")
    @classmethod
    def _something_encodes(cls, devices: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if devices is not None and info.data.get("mode") == "cached":
            raise ValueError("with mode cached nothing is encoded while training: set data.mode=online, or remove it")
        return devices

    @property
    def cache_folder(self) -> Path:
        """`cache`, for whoever writes it. Raises InputError if it is a URL."""
        if isinstance(self.cache, Path):
            return self.cache
        raise InputError(
            f"data.cache is {self.cache}, but a cache is made in a folder. Set data.cache to one, and copy it to the "
            "URL when it is finished."
        )

    @field_validator("local_cache")
    @classmethod
    def _copies_have_a_place(cls, local_cache: Path | None, info: ValidationInfo) -> Path | None:
        cache = info.data.get("cache")
        if local_cache is None and isinstance(cache, str):
            raise ValueError(f"data.cache is {cache}: give a folder on each node's own disk for copies of its shards")
        return local_cache

    @field_validator("datasets")
    @classmethod
    def _names_are_unique(cls, datasets: list[DatasetConfig]) -> list[DatasetConfig]:
        names = [dataset.name for dataset in datasets]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"each needs a name of its own: rename all but one of those called {', '.join(repeated)}")
        return datasets

    @field_validator("resolution")
    @classmethod
    def _resolutions_differ(cls, resolution: list[int]) -> list[int]:
        repeated = sorted({side for side in resolution if resolution.count(side) > 1})
        if repeated:
            raise ValueError(f"no number may stand there twice: keep one {', one '.join(map(str, repeated))}")
        return resolution


class TrainConfig(Section):
    """Steps, batches and optimizer."""

    steps: Annotated[PositiveInt, Field(examples=[4000])]
    """Optimizer updates in the whole run."""

    global_batch_size: Annotated[PositiveInt, Field(examples=[16])]
    """Samples per update, over all GPUs."""

    micro_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Samples per GPU and forward pass, at the largest bucket. auto: decided at start."""

    lr: Annotated[PositiveFloat, Field(examples=[1e-4])]
    """Highest learning rate, reached after the warm-up."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""

    lr_final_fraction: Fraction = 0.0
    """Learning rate at the last step, as a fraction of `lr`. A constant schedule does not fall."""

    warmup_steps: Count = 100
    """Steps in which the learning rate rises from zero to `lr`."""

    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = "adamw8bit"
    """adamw8bit keeps its two moments in 8 bits (bitsandbytes); adafactor keeps one, as a row and a column per weight;
    prodigy finds the step size itself, which lr then multiplies: set it to 1. Which engines take which:
    docs/combinations.md."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay, per step and times the learning rate."""

    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients of a larger norm are scaled down to it. null: never."""

    ema_decay: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    """Per step, of the moving average of the weights that is kept beside them. null: none is kept."""

    weights: Literal["fp32_master", "bf16_stochastic"] = "fp32_master"
    """How full fine-tuning keeps weights and moments. fp32_master: in fp32, 16 bytes a weight with its gradient;
    bf16_stochastic: in bf16 alone, 8 bytes, rounded up or down at random so that small updates count on average."""

    activation_checkpointing: Literal["auto"] | Annotated[bool, Field(strict=True)] = "auto"
    """Compute activations again in the backward pass to save memory. auto: decided at start."""

    compile: Literal["regional", "off"] = "off"
    """regional: torch.compile of the blocks, one graph for all of a kind and for every size of picture; it costs a
    minute or more at start. What it gains has not been measured on a GPU yet, so it is off unless asked for."""

    @field_validator("micro_batch_size")
    @classmethod
    def _micro_batch_fits(cls, micro: int | Literal["auto"], info: ValidationInfo) -> int | Literal["auto"]:
        total = info.data.get("global_batch_size")
        if micro != "auto" and total is not None and micro > total:
            raise ValueError(
                f"must not be above train.global_batch_size, {total}: lower it, or raise the global batch size"
            )
        return micro

    @field_validator("optimizer")
    @classmethod
    def _prodigy_has_a_rate_of_its_own(cls, optimizer: str, info: ValidationInfo) -> str:
        lr = info.data.get("lr")
        if optimizer == "prodigy" and lr is not None and lr < 0.1:
            raise ValueError(f"multiplies the step size that it finds by train.lr, {lr:g}: set train.lr=1")
        return optimizer

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup_steps: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps is not None and warmup_steps >= steps:
            raise ValueError(f"must be below train.steps, {steps}: lower it, or raise the steps")
        return warmup_steps


class FlowConfig(Section):
    """Flow matching: which noise levels are trained, and how the loss weighs the picture."""

    timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """How sigma is drawn, before the shift."""

    shift: Literal["dynamic", "none"] | PositiveFloat = "dynamic"
    """Moves sigma towards noise. dynamic: by the bucket's number of tokens, as FLUX.1 samples; a number: by that factor
    at every size."""

    guidance: Annotated[float, Field(strict=True, ge=0, le=100)] = 30.0
    """Guidance that the model is told in training; 30 is what FLUX.1-Fill is sampled with."""

    hole_weight: NonNegativeFloat = 1.0
    """Weight of the loss inside the hole, normalised per sample."""

    keep_weight: NonNegativeFloat = 1.0
    """Weight of the loss outside the hole, normalised per sample."""

    @field_validator("keep_weight")
    @classmethod
    def _something_is_trained(cls, keep_weight: float, info: ValidationInfo) -> float:
        if keep_weight == 0 and info.data.get("hole_weight") == 0:
            raise ValueError("must be above 0 when flow.hole_weight is 0: raise one of the two")
        return keep_weight


class ParallelConfig(Section):
    """How the work is spread over GPUs."""

    engine: Literal[
        "auto", "single", "ddp", "fsdp2", "fsdp2-offload", "hsdp", "zero1", "zero2", "zero3", "zero3-offload"
    ] = "auto"
    """single: one process; ddp: a copy of the model on each GPU; fsdp2: sharded over all GPUs; hsdp: sharded within a
    node, copied across; zero1, zero2, zero3: DeepSpeed. auto: ddp when there is more than one GPU."""


class ValidationConfig(Section):
    """Pictures sampled with the live weights, and their figures."""

    every_steps: PositiveInt | None = 250
    """Validate every so many steps, and at the end. null: never."""

    images: PositiveInt = 8
    """Pictures sampled each time, of the held-out ones and as many of the training ones."""

    sampler_steps: PositiveInt = 28
    """Steps of the sampler per picture."""


class CheckpointConfig(Section):
    """What a stopped run goes on from."""

    every_steps: PositiveInt | None = 250
    """Save every so many steps, and at the end. null: only at the end, and by the clock."""

    every_minutes: PositiveFloat | None = None
    """Save when so many minutes have passed since the last save, too. null: by steps alone."""

    keep_last: PositiveInt | None = 3
    """Older checkpoints are removed, once the new one is whole. null: keep all."""

    keep_best: Literal["hole_psnr", "loss"] | None = "hole_psnr"
    """Never remove the best one so far, by this figure of validations at the steps that were saved: hole_psnr, or loss
    (the mean over noise levels); of held-out pictures if there are any. null: it is removed like the others."""

    requantize: Annotated[bool, Field(strict=True)] = False
    """8-bit optimizer state fits the engine and the number of processes that saved it. true: on others it is quantized
    anew, which changes it a little; false: they are refused."""

    asynchronous: Annotated[bool, Field(strict=True, alias="async")] = True
    """Write checkpoints while training goes on, from a copy in the host's memory (as large as the checkpoint)."""


class GuardConfig(Section):
    """What a run survives before it stops."""

    max_bad_samples: Count = 16
    """Damaged samples that are replaced by the next whole one of their shard; with more the run stops."""


class LoggingConfig(Section):
    """Where figures go beside metrics.jsonl."""

    trackers: list[Literal["tensorboard"]] = ["tensorboard"]
    """An empty list: metrics.jsonl alone."""


class Config(Section):
    """One run of fluxfill."""

    version: Literal[1] = 1
    """Of the config's format."""

    run: RunConfig
    """Name, place and seed of the run."""

    model: ModelConfig
    """The model that training starts from."""

    method: Annotated[LoraConfig | DoraConfig | LokrConfig | FullConfig, Field(discriminator="type")]
    """What is trained: an adapter, or every weight."""

    data: DataConfig
    """The pictures, and the cache of encoded samples that is made from them."""

    train: TrainConfig
    """Steps, batches and optimizer."""

    flow: FlowConfig = FlowConfig()
    """Flow matching: which noise levels are trained, and how the loss weighs the picture."""

    parallel: ParallelConfig = ParallelConfig()
    """How the work is spread over GPUs."""

    validation: ValidationConfig = ValidationConfig()
    """Pictures sampled with the live weights, and their figures."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """What a stopped run goes on from."""

    guard: GuardConfig = GuardConfig()
    """What a run survives before it stops."""

    logging: LoggingConfig = LoggingConfig()
    """Where figures go beside metrics.jsonl."""
