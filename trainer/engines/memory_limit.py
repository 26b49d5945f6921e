"""What did not fit a GPU's memory: a record in the run's folder, which the next start heeds.

A rank that is out of memory in the middle of a step cannot try it again by itself: under most engines the others wait
for it in a collective. So the process ends, the others by its end, and the same command goes on from the last
checkpoint with less at once (trainer/process/outcome.py, launch/supervise.py). Nothing else of the run changes.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from configs.memory import optimizer_state_bytes
from configs.schema import Config
from data.batches.batch_stream import BatchStream
from data.storage.atomic_write import write_text_atomically
from trainer.engines.base import Engine
from trainer.model.checkpointing import all_checkpointed
from trainer.model.flow import flow_loss, mix_noise, sample_sigma, velocity_target
from trainer.model.flux import predict_velocity
from trainer.process.json_lines import write_event
from trainer.process.out_of_memory import is_out_of_host_memory, is_out_of_memory
from trainer.process.outcome import StartAgain

log = logging.getLogger("fluxfill")

FILE = "memory.json"
TRIED_ON = ("cuda",)  # device types whose memory is measured before the first step
# Keys on which the memory of a step hangs; with another value what did not fit may.
_SECTIONS = ("model", "method", "parallel")
_TRAIN_KEYS = ("weights", "optimizer", "ema_decay", "activation_checkpointing", "compile")
_DATA_KEYS = ("mode", "resolution", "encoder_devices", "encoders", "encode_batch_size")

_WAYS_OUT = (
    "train.activation_checkpointing=true, model.precision=int8 or nf4 for an adapter, data.resolution=[512], an engine "
    "that shards (docs/troubleshooting.md#out-of-memory)"
)


@dataclass(frozen=True)
class MemoryLimit:
    """The most that is tried; None: nothing was found not to fit.

    micro_batch_size: samples of the largest bucket in a forward pass.  validation_images: pictures sampled at once; 0:
    none are.  found_with: engine, GPUs and settings.
    """

    micro_batch_size: int | None = None
    validation_images: int | None = None
    found_with: dict[str, Any] = field(default_factory=dict)


def read_memory_limit(config: Config, engine: Engine) -> MemoryLimit:
    """What earlier starts of the run have found, with this engine, these GPUs and settings; all ranks call it."""
    path = config.run.folder / FILE
    found, now = None, _found_with(config, engine)  # whatever is found: it asks all ranks
    if engine.is_main:
        try:
            found = MemoryLimit(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except (ValueError, TypeError) as error:
            log.warning("%s is passed over: %s", path, error)
    found = engine.ranks.broadcast_object(found)
    if found is None or found.found_with == now:
        return found or MemoryLimit()
    log.info("%s was found with other GPUs, another engine or config, and is passed over", path)
    return MemoryLimit()


def micro_batch_limit(config: Config, engine: Engine) -> int | None:
    """The most samples of the largest bucket in a forward pass, as memory did not suffice; None: as many as are asked
    for, or chosen. All ranks call it."""
    limit, asked = read_memory_limit(config, engine).micro_batch_size, config.train.micro_batch_size
    if engine.is_main and limit is not None and (asked == "auto" or asked > limit):
        log.warning(
            "train.micro_batch_size %s, but memory did not suffice before: no more than %d at once, for the same "
            "global batch. Delete %s to try more again",
            *(asked, limit, config.run.folder / FILE),
        )
    return limit


@contextmanager
def smaller_when_out_of_memory(
    config: Config, engine: Engine, transformer: nn.Module, stream: BatchStream
) -> Iterator[None]:
    """Steps on the micro-batches of a stream, of which the largest is tried first, on a GPU.

    Raises StartAgain where one does not fit, on the rank that finds it, once the next smaller size is in the record;
    RuntimeError, with the ways out, where there is no smaller one. All ranks enter it.
    """
    heeded = read_memory_limit(config, engine).micro_batch_size
    # By fit_to_memory, at the next start.
    may_checkpoint = (
        config.train.activation_checkpointing == "auto" and heeded is None and not all_checkpointed(transformer)
    )
    try:
        if engine.device.type in TRIED_ON:
            _try_largest(config, engine, transformer, stream)
        yield
    except Exception as error:
        # A smaller micro-batch is no help to a save that lacks memory of the host.
        if not is_out_of_memory(error) or (is_out_of_host_memory(error) and engine.device.type != "cpu"):
            raise
        told = _told(error)
        micro_batch_size = stream.rows_per_forward
        if micro_batch_size == 1 and not may_checkpoint:
            raise RuntimeError(f"{told} One sample at a time does not fit the memory. Ways out: {_WAYS_OUT}") from error
        smaller = -(-micro_batch_size // 2)
        _write(config, engine, micro_batch_size=smaller)
        raise StartAgain(
            f"{told} train.micro_batch_size {micro_batch_size} does not fit the memory; the same command goes on from "
            f"the last checkpoint with {smaller}{', all blocks checkpointed,' if may_checkpoint else ','} and the same "
            "global batch",
            why="out of memory",
        ) from error


def _try_largest(config: Config, engine: Engine, transformer: nn.Module, stream: BatchStream) -> None:
    """One forward and backward pass of the largest micro-batch beside all that a step holds; nothing is trained."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # or a start that held more for a moment would be told as the step's
    is_fresh = not any(state for *_, state in engine.optimizer_states())  # the first step makes the optimizer's state
    held = [
        torch.empty(int(part.weight.numel() * optimizer_state_bytes(config)), dtype=torch.uint8, device=engine.device)
        for part in engine.local_slices()
        if is_fresh and part.weight.device.type == engine.device.type  # accelerate's may be "cuda" without a number
    ]
    example = replace(stream.example(), is_last=not engine.name.startswith("zero"))  # whose exchange is a step's
    for rows in engine.micro_steps(iter([example])):
        sigma = sample_sigma(rows.uniform, rows.bucket.tokens, config.flow)
        noisy = mix_noise(rows.latents, rows.noise, sigma)
        target = velocity_target(engine.unwrap(), noisy, rows, sigma, config.flow)
        velocity = predict_velocity(transformer, noisy, rows, sigma, config.flow)
        engine.backward(flow_loss(velocity, target, torch.ones_like(rows.noise[:, :1])), rows.weight)
    engine.drop_gradients()
    del held
    if engine.device.type == "cuda":
        most, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(engine.device).total_memory
        log.info(
            "the largest micro-batch (%d x %s) fits: %.1f GiB at most of the GPU's %.1f",
            *(stream.rows_per_forward, example.bucket, most / 2**30, total / 2**30),
        )


