"""A real SLURM of two nodes on this machine, in a folder of its own: nothing of the system's configuration is read.

Its daemons, its jobs and whatever they start live in a PID namespace that ends with its first process, and that one
ends with the process that started it: a killed pytest leaves no daemon behind. Processes are tracked by cgroups, as
clusters do: only so do signals reach the processes that they reach there.
"""

import ctypes
import fcntl
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from tests.patience import PATIENCE

CGROUPS = Path("/sys/fs/cgroup")
GPUS_PER_NODE = 8
_SLOTS, _LOCKS = 6, Path("/tmp")  # not TMPDIR, of which each pytest may have another
# How long a credential of a job step is good. A controller lets a requeued job wait for so long, until nodes have
# forgotten its last start, and it alone is told less: nodes know a new credential from one that was taken back. A real
# cluster has 120 for both.
_CREDENTIAL_SECONDS = {"slurm.conf": 10, "nodes.conf": 600}
# Between the TERM of a preemption and its end, in the partition that grants any.
GRACE_SECONDS = 300
_GOING_ON = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"}
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

_SLURM_CONF = """\
ClusterName={name}
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=CREDENTIAL_SECONDS
SlurmctldPort={ports[0]}
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=600
UnkillableStepTimeout=600
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=120
DefMemPerCPU=400
DebugFlags=NO_CONF_HASH
MinJobAge=3600
MpiDefault=none
GresTypes=gpu
NodeName={name}n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=8000 Gres=gpu:{gpus}
NodeName={name}n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=8000 Gres=gpu:{gpus}
PartitionName=DEFAULT Nodes={name}n[0-1] MaxTime=INFINITE OverTimeLimit=0 PreemptMode=OFF
PartitionName=train Default=YES
PartitionName=scavenge PreemptMode=REQUEUE GraceTime=0
PartitionName=scavenge-grace PreemptMode=REQUEUE GraceTime={grace_seconds}
PartitionName=urgent PriorityTier=10
"""
_OWN_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
_CGROUP_CONF = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={CGROUPS}\nCgroupAutomount=no\n"

# The first process of the namespace: starts the daemons by the names that they know themselves by, and waits for the
# first of them to end. Called as Debian's slurmd-wlm, slurmd takes no notice of Gres.
_DAEMONS = """\
set -u
cd "$1"
munged --force --foreground --key-file munge/key --socket munge/socket --pid-file "$1/munge/pid" \
  --log-file "$1/munge/log" --seed-file "$1/munge/seed" &
until [ -S munge/socket ]; do sleep 0.1; done
slurmctld -D &
slurmd -D -f "$1/nodes.conf" -N "$2n0" -d /usr/sbin/slurmstepd &
slurmd -D -f "$1/nodes.conf" -N "$2n1" -d /usr/sbin/slurmstepd &
wait -n
"""


