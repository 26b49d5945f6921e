"""What a run is: every section, key, default and limit of a config. Frozen once validated.

The section `data` is in configs/data_schema.py, what all sections are made of in configs/section.py.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from configs.data_schema import DataConfig
from configs.section import (
    Count,
    Fraction,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
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


# Each has its file in configs/engines/ and its class in trainer/engines/start.py.
EngineName = Literal["single", "ddp", "fsdp2", "fsdp2-offload", "hsdp", "zero1", "zero2", "zero3", "zero3-offload"]


class ParallelConfig(Section):
    """How the work is spread over GPUs."""

    engine: Literal["auto", EngineName] = "auto"
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
