"""A run that is out of memory: it starts again with less at once, and is otherwise the same run."""

import json
import logging
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from configs.loading import dump_config
from configs.memory import optimizer_state_bytes
from launch.supervise import Outcome
from tests.ranks import run_ranks
from tests.trainer.engines.runs import assert_same_run
from tests.trainer.launches import launch as launch_for_real
from tests.trainer.launches import losses
from trainer.checkpoints.run_state import RunState
from trainer.engines import memory_limit
from trainer.engines.memory_limit import (
    FILE,
    MemoryLimit,
    micro_batch_limit,
    read_memory_limit,
    smaller_when_out_of_memory,
    validate_less,
)
from trainer.method import build_transformer
from trainer.model.checkpointing import checkpoint_blocks
from trainer.optimizers.optimizer import build_optimizer
from trainer.process.outcome import StartAgain
from trainer.training_data import choose_order, open_stream
from trainer.validation import validator
from trainer.validation.validator import Validator


@pytest.fixture
def run(config, tmp_path):
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path, "name": "run"})})


def fail(run, engine, rows: int, error: Exception, model: torch.nn.Module | None = None) -> None:
    stream = SimpleNamespace(rows_per_forward=rows)
    with smaller_when_out_of_memory(run, engine, model or torch.nn.Identity(), stream):
        raise error


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB")


def checkpointing(run, setting: bool | str):
    return run.model_copy(update={"train": run.train.model_copy(update={"activation_checkpointing": setting})})


@pytest.mark.parametrize("rows, smaller", [(16, 8), (5, 3), (3, 2), (2, 1)])
def test_the_next_start_takes_about_half(run, engine, rows, smaller, monkeypatch, caplog):
    run = checkpointing(run, False)
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    with pytest.raises(StartAgain) as raised:
        fail(run, engine, rows, OOM)
    assert raised.value.why == "out of memory"
    assert str(raised.value) == (
        f"CUDA out of memory. Tried to allocate 2.00 GiB. train.micro_batch_size {rows} does not fit the memory; the "
        f"same command goes on from the last checkpoint with {smaller}, and the same global batch"
    )
    train = run.train.model_copy(update={"micro_batch_size": 64})
    assert micro_batch_limit(run.model_copy(update={"train": train}), engine) == smaller
    assert f"train.micro_batch_size 64, but memory did not suffice before: no more than {smaller} at" in caplog.text
    event = json.loads((run.run.folder / "events.jsonl").read_text())
    assert (event["event"], event["micro_batch_size"], event["rank"]) == ("out of memory", smaller, 0)


def test_one_sample_that_does_not_fit_ends_the_run_with_ways_out(run, engine):
    run = checkpointing(run, False)
    with pytest.raises(RuntimeError, match=r"One sample at a time does not fit .*activation_checkpointing") as raised:
        fail(run, engine, 1, OOM)
    assert not isinstance(raised.value, StartAgain) and not (run.run.folder / FILE).exists()


def test_one_sample_is_tried_again_with_all_blocks_checkpointed_where_auto_may(run, engine):
    run = checkpointing(run, "auto")
    with pytest.raises(StartAgain, match="goes on from the last checkpoint with 1, all blocks checkpointed, and the"):
        fail(run, engine, 1, OOM)
    assert micro_batch_limit(run, engine) == 1
    with pytest.raises(RuntimeError, match="One sample at a time does not fit") as raised:
        fail(run, engine, 1, OOM)
    assert not isinstance(raised.value, StartAgain)


@pytest.mark.parametrize("blocks", [5, 6])
def test_one_sample_is_not_tried_again_where_auto_has_checkpointed_all(run, engine, tiny_model, blocks):
    run = checkpointing(run, "auto")
    transformer = build_transformer(run, tiny_model, engine)
    checkpoint_blocks(transformer, blocks)
    told = "One sample at a time does not fit" if blocks == 6 else "with 1, all blocks checkpointed"
    with pytest.raises(RuntimeError if blocks == 6 else StartAgain, match=told):
        fail(run, engine, 1, OOM, torch.nn.Sequential(transformer))
    assert (run.run.folder / FILE).exists() is (blocks == 5)