def reason_to_skip() -> str | None:
    """Why no cluster can be started here; None: it can."""
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
    if missing := [program for program in programs if not shutil.which(program)]:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm munge)"
    if os.geteuid() != 0:
        return "only root can start slurmd"
    if not os.access(CGROUPS / "freezer", os.W_OK):
        return f"{CGROUPS}/freezer (cgroups of version 1) cannot be written"
    tried = subprocess.run([*_OWN_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    return f"no PID namespace can be had: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Cluster:
    """A running SLURM.  environment: for its commands, with no other SLURM variable.  nodes: their names."""

    folder: Path
    environment: Mapping[str, str]
    nodes: tuple[str, str]

    def run(self, *command: str, **options: object) -> str:
        """What a command prints (`sinfo`, `scontrol`, `srun`). Raises AssertionError with its words if it fails."""
        done = subprocess.run(
            command, env={**self.environment}, capture_output=True, text=True, timeout=PATIENCE, check=False, **options
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, *options: str, folder: Path) -> str:
        """The id of a job that runs the text of a batch script in a folder."""
        return self.run("sbatch", "--parsable", *options, input=script, cwd=folder).strip()

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ExitCode, ..."""
        line = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(.*?)(?= [A-Z][A-Za-z:/]+=|$)", line))

    def states(self, job: str) -> list[str]:
        """The states of a job, or of each task of an array."""
        told = self.run("scontrol", "show", "job", "--oneliner", job)
        return re.findall(r" JobState=(\S+)", told)

    def take_away(self, node: str) -> None:
        """An administrator sets a node down."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def bring_back(self, node: str) -> None:
        """A node that was taken away, in use again. With ReturnToService=2 it may come back by itself, whenever its
        daemon registers, and then "resume" is refused."""

        def is_back() -> str | None:
            state = re.findall(r" State=(\S+)", self.run("scontrol", "show", "node", "--oneliner", node))[0]
            if "DOWN" not in state:
                return state
            resume = ["scontrol", "update", f"nodename={node}", "state=resume"]
            subprocess.run(resume, env={**self.environment}, capture_output=True, check=False)
            return None

        wait_for(is_back, f"{node} stays down")

    def wait(self, job: str) -> str:
        """The state that a job ended in, COMPLETED or FAILED; of an array's tasks, each state once."""

        def have_ended() -> str | None:
            states = set(self.states(job))
            return None if states & _GOING_ON else " ".join(sorted(states))

        return wait_for(have_ended, f"job {job} did not end", 900)


def wait_for(look: Callable[[], str | None], complaint: str, timeout_seconds: float = PATIENCE) -> str:
    """What `look` gives once it gives something."""
    deadline = time.monotonic() + timeout_seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"{complaint} in {timeout_seconds} s"
        time.sleep(0.3)  # a look may start a program, which a busy machine has to run beside what is waited for
    return found


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Two idle nodes, in an empty folder; gone afterwards, with all that ran on them."""
    name = f"t{os.getpid()}"  # of nodes and so of cgroups, which several clusters on a machine share
    nodes = (f"{name}n0", f"{name}n1")
    socket = folder / nodes[0] / f"{nodes[0]}_{10**6}.{2**32}"  # of a step; no job starts where its name is longer
    assert len(str(socket)) < 108, f"{folder}: its name is too long for Unix sockets"
    slot = _own_slot()
    _write_configuration(folder, name, slot.number)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    cluster = Cluster(folder, environment, nodes)
    with (folder / "daemons.log").open("wb") as log:
        daemons = subprocess.Popen(
            [*_OWN_NAMESPACE, "bash", "-c", _DAEMONS, "daemons", folder, name],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
    try:
        wait_for(lambda: _idle(cluster, daemons), f"the nodes were not idle: {folder}/*.log tell why")
        yield cluster
    finally:
        daemons.kill()  # the kernel ends its child then, and with that all of the namespace
        daemons.wait(timeout=PATIENCE)
        _remove_cgroups()
        slot.lock.close()


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # unshare takes no notice of TERM


class _Slot(NamedTuple):
    """One of the clusters that this machine may have at a time: which ports are its own follows from it."""

    number: int
    lock: IO[str]


def _own_slot() -> _Slot:
    deadline = time.monotonic() + PATIENCE
    for number in itertools.cycle(range(_SLOTS)):
        # By user: another's file could not be opened, by root neither in a folder that all may write in.
        lock = (_LOCKS / f"fluxfill-tests-slurm-{os.getuid()}-{number}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another pytest's
            lock.close()
            assert time.monotonic() < deadline, f"{_SLOTS} clusters are running already"
            time.sleep(0.3)
            continue
        return _Slot(number, lock)
    raise AssertionError


def _write_configuration(folder: Path, name: str, slot: int) -> None:
    for part in ("munge", "state", *(f"{name}n{number}" for number in range(2))):
        (folder / part).mkdir(parents=True)
    (folder / "munge").chmod(0o755)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    devices = [folder / f"gpu{number}" for number in range(GPUS_PER_NODE)]
    for device in devices:
        device.touch()  # a count without files makes the nodes invalid
    text = _SLURM_CONF.format(
        name=name,
        folder=folder,
        ports=_free_ports(3, slot),
        first_job=1000 + 3000 * slot,  # ports of training follow from it, of a restart 1009 higher
        gpus=GPUS_PER_NODE,
        grace_seconds=GRACE_SECONDS,
    )
    for file, seconds in _CREDENTIAL_SECONDS.items():
        (folder / file).write_text(text.replace("CREDENTIAL_SECONDS", str(seconds)))
    (folder / "cgroup.conf").write_text(_CGROUP_CONF)
    gres = f"NodeName={name}n[0-1] Name=gpu File={folder}/gpu[0-{GPUS_PER_NODE - 1}]\n"
    (folder / "gres.conf").write_text(gres)


def _free_ports(count: int, slot: int) -> list[int]:
    """Of the slot's own: above those of training jobs, and below those that the system hands out, which may be taken in
    the meantime."""
    free: list[int] = []
    for port in range(30_000 + 400 * slot, 30_000 + 400 * (slot + 1)):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        free.append(port)
        if len(free) == count:
            break
    return free


def _idle(cluster: Cluster, daemons: "subprocess.Popen[bytes]") -> str | None:
    assert daemons.poll() is None, (cluster.folder / "daemons.log").read_text()
    told = subprocess.run(
        ["sinfo", "--noheader", "--format=%T %D"],
        env={**cluster.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return "idle" if told.stdout.split() == ["idle", "2"] else None


def _remove_cgroups() -> None:
    """Of this process's nodes, and of those whose process was killed."""
    for folder in CGROUPS.glob("*/slurm_t[0-9]*n[01]"):
        owner = re.sub(r"slurm_t(\d+)n[01]", r"\1", folder.name)
        if owner != str(os.getpid()) and Path("/proc", owner).exists():
            continue
        for path, _, _ in os.walk(folder, topdown=False):
            try:
                os.rmdir(path)
            except OSError as error:  # a process in it has not ended yet
                print(f"{path}: {error}", file=sys.stderr)
