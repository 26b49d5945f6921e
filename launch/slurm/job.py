"""What a batch script runs on its job's first node: a step on all of the nodes, and how the job ends.

    python -P -m launch.slurm.job train|preprocess CONFIG [KEY=VALUE ...]

The exit code of `srun` says little (a launcher's, the largest of several, 0 where a node was taken away), so that of
training is in the outcome.json of this very start. What failed or was stopped is started again by `scontrol requeue`,
which keeps the job's id; bad input is not, a second job of a run that another one trains is not, and neither is a job
that comes no further.
"""

import json
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from configs.supervision import FAILED, STOPPED, exit_code, hold_stop_signals

if __name__ == "__main__":
    hold_stop_signals()  # now, not after the imports; but for a step that hears them they stay held to the end

from configs.errors import InputError, StorageFailed, is_of_storage
from configs.loading import load_config
from configs.schema import Config
from configs.webhook import notify_end
from data.storage.atomic_write import write_text_atomically
from data.storage.checkpoint_folders import newest_step
from data.storage.run_lock import VARIABLE, RunLock, own_run_folder
from launch.command import choose_on_nodes
from launch.gpus import count_training_gpus
from launch.preflight.place import TOKEN
from launch.preflight.result import Result, read_result, result_file
from launch.slurm import controller
from launch.slurm.allocation import Allocation, choose_port, head_address, read_allocation
from launch.slurm.controller import node_names
from launch.slurm.restarts import (
    End,
    JobEvent,
    count_shards,
    count_vain,
    decide,
    end_log,
    explain_stop,
    newest_shard,
    note_silent_ends,
    read_ends,
    write_end,
    write_job_event,
)
from launch.slurm.step import render_step, render_step_environment
from launch.supervise import OTHER_NODES_SECONDS, Again, Outcome, run_supervised, run_workers

# Set by `fluxfill slurm submit` for the jobs of a chain, which count their restarts together, and for the last of them.
# That the config has slurm.chain says nothing: a job that was submitted otherwise has no successor.
CHAIN, CHAIN_LAST = "FLUXFILL_CHAIN", "FLUXFILL_CHAIN_LAST"

_NONE_FOLLOWS = "this is the last job of its chain, and none follows; submit the run again"


@dataclass(frozen=True)
class Work:
    """What a job does.  kind: train or preprocess.  arguments: the config's path and the overrides, as given.  owner:
    of the run folder; its rank 0 joins it."""

    kind: str
    config: Config
    arguments: Sequence[str]
    owner: str = ""

    @property
    def unit(self) -> str:
        """Of its progress."""
        return "" if self.kind == "train" else " of the shards that this job finishes"

    @property
    def chain(self) -> str | None:
        """What the jobs of its chain share; None: it is of none, and requeues itself."""
        return os.environ.get(CHAIN) if self.kind == "train" else None

    @property
    def ends_chain(self) -> bool:
        """Whether no job of its chain follows."""
        return self.chain is not None and CHAIN_LAST in os.environ

    def processes_per_node(self, allocation: Allocation) -> int:
        """One for each GPU that does not encode for the others; one on a node without GPUs."""
        encoding = self.config.data.encoder_devices if self.kind == "train" else None
        return max(count_training_gpus(allocation.gpus_per_node, encoding), 1)

    def since(self, earlier: Sequence[End]) -> int:
        """From when on shards count as the job's.  earlier: its ends."""
        if self.kind == "train":
            return 0
        return earlier[-1].since if earlier else newest_shard(self.config.data.cache_folder)

    def progress(self, since: int) -> int:
        """How far it is: a number that grows."""
        run = self.config.run.folder
        return newest_step(run) if self.kind == "train" else count_shards(self.config.data.cache_folder, since)


def main(arguments: Sequence[str] | None = None) -> int:
    """train|preprocess CONFIG [KEY=VALUE ...]; returns the exit code, after it has asked for a restart if due."""
    kind, *given = sys.argv[1:] if arguments is None else arguments
    try:
        work = Work(kind, load_config(given[0], given[1:]), given)
        allocation = read_allocation(os.environ)
        os.environ.pop("SLURM_GPUS", None)  # of all nodes together, or of an outer salloc: srun would ask for as many
        try:
            if kind == "preprocess":  # any number of jobs share that
                return _run_job(work, allocation)
            with own_run_folder(work.config.run.folder, os.environ, supervisor="the batch script") as lock:
                return _run_job(replace(work, owner=lock.owner.id), allocation, lock)
        except (StorageFailed, OSError) as error:
            if isinstance(error, OSError) and not is_of_storage(error):
                raise
            say(f"{error}")
            return _end_without_storage(work, allocation)
    except InputError as error:
        say(f"{error} This job is not started again.")
        return exit_code(error)


def say(text: str) -> None:
    """A line of the job's log."""
    print(f"fluxfill: {text}", file=sys.stderr, flush=True)


