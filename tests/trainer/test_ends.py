"""Every way in which a run ends: its exit code, outcome.json, what `fluxfill status` says and what a SLURM job does."""

import json
import os
import signal
import sys
from collections.abc import Callable

import pytest

from configs.loading import dump_config
from launch.slurm.restarts import decide
from launch.status.run import read_status
from launch.supervise import Outcome
from tests.ranks import run_ranks

FULL = OSError(28, "No space left on device")


def fail(error: BaseException) -> Callable:
    def raise_it(*_, **__):
        raise error

    return raise_it


def end_by(how: str, arguments: list[str]) -> int:
    """The exit code of a run that meets a fault."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    import trainer.checkpoints.save as save
    from trainer import main
    from trainer.engines.base import Engine
    from trainer.process.outcome import run_and_report
    from trainer.process.stop_signals import install_stop_signals
    from trainer.validation.validator import Validator

    step = Engine.step

    def stop_in_step(self, *given):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *given)

    install_stop_signals()
    match how:
        case "stopped":
            Engine.step = stop_in_step
        case "memory":
            main.flow_loss = fail(torch.OutOfMemoryError("CUDA out of memory"))
        case "nan":
            loss = main.flow_loss
            main.flow_loss = lambda *given: loss(*given) * float("nan")
        case "last save":
            save.write_tensors = fail(FULL)
        case "export":
            main.export_and_verify = fail(RuntimeError("final: weights differ"))
        case "validation":
            sample, at_start = Validator._sample_all, [True]
            Validator._sample_all = lambda *given: sample(*given) if at_start and at_start.pop() else fail(FULL)()
        case "tracker":
            SummaryWriter.close = fail(FULL)
    sys.argv = ["main.py", *arguments]
    try:
        return run_and_report(main.train)
    except Exception:  # Python ends with 1, under its traceback
        return 1


@pytest.mark.parametrize(
    "how, code, reason, state, decision",
    [
        ("nothing", 0, "done", "finished", "done"),
        ("tracker", 0, "done", "finished", "done"),
        ("stopped", 75, "stopped by SIGTERM after step 1; resumable", "stopped", "restart"),
        ("memory", 1, "CUDA out of memory", "failed", "restart"),
        ("nan", 2, "guard.max_rollbacks) have not helped", "failed", "stop"),
        ("last save", 1, "its last save has failed: step 2 was not saved", "failed", "restart"),
        ("export", 1, "RuntimeError: final: weights differ", "failed", "restart"),
        ("validation", 1, "No space left on device", "failed", "restart"),
    ],
)
def test_code_outcome_status_and_job_agree_on_an_end(config, tmp_path, how, code, reason, state, decision):
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(dump_config(config), encoding="utf-8")
    settings = [f"run.dir={tmp_path}", "run.name=run", "train.steps=2", "train.warmup_steps=0"]
    settings += ["train.global_batch_size=2", "train.micro_batch_size=2", "checkpoint.every_steps=null"]
    settings += [f"validation.every_steps={2 if how == 'validation' else 'null'}", "logging.trackers=[tensorboard]"]
    settings += ["guard.max_skips=1", "guard.max_rollbacks=0"]
    assert run_ranks("single", 1, end_by, how, ["--config", str(path), *settings]) == [code]
    told = json.loads((run / "outcome.json").read_text())
    assert told["code"] == code and reason in told["reason"]
    assert (read_status(run).state, (run / "final").exists()) == (state, how in ("nothing", "tracker", "last save"))
    saved = len(list(run.glob("checkpoints/*/COMPLETE")))
    assert saved == (how not in ("memory", "nan", "last save"))
    assert decide(Outcome(told["code"], told["reason"], told["step"]), [], 0, saved, max_restarts=3)[0] == decision
