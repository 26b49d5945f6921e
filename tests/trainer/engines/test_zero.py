"""DeepSpeed ZeRO: what it would do in silence (wrap around, compute in fp32, wait for a dead build) is not done."""

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from configs.errors import InputError
from configs.memory import ZERO_BUCKET
from tests.ranks import RankFailure
from tests.trainer.engines.runs import STEPS, assert_same_run, read_tensors, slow, train
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


def watch_dtypes(arguments: list[str]) -> tuple[int, set[torch.dtype], torch.dtype, int]:
    """The trainer. (Micro-steps; dtypes of the trained weights when the optimizer is built of them; dtype of the sum of
    gradients over micro-batches; elements that are reduced at once.)"""
    from trainer.engines.base import Engine

    seen = []
    prepare = Engine.prepare

    def watched_prepare(self, transformer, build_optimizer):
        def watched_build(parameters):
            seen.append({parameter.dtype for parameter in parameters})
            return build_optimizer(parameters)

        engine = prepare(self, transformer, watched_build)
        seen.append(engine.optimizer.gradient_accumulation_dtype)
        seen.append(engine.zero_reduce_bucket_size())
        return engine

    Engine.prepare = watched_prepare
    watched = train(arguments)
    return len(watched.is_last), *seen


@pytest.mark.parametrize("engine", ["zero2", *slow(("zero3",))])
def test_in_bf16_zero_places_no_fp32_weights_adds_gradients_up_in_fp32(launch, engine):
    settings = ["model.precision=bf16", "train.steps=2", "train.warmup_steps=1", "train.micro_batch_size=1"]
    run = launch(engine, 2, f"{engine}-bf16", *settings, function=watch_dtypes)
    assert run.returned == [(2 * 4, {torch.bfloat16}, torch.float32, ZERO_BUCKET)] * 2


def train_with_small_buckets(stage: int, arguments: list[str]) -> float:
    """The trainer, where each rank keeps many buckets of gradients. Elements reduced to one rank, of each exchange."""
    import deepspeed.comm

    import configs.communication
    import trainer.engines.zero

    configs.communication.ZERO_BUCKET = trainer.engines.zero.ZERO_BUCKET = 10_000
    reduced, reduce = [], deepspeed.comm.reduce

    def watched(tensor, *args, **kwargs):
        reduced.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    deepspeed.comm.reduce = watched
    is_last = train(arguments).is_last
    return sum(reduced) / (sum(is_last) if stage == 1 else len(is_last))


@pytest.mark.parametrize("engine, num_processes", [("zero2", 2), *slow(("zero1", 2), ("zero2", 3))])
def test_gradients_reduced_to_the_rank_that_keeps_them_make_the_same_run(launch, undisturbed, engine, num_processes):
    """As those of FLUX.1 are; the tiny model's fit one bucket, which belongs to all ranks and is reduced on all."""
    name = f"{engine}-{num_processes}-to-owners"
    function = partial(train_with_small_buckets, int(engine[-1]))
    run = launch(engine, num_processes, name, function=function)
    trained = sum(tensor.numel() for name, tensor in read_tensors(run.folder).items() if name.startswith("weight/"))
    assert run.returned == [trained] * num_processes
    # Two numbers have one sum; three are added up in another order.
    within = 0.0 if num_processes == 2 else 1e-5
    assert_same_run(run.folder, undisturbed(engine, num_processes).folder, within=within)


def train_as_it_is(arguments: list[str]) -> None:
    """The trainer, with parameters of fewer than 1e5 elements gathered all the time, as DeepSpeed has them."""
    from trainer.main import train

    train(arguments)


@pytest.mark.slow
def test_small_parameters_that_stay_gathered_are_those_of_the_average_while_it_is_validated(launch):
    """Almost all of the tiny model's, and the factors of an adapter of rank 32 on FLUX.1."""
    settings = [
        f"validation.every_steps={STEPS}",
        "validation.weights=ema",
        "validation.images=2",
        "train.ema_decay=0.999",
    ]
    settings += ["train.deterministic=true", "train.lr=1e-2"]

    def figures(engine: str, num_processes: int) -> dict:
        run = launch(engine, num_processes, f"average-{engine}", *settings, function=train_as_it_is).folder
        lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        return {name: figure for name, figure in lines[-1]["holdout"].items() if name.startswith("loss_sigma")}

    assert figures("zero3", 2) == pytest.approx(figures("single", 1), abs=1e-3)


def start_with_nothing_compiled(extensions: str, arguments: list[str]) -> list[str]:
    """Start the engine; returns what has been compiled for it."""
    from trainer.engines.start import start_engine
    from trainer.process.command_line import read_command_line

    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    start_engine(read_command_line(arguments).config).close()
    return os.listdir(extensions)


def test_on_a_cpu_deepspeed_compiles_nothing(launch, tmp_path: Path):
    """Its sums in shared memory take a minute, and only inference asks for them."""
    function = partial(start_with_nothing_compiled, str(tmp_path))
    assert launch("zero2", 1, "not-compiled", function=function).returned == [[]]


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


@pytest.mark.fault(25, "the lock of a killed build of DeepSpeed's kernels")
def test_a_lock_that_a_killed_build_left_is_removed_before_deepspeed_starts(launch, tmp_path: Path):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(RankFailure, match="DeepSpeed starts now"):
        launch("zero2", 1, str(tmp_path), function=start_until_deepspeed)
    assert not lock.exists()