def test_another_error_is_left_alone(run, engine):
    with pytest.raises(ValueError, match="other"):
        fail(run, engine, 4, ValueError("other"))
    assert not (run.run.folder / FILE).exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_what_a_host_lacks_beside_a_gpu_is_left_alone(run, engine, error, monkeypatch):
    with pytest.raises(StartAgain):  # on a CPU it is the device's
        fail(run, engine, 4, error)
    (run.run.folder / FILE).unlink()
    monkeypatch.setattr(engine, "device", torch.device("meta"))
    with pytest.raises(type(error)) as raised:
        fail(run, engine, 4, error)
    assert raised.value is error and not (run.run.folder / FILE).exists()


def test_what_was_found_with_other_settings_does_not_bind(run, engine):
    with pytest.raises(StartAgain):
        fail(run, engine, 4, OOM)
    train = run.train.model_copy(update={"activation_checkpointing": True})
    assert micro_batch_limit(run.model_copy(update={"train": train}), engine) is None
    encoders = run.data.encoders.model_copy(update={"t5": "cpu"})  # off the GPU, with mode online
    for less in ({"encoders": encoders}, {"encode_batch_size": 1}):
        assert micro_batch_limit(run.model_copy(update={"data": run.data.model_copy(update=less)}), engine) is None
    longer = run.train.model_copy(update={"steps": 10**6, "lr": 1e-6})
    assert micro_batch_limit(run.model_copy(update={"train": longer}), engine) == 2


def find_and_read(path: str, finder: int) -> tuple[int | None, int | None]:
    """A rank of two, with a card of its own kind, as it were. One finds what fits a step, the other what a validation;
    returns what the next start reads."""
    from configs.loading import load_config
    from trainer.engines.start import start_engine

    config = load_config(path)

    def start():
        engine = start_engine(config)
        engine.device, device = torch.device("cuda"), engine.device
        torch.cuda.get_device_name = lambda _: f"card {engine.rank}"
        limit = read_memory_limit(config, engine)
        engine.device = device
        return engine, limit

    engine, before = start()
    assert before == MemoryLimit()
    with (
        pytest.raises(StartAgain) if engine.rank == finder else nullcontext(),
        smaller_when_out_of_memory(config, engine, torch.nn.Identity(), SimpleNamespace(rows_per_forward=4)),
    ):
        if engine.rank == finder:
            raise OOM
    engine.ranks.barrier()
    if engine.rank != finder:
        validate_less(config, engine, OOM, images=1)
    engine.ranks.barrier()
    engine, found = start()
    return found.micro_batch_size, found.validation_images


@pytest.mark.parametrize("finder", [0, 1])
def test_what_ranks_with_other_cards_have_found_binds_all(run, tmp_path, finder):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(run), encoding="utf-8")
    assert run_ranks("ddp", 2, find_and_read, str(path), finder) == [(2, 1), (2, 1)]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_done_with_less_is_told_by_rank_0_alone(run, engine, samples, tiny_model, monkeypatch, caplog, rank):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    run.run.folder.mkdir()
    found = MemoryLimit(micro_batch_size=1, validation_images=0)
    for module in (memory_limit, validator):
        monkeypatch.setattr(module, "read_memory_limit", lambda *_: found)
    monkeypatch.setattr(engine, "rank", rank)
    assert micro_batch_limit(run, engine) == 1
    Validator(run, engine, tiny_model, samples)._leave_out("why")
    told = ["no more than 1 at once", "no validation: it did not fit", "no more validation: why"]
    assert [caplog.text.count(words) for words in told] == [int(rank == 0)] * 3


@pytest.mark.parametrize("text", ["{", "[]", '{"micro": 3}'])
def test_a_record_that_cannot_be_read_is_passed_over(run, engine, text):
    run.run.folder.mkdir()
    (run.run.folder / FILE).write_text(text)
    assert read_memory_limit(run, engine).micro_batch_size is None