def validate_less(config: Config, engine: Engine, error: Exception, *, images: int) -> StartAgain:
    """The error for a validation that did not fit in the middle of a sharded model, once the record says how many
    pictures at once are tried next."""
    _write(config, engine, validation_images=images)
    how = "one picture at a time" if images else "without validation"
    return StartAgain(
        f"{_told(error)} Validation does not fit the memory; the same command goes on from the last checkpoint, {how}",
        why="out of memory",
    )


def _write(config: Config, engine: Engine, **found: Any) -> None:
    """Add to the record; by the rank that found it."""
    path = config.run.folder / FILE
    now = _found_with(config, engine)
    try:
        before = MemoryLimit(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        before = MemoryLimit()
    if before.found_with != now:
        before = MemoryLimit(found_with=now)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(asdict(replace(before, **found)), indent=1) + "\n")
    write_event(config.run.folder, "out of memory", rank=engine.rank, **found)


def _told(error: Exception) -> str:
    """The beginning of an error's message, with what was asked for; torch goes on for a paragraph."""
    told = str(error).partition("\n")[0].partition(" GPU ")[0].strip()
    return told if told.endswith(".") else f"{told}."


def _found_with(config: Config, engine: Engine) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    return {
        "engine": engine.name,
        "processes": engine.world_size,
        "gpus": engine.gpus,  # of all ranks: whichever finds what does not fit, all of them heed it
        **{section: settings[section] for section in _SECTIONS},
        "train": {key: settings["train"][key] for key in _TRAIN_KEYS},
        "data": {key: settings["data"][key] for key in _DATA_KEYS},
    }
