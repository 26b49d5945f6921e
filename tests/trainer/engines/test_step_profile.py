"""Traces of named steps, by the calls that the training loop makes."""

import gzip
import io
import json

import pytest
import torch
from rich.console import Console

from trainer.checkpoints.run_state import RunState
from trainer.engines.base import Update
from trainer.engines.step_profile import StepProfile
from trainer.run_log import RunLog
from trainer.training_data import choose_order, open_stream


@pytest.fixture
def profiled(config, engine, samples, tmp_path, monkeypatch):
    """profiled(steps, first): makes two steps of a run behind step `first`; returns the events of its traces."""

    def run(steps: list[int], first: int) -> dict[str, list[str]]:
        train = config.train.model_copy(update={"profile_steps": steps})
        run = config.model_copy(update={"train": train, "run": config.run.model_copy(update={"dir": tmp_path})})
        monkeypatch.setattr(engine, "profile", StepProfile(run, engine.rank))
        state = RunState(step=first, batch=first, skips=0, restarts=0, order=choose_order(run, samples))
        weight = torch.ones(4, requires_grad=True)
        optimizer = torch.optim.AdamW([weight])
        log = RunLog(run, engine, state, Console(file=io.StringIO()))
        with open_stream(run, engine, samples, state, 16) as stream:
            for _ in range(2):
                for rows in engine.micro_steps(next(stream)):
                    (weight.sum() * rows.noise.mean()).backward()
                optimizer.step()
                state = state.after(Update(0.5, 1.0, applied=True))
                log.step(state, Update(0.5, 1.0, applied=True), 1e-3, stream)
        log.close()
        return {
            path.name: [event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
            for path in (tmp_path / run.run.name / "profile").glob("*")
        }

    return run


def test_a_named_step_leaves_its_trace_and_no_other_does(profiled):
    ((name, events),) = profiled([2, 7], 0).items()
    assert name == "step-00000002-rank-00000.json.gz"
    assert events.count("Optimizer.step#AdamW.step") == 1
    assert any("Backward" in event for event in events)


def test_steps_of_a_resumed_run_are_counted_on(profiled):
    assert sorted(profiled([6, 7], 5)) == ["step-00000006-rank-00000.json.gz", "step-00000007-rank-00000.json.gz"]


def test_a_disk_that_takes_no_trace_does_not_end_the_run(profiled, tmp_path, caplog, config):
    (tmp_path / config.run.name).mkdir()
    (tmp_path / config.run.name / "profile").touch()
    with caplog.at_level("ERROR", logger="fluxfill"):
        assert profiled([1], 0) == {}
    assert "step 1 has no trace" in caplog.text