def _run_job(work: Work, allocation: Allocation, lock: RunLock | None = None) -> int:
    slurm = work.config.slurm
    job = controller.show_job(allocation.number)
    name = allocation.number if job is None else job.id
    log = end_log(work.config.run.folder, work.kind, work.chain or name)
    earlier = read_ends(log)
    if work.chain is not None and earlier and earlier[-1].decision != "restart":
        say(f"nothing is left to do: an earlier job of the chain ended with {earlier[-1].reason}")
        return earlier[-1].code
    if job is not None and not job.may_requeue and work.chain is None:
        say(
            "this job may not be requeued (Requeue=0, by --no-requeue or SBATCH_NO_REQUEUE): when it is stopped or "
            "fails, submit it again"
        )
    restarts = 0 if job is None else job.restarts
    since = work.since(earlier)
    start = work.progress(since)
    if job is not None and job.unread:
        with suppress(InputError):  # it can be read again; what stays noted costs a restart, if ever
            controller.note_unread(job, 0)
    earlier = note_silent_ends(log, earlier, name, restarts, start, since)
    if (vain := count_vain(earlier)) > slurm.max_restarts:
        reason = explain_stop(vain, start, slurm.max_restarts, work.unit)
        say(reason)
        if work.kind == "train" and (work.chain is None or work.ends_chain):  # else the next of the chain says the same
            notify_end(work.config.run.name, code=FAILED, reason=reason, step=None)
        return FAILED
    size = f"{allocation.num_nodes} x {work.processes_per_node(allocation)} processes"
    say(f"job {name}, start {restarts + 1}: {size}")
    if work.kind == "train":
        write_job_event(work.config.run.folder, JobEvent(name, "started", allocation.nodelist, restarts))
    outcome, bad_nodes = _run_work(work, allocation, restarts)
    if lock is not None:
        with suppress(StorageFailed, OSError):  # a disk that does not answer: not lost
            lock.refuse_loss()  # the outcome would be another's
    # A stop signal changes nothing any more: SLURM sends TERM, and after KillWait KILL, at a time limit, when the last
    # save may just have ended; and as soon as the job waits again, when alone it can be told of nodes.
    progress = work.progress(since)
    decision, why = decide(outcome, earlier, start, progress, slurm.max_restarts, work.unit)
    if decision == "restart" and work.ends_chain:
        decision, why = "stop", f"{_NONE_FOLLOWS}: it goes on from {progress}"
    requeues_itself = decision == "restart" and work.chain is None
    if requeues_itself and (obstacle := _obstacle(allocation.number)):
        decision, why = "left", obstacle
    try:
        write_end(log, End(name, restarts, outcome.code, outcome.reason, start, progress, decision, since=since))
    except StorageFailed as error:  # what was decided stands; the next start counts one that left no word
        say(f"{error}")
    say(f"{outcome.reason}: {why}")
    if requeues_itself and decision == "restart" and (refusal := _requeue(name, allocation.number, bad_nodes)):
        decision, why = "left", refusal
    if work.kind == "train" and decision != "restart":
        notify_end(work.config.run.name, code=outcome.code, reason=f"{outcome.reason}: {why}", step=outcome.step)
    return outcome.code


def _run_work(work: Work, allocation: Allocation, restarts: int) -> tuple[Outcome, Sequence[str]]:
    """(how the work ended, nodes that are broken). What ends it before the trainer starts is in outcome.json too."""
    outcome_file = work.config.run.folder / "outcome.json"
    checked = Result(0, "")
    try:
        if work.kind == "train":
            outcome_file.unlink(missing_ok=True)  # an earlier start's: `fluxfill status` reads it during the preflight
        if work.kind == "train" and work.config.slurm.preflight:
            checked = _run_preflight(work, allocation, restarts)
        if checked.code == 0:
            return _run_step(work, allocation, restarts), ()
    except InputError as error:
        checked = Result(exit_code(error), f"{error}")
    if work.kind == "train":
        told = json.dumps({"code": checked.code, "reason": checked.reason, "step": None})
        write_text_atomically(outcome_file, f"{told}\n")
    return Outcome(checked.code, checked.reason), checked.bad_nodes


def _run_preflight(work: Work, allocation: Allocation, restarts: int) -> Result:
    """Look at all nodes before weights load."""
    file = result_file(work.config.run.folder)
    file.unlink(missing_ok=True)
    try:
        names = node_names(allocation.nodelist)
    except InputError:  # no scontrol; nodes that answer tell their names
        names = []
    module = ["--names", ",".join(names), "--gpus", str(allocation.gpus_per_node)]
    line, [environment] = _render_step("preflight", work, allocation, restarts, module)
    outcome = run_workers(line, [environment | {TOKEN: secrets.token_hex(16)}])
    if outcome.code == STOPPED:
        return Result(STOPPED, outcome.reason)
    return read_result(file) or Result(FAILED, "the preflight left no result: its messages are above")


