"""Short runs of the tiny model: what the launches share, what a rank tells of one, and what is read of its folder."""

import json
import shutil
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

STEPS, HALF = 4, 2
SINGLE = ("single", 1)
# How far tensors of one run may lie from those of another engine: Adam divides gradients by their size, and of those
# that are next to nothing (of a LoRA's A while B is near its zeros) what another order of sums does to them, which
# depends on the processor, is part of an update then (of about 1e-3). Here it comes to 4e-6.
ROUNDING = 5e-5

SETTINGS = (
    "train.global_batch_size=8",
    "train.micro_batch_size=3",
    f"train.steps={STEPS}",
    "train.warmup_steps=2",
    "train.ema_decay=0.9",
    "validation.every_steps=null",
    f"checkpoint.every_steps={HALF}",
    "checkpoint.keep_last=null",
    "logging.trackers=[]",
)


AS_ON_GPUS = ("train.activation_checkpointing=true", "train.deterministic=true")


class Run(NamedTuple):
    """folder: of the run.  returned: by each rank, in rank order."""

    folder: Path
    returned: list


def slow(*launches: tuple) -> list:
    """The parameters of a test that run only when slow tests are chosen."""
    return [pytest.param(*launch, marks=pytest.mark.slow) for launch in launches]


# --- in a rank --------------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """What a rank did while it trained.

    read: position of every row that it read.  For each micro-step, is_last: whether it was its step's last one;
    addresses: where the gradients lay after it (DTensors have none); unsharded: elements of unsharded gradients that
    FSDP held after it.  patience: seconds that each process group waits for another rank.
    sends_buffers: whether DDP sends buffers with each forward pass.
    """

    read: list[int] = field(default_factory=list)
    is_last: list[bool] = field(default_factory=list)
    addresses: list[list[int]] = field(default_factory=list)
    unsharded: list[int] = field(default_factory=list)
    patience: list[float] = field(default_factory=list)
    sends_buffers: bool | None = None


RANKS_PATIENCE = timedelta(minutes=45)  # gloo's own is the trainer's


def train(arguments: list[str]) -> Watched:
    """The trainer, in a forked rank."""
    from torch.distributed.tensor import DTensor

    from data.batches.row_filler import RowFiller
    from trainer.engines.base import Engine
    from trainer.main import train

    watched = Watched()
    begin, micro_steps, backward = RowFiller.begin, Engine.micro_steps, Engine.backward

    def watched_begin(self, rows, place, position):
        watched.read.append(position)
        return begin(self, rows, place, position)

    def watched_micro_steps(self, batches):
        for rows in micro_steps(self, batches):
            watched.is_last.append(rows.is_last)
            yield rows

    def watched_backward(self, losses, weight):
        backward(self, losses, weight)
        gradients = [parameter.grad for parameter in self.unwrap().parameters() if parameter.grad is not None]
        watched.addresses.append([grad.data_ptr() for grad in gradients if not isinstance(grad, DTensor)])
        watched.unsharded.append(count_unsharded_gradients(self.unwrap()))
        watched.patience = patience_of_groups()
        watched.sends_buffers = getattr(self._transformer, "broadcast_buffers", None)

    Engine.patience = RANKS_PATIENCE
    partition_small_parameters()
    RowFiller.begin, Engine.micro_steps, Engine.backward = watched_begin, watched_micro_steps, watched_backward
    refuse_numbers_of_dtensors()
    train(arguments)
    return watched


def partition_small_parameters() -> None:
    """From now on ZeRO-3 partitions parameters of fewer than 1e5 elements, too: almost all of the tiny model's, which
    it would leave whole on each rank."""
    from trainer.engines.zero import Zero3Engine

    prepare = Zero3Engine._prepare

    def prepare_in_parts(self, transformer, build_optimizer):
        settings = self._accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        settings["stage3_param_persistence_threshold"] = 0
        return prepare(self, transformer, build_optimizer)

    Zero3Engine._prepare = prepare_in_parts


def patience_of_groups() -> list[float]:
    """Seconds that each process group of this rank waits for another, on a CPU."""
    from torch.distributed.distributed_c10d import _world

    device = torch.device("cpu")
    return [group._get_backend(device).options._timeout.total_seconds() for group in _world.pg_map]


def count_unsharded_gradients(model: torch.nn.Module) -> int:
    """Elements of the unsharded gradients that FSDP holds."""
    held = 0
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if hasattr(module, "_get_fsdp_state") else None
        for parameter in group.fsdp_params if group else ():
            full = getattr(parameter, "_unsharded_param", None)
            for gradient in (parameter.unsharded_accumulated_grad, None if full is None else full.grad):
                held += 0 if gradient is None else gradient.numel()
    return held


def refuse_numbers_of_dtensors() -> None:
    """From now on a number read off a DTensor is an error: of a sum or a norm it would be this rank's part alone."""
    from torch.distributed.tensor import DTensor

    def refuse(self, *_):
        raise AssertionError("a number was read off a DTensor: call full_tensor() first")

    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        setattr(DTensor, name, refuse)


# --- a run's folder ---------------------------------------------------------------------------------------------------


def go_on_from(source: Path, name: str, step: int = HALF) -> Path:
    """A folder beside `source` whose run goes on from a checkpoint of it."""
    folder = source.parent / name
    checkpoint = Path("checkpoints", f"step-{step:08d}")
    shutil.copytree(source / checkpoint, folder / checkpoint)
    shutil.copy(source / "metrics.jsonl", folder)
    return folder


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def read_losses(run: Path) -> list[float]:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def read_tensors(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """ "<kind>/<parameter>" -> flat tensor, of weights, moments and average alike."""
    from trainer.checkpoints.tensor_files import StateFiles

    folder = run / "checkpoints" / f"step-{step:08d}"
    files = StateFiles(folder)
    tensors = {}
    for name in files.names():
        kind, parameter = name.split("/", 1)
        tensors[name] = files.read(kind, parameter, 0, files.sizes[parameter])
    for rank in range(len(list(folder.glob("rank-*")))):
        tensors |= {f"{rank}/{name}": value.float() for name, value in files.read_bound(rank).items()}
    return tensors


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two numbers that should be the same."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def assert_same_run(run: Path, expected: Path, *, within: float, tensors_within: float | None = None) -> None:
    """Losses of every step, and all that the last checkpoint holds, are those expected."""
    assert read_losses(run) == pytest.approx(read_losses(expected), abs=within)
    apart = furthest(read_tensors(run), read_tensors(expected))
    assert apart <= (within if tensors_within is None else tensors_within), apart
