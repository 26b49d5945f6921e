from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.scaling import (
    LAUNCHES,
    Collectives,
    bytes_by_plan,
    bytes_received,
    launch,
    make_inputs,
    measure,
    settings,
)


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_bytes_are_those_of_the_tensors_that_ranks_exchange(group):
    whole, part = torch.zeros(10), torch.zeros(10, dtype=torch.bfloat16)
    with Collectives() as counted:
        dist.all_reduce(whole)  # there and back
        dist.all_gather_into_tensor(torch.zeros(10, dtype=torch.bfloat16), part)
        dist.reduce_scatter_tensor(torch.zeros(10), whole)
        dist.barrier()
    assert counted.moved == {"allreduce_": 80, "_allgather_base_": 20, "_reduce_scatter_base_": 40}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder of pictures, a model and a cache."""
    folder = tmp_path_factory.mktemp("scaling")
    make_inputs(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("engine", [engine for _, engine in LAUNCHES.values()])
def test_two_ranks_exchange_what_a_plan_reckons_with(inputs, engine, micro_steps):
    name = f"run.name={engine}-{micro_steps}"
    two = launch(engine, 2, [*settings(inputs, 2, 4, micro_steps), name], 4)
    planned = pytest.approx(bytes_by_plan(inputs, engine, micro_steps), rel=0.02)
    assert [sum(bytes_received(rank).values()) for rank in two] == [planned, planned]


@pytest.mark.slow
@pytest.mark.parametrize("keep_target", ["picture", "base"])
def test_an_adapters_base_is_gathered_as_often_under_zero3_as_a_plan_reckons_with(inputs, keep_target):
    """Of all blocks checkpointed, as on a full GPU: twice, and once more for the pass of the base itself."""
    more = ["method={type: lora, rank: 8}", f"flow.keep_target={keep_target}", "train.activation_checkpointing=true"]
    two = launch("zero3", 2, [*settings(inputs, 2, 4, 1, *more), f"run.name=zero3-{keep_target}"], 4)
    planned = pytest.approx(bytes_by_plan(inputs, "zero3", 1, *more), rel=0.01)
    assert [sum(bytes_received(rank).values()) for rank in two] == [planned, planned]


@pytest.mark.slow
def test_a_pair_of_runs_is_a_line_of_results(inputs):
    parameters = 20_651_840
    line = measure(inputs, "ddp", parameters, steps=4, repeats=1)
    assert line["cpu_seconds_of_one_rank"] > 0 and line["repeats"] == 1
    assert line["bytes_a_parameter"] == line["by_plan_a_parameter"] == 4
