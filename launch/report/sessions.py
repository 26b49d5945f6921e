"""The starts of a run, from its starts.jsonl and its logs: what each ran on, how long it lived, what all of it cost."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from launch.report.curves import as_number, as_whole

STARTS = "starts.jsonl"


@dataclass(frozen=True)
class Session:
    """One start.  begin, end: seconds since 1970; end is the last sign of it.  gpus: the kinds, by name; none: CPUs.
    versions: package -> version.  code, reason, end_step: how it ended; None where it left no word, or goes on."""

    begin: float
    end: float
    step: int
    host: str
    engine: str
    processes: int
    nodes: int
    gpus: tuple[str, ...]
    commit: str
    versions: dict[str, str]
    code: int | None
    reason: str
    end_step: int | None

    @property
    def hours(self) -> float:
        """Of all its processes together."""
        return max(self.end - self.begin, 0.0) * self.processes / 3600


class Cost(TypedDict):
    """Hours of GPUs, or of processes where there are none.  total: with weights, validation and saves.  kept: of the
    steps that the run consists of.  undone: of steps that a restart or a rollback undid.  waiting: for data, in the
    former."""

    unit: str
    total: float | None
    kept: float
    undone: float
    waiting: float


def read_sessions(starts: Sequence[dict], logged: Sequence[dict]) -> list[Session]:
    """The starts, oldest first.  starts: the lines of starts.jsonl.  logged: of all other logs, those with a time."""
    begun = [line for line in starts if "code" not in line and as_number(line.get("time")) is not None]
    signs = sorted(time for line in logged if (time := as_number(line.get("time"))) is not None)
    found = []
    for number, line in enumerate(begun):
        begin = float(line["time"])
        until = float(begun[number + 1]["time"]) if number + 1 < len(begun) else float("inf")
        ends = [end for end in starts if "code" in end and begin <= (as_number(end.get("time")) or 0.0) < until]
        del ends[1:]  # of later starts that were refused, or had nothing to do
        own = [begin, *(time for time in signs if begin <= time < until), *(float(end["time"]) for end in ends)]
        found.append(
            Session(
                begin,
                max(own),
                as_whole(line.get("step")) or 0,
                _text(line.get("host")),
                _text(line.get("engine")),
                max(as_whole(line.get("processes")) or 1, 1),
                max(as_whole(line.get("nodes")) or 1, 1),
                tuple(str(name) for name in _list(line.get("gpus"))),
                _text(line.get("commit")),
                {str(name): str(version) for name, version in _dict(line.get("versions")).items()},
                as_whole(ends[0].get("code")) if ends else None,
                _text(ends[0].get("reason")) if ends else "",
                as_whole(ends[0].get("step")) if ends else None,
            )
        )
    return found


def count_cost(sessions: Sequence[Session], kept: Sequence[dict], undone: Sequence[dict]) -> Cost:
    """What a run cost.  kept, undone: lines of metrics.  Without a record of its starts (`sessions` is empty) nothing
    is known but the seconds of its steps, on however many GPUs."""
    unit = "hours of steps" if not sessions else "GPU-hours" if any(each.gpus for each in sessions) else "process-hours"
    return {
        "unit": unit,
        "total": sum(each.hours for each in sessions) if sessions else None,
        "kept": _hours(sessions, kept, "seconds"),
        "undone": _hours(sessions, undone, "seconds"),
        "waiting": _hours(sessions, kept, "data_wait_seconds"),
    }


def _hours(sessions: Sequence[Session], lines: Sequence[dict], name: str) -> float:
    """Of lines in any order: those of several logs may follow each other."""
    begins = [session.begin for session in sessions]
    hours, number = 0.0, 0
    for line in lines:
        if (time := as_number(line.get("time"))) is not None:
            number = max(bisect_right(begins, time) - 1, 0)
        processes = sessions[number].processes if sessions else 1
        hours += (as_number(line.get(name)) or 0.0) * processes / 3600
    return hours


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: object) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
