"""What a soak says: a line for each start while it runs, tables at its end, and a line of JSON to keep."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from demo.soak_faults import FAULTS, KILLS
from demo.soak_judge import Comparison, Event


@dataclass(frozen=True)
class Ended:
    """A run at its end.  against: the run it was held against.  excluded, replaced: batches that it passed over for
    NaN, and rows that others stood in for."""

    run: str
    against: str
    exact: bool
    found: Comparison
    excluded: int = 0
    replaced: int = 0

    @property
    def told(self) -> str:
        return self.found.wrong or ("bit-equal" if self.exact else f"{self.found.apart:.1e} apart")


def tell_start(event: Event, console: Console) -> None:
    """The line of a start that has ended."""
    steps = "no step" if event.first_step is None else f"steps {event.first_step}-{event.last_step}"
    if event.first_step is not None and event.first_step > event.last_step:
        steps = "no step more"
    lost = "" if event.lost is None else f"lost {event.lost}"
    line = f"  {event.launch:<6}  {event.fault:<40}  exit {event.code:>3}  {steps:<12}  {event.seconds:>5.1f} s  {lost}"
    console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
    for text in event.wrong:
        console.print(f"    WRONG: {text}", style="red", highlight=False, markup=False, soft_wrap=True)


def report(events: list[Event], ended: list[Ended], console: Console) -> int:
    """The tables; returns how much was wrong. A soak that has disturbed nothing has shown nothing."""
    table = Table(title=f"Faults, in {len(events)} starts", title_justify="left")
    table.add_column("fault")
    for column in ("times", "exit codes", "most steps lost", "last process gone"):
        table.add_column(column, justify="right")
    for kind in ("none", *FAULTS):
        if of_kind := [event for event in events if event.kind == kind]:
            codes = ", ".join(map(str, sorted({event.code for event in of_kind})))
            lost = max((event.lost for event in of_kind if event.lost is not None), default=0)
            gone = max(event.gone_seconds for event in of_kind)
            table.add_row(kind, str(len(of_kind)), codes, str(lost), f"after {gone:.1f} s")
    for what, times in _planted(ended).items():
        if times:
            table.add_row(what, str(times), "", "", "")
    console.print(table)
    runs = Table(title="Runs, and those they were held against", title_justify="left")
    for column in ("run", "starts", "held against", "result"):
        runs.add_column(column)
    for run in ended:
        runs.add_row(run.run, str(sum(event.run == run.run for event in events)), run.against, run.told)
    console.print(runs)
    wrong = [f"{event.run}, {event.fault}: {text}" for event in events for text in event.wrong]
    if not any(event.kind in FAULTS for event in events):
        wrong.append("no fault was inflicted: give it more --minutes")
    for text in wrong:
        console.print(f"WRONG: {text}", style="red", highlight=False, markup=False, soft_wrap=True)
    return len(wrong)


def _planted(ended: list[Ended]) -> dict[str, int]:
    """Of runs with bad data: how much of it they have met."""
    return {"NaN in a batch": sum(run.excluded for run in ended), "row replaced": sum(run.replaced for run in ended)}


def write_result(path: Path, events: list[Event], ended: list[Ended], seed: int, minutes: float) -> None:
    """Add the soak to a file of results, a line of JSON.

    lost_by_kills: kind -> {steps: how many kills lost so many}, of starts that had come to train.
    """
    kills = {kind: Counter(e.lost for e in events if e.kind == kind and e.lost is not None) for kind in KILLS}
    line = {
        "benchmark": "soak",
        "seed": seed,
        "minutes": round(minutes, 1),
        "starts": len(events),
        "faults": dict(Counter(event.kind for event in events if event.kind in FAULTS)) | _planted(ended),
        "lost_by_kills": {kind: {str(steps): lost[steps] for steps in sorted(lost)} for kind, lost in kills.items()},
        "seconds_to_go": max((event.gone_seconds for event in events), default=0.0),
        "runs": [
            {
                "run": run.run,
                "starts": sum(event.run == run.run for event in events),
                "kills": sum(event.run == run.run and event.kind in KILLS for event in events),
                "against": run.against,
                "within": 0.0 if run.exact else "1e-5",
                "apart": run.found.apart,
            }
            for run in ended
        ],
        "wrong": [text for event in events for text in event.wrong],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
