"""What a run is: every section, key, default and limit of a config. Frozen once validated.

The section `data` is in configs/data_schema.py, `slurm` in configs/slurm_schema.py; what all sections are made of in
configs/section.py.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from configs.data_schema import DataConfig
from configs.section import (
    ANOTHER_RUN,
    NO_MATTER,
    Count,
    Fraction,
    NonNegativeFloat,
    PathText,
    PlaceText,
    PositiveFloat,
    PositiveInt,
    Section,
    in_force,
)
from configs.slurm_schema import SlurmConfig


class RunConfig(Section):
    """Name, place and seed of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", examples=["sofa-removal"])]
    """The run's folder under `dir`: letters, digits, dots, underscores and hyphens."""

    dir: PathText = Path("runs")
    """Folder that holds the runs."""

    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63), ANOTHER_RUN] = 42
    """Of everything random: order of the samples, noise, new weights."""

    @property
    def folder(self) -> Path:
        """Where this run writes: dir / name."""
        return self.dir / self.name


class ModelConfig(Section):
    """The model that training starts from."""

    base: Annotated[PlaceText, Field(examples=["black-forest-labs/FLUX.1-Fill-dev"])]
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
        | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    ) = "attention+mlp"
    """Which linear layers get an adapter: those of the attention, also those of the feed-forward parts, or a list of
    module names as peft takes them (`transformer.proj_out`: the model's last layer)."""

    init_from: PathText | None = None
    """Adapter of the same type to go on from: a .safetensors file of any trainer, or its folder. null: start at the
    base's output."""


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

    steps: Annotated[PositiveInt, Field(examples=[4000]), in_force("where the run ends, and the learning rate")]
    """Optimizer updates in the whole run."""

    global_batch_size: Annotated[PositiveInt, Field(examples=[16]), ANOTHER_RUN]
    """Samples per update, over all GPUs."""

    micro_batch_size: Annotated[PositiveInt | Literal["auto"], NO_MATTER] = "auto"
    """Samples per GPU and forward pass, at the largest bucket. auto: as many as fit beside the model and make a step
    fastest, by fluxfill plan's count and what is free at start; on a CPU 1. What is trained does not hang on it."""

    lr: Annotated[PositiveFloat, Field(examples=[1e-4]), in_force("the learning rate")]
    """Highest learning rate, reached after the warm-up."""

    lr_schedule: Annotated[Literal["constant", "linear", "cosine"], in_force("the learning rate")] = "cosine"
    """How the learning rate falls after the warm-up."""

    lr_final_fraction: Annotated[Fraction, in_force("the learning rate")] = 0.0
    """Learning rate at the end of the schedule, as a fraction of `lr`. A constant schedule does not fall."""

    warmup_steps: Annotated[Count, in_force("the learning rate")] = 100
    """Steps in which the learning rate rises from zero to `lr`."""

    schedule_steps: Annotated[PositiveInt | None, in_force("the learning rate")] = None
    """Step at which the schedule ends; behind it the rate stays. null: at `steps`. More than `steps`, for a run that is
    to be continued without a jump of the rate; fewer, for an end at `lr_final_fraction`."""

    optimizer: Annotated[Literal["adamw", "adamw8bit", "adafactor", "prodigy"], ANOTHER_RUN] = "adamw8bit"
    """adamw8bit keeps its two moments in 8 bits (bitsandbytes); adafactor keeps one, as a row and a column per weight;
    prodigy finds the step size itself, which lr then multiplies: set it to 1. Which engines take which:
    docs/combinations.md."""

    weight_decay: Annotated[NonNegativeFloat, in_force("how much weights shrink each step")] = 0.01
    """Decoupled weight decay, per step and times the learning rate."""

    max_grad_norm: Annotated[PositiveFloat | None, in_force("which gradients are scaled down")] = 1.0
    """Gradients of a larger norm are scaled down to it. null: never."""

    ema_decay: Annotated[
        Annotated[float, Field(strict=True, gt=0, lt=1)] | None, in_force("the moving average of the weights")
    ] = None
    """Per step, of the moving average of the weights that is kept beside them. null: none is kept."""

    weights: Annotated[Literal["fp32_master", "bf16_stochastic"], ANOTHER_RUN] = "fp32_master"
    """How full fine-tuning keeps weights and moments. fp32_master: in fp32, 16 bytes a weight with its gradient;
    bf16_stochastic: in bf16 alone, 8 bytes, rounded up or down at random so that small updates count on average."""

    activation_checkpointing: Annotated[Literal["auto"] | Annotated[bool, Field(strict=True)] | Count, NO_MATTER] = (
        "auto"
    )
    """Compute activations again in the backward pass to save memory: true, of all blocks; a number, of the first so
    many (FLUX.1 has 57). auto: of as few as fit, as for micro_batch_size; on a CPU of none."""

    compile: Annotated[Literal["regional", "off"], NO_MATTER] = "off"
    """regional: torch.compile of the blocks, one graph for all of a kind and for every size of picture; it costs a
    minute or more at start. What it gains has not been measured on a GPU yet, so it is off unless asked for."""

    attention: Annotated[Literal["auto", "cudnn", "flash", "efficient", "math"], NO_MATTER] = "auto"
    """Which of torch's attention kernels is tried first; the log says which one computes. auto: cudnn on GPUs of
    compute capability 9 and 10 (Hopper, Blackwell), else torch's own choice."""

    deterministic: Annotated[bool, Field(strict=True), NO_MATTER] = False
    """On GPUs, have every sum be added up in the same order each time, at some cost in speed: the same launch on the
    same kind of GPU then gives the same bits. On a CPU it does so anyway."""
    profile_steps: Annotated[list[PositiveInt], NO_MATTER] = []
    """Steps that each rank writes a profiler's trace of, to profile/ in the run's folder, for ui.perfetto.dev. Such a
    step takes longer, and its trace tens of MB."""

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

    @field_validator("schedule_steps")
    @classmethod
    def _schedule_trains_to_the_end(cls, schedule_steps: int | None, info: ValidationInfo) -> int | None:
        steps, warmup_steps = info.data.get("steps"), info.data.get("warmup_steps")
        if schedule_steps is None or steps is None or warmup_steps is None:
            return schedule_steps
        if schedule_steps <= warmup_steps:
            raise ValueError(f"must be above train.warmup_steps, {warmup_steps}: raise it, or lower the warm-up")
        falls_to_zero = info.data.get("lr_final_fraction") == 0 and info.data.get("lr_schedule") != "constant"
        if schedule_steps < steps and falls_to_zero:
            raise ValueError(
                f"the rate is 0 behind it, and train.steps is {steps}: set train.lr_final_fraction above 0, or no "
                "fewer than the steps"
            )
        return schedule_steps

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup_steps: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps is not None and warmup_steps >= steps:
            raise ValueError(f"must be below train.steps, {steps}: lower it, or raise the steps")
        return warmup_steps


