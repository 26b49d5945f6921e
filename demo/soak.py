"""Runs under random faults, from a seed: each must end with the losses and weights of one that nothing disturbed.

make soak MINUTES=15 SEED=1                 (or: python demo/soak.py --minutes 15 --seed 1)
python demo/soak.py --kills 20 --seed 1     one run of 60 steps, killed 20 times

Every start is `fluxfill train` as a user types it, of a tiny FLUX-Fill on photographs, on a CPU. Of the runs some have
one engine, some another at each start, and some bad data: batches with NaN, and bits that flip in their shards. These
are held against a run that was given the batches and rows to pass over beforehand, and whose data is whole.

What happened is in events.jsonl in the folder, a line for each start, and in a table at the end; the exit code is 1 if
anything was not as it must be. demo/soak_faults.py says what the faults are.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from configs.supervision import ALREADY_RUNNING, FAILED
from data.storage.checkpoint_folders import newest_step
from demo.run import make_inputs
from demo.soak_faults import CUT, FAULTS, FLIPPED, HARMLESS, KILLS, Fault, Moment, Start, describe, draw_fault, inflict
from demo.soak_judge import (
    INTERVAL,
    STEPS,
    Comparison,
    Event,
    compare,
    judge_loss,
    judge_replaced,
    read_run_state,
    unfinished_save,
)
from demo.soak_report import Ended, report, tell_start, write_result

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "soak"
KILLED_FOLDER = ROOT / "runs" / "soak-kills"
# DeepSpeed's kernels, built once for all soaks and for them alone: no other run can meet what a kill amid a build left.
EXTENSIONS = ROOT / "runs" / "soak-extensions"
GLOBAL_BATCH_SIZE = 8
# Engine -> processes. Each goes on from any other's checkpoint.
LAUNCHES = {"single": 1, "ddp": 2, "fsdp2": 2, "zero2": 2}
SETTINGS = (
    *("method={type: lora, rank: 4}", f"train.global_batch_size={GLOBAL_BATCH_SIZE}", "train.micro_batch_size=4"),
    *(f"train.steps={STEPS}", "train.warmup_steps=5", "train.lr=1e-4", "train.ema_decay=0.9", "data.preprocess=never"),
    *(f"checkpoint.every_steps={INTERVAL}", "validation.every_steps=null", "logging.trackers=[]"),
)
_MAX_SKIPS = 2
# A row that is replaced is another run's; damage has to end this one.
_WHOLE = ("guard.max_bad_samples=0",)
_DAMAGED = ("guard.max_bad_samples=1000", f"guard.max_skips={_MAX_SKIPS}", "guard.lr_factor=1.0")
_FLUXFILL = (sys.executable, "-P", "-m", "launch")
_FAULTS_A_RUN = 6


@dataclass(frozen=True)
class Run:
    """launches: of its starts one is drawn each time.  nan_batches: whose loss is no number, at every start."""

    name: str
    launches: Sequence[str]
    settings: Sequence[str] = _WHOLE
    nan_batches: Sequence[int] = ()
    rows: Path | None = None  # for demo/soak_hook


class Soak:
    """The runs of one soak, in its folder.  longest_seconds: of a start.  left_seconds: after its end, in which its
    processes must go.  until: when no fault is inflicted any more, on the monotonic clock."""

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        longest_seconds: float = 600.0,
        left_seconds: float = 30.0,
        until: float | None = None,
    ) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self.ended: list[Ended] = []
        self._console, self._until = console, until
        self._longest_seconds, self._left_seconds = longest_seconds, left_seconds
        self._startup_seconds: dict[str, float] = {}

    @property
    def is_over(self) -> bool:
        return self._until is not None and time.monotonic() > self._until

    def prepare(self) -> None:
        """Write triples, model and cache."""
        for lock in EXTENSIONS.glob("*/lock"):  # of a soak that was ended amid the build: others would wait for it
            shutil.rmtree(lock.parent)
        make_inputs(self.folder)
        overrides = [text for text in self._overrides("none") if not text.startswith("data.preprocess")]
        line = [*_FLUXFILL, "preprocess", str(ROOT / "configs" / "demo.yaml"), *overrides]
        with (self.folder / "preprocess.txt").open("wb") as output:
            subprocess.run(line, check=True, stdout=output, stderr=output)

    def undisturbed(self, launch: str) -> Path:
        """The folder of the run that nothing disturbs, made once."""
        run = Run(f"undisturbed-{launch}", [launch])
        if launch not in self._startup_seconds:
            self._print(run.name)
            start = self._start(run, launch)
            start.reached(Moment(steps=1))
            self._startup_seconds[launch] = start.seconds
            self._end(start, run, launch, None)
        return self._folder(run.name)

    def disturbed(
        self, name: str, launches: list[str], num_faults: int, chance: random.Random, kinds: list[str], *given: str
    ) -> None:
        """A run with so many faults, and then to its end; held against the undisturbed one of the first launch.

        launches: of its starts one is drawn each time; one alone: bit for bit.  given: settings.
        """
        expected = self.undisturbed(launches[0])
        if "zero2" in launches:
            self.undisturbed("zero2")  # it builds DeepSpeed's kernels, which a full disk would not hold
        run = Run(name, launches, (*_WHOLE, *given))
        self._tell_run(run)
        self._disturb(run, num_faults, chance, kinds)
        self._finish(run, chance)
        self._compare(name, expected, exact=len(launches) == 1)

    def damaged(self, name: str, launch: str, num_faults: int, chance: random.Random, *given: str) -> None:
        """A run with NaN in two places of its order, and bits that flip in its shards, among other faults; held
        against one of whole data that was given what to pass over."""
        expected = self.undisturbed(launch)  # also: how long a start takes
        first = chance.randint(3, 20)
        places = (first, chance.randint(first + 8, 48))
        batches = [place + after for place in places for after in range(_MAX_SKIPS)]
        nan = [batch * GLOBAL_BATCH_SIZE + chance.randrange(GLOBAL_BATCH_SIZE) for batch in batches]
        run = Run(name, [launch], (*_DAMAGED, *given), batches, self._plan_rows(name, nan=nan))
        self._tell_run(run)
        undo = self._disturb(run, 1, chance, [FLIPPED])
        undo += self._disturb(run, num_faults - 1, chance, [kind for kind in FAULTS if kind != CUT])
        self._finish(run, chance)
        for put_back in reversed(undo):
            put_back()
        if not self._is_done(run):
            return self._compare(name, expected, exact=True)
        state = read_run_state(self._folder(name))
        if state["excluded"] != batches:
            self.events[-1].wrong.append(f"passed over batches {state['excluded']}, not {batches}")
        self.events[-1].wrong += judge_replaced(state["replaced"], len(undo))
        instead = {row["position"]: row["replacement"] for row in state["replaced"]}
        excluded = f"guard.exclude_batches={state['excluded']}"
        beforehand = Run(f"{name}-given", [launch], (*_WHOLE, excluded), (), self._plan_rows(name, instead=instead))
        self._tell_run(beforehand)
        self._finish(beforehand, chance)
        self._compare(
            name, self._folder(beforehand.name), exact=True, excluded=len(state["excluded"]), replaced=len(instead)
        )

    def _plan_rows(self, name: str, *, nan: Sequence[int] = (), instead: dict[int, int] | None = None) -> Path:
        path = self.folder / "rows" / f"{name}-{'given' if instead is not None else 'nan'}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"nan": list(nan), "instead": instead or {}}), encoding="utf-8")
        return path

    def _compare(self, name: str, expected: Path, *, exact: bool, excluded: int = 0, replaced: int = 0) -> None:
        ends = [event for event in self.events if event.code == 0]
        if {name, expected.name} <= {event.run for event in ends}:
            found = compare(self._folder(name), expected, exact=exact)
        else:
            found = Comparison(float("inf"), "one of the two did not come to its end")
        ended = Ended(name, expected.name, exact, found, excluded, replaced)
        self.ended.append(ended)
        if found.wrong:
            self.events[-1].wrong.append(f"{name}: {found.wrong}")
        self._print(f"  {ended.told}, held against {expected.name}")

    def _tell_run(self, run: Run) -> None:
        told = [f"NaN in batches {', '.join(map(str, run.nan_batches))}"] if run.nan_batches else []
        told += [text for text in run.settings if text.startswith(("checkpoint.", "guard.exclude"))]
        self._print(": ".join([run.name, *([", ".join(told)] if told else [])]))

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def _disturb(self, run: Run, num_faults: int, chance: random.Random, kinds: list[str]) -> list[Callable[[], None]]:
        """Inflict so many faults on a run, or fewer if it ends before. Returns what mends its data."""
        mend: list[Callable[[], None]] = []
        for number in range(num_faults):
            if self.is_over or self._is_done(run):
                break
            launch = chance.choice(run.launches)
            startup = self._startup_seconds.get(launch) or max(self._startup_seconds.values())
            left = (STEPS - newest_step(self._folder(run.name))) // (num_faults - number)
            fault = draw_fault(chance, kinds, startup, INTERVAL, most_steps=min(max(left, 1), INTERVAL + 2))
            start = self._start(run, launch, fault)
            undo = inflict(fault, start, self.folder / "cache") if start.reached(fault.moment) else None
            self._end(start, run, launch, fault, was_disturbed=undo is not None)
            if undo is not None and fault.kind == FLIPPED:
                mend.append(undo)
            elif undo is not None:
                undo()
        return mend

    def _finish(self, run: Run, chance: random.Random) -> None:
        """Start a run once more, undisturbed, unless it is at its end."""
        if not self._is_done(run):
            launch = chance.choice(run.launches)
            self._end(self._start(run, launch), run, launch, None)

    def _is_done(self, run: Run) -> bool:
        return any(event.run == run.name and event.code == 0 for event in self.events)

    def _overrides(self, name: str) -> list[str]:
        places = [f"data.datasets.0.{role}={self.folder}/triples/{role}" for role in ("target", "source", "mask")]
        places += [f"model.base={self.folder}/model", f"data.cache={self.folder}/cache", f"run.dir={self.folder}/runs"]
        return [*SETTINGS, *places, f"run.name={name}"]

    def _start(self, run: Run, launch: str, fault: Fault | None = None) -> Start:
        line = [*_FLUXFILL, "train", str(ROOT / "configs" / "demo.yaml"), *self._overrides(run.name), *run.settings]
        line += [f"parallel.engine={launch}", "--num-processes", str(LAUNCHES[launch])]
        output = self.folder / "output" / f"{run.name}-{len(self.events):03d}.txt"
        variables = {"TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
        if run.rows is not None:
            paths = [str(ROOT / "demo" / "soak_hook"), *filter(None, [os.environ.get("PYTHONPATH")])]
            variables |= {"FLUXFILL_SOAK_ROWS": str(run.rows), "PYTHONPATH": os.pathsep.join(paths)}
        return Start(line, output, self._folder(run.name), fault, variables, longest_seconds=self._longest_seconds)

    def _end(self, start: Start, run: Run, launch: str, fault: Fault | None, *, was_disturbed: bool = False) -> Event:
        """Wait for a start's end, and judge it."""
        code = start.wait()
        seconds = start.seconds
        wrong = [] if code is not None else ["did not end"]
        if left := start.left_behind(self._left_seconds):
            wrong.append(f"left behind: {'; '.join(left)}")
        gone_seconds, folder = start.seconds - seconds, self._folder(run.name)
        first, last, saved = start.first_step(), start.steps(), newest_step(folder)
        told = describe(fault) if fault is not None and was_disturbed else "none"
        shown = FAILED if code is None else code
        event = Event(run.name, launch, told, shown, first, last, round(seconds, 1), round(gone_seconds, 1), saved)
        event.wrong, event.writing = wrong, unfinished_save(folder)
        if first is not None:
            self._judge_last(run, first, start)
            event.lost = last - saved  # until the next one says
        if code is not None:
            expected = FAULTS[fault.kind].codes if fault is not None and was_disturbed else (0,)
            if code not in expected and not (code == 0 and last == STEPS):
                wrong.append(f"ended with code {code}, not {' or '.join(map(str, expected))}: {start.reason()}")
            if was_disturbed and fault is not None and fault.kind == CUT and code and ".tar" not in start.reason():
                wrong.append(f"the shard that was cut is not named: {start.reason()}")
        if start.second_code not in (None, ALREADY_RUNNING):
            wrong.append(f"the second start ended with code {start.second_code}, not {ALREADY_RUNNING}")
        self.events.append(event)
        tell_start(event, self._console)
        # Anew: of an earlier start it is known now what was lost.
        lines = [json.dumps(asdict(each)) for each in self.events]
        (self.folder / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return event

    def _judge_last(self, run: Run, first: int, start: Start) -> None:
        """Of the starts before this one, the last that came to train: where this one went on from."""
        trained = [event for event in self.events if event.run == run.name and event.first_step is not None]
        if not trained:
            return
        last = trained[-1]
        last.lost = last.last_step - (first - 1)
        if start.saw(" is damaged ("):
            last.wrong.append("it left a damaged checkpoint")  # which no fault does
        elif run.nan_batches and start.saw("was saved between skipped updates"):
            return  # what skips have cost is no loss of the fault's
        if first - 1 != last.saved:
            last.wrong.append(f"step {last.saved} was saved, but the next start went on from {first - 1}")
        last.wrong += judge_loss(last)


def soak_for(soak: Soak, seed: int, console: Console) -> None:
    """Disturb runs until the time is up: of each three one has bad data, and one another engine at each start."""
    chance, number = random.Random(seed), 0
    while not soak.is_over:
        for what in chance.sample(["damaged", "moved", "same"], 3):
            number += 1
            if soak.is_over:
                break
            launch, (given, saves) = chance.choice(list(LAUNCHES)), _draw_saves(chance)
            name = f"run-{number:02d}-{what}-{'each' if what == 'moved' else launch}-{saves}"
            if what == "damaged":
                soak.damaged(name, launch, _FAULTS_A_RUN, chance, given)
            else:
                launches = [launch, *(other for other in LAUNCHES if other != launch)] if what == "moved" else [launch]
                soak.disturbed(name, launches, _FAULTS_A_RUN, chance, [*HARMLESS, CUT], given)


def kill_one_run(soak: Soak, chance: random.Random, num_kills: int) -> None:
    """A run that is killed so many times, while it starts as well, and then comes to its end."""
    launch, (given, saves) = chance.choice(list(LAUNCHES)), _draw_saves(chance)
    soak.disturbed(f"killed-{launch}-{saves}", [launch], num_kills, chance, list(KILLS), given)
    if (kills := sum(event.kind in KILLS for event in soak.events)) != num_kills:
        soak.events[-1].wrong.append(f"it came to its end after {kills} kills, not {num_kills}")


def _draw_saves(chance: random.Random) -> tuple[str, str]:
    """(setting, word) of how a run saves: in the background, or while training waits."""
    return chance.choice([("checkpoint.async=true", "async"), ("checkpoint.async=false", "sync")])


def main() -> int:
    parser = argparse.ArgumentParser(description="Disturb training runs at random, and hold their ends against others.")
    parser.add_argument("--minutes", type=float, default=15.0, help="after which nothing is disturbed; by default 15")
    parser.add_argument("--kills", type=int, help="kill one run so many times instead")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn")
    parser.add_argument("--results", type=Path, help="add what came of it to this file, a line of JSON")
    options = parser.parse_args()
    console, begun = Console(), time.monotonic()
    folder = KILLED_FOLDER if options.kills else FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    soak = Soak(folder, console, until=None if options.kills else begun + 60 * options.minutes)
    soak.prepare()
    if options.kills:
        kill_one_run(soak, random.Random(options.seed), options.kills)
    else:
        soak_for(soak, options.seed, console)
    wrong = report(soak.events, soak.ended, console)
    console.print(f"seed {options.seed}: {wrong or 'nothing'} wrong; {folder}/events.jsonl has every start")
    if options.results is not None:
        write_result(options.results, soak.events, soak.ended, options.seed, (time.monotonic() - begun) / 60)
    return FAILED if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
