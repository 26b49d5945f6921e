"""What befell a run, as marks on the time axis of its curves: skips, rollbacks, preemptions, restarts, failures."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypedDict

from configs.supervision import STOPPED
from launch.report.curves import as_number, as_whole
from launch.report.sessions import Session
from launch.slurm.restarts import End

Kind = Literal["skip", "rollback", "preemption", "restart", "failure", "note"]

MOST_MARKS = 300  # of a kind: a page shows the last
_NOTES = {"straggler", "hang", "out of memory", "validation left out"}
_SAME_END_SECONDS = 300.0  # between what rank 0 and its job write of one end


class Mark(TypedDict):
    """step: None where it is not known; the time tells then.  time: seconds since 1970, None of an unknown one."""

    kind: Kind
    step: int | None
    time: float | None
    text: str


def read_marks(events: Iterable[dict], sessions: Sequence[Session], ends: Iterable[End]) -> list[Mark]:
    """The marks by time.  events: lines of events.jsonl.  ends: of its SLURM jobs."""
    marks = [*_of_events(events, sessions), *_of_sessions(sessions), *_of_jobs(ends, sessions)]
    marks.sort(key=lambda mark: mark["time"] or 0.0)
    of_kind: dict[str, list[Mark]] = {}
    for mark in marks:
        of_kind.setdefault(mark["kind"], []).append(mark)
    shown = {id(mark) for of_one in of_kind.values() for mark in of_one[-MOST_MARKS:]}
    return [mark for mark in marks if id(mark) in shown]


def _of_events(events: Iterable[dict], sessions: Sequence[Session]) -> Iterator[Mark]:
    recorded = sessions[0].begin if sessions else float("inf")
    for event in events:
        what, why = str(event.get("event")), str(event.get("why") or "")
        if what == "skip":
            yield _mark(event, "skip", f"skipped: {why}{_keys(event)}")
        elif what == "rollback":
            back = f"back to step {event.get('to_step')}, learning rate x {event.get('lr_scale')}: {why}"
            yield _mark(event, "rollback", back)
        elif what == "stop":
            yield _mark(event, "failure", why)
        elif what == "resumed" and (as_number(event.get("time")) or 0.0) < recorded:
            yield _mark(event, "restart", f"went on from step {event.get('step')}")
        elif what in _NOTES:
            rank = "" if event.get("rank") is None else f", rank {event['rank']}"
            yield _mark(event, "note", f"{what}{rank}{f': {why}' if why else ''}")


def _of_sessions(sessions: Sequence[Session]) -> Iterator[Mark]:
    for number, session in enumerate(sessions):
        if number:
            ran_on = f"{session.processes} x {' + '.join(session.gpus) or 'CPU'}"
            text = f"start {number + 1}, from step {session.step}, {ran_on}"
            yield {"kind": "restart", "step": session.step, "time": session.begin, "text": text}
        if session.code is not None and session.code != 0:
            kind: Kind = "preemption" if session.code == STOPPED else "failure"
            yield {"kind": kind, "step": session.end_step, "time": session.end, "text": session.reason}
        elif session.code is None and number + 1 < len(sessions):
            yield {"kind": "failure", "step": None, "time": session.end, "text": "left no word: killed, or a node lost"}


def _of_jobs(ends: Iterable[End], sessions: Sequence[Session]) -> Iterator[Mark]:
    """Ends of jobs, of which the run itself tells nothing."""
    for end in ends:
        told = [session for session in sessions if abs(session.end - end.time) < _SAME_END_SECONDS]
        if end.code != 0 and not told:
            kind: Kind = "preemption" if end.code == STOPPED else "failure"
            text = f"job {end.job}: {end.reason} ({end.decision})"
            yield {"kind": kind, "step": end.progress, "time": end.time, "text": text}


def _mark(event: dict[str, Any], kind: Kind, text: str) -> Mark:
    return {"kind": kind, "step": as_whole(event.get("step")), "time": as_number(event.get("time")), "text": text}


def _keys(event: dict[str, Any]) -> str:
    samples = event.get("samples")
    keys = [str(sample.get("key")) for sample in samples if isinstance(sample, dict)] if samples else []
    return f" ({', '.join(keys[:3])})" if keys else ""
