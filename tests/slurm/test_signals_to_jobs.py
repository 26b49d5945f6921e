"""Signals to training jobs on a real SLURM: whenever one comes, the job ends as the run that nothing happened to."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import HELD_AT, STEPS, Submitted, assert_same_run, go_file

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.mark.parametrize(
    "options", [("--signal=USR1",), ("--signal=TERM",), ("--batch", "--signal=USR2")], ids="-".join
)
def test_a_signal_saves_and_the_job_goes_on_by_itself(
    options: tuple[str, ...], submit: Callable[..., Submitted], undisturbed: Submitted, cluster: Cluster
) -> None:
    """To the job's step, which is what --signal before a time limit sends; or to its batch script alone, as B:."""
    job = submit(f"signalled-{'-'.join(options).replace('=', '-')}", hold_at=HELD_AT)
    job.wait_until_held()
    cluster.run("scancel", *options, job.jobs[0])
    wait_for(lambda: "heard" if "death signal" in job.log else None, "no launcher heard the signal")
    job.release()
    assert_same_run(job, undisturbed)
    first, second = job.ends()
    assert (first["code"], first["decision"], second["decision"]) == (75, "restart", "done")
    assert HELD_AT < first["progress"] == second["start"] < STEPS, "it saved where it was stopped"
    assert "start 1: 2 x 1 processes" in job.log and "start 2: 2 x 1 processes" in job.log, (
        "the first start's log is kept"
    )


def test_a_signal_during_validation_is_heard_after_it(
    submit: Callable[..., Submitted], undisturbed: Submitted, cluster: Cluster
) -> None:
    pictures = (f"validation.every_steps={HELD_AT}", "validation.images=4", "validation.sampler_steps=8")
    job = submit("validating", *pictures, hold_at=f"step-{HELD_AT:08d}-holdout.png")
    job.wait_until_held()
    cluster.run("scancel", "--signal=USR1", job.jobs[0])
    wait_for(lambda: "heard" if "death signal" in job.log else None, "no launcher heard the signal")
    job.release()
    assert_same_run(job, undisturbed)
    assert job.ends()[0]["code"] == 75
    steps = [json.loads(line)["step"] for line in (job.run / "validation.jsonl").read_text().splitlines()]
    assert steps == [0, 4, 8, 12] and len(list((job.run / "samples").glob("step-*-holdout.png"))) == 4


@pytest.mark.parametrize("program", ["accelerate.commands.launch", "trainer/main.py"])
def test_a_signal_while_a_steps_processes_start_loses_nothing(
    program: str, submit: Callable[..., Submitted], undisturbed: Submitted, cluster: Cluster
) -> None:
    job = submit(f"early-{Path(program).stem}", hold_at=1)
    job.wait_for_process(program)
    cluster.run("scancel", "--signal=USR1", job.jobs[0])
    job.release()
    assert_same_run(job, undisturbed)


def test_a_signal_to_the_batch_script_before_python_runs_there_is_ignored(
    submit: Callable[..., Submitted], undisturbed: Submitted, cluster: Cluster, config_file: Path
) -> None:
    """It loads a module, which takes as long as the test wants."""
    go = go_file(config_file.parent / "loading")
    module = f"() {{ touch '{go}.held'; until [ -e '{go}' ]; do sleep 0.1; done; }}"
    job = submit(
        "loading",
        "slurm.modules=[slow]",
        options=("--export=ALL",),
        cluster=replace(cluster, environment={**cluster.environment, "BASH_FUNC_module%%": module}),
    )
    job.wait_until_held()
    for signal_name in ("USR1", "TERM", "USR2"):
        cluster.run("scancel", "--batch", f"--signal={signal_name}", job.jobs[0])
    job.release()
    assert_same_run(job, undisturbed, restarts=0)


def test_a_signal_to_the_batch_script_before_it_has_a_step_is_heard_and_the_job_starts_again(
    submit: Callable[..., Submitted], undisturbed: Submitted, cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    """It asks the controller about itself, which takes as long as the test wants."""
    go = go_file(config_file.parent / "asking")
    wait = f"touch '{go}.held'; until [ -e '{go}' ]; do sleep 0.1; done"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\n{wait}\nPATH=${{PATH#*:}}\nexec scontrol "$@"\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{cluster.environment['PATH']}"
    around = replace(cluster, environment={**cluster.environment, "PATH": path})
    job = submit("asking", options=("--export=ALL",), cluster=around)
    job.wait_until_held()
    cluster.run("scancel", "--batch", "--signal=TERM", job.jobs[0])
    job.release()
    assert_same_run(job, undisturbed)
    first, second = job.ends()
    assert (first["code"], first["decision"], second["decision"]) == (75, "restart", "done")
    assert job.log.count("accelerate.commands.launch") == 1, "the first start had no step"
