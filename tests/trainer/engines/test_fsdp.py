"""FSDP2 and its DTensors: nothing unsharded for longer than a layer computes, no number read off a shard."""

from typing import Any

import pytest
import torch

from configs.errors import InputError
from tests.ranks import run_ranks
from tests.trainer.engines.runs import (
    STEPS,
    assert_same_run,
    go_on_from,
    refuse_numbers_of_dtensors,
    slow,
    train,
)
from trainer.engines.fsdp import mixed_precision
from trainer.engines.start import start_engine


@pytest.mark.parametrize("engine, num_processes", [("fsdp2", 2), *slow(("hsdp", 4))])
def test_between_micro_steps_no_rank_holds_unsharded_gradients(undisturbed, engine, num_processes):
    for watched in undisturbed(engine, num_processes).returned:
        assert watched.is_last.count(False) >= (STEPS / 2 if num_processes == 2 else 0)
        assert watched.unsharded == [0] * len(watched.is_last)
        assert watched.is_last.count(True) == STEPS


def train_after_a_look(arguments: list[str]):
    """The trainer, where the model computes something before a checkpoint is loaded, as it does on a quantized base."""
    from trainer.engines.base import Engine

    prepare = Engine.prepare

    def prepare_and_look(self, transformer, build_optimizer):
        prepared = prepare(self, transformer, build_optimizer)
        config = prepared.config
        with torch.no_grad():
            prepared(
                hidden_states=torch.randn(1, 16, config.in_channels),
                encoder_hidden_states=torch.randn(1, 8, config.joint_attention_dim),
                pooled_projections=torch.randn(1, config.pooled_projection_dim),
                timestep=torch.full((1,), 0.5),
                guidance=torch.full((1,), 30.0),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(8, 3),
            )
        return prepared

    Engine.prepare = prepare_and_look
    return train(arguments)


def test_fsdp2_goes_on_with_the_checkpoint_bit_for_bit_after_a_forward_pass_too(launch, undisturbed):
    whole = undisturbed("fsdp2", 2).folder
    halves = go_on_from(whole, "looked")
    launch("fsdp2", 2, halves.name, function=train_after_a_look)
    assert_same_run(halves, whole, within=0.0)


def read_numbers_off_a_dtensor() -> dict[str, str]:
    """In a rank: way of reading a number -> what came of it."""
    from torch.distributed import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    refuse_numbers_of_dtensors()
    total: Any = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)]).sum()
    assert total.full_tensor().item() == 4.0
    told = {}
    for name, read in (
        ("item", total.item),
        ("tolist", total.tolist),
        ("float", lambda: float(total)),
        ("if", lambda: bool(total)),
    ):
        try:
            told[name] = f"{read()} was read"
        except AssertionError as error:
            told[name] = str(error)
    return told


def test_a_number_that_the_trainer_reads_off_a_dtensor_is_caught():
    """It would be this rank's part of a sum or a norm alone. Every run of these tests is watched for it."""
    (told,) = run_ranks("fsdp2", 1, read_numbers_off_a_dtensor)
    assert told == dict.fromkeys(
        ("item", "tolist", "float", "if"), "a number was read off a DTensor: call full_tensor() first"
    )


def test_bf16_is_for_weights_and_sums_stay_in_fp32():
    """Inputs are not cast: a timestep of 0.4567 would become 0.457, and a position of 257 another's, 256."""
    policy = mixed_precision(torch.bfloat16)
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert policy.cast_forward_inputs is False
    assert mixed_precision(torch.float32).param_dtype is None


def test_hsdp_on_one_node_is_refused(config, monkeypatch):
    environment = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    for name, value in (environment | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"there are 4 processes, 4 on this node.*or use fsdp2"):
        start_engine(config)
