"""A rank that is stopped in the middle of a run: the others notice, say so, and the run goes on from its checkpoint."""

import pytest

from launch.supervise import Outcome
from tests.trainer.launches import launch, losses

# Rank 1 stops in its third step, as by `kill -STOP`; at the first start.
_STOPS = """
import os, pathlib, signal, trainer.process.watchdog
trainer.process.watchdog._TICK_SECONDS = 15.0  # in which the other rank leaves its stacks, on a busy machine too
from diffusers import FluxTransformer2DModel
forward, calls, mark = FluxTransformer2DModel.forward, [], pathlib.Path("MARK")
def stopping(self, *arguments, **named):
    calls.append(1)
    if rank == 1 and len(calls) == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return forward(self, *arguments, **named)
FluxTransformer2DModel.forward = stopping
"""


@pytest.mark.fault(17, "kill -STOP of a rank in mid-step")
@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_the_run_which_goes_on(config, tmp_path, capfd):
    fault = _STOPS.replace("MARK", str(tmp_path / "mark"))
    ended = launch(config, tmp_path, "stopped", "ddp", 2, fault, "guard.step_timeout_minutes=1")
    assert ended == Outcome(0, "done", 4)
    said = capfd.readouterr().err
    assert "were stopped by a signal (SIGSTOP)" in said and "It starts again" in said
    assert len(losses(tmp_path / "stopped")) == 4
    stacks = tmp_path / "stopped" / "stacks"
    assert "in stopping" in (stacks / "rank-00001.txt").read_text()
    assert "backward" in (stacks / "rank-00000.txt").read_text()
