"""DeepSpeed ZeRO: what it would do in silence (wrap around, compute in fp32, wait for a dead build) is not done."""

import os
import time
from pathlib import Path

import pytest
import torch

from configs.errors import InputError
from tests.ranks import RankFailure
from tests.trainer.engines.runs import slow, train
from trainer.engines.zero import EIGHT_BIT_LIMIT, check_eight_bit_partition


def test_a_partition_that_bitsandbytes_cannot_count_is_refused_with_the_processes_that_it_takes():
    """All of FLUX.1's 11.9e9 elements; the optimizer would be told the length modulo 2**32."""
    flux = 11_902_587_968
    with pytest.raises(InputError, match=r"engine zero2 on 4 process.* 2,975,646,992 elements.*or 6 processes or more"):
        check_eight_bit_partition(flux, 4, "zero2")
    with pytest.raises(InputError, match=r"engine zero1 on 5 process"):
        check_eight_bit_partition(flux, 5, "zero1")
    check_eight_bit_partition(flux, 6, "zero2")
    with pytest.raises(InputError, match=r"on 2 process.*or 3 processes or more"):
        check_eight_bit_partition(2 * EIGHT_BIT_LIMIT, 2, "zero2")
    check_eight_bit_partition(2 * EIGHT_BIT_LIMIT - 2, 2, "zero2")


def train_with_small_kernels(arguments: list[str]) -> None:
    """The trainer, where bitsandbytes counts to 10,000."""
    import trainer.engines.zero

    trainer.engines.zero.EIGHT_BIT_LIMIT = 10_000
    train(arguments)


def test_a_run_asks_before_it_trains(launch):
    with pytest.raises(RankFailure, match=r"engine zero2 on 1 .*bitsandbytes takes less than 10,000\. Use fsdp2"):
        launch("zero2", 1, "long", "train.optimizer=adamw8bit", function=train_with_small_kernels)


def train_as_on_a_gpu(arguments: list[str]) -> tuple[int, set[torch.dtype], torch.dtype]:
    """The trainer, where torch, asked without a device, tells of the CPU's autocast: on a GPU it tells of the GPU's,
    and DeepSpeed acts on it. (Micro-steps; dtypes of the trained weights when the optimizer is built of them; dtype of
    the sum of gradients over micro-batches.)"""
    from trainer.engines.base import Engine

    seen = []
    prepare, of_device = Engine.prepare, torch.is_autocast_enabled

    def watched_prepare(self, transformer, build_optimizer):
        def watched_build(parameters):
            seen.append({parameter.dtype for parameter in parameters})
            return build_optimizer(parameters)

        engine = prepare(self, transformer, watched_build)
        seen.append(engine.optimizer.gradient_accumulation_dtype)
        return engine

    Engine.prepare = watched_prepare
    torch.is_autocast_enabled = lambda device="cpu": of_device(device)
    watched = train(arguments)
    return len(watched.is_last), *seen


@pytest.mark.parametrize("engine", ["zero2", *slow(("zero3",))])
def test_in_bf16_zero_places_no_fp32_weights_adds_gradients_up_in_fp32_and_computes_in_autocast(launch, engine):
    """DeepSpeed switches off an autocast around it: fp32 inputs would then meet bf16 weights, at the first step."""
    settings = ["model.precision=bf16", "train.steps=2", "train.warmup_steps=1", "train.micro_batch_size=1"]
    run = launch(engine, 2, f"{engine}-bf16", *settings, function=train_as_on_a_gpu)
    assert run.returned == [(2 * 4, {torch.bfloat16}, torch.float32)] * 2


def start_until_deepspeed(arguments: list[str]) -> None:
    """Start the engine as far as to where DeepSpeed would build its communication."""
    import accelerate.utils

    from trainer.engines.start import start_engine
    from trainer.process.command_line import read_command_line

    def reached(*_, **__):
        raise RuntimeError("DeepSpeed starts now")

    os.environ["TORCH_EXTENSIONS_DIR"] = next(a.partition("=")[2] for a in arguments if a.startswith("run.name="))
    arguments = [a for a in arguments if not a.startswith("run.name=")]
    accelerate.utils.DeepSpeedPlugin = reached
    start_engine(read_command_line(arguments).config)


def test_a_lock_that_a_killed_build_left_is_removed_before_deepspeed_starts(launch, tmp_path: Path):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(RankFailure, match="DeepSpeed starts now"):
        launch("zero2", 1, str(tmp_path), function=start_until_deepspeed)
    assert not lock.exists()