def train_after_a_trial(arguments: list[str]) -> bool:
    """The trainer as on a GPU, where the largest micro-batch is tried first: before step 1, and watched as the first
    step of a kind; returns whether it was."""
    import trainer.engines.memory_limit
    from trainer.engines.base import Engine
    from trainer.main import train
    from trainer.process import watchdog

    passes, before, allowed = [], [], []
    backward, step = Engine.backward, Engine.step

    def counted(self, losses, weight):
        watching = watchdog._watchdog
        allowed.append(watching and watching._allowed / watching._limit)
        passes.append(float(weight.sum()))
        backward(self, losses, weight)

    def stepped(self, *rest):
        before.append(list(passes))
        return step(self, *rest)

    Engine.backward, Engine.step = counted, stepped
    trainer.engines.memory_limit.TRIED_ON = ("cpu",)
    train(arguments)
    return before[0][0] == 0.0 and len(before[0]) > 1 and allowed[0] == watchdog.LONGER


@pytest.fixture
def held_in_a_trial(run, engine, samples, tiny_model, monkeypatch):
    """held(optimizer, resumed=...): of how many weights a trial holds the state that the first step will make."""

    def held(optimizer: str, *, resumed: bool) -> int:
        made: list[float] = []
        monkeypatch.setattr(memory_limit, "TRIED_ON", ("cpu",))
        monkeypatch.setattr(
            memory_limit, "optimizer_state_bytes", lambda config: made.append(optimizer_state_bytes(config)) or made[-1]
        )
        train = run.train.model_copy(update={"optimizer": optimizer})
        tried = run.model_copy(update={"train": train})
        transformer = build_transformer(tried, tiny_model, engine)
        transformer = engine.prepare(transformer, partial(build_optimizer, train=train, seed=0))
        if resumed:
            engine.init_optimizer_state()
        state = RunState(step=0, batch=0, skips=0, restarts=0, order=choose_order(tried, samples))
        with (
            open_stream(tried, engine, samples, state, 1) as stream,
            smaller_when_out_of_memory(tried, engine, transformer, stream),
        ):
            return len(made)

    return held


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_trial_holds_optimizer_state_unless_it_is_there(held_in_a_trial, optimizer):
    assert held_in_a_trial(optimizer, resumed=False) > 0
    assert held_in_a_trial(optimizer, resumed=True) == 0  # of 8 bits too, which no slice shows as moments


def test_a_device_without_a_number_is_the_one_that_has_one(held_in_a_trial, engine, monkeypatch):
    monkeypatch.setattr(engine, "device", torch.device("cpu", 0))  # unequal to that of its weights, "cpu"
    assert held_in_a_trial("adamw", resumed=False) > 0


LAUNCHES = [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("engine, num_processes", LAUNCHES)
def test_the_trial_of_the_largest_micro_batch_changes_nothing(launch, undisturbed, engine, num_processes):
    tried = launch(engine, num_processes, f"tried-{engine}", function=train_after_a_trial)
    assert tried.returned == [True] * num_processes
    assert_same_run(tried.folder, undisturbed(engine, num_processes).folder, within=0.0)


# Rank 1's GPU, as it were, holds two samples from the third step on.
_TWO_FIT = """
import torch
from diffusers import FluxTransformer2DModel
forward, calls = FluxTransformer2DModel.forward, []
def limited(self, hidden_states, *rest, **named):
    calls.append(1)
    if rank == RANK and len(calls) > 2 and len(hidden_states) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return forward(self, hidden_states, *rest, **named)
FluxTransformer2DModel.forward = limited
"""


@pytest.mark.fault(15, "torch's error on one rank, in mid-run")
@pytest.mark.slow
@pytest.mark.parametrize("engine, num_processes", [("single", 1), ("ddp", 2)])
def test_a_run_out_of_memory_goes_on_from_its_checkpoint_with_less_at_once(
    config, tmp_path, capfd, engine, num_processes
):
    fault = _TWO_FIT.replace("RANK", str(num_processes - 1))
    assert launch_for_real(config, tmp_path, "short", engine, num_processes, fault) == Outcome(0, "done", 4)
    assert "fluxfill: " in (told := capfd.readouterr().err) and "goes on from the last checkpoint with 2" in told
    assert json.loads((tmp_path / "short" / FILE).read_text())["micro_batch_size"] == 2
    assert launch_for_real(config, tmp_path, "whole", engine, num_processes, "") == Outcome(0, "done", 4)
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    state = json.loads((tmp_path / "short" / "checkpoints" / "step-00000004" / "state.json").read_text())["state"]
    assert state["restarts"] == 1