def _run_step(work: Work, allocation: Allocation, restarts: int) -> Outcome:
    """Run the work on all nodes and wait for it."""
    options = []
    if work.kind == "train":
        engine, _ = choose_on_nodes(work.config, allocation.num_nodes, allocation.gpus_per_node)
        options = ["--engine", engine]
    line, [environment] = _render_step(work.kind, work, allocation, restarts, options)
    if work.kind == "preprocess":
        return run_workers(line, [environment])
    # SLURM signals the step itself; what reaches this process alone (scancel --batch, sbatch --signal=B:) goes to srun.
    outcome_file = work.config.run.folder / "outcome.json"
    # What starts again with a smaller micro-batch keeps its nodes; after a hang they may be at fault.
    after: tuple[Again, ...] = ("out of memory",)
    outcome = run_supervised(
        line,
        environment | {"FLUXFILL_OUTCOME": str(outcome_file)},  # for a node that does not see the config
        outcome_file,
        sends=signal.SIGUSR1,
        stop_after_failure=OTHER_NODES_SECONDS,
        restarts_after=after,
    )
    if outcome.code == 0 and outcome.step is None:
        return Outcome(FAILED, "srun ended with 0 and the trainer left no outcome: a node may be gone")
    return outcome


def _render_step(
    kind: str, work: Work, allocation: Allocation, restarts: int, options: Sequence[str] = ()
) -> tuple[list[str], list[dict[str, str]]]:
    """(command, its variables) of what runs on all nodes."""
    slurm = work.config.slurm
    module = ["launch.slurm.node", kind, "--processes", str(work.processes_per_node(allocation)), *options]
    if kind != "preprocess":
        module += ["--head", head_address(allocation, slurm.interface)]
        module += ["--port", str(choose_port(allocation.number, restarts))]
    line = render_step(allocation, slurm.container, sys.executable, os.getcwd(), [*module, *work.arguments])
    environment = render_step_environment(slurm) | {VARIABLE: work.owner}
    if slurm.container is None:  # DeepSpeed looks for ninja on the PATH
        path = environment.get("PATH", os.environ["PATH"])
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    return line, [environment]


def _obstacle(number: str) -> str | None:
    """Why this job is not to ask for a restart; None: it may."""
    job = controller.show_job(number)
    if job is None:
        return (
            "scontrol cannot be asked, so this job does not start again: submit it again, or set slurm.chain for jobs "
            "that follow each other"
        )
    return "it is being cancelled or requeued from outside, and left at that" if job.is_ending else None


def _end_without_storage(work: Work, allocation: Allocation) -> int:
    """Ask for a restart where the run's folder does not answer, so many times. The end cannot be noted there: the next
    start that can read it counts a start that left no word."""
    job = controller.show_job(allocation.number)
    if work.chain is not None and not work.ends_chain:
        return FAILED
    reason = _NONE_FOLLOWS if work.ends_chain else _obstacle(allocation.number)
    if reason is None and job is not None:
        reason = _unnoted_too_often(work, job)
    if reason is not None:
        say(reason)
    elif job is not None:
        reason = _requeue(job.id, allocation.number, ())
    if reason is not None and work.kind == "train":
        notify_end(work.config.run.name, code=FAILED, reason=reason, step=None)
    return FAILED


def _unnoted_too_often(work: Work, job: controller.Job) -> str | None:
    """Why a job whose end cannot be noted is not to start again: too many such starts. None: it may."""
    most, run = work.config.slurm.max_restarts, work.config.run.folder
    try:
        ends = read_ends(end_log(run, work.kind, job.id))
        progress = work.progress(work.since(ends))
    except OSError as error:  # nobody knows what was noted
        unread = job.unread + 1
        if unread > most:
            where = f"{error.filename or run} ({error.strerror}; slurm.max_restarts is {most})"
            return f"{unread} starts in a row could not read {where}. Look at its storage, and submit the job again"
        try:
            controller.note_unread(job, unread)
        except InputError as refused:
            return f"not started again, as {run} cannot be read and nobody would count the starts: {refused}"
        return None
    unnoted = job.restarts - sum(end.job == job.id for end in ends)
    return explain_stop(unnoted, progress, most, work.unit) if unnoted > most else None


def _requeue(job: str, number: str, bad_nodes: Sequence[str]) -> str | None:
    """Ask for a restart, without nodes that are broken: they are always free, and would get every restart. Returns why
    there is none; None: it is granted."""
    try:
        controller.requeue(job)
    except InputError as error:
        refusal = f"not started again, submit it again: {error}"
        say(refusal)
        return refusal
    say(f"job {job} starts again")
    waiting = controller.show_job(number) if bad_nodes else None
    if waiting is None:
        return None
    try:
        controller.exclude_nodes(waiting, bad_nodes)
        say(f"without {', '.join(bad_nodes)}")
    except InputError as error:
        say(f"{', '.join(bad_nodes)} cannot be excluded ({error}): set slurm.exclude")
    return None


if __name__ == "__main__":
    sys.exit(main())
