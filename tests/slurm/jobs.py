"""Training jobs of the tiny model on the tests' SLURM: what they share, and what is read of them."""

import json
from dataclasses import dataclass
from pathlib import Path

from tests.holding import go_file, held_file
from tests.slurm.cluster import Cluster, wait_for

STEPS = 12
HELD_AT = 4  # the step at which most jobs are held until something has happened to them
SETTINGS = (
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    f"train.steps={STEPS}",
    "train.warmup_steps=3",
    "validation.every_steps=null",
    "checkpoint.every_steps=3",
    "logging.trackers=[]",
    "slurm.nodes=2",
    "slurm.gpus_per_node=1",
    "slurm.cpus_per_gpu=2",
    "slurm.interface=lo",  # both nodes are this machine
    "slurm.max_restarts=2",
    "slurm.preflight=false",  # it has tests of its own
)
TWO_RANKS_EACH = ("slurm.gpus_per_node=2",)
SAME = ("step", "epoch", "loss", "grad_norm", "lr", "samples")  # the rest is time


@dataclass(frozen=True)
class Submitted:
    """jobs: ids, in the order of their submission.  run: the run's folder."""

    cluster: Cluster
    run: Path
    jobs: list[str]

    @property
    def log(self) -> str:
        return (self.run.parent / f"{self.run.name}-{self.jobs[-1]}.log").read_text(encoding="utf-8", errors="replace")

    def metrics(self) -> list[dict]:
        """Every line of metrics.jsonl, without what differs from run to run."""
        lines = (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{name: json.loads(line)[name] for name in SAME} for line in lines]

    def ends(self) -> list[dict]:
        """What the job noted each time it ended."""
        [log] = (self.run / "slurm").glob("train-*.jsonl")
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]

    @property
    def gate(self) -> Path:
        """The file that lets the job go on where it is held."""
        return go_file(self.run)

    def wait_until_held(self) -> None:
        """Return when the job has come to where it is to be held."""
        held = held_file(self.run)
        wait_for(lambda: "held" if held.exists() else None, f"{self.run.name} did not come to where it is held")

    def release(self) -> None:
        """Let the job go on, now and after restarts."""
        self.gate.touch()

    def wait_for_process(self, program: str) -> int:
        """The id of the first process of the run, on any node, that runs a program."""

        def find() -> str | None:
            return " ".join(map(str, self.processes(program)[:1]))

        return int(wait_for(find, f"{self.run.name} has no process {program}"))

    def processes(self, program: str) -> list[int]:
        """Ids of the run's processes, on both nodes, that run a program: a module or a file by its name. Another test
        of this machine may have a run of the same name, so the config has to be this one's, too. What a process has
        forked has its command line until it runs a program of its own, and is left out."""
        config = str(self.run.parent / "config.yaml")
        parents = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace").split("\0")
                parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            runs_it = any(word.endswith(program) for word in words[1:5])  # behind -P -m launch.without_traceback, too
            if runs_it and {config, f"run.name={self.run.name}"} <= set(words):
                parents[int(path.parent.name)] = parent
        return sorted(pid for pid, parent in parents.items() if parent not in parents)

    def wait_for_restart(self) -> None:
        """Return when SLURM has put the job back into its queue: until then its state may be an end."""
        wait_for(lambda: self.cluster.show(self.jobs[-1])["Restarts"].strip("0"), f"{self.run.name} was not restarted")

    def finish(self) -> str:
        """The state that the last job ended in."""
        return self.cluster.wait(self.jobs[-1])


def assert_same_run(job: Submitted, undisturbed: Submitted, restarts: int = 1) -> None:
    """The job has finished, after so many restarts, and its metrics are those of the undisturbed run."""
    if restarts:
        job.wait_for_restart()
    assert job.finish() == "COMPLETED", job.log
    assert job.metrics() == undisturbed.metrics()
    assert job.cluster.show(job.jobs[-1])["Restarts"] == str(restarts)