class FlowConfig(Section):
    """Flow matching: which noise levels are trained, and how the loss weighs the picture."""

    timestep_sampling: Annotated[Literal["logit_normal", "uniform"], in_force("which noise levels are trained")] = (
        "logit_normal"
    )
    """How sigma is drawn, before the shift."""

    shift: Annotated[Literal["dynamic", "none"] | PositiveFloat, in_force("which noise levels are trained")] = "dynamic"
    """Moves sigma towards noise. dynamic: by the bucket's number of tokens, as FLUX.1 samples; a number: by that factor
    at every size."""

    guidance: Annotated[float, Field(strict=True, ge=0, le=100), in_force("the guidance that the model is told")] = 30.0
    """Guidance that the model is told in training; 30 is what FLUX.1-Fill is sampled with."""

    hole_weight: Annotated[NonNegativeFloat, in_force("the loss")] = 1.0
    """Weight of the loss inside the hole, normalised per sample."""

    keep_weight: Annotated[NonNegativeFloat, in_force("the loss")] = 1.0
    """Weight of the loss outside the hole, normalised per sample."""

    unmasked_probability: Annotated[Fraction, in_force("the loss")] = 0.0
    """Chance of each sample that its loss ignores the mask: hole and kept part weigh alike, and both are held against
    the picture. For runs whose weights, or whose `keep_target`, would else never show the model a whole picture."""

    keep_target: Annotated[Literal["picture", "base"], in_force("the loss")] = "picture"
    """What the loss holds the kept part against. picture: its own velocity; base: what the frozen base predicts there
    (prior preservation), for adapters on FLUX.1-Fill; one more forward pass, without gradients, a micro-batch."""

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
    """Pictures sampled while a run trains, and their figures."""

    every_steps: PositiveInt | None = 250
    """Validate every so many steps, and at the end. null: never."""

    images: PositiveInt = 8
    """Pictures sampled each time, of the held-out ones and as many of the training ones."""

    sampler_steps: PositiveInt = 28
    """Steps of the sampler per picture."""

    weights: Literal["live", "ema"] = "live"
    """What is sampled with: the weights as they train, or their moving average (`train.ema_decay`), which then decides
    too which checkpoint is the best one. Meanwhile the live weights wait in the host's memory."""


