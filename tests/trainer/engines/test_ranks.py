"""What ranks send each other, in groups of real processes; and the patience they have with one that reads for long."""

import shutil
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer.engines.runs import HALF, STEPS
from trainer.engines.ranks import Ranks


def talk(world_size: int) -> dict[str, object]:
    """What this rank hears from a collective of each kind."""
    import os

    rank, cpu = int(os.environ["RANK"]), torch.device("cpu")
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    ranks = Ranks(rank, world_size, cpu)
    mine = torch.arange(6.0).view(2, 3).T if rank == 0 else torch.empty(3, 2, device="meta")
    total = torch.tensor([1.0, float("nan") if rank == world_size - 1 else 0.0])
    ranks.all_reduce_sum_(total)
    heard = {
        "all_gather": ranks.all_gather(f"rank {rank}"),
        "start_all_gather": ranks.start_all_gather(0.5 + rank).tolist(),
        "gather": ranks.gather(rank),
        "broadcast_object": ranks.broadcast_object(f"rank {rank}"),
        "broadcast": ranks.broadcast(mine).tolist(),
        "all_reduce_sum": ranks.all_reduce_sum(0.5 + rank),
        "all_reduce_sum_": str(total.tolist()),
    }
    ranks.barrier()
    if world_size > 1:
        torch.distributed.destroy_process_group()
    return heard


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_hears_what_its_collective_promises(world_size):
    for rank, heard in enumerate(run_ranks("ddp", world_size, talk, world_size)):
        assert heard == {
            "all_gather": [f"rank {other}" for other in range(world_size)],
            "start_all_gather": [0.5 + other for other in range(world_size)],
            "gather": list(range(world_size)) if rank == 0 else None,
            "broadcast_object": "rank 0",
            "broadcast": [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]],
            "all_reduce_sum": sum(0.5 + other for other in range(world_size)),
            "all_reduce_sum_": f"[{float(world_size)}, nan]",
        }


@dataclass(frozen=True)
class Choice:
    """checkpoint: that the trainer would go on from.  hashed: files that this rank read for it."""

    checkpoint: str
    hashed: list[str]


def choose_twice(arguments: list[str]) -> tuple[Choice, Choice, float]:
    """(the choice, the choice once the newest checkpoint is damaged, the group's patience in seconds).

    Of 45 minutes: gloo's own is the trainer's.
    """
    import hashlib

    from trainer.checkpoints.resume import choose_checkpoint
    from trainer.engines.base import Engine
    from trainer.engines.start import start_engine
    from trainer.process.command_line import read_command_line

    hashed: list[str] = []
    digest = hashlib.file_digest

    def watched(file, algorithm):
        hashed.append(Path(file.name).name)
        return digest(file, algorithm)

    hashlib.file_digest = watched
    Engine.patience = timedelta(minutes=45)
    config, resume_from = read_command_line(arguments)
    engine = start_engine(config)
    choices = []
    for _ in range(2):
        folder = choose_checkpoint(config, resume_from, engine)
        choices.append(Choice(folder.name, hashed.copy()))
        hashed.clear()
        engine.ranks.barrier()
        if engine.is_main:
            last = folder / "rank-00001.safetensors"
            last.write_bytes(last.read_bytes()[:-1] + b"\x00")
        engine.ranks.barrier()
    group = torch.distributed.group.WORLD
    patience = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    engine.close()
    return *choices, patience


@pytest.mark.parametrize("engine, num_processes", [("ddp", 2), ("fsdp2", 3), ("zero2", 2)])
def test_ranks_share_the_reading_of_a_checkpoint_and_have_the_patience_for_it(
    launch, undisturbed, engine, num_processes
):
    source = undisturbed("ddp", 2).folder
    run = source.parent / f"shared-{engine}"
    shutil.copytree(source / "checkpoints", run / "checkpoints")
    files = [
        path.name
        for path in (source / "checkpoints" / f"step-{STEPS:08d}").rglob("*")
        if path.is_file() and path.name not in ("COMPLETE", "manifest.json")
    ]
    ranks = launch(engine, num_processes, run.name, function=choose_twice).returned
    intact, damaged, patience = zip(*ranks, strict=True)
    assert {choice.checkpoint for choice in intact} == {f"step-{STEPS:08d}"}
    assert sorted(chain.from_iterable(choice.hashed for choice in intact)) == sorted(files)
    assert all(choice.hashed for choice in intact)
    assert {choice.checkpoint for choice in damaged} == {f"step-{HALF:08d}"}
    assert set(patience) == {45 * 60}
