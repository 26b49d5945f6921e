"""The faults of a soak: what each does to a start of `fluxfill train`, when, and how it may end.

Processes are found by a variable of their environment, which is handed down, whoever their parents are.
"""

import json
import os
import random
import re
import resource
import secrets
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configs.supervision import BAD_INPUT, FAILED, STOP_SIGNALS, STOPPED

_MARK = "FLUXFILL_SOAK"
_NO_ROOM_BYTES = 40_000  # of a file on the full disk: enough for logs, too little for a checkpoint
_EMPTY_TEXT = 16  # bytes of the text member of a sample whose text an earlier one has


@dataclass(frozen=True)
class Moment:
    """So many seconds after a start, or after so many steps of it, whichever is first."""

    seconds: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Fault:
    """kind: of FAULTS.  pick: from 0 to 1, chooses among processes, signals, shards and places in them."""

    kind: str
    moment: Moment
    pick: float


@dataclass(frozen=True)
class Kind:
    """codes: with which a start may end.  intervals: between checkpoints that may be lost; None: any number."""

    codes: tuple[int, ...]
    intervals: int | None


_KILLED = (-signal.SIGKILL, FAILED, STOPPED)
KILLS = {
    "kill -9 fluxfill train": Kind(_KILLED, 1),
    "kill -9 accelerate launch": Kind(_KILLED, 1),
    "kill -9 a rank": Kind(_KILLED, 1),
    "kill -9 all": Kind(_KILLED, 1),
}
# None of them changes what is trained.
HARMLESS = {
    **KILLS,
    "signal": Kind((STOPPED,), 0),
    "signal to a rank": Kind((STOPPED,), 0),
    "full disk": Kind((FAILED, STOPPED), None),
    "second start": Kind((STOPPED,), 0),
}
CUT, FLIPPED = "truncated shard", "flipped bit"
# Where a run takes no damaged sample, the first ends it; where it takes them, the second has others stand in for them.
FAULTS = {**HARMLESS, CUT: Kind((FAILED, BAD_INPUT), 1), FLIPPED: Kind((STOPPED,), 0)}


def draw_fault(
    chance: random.Random, kinds: list[str], startup_seconds: float, interval: int, *, most_steps: int | None = None
) -> Fault:
    """Half of the kills come while a start still imports and loads, the other faults once it trains.

    most_steps: that it may train until then; by default two more than an interval between checkpoints.
    """
    kind = chance.choice(kinds)
    moment = Moment(steps=chance.randint(1, most_steps or interval + 2))
    if kind in KILLS and chance.random() < 0.5:
        moment = Moment(seconds=chance.uniform(0, startup_seconds), steps=1)  # some starts are faster
    if kind == "full disk":
        moment = Moment(steps=interval + 1)  # so a save has failed
    return Fault(kind, moment, chance.random())


def describe(fault: Fault) -> str:
    at = f"{fault.moment.seconds:.2f} s" if fault.moment.seconds is not None else f"{fault.moment.steps} steps"
    return f"{fault.kind}, after {at}"


