"""What no CPU can hold of the trainer: a GPU's arithmetic, memory and clocks; some of it at FLUX.1-Fill's whole size.

`benchmarks/gpu.py` measures the same runs; here they only have to be right.
"""

import time
from functools import partial

import pytest
import torch

from benchmarks.gpu import CASES, KINDS, TOLERANCE, Case, Failed, Measurement, Worker, read_lines
from configs.memory import GIB
from trainer.checkpoints.run_state import RunState
from trainer.engines.memory_limit import read_memory_limit, smaller_when_out_of_memory
from trainer.fit import device_memory
from trainer.method import build_transformer
from trainer.optimizers.optimizer import build_optimizer
from trainer.process.outcome import StartAgain
from trainer.training_data import choose_order, open_stream

pytestmark = [pytest.mark.gpu]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_computes_on_the_gpu_what_it_computes_on_the_cpu(kind, tmp_path):
    case, out = Case("small", "a small model", kind, 1024), tmp_path / "lines.jsonl"
    assert Measurement(tmp_path, out, minutes=15, tiny=True).run([case]) == 0
    compared, measured = read_lines(out)
    assert compared["device"] == torch.cuda.get_device_name() and compared["furthest"] < TOLERANCE
    assert "error" not in measured and measured["seconds_per_step"] > 0 and measured["peak_gib"] >= 0


@pytest.mark.parametrize("name", ["lora-1024", "lora-512", "lora-1024-nf4", "lora-1024-int8", "full-512-rounded"])
def test_the_memory_of_a_step_is_within_a_tenth_of_the_plan(name, tmp_path):
    case = next(case for case in CASES if case.name == name)
    job = {"name": name, "side": case.side, "samples": case.samples, "settings": KINDS[case.kind].settings}
    worker = Worker(tmp_path)
    worker.begin("gpu_case", "measure", **job, tiny=False, folder=tmp_path)
    try:
        found = worker.answer(600)
    except Failed as error:
        if "does not fit the memory" in str(error):
            pytest.skip(f"{torch.cuda.get_device_name()} is too small: {error}")
        raise
    worker.close()
    assert found["peak_gib"] == pytest.approx(found["planned_gib"], rel=0.1)


def test_a_gpus_memory_is_told_by_its_driver_and_its_allocator():
    before = device_memory(torch.device("cuda", 0))
    held = torch.empty(GIB // 2, dtype=torch.uint8, device="cuda:0")
    after = device_memory(torch.device("cuda", 0))
    assert before is not None and after is not None
    assert after.allocated - before.allocated == held.numel()
    assert after.card == torch.cuda.get_device_name(0) and after.total == before.total
    assert after.allocated <= after.reserved <= after.total - after.free


@pytest.fixture
def start_of(config):
    def state(samples) -> RunState:
        return RunState(step=0, batch=0, skips=0, restarts=0, order=choose_order(config, samples))

    return state


def test_forward_seconds_are_those_of_the_device(config, engine, samples, start_of):
    """By the host's clock, which sees what it has queued in no time, these passes would take nothing."""
    with open_stream(config, engine, samples, start_of(samples), 1) as stream:
        example = stream.example()
        loss = torch.ones(len(example.weight), device=engine.device, requires_grad=True)
        engine.forward_seconds()
        start = time.monotonic()
        for rows in engine.micro_steps(iter([example, example])):
            torch.cuda._sleep(1_000_000_000)  # cycles, of which a GPU has 1 to 3 in a nanosecond
            engine.backward(loss * 1, rows.weight)
        queued = time.monotonic() - start
        torch.cuda.synchronize()
        waited = time.monotonic() - start
        assert queued < engine.forward_seconds() <= waited
        assert engine.forward_seconds() == 0.0


def test_a_micro_batch_that_does_not_fit_is_found_before_the_first_step(
    config, engine, samples, tiny_model, start_of, tmp_path
):
    run = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path, "name": "run"})})
    transformer = build_transformer(run, tiny_model, engine)
    transformer = engine.prepare(transformer, partial(build_optimizer, train=run.train, seed=0))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)  # nothing new beside what is there
    try:
        with (
            open_stream(run, engine, samples, start_of(samples), 16) as stream,
            pytest.raises(StartAgain, match="micro_batch_size 16 does not fit the memory"),
            smaller_when_out_of_memory(run, engine, transformer, stream),
        ):
            pytest.fail("it was not tried")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert read_memory_limit(run, engine).micro_batch_size == 8
