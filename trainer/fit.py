"""`auto` of train.micro_batch_size and train.activation_checkpointing, decided when the model is on the device."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.fit import Cluster, Fit, Work, fit_step, named_fit
from configs.flux_shape import FluxShape
from configs.gpu_profiles import profile_of_card
from configs.memory import CONTEXT, GIB, USABLE
from configs.schema import Config
from data.batches.training_set import TrainingSet
from data.encoders.model_folder import read_part_config
from trainer.engines.base import Engine
from trainer.model.checkpointing import checkpoint_blocks
from trainer.training_data import largest_bucket

log = logging.getLogger("fluxfill")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a GPU.  free: by its driver.  reserved: by this process's allocator.  allocated: of those, in tensors.
    card: its name, by the driver too."""

    card: str
    total: int
    free: int
    reserved: int
    allocated: int


def fit_to_memory(
    config: Config, engine: Engine, model: Path, samples: TrainingSet, *, at_most: int | None = None
) -> int:
    """Samples of a micro-batch of the largest bucket; and as many blocks are checkpointed as are asked for, or as fit.

    auto is decided by the functions of `fluxfill plan`, with what is free on the rank that has the least: all ranks
    call it, after `engine.prepare`.  at_most: samples of a micro-batch, whatever the config says, since more did not
    fit: auto checkpoints all blocks then, as room by count would be filled up again.  Raises InputError for more blocks
    than the model has.
    """
    base = FluxShape.of(read_part_config(model, "transformer"))
    micro, checkpointed = named_fit(config, base)
    if micro is not None and at_most is not None:
        micro = min(micro, at_most)
    if at_most is not None and checkpointed is None:
        checkpointed = base.blocks
        log.info("train.activation_checkpointing: auto, so all %d blocks: memory did not suffice before", base.blocks)
    if micro is None or checkpointed is None:
        memory = device_memory(engine.device)
        if memory is None:
            chosen, reason = (micro or 1, checkpointed or 0), "on a CPU"
        else:
            work = work_of(config, engine, base, samples, memory)
            room = min(engine.ranks.all_gather(room_for_activations(work, memory)))
            # Rank 0 decides, for cards that are not alike.
            fit = fit_step(work, room, micro=micro, checkpointed=checkpointed, at_most=at_most)
            chosen = engine.ranks.broadcast_object((fit.micro_batch_size, fit.checkpointed))
            reason = _reason(work, fit, room)
        if micro is None:
            also = "and as many tokens of smaller ones"
            log.info("train.micro_batch_size: auto, so %d at the largest bucket %s; %s", chosen[0], also, reason)
        if checkpointed is None:
            log.info("train.activation_checkpointing: auto, so %d of %d blocks; %s", chosen[1], base.blocks, reason)
        micro, checkpointed = chosen
    checkpoint_blocks(engine.unwrap(), checkpointed)
    return micro


def device_memory(device: torch.device) -> DeviceMemory | None:
    """What a GPU has left now; None of a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return DeviceMemory(torch.cuda.get_device_name(device), total, free, reserved, allocated)


def work_of(config: Config, engine: Engine, base: FluxShape, samples: TrainingSet, memory: DeviceMemory) -> Work:
    """The run as a plan reckons it, on cards like this one."""
    profile = profile_of_card(memory.card, memory.total / GIB)
    cluster = Cluster(profile, engine.num_nodes, engine.world_size // engine.num_nodes)
    tokens = largest_bucket(samples).tokens + samples.manifest.text_length
    return Work(config, base, engine.name, cluster, tokens)


def room_for_activations(work: Work, memory: DeviceMemory) -> float:
    """Bytes for activations, once all that is to come is there: gradients, moments, averages and buffers by count, or
    what is there already, if that is more."""
    outside = memory.total - memory.free - memory.reserved  # CUDA's context, NCCL's, other processes
    encoders = sum(part.bytes for part in work.encoders)  # not there yet: they come with the first batch
    held = max(work.fixed_bytes - encoders - CONTEXT.bytes, memory.allocated)
    return USABLE * memory.total - max(outside, CONTEXT.bytes) - held - encoders


def _reason(work: Work, fit: Fit, room: float) -> str:
    needed = f"{fit.micro_batch_size} x {work.tokens:,} tokens take {fit.cost.peak / GIB:.1f} GiB by count"
    one, all_blocks = work.cost(1, 0).peak / GIB, work.cost(1, work.base.blocks).peak / GIB
    free = f"{max(room, 0.0) / GIB:.1f} are left for activations on the fullest GPU"
    if not fit.fits:
        free += ". The run may go out of memory: ask `fluxfill plan` for what fits"
    return f"{needed}, {free} (a sample takes {one:.1f} GiB with no block checkpointed, {all_blocks:.1f} with all)"