class Start:
    """A start of `fluxfill train`, its processes and what it left in its run's folder.

    longest_seconds: after which it is ended.
    """

    def __init__(
        self,
        line: list[str],
        output: Path,
        run: Path,
        fault: Fault | None,
        variables: dict[str, str] | None = None,
        *,
        longest_seconds: float,
    ) -> None:
        mark = secrets.token_hex(8)
        self._environment = {**os.environ, **(variables or {}), _MARK: mark, "OMP_NUM_THREADS": "1"}
        self._mark = f"{_MARK}={mark}".encode()
        self._line, self._output, self._run, self._longest_seconds = line, output, run, longest_seconds
        self.second_code: int | None = None  # with which another start beside it ended
        self._before = set(self._lines())
        output.parent.mkdir(parents=True, exist_ok=True)
        is_full = fault is not None and fault.kind == "full disk"
        self._begun = time.monotonic()
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                line, stdout=file, stderr=file, env=self._environment, preexec_fn=_leave_no_room if is_full else None
            )

    def start_beside(self) -> None:
        """Start the same once more, and wait for its end."""
        with self._output.with_suffix(".second.txt").open("wb") as file:
            done = subprocess.run(
                self._line, stdout=file, stderr=file, env=self._environment, timeout=self._longest_seconds
            )
        self.second_code = done.returncode

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def _lines(self) -> list[str]:
        try:
            return (self._run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []

    def steps(self) -> int:
        """The last step in metrics.jsonl."""
        found = [re.match(r'\{"step": (\d+),', line) for line in self._lines()]
        return max((int(match[1]) for match in found if match), default=0)

    def num_trained(self) -> int:
        """Steps that it has made: until it trains, lines of an earlier start are there which it will set aside."""
        return len(set(self._lines()) - self._before)

    def first_step(self) -> int | None:
        """The first step that it trains; None if it never came to that."""
        text = self._output.read_text(encoding="utf-8", errors="replace")
        if resumed := re.search(r"resumed from .*, step (\d+)", text):
            return int(resumed[1]) + 1
        return 1 if re.search(r"step 1/\d", text) else None

    def reached(self, moment: Moment) -> bool:
        """Wait for a moment; False if the start has ended before."""
        while self.process.poll() is None and self.seconds < self._longest_seconds:
            if moment.seconds is not None and self.seconds >= moment.seconds:
                return True
            if moment.steps is not None and self.num_trained() >= moment.steps:
                return True
            time.sleep(0.02)
        return False

    def wait(self) -> int | None:
        """Its exit code; None if it had to be ended."""
        try:
            return self.process.wait(timeout=max(self._longest_seconds - self.seconds, 1.0))
        except subprocess.TimeoutExpired:
            self.kill(self.processes())
            self.process.wait()
            return None

    def processes(self, role: str = "") -> list[int]:
        """Ids of its processes.  role: "launcher" or "rank", or all of them."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has ended
                continue
            launches = "accelerate.commands.launch" in line
            is_rank = "trainer/main.py" in line and not launches
            if {"": True, "launcher": launches, "rank": is_rank}[role] and line:
                found.append(int(folder.name))
        return sorted(found)

    def saw(self, words: str) -> bool:
        """Whether it has printed these words."""
        return words in self._output.read_text(encoding="utf-8", errors="replace")

    def left_behind(self, seconds: float) -> list[str]:
        """Command lines of its processes that are there so long after its end; they are ended then."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        lines = []
        for pid in left:
            with suppress(OSError):  # it has ended
                lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[-60:])
        self.kill(left)
        return lines

    def kill(self, processes: list[int], number: int = signal.SIGKILL) -> None:
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def reason(self) -> str:
        """Of outcome.json, or what it printed last."""
        try:
            return json.loads((self._run / "outcome.json").read_text(encoding="utf-8"))["reason"]
        except (OSError, ValueError):
            return self._output.read_text(encoding="utf-8", errors="replace")[-500:]


def _leave_no_room() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (_NO_ROOM_BYTES, _NO_ROOM_BYTES))


def inflict(fault: Fault, start: Start, cache: Path) -> Callable[[], None]:
    """Do to a start what the fault does; to its first process, where it has no other yet. Returns what undoes it once
    the start has ended."""

    def pick(choices: list) -> list:
        return [choices[int(fault.pick * len(choices))]] if choices else [start.process.pid]

    match fault.kind:
        case "kill -9 fluxfill train":
            start.kill([start.process.pid])
        case "kill -9 accelerate launch":
            start.kill(pick(start.processes("launcher")))
        case "kill -9 a rank":
            start.kill(pick(start.processes("rank")))
        case "kill -9 all":
            start.kill(start.processes())
        case "signal":
            start.kill([start.process.pid], pick(list(STOP_SIGNALS))[0])
        case "signal to a rank":
            start.kill(pick(start.processes("rank")), pick(list(STOP_SIGNALS))[0])
        case "full disk":
            start.kill([start.process.pid], signal.SIGTERM)
        case "second start":
            start.start_beside()
            start.kill([start.process.pid], signal.SIGTERM)
        case "truncated shard" | "flipped bit":
            (shard,) = pick(
                sorted(path for path in cache.glob("shards/*/*.tar") if not path.name.startswith("holdout"))
            )
            whole = shard.read_bytes()
            if fault.kind == CUT:
                os.truncate(shard, int(fault.pick * len(whole)))
            else:
                _flip_bit(shard, fault.pick)
                start.kill([start.process.pid], signal.SIGTERM)
            return lambda: _put_back(shard, whole)
    return lambda: None


def _flip_bit(shard: Path, pick: float) -> None:
    """Amid the tensors of a sample or a text: no run reads what lies between, nor a sample's .json or empty text."""
    with tarfile.open(shard) as tar:
        members = [member for member in tar if member.name.endswith(".safetensors") and member.size > _EMPTY_TEXT]
    member = members[int(pick * 1000) % len(members)]
    with shard.open("r+b") as file:
        file.seek(member.offset_data + member.size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _put_back(shard: Path, whole: bytes) -> None:
    shard.write_bytes(whole)