class CheckpointConfig(Section):
    """What a stopped run goes on from."""

    every_steps: PositiveInt | None = 250
    """Save every so many steps, and at the end. null: only at the end, and by the clock."""

    every_minutes: PositiveFloat | None = None
    """Save when so many minutes have passed since the last save, too. null: by steps alone."""

    keep_last: PositiveInt | None = 3
    """Older checkpoints are removed, once the new one is whole. null: keep all."""

    keep_best: Literal["auto", "hole_psnr", "loss"] | None = "auto"
    """Never remove the best one so far, by this figure of validations at the steps that were saved: hole_psnr, or loss
    (the mean over noise levels); of held-out pictures if there are any. auto: loss where a dataset's masks are random,
    as many fills of such a hole are right; else hole_psnr. null: it is removed like the others."""

    asynchronous: Annotated[bool, Field(strict=True, alias="async")] = True
    """Write checkpoints while training goes on, from a copy in the host's memory (as large as the checkpoint). A save
    for whose copy a node has too little memory, and the last one, is written while training waits, and copies one
    tensor at a time; false: all are."""

    at_end: Annotated[bool, Field(strict=True)] = True
    """Save when the run ends or is stopped, and write what it trained to <run>/final. false: neither, for a run that
    only tries whether it would train, as `fluxfill check` does."""


class GuardConfig(Section):
    """What a run survives before it stops."""

    max_bad_samples: Count = 16
    """Damaged samples that are replaced by the next whole one of their shard; with more the run stops."""

    max_skips: PositiveInt = 5
    """Updates skipped in a row, for a loss or gradient that is not finite, before the run goes back to its last good
    checkpoint. There it passes over the batches that were skipped."""

    max_rollbacks: Count = 3
    """Times that the run goes back; once more, and it stops with a report of the samples in guard-report/."""

    lr_factor: Annotated[
        float, Field(strict=True, gt=0, le=1), in_force("the learning rate after a rollback to come")
    ] = 0.5
    """What the learning rate is multiplied by each time that the run goes back. 1: it stays."""

    loss_spike: Annotated[PositiveFloat | None, in_force("which updates are skipped")] = None
    """Skip an update too if its loss is so many standard deviations above the median of the last 100 (the deviation
    estimated by their median deviation, which outliers do not move). null: whatever is finite is applied."""

    exclude_batches: Annotated[list[Count], in_force("which batches are passed over")] = []
    """Global batches that are passed over, counted from 0 as in events.jsonl; the others keep their noise."""

    step_timeout_minutes: PositiveFloat | None = 10.0
    """End a run that hangs, with the stacks of all ranks in <run>/stacks: when no micro-batch, and no step of the
    sampler, has ended for so long; six times that for the first, a save and a rollback. null: wait for ever."""


class LoggingConfig(Section):
    """Where figures go beside metrics.jsonl."""

    trackers: list[Literal["tensorboard"]] = ["tensorboard"]
    """An empty list: metrics.jsonl alone."""


class Config(Section):
    """One run of fluxfill."""

    version: Annotated[Literal[1], NO_MATTER] = 1
    """Of the config's format."""

    run: Annotated[RunConfig, NO_MATTER]
    """Name, place and seed of the run."""

    model: Annotated[ModelConfig, ANOTHER_RUN]
    """The model that training starts from."""

    method: Annotated[LoraConfig | DoraConfig | LokrConfig | FullConfig, Field(discriminator="type"), ANOTHER_RUN]
    """What is trained: an adapter, or every weight."""

    data: DataConfig
    """The pictures, and the cache of encoded samples that is made from them."""

    train: TrainConfig
    """Steps, batches and optimizer."""

    flow: FlowConfig = FlowConfig()
    """Flow matching: which noise levels are trained, and how the loss weighs the picture."""

    parallel: Annotated[ParallelConfig, NO_MATTER] = ParallelConfig()
    """How the work is spread over GPUs."""

    validation: Annotated[ValidationConfig, NO_MATTER] = ValidationConfig()
    """Pictures sampled while a run trains, and their figures."""

    checkpoint: Annotated[CheckpointConfig, NO_MATTER] = CheckpointConfig()
    """What a stopped run goes on from."""

    guard: Annotated[GuardConfig, NO_MATTER] = GuardConfig()
    """What a run survives before it stops."""

    logging: Annotated[LoggingConfig, NO_MATTER] = LoggingConfig()
    """Where figures go beside metrics.jsonl."""

    slurm: Annotated[SlurmConfig, NO_MATTER] = SlurmConfig()
    """Jobs on a SLURM cluster."""
