"""The fault matrix: what goes wrong in a training run, what must happen then, and the tests that inject it.

A test of a fault says so: `@pytest.mark.fault(row, "how it is injected")`. It may add what it measured:
`record_property("happened", "2 steps lost")`.

python -m tests.fault_matrix [pytest's arguments]

runs these tests, slow ones too, and writes docs/reliability.md; of tests that it is not asked for, the page keeps what
it says. tests/test_reliability.py holds the page against the marks.
"""

import ast
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import date
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
SOAKS = ROOT / "benchmarks" / "results" / "soak.jsonl"
NOT_RUN = "not run yet"


class Fault(NamedTuple):
    """what: goes wrong.  must: happen then.  why_not: what of it no test here injects, and the reason."""

    what: str
    must: str
    why_not: str = ""


ROWS = {
    1: Fault(
        "kill -9 of a rank, at any moment",
        "the others end and leave no process behind; the same command goes on from the newest checkpoint, bit for bit, "
        "and loses no more than one checkpoint interval",
    ),
    2: Fault("kill -9 of the launcher, also while its ranks start", "no rank outlives it by 30 s; the run goes on"),
    3: Fault(
        "stop signals, to the launcher or one rank, twice, during a save, validation or start",
        "all ranks stop after the same step with one complete checkpoint and exit code 75; a second signal is ignored",
    ),
    4: Fault(
        "a grace period shorter than a save",
        "the newest complete checkpoint stands; what is half-done is removed",
    ),
    5: Fault("a truncated shard", "named at start or on reading, with shard and key; never fewer samples in silence"),
    6: Fault("a flipped bit in a shard, an index or a manifest", "found by checksum and named"),
    7: Fault("a missing shard", "all of them named at start; in mid-run waited for, then a stop on all ranks"),
    8: Fault(
        "storage that is slow or fails", "bounded retries that cost time alone, then an error that names the place"
    ),
    9: Fault(
        "a full disk during a checkpoint",
        "told; older checkpoints untouched, training goes on, the next save with room succeeds",
    ),
    10: Fault("kill -9 during a checkpoint, in each of its phases", "the newest complete one is taken, leftovers go"),
    11: Fault(
        "a flipped bit, a cut or a missing file in a checkpoint", "found by sha256 and told; the one before is taken"
    ),
    12: Fault(
        "a loss that is not finite, on one rank",
        "every rank skips the same update; weights, moments and average stay as they are",
    ),
    13: Fault(
        "losses that are not finite in a row, or a spike",
        "back to the last good checkpoint, past the offending batches; a stop with a report after so many times",
    ),
    14: Fault("numbers that are not finite in weights or latents", "never saved, never stored, never trained on"),
    15: Fault(
        "out of memory on one rank",
        "no rank hangs; the run goes on at the next smaller micro-batch and the same global batch, or says what to set",
        "That of a real GPU: no GPU here. torch's error is raised in its place.",
    ),
    16: Fault(
        "a slow rank",
        "named",
        "A GPU that is slow: no GPU here, and one that works cannot be made so. The times that it would have taken are "
        "put in their place.",
    ),
    17: Fault("a hang", "within the time that was set: stacks of every rank in the run's folder, an end"),
    18: Fault("a wrong config", "refused before any process group, with exit code 2 and every problem with its line"),
    19: Fault(
        "a clock that is wrong or jumps",
        "the newest checkpoint is that of the highest step; nobody is taken for dead",
        "The kernel's own clock, which stamps files: a test may not set a machine's. What Python reads jumps instead.",
    ),
    20: Fault(
        "a resume on another number of processes",
        "same samples in every step, same rates, losses and weights to rounding",
    ),
    21: Fault("a resume under another engine", "weights, moments, average and step are those that were saved"),
    22: Fault("8-bit optimizer state on another layout", "quantized again, and the log says so; exact on the same one"),
    23: Fault(
        "two starts in one run folder",
        "the second ends with exit code 3 and names the first; no file is touched",
    ),
    24: Fault("restarts without progress", "a stop after so many, that says so"),
    25: Fault(
        "what a dead process left: locks, claims, build locks, half files", "bypassed or removed, and never waited for"
    ),
    26: Fault(
        "a rank that writes slower than the others", "no checkpoint is complete before its last rank has written"
    ),
    27: Fault(
        "a malicious checkpoint, model, shard, table, picture, tar, config or URL",
        "refused; nothing of it is executed and nothing is written outside",
    ),
    28: Fault(
        "data that does not divide: odd rows, fewer shards than ranks, no samples",
        "equal steps on all ranks, every sample counted; nothing at all is refused",
    ),
    29: Fault(
        "a migration that is interrupted, folders that cannot be read, odd names, links, full disks",
        "the same command finishes it; the old folders never change",
    ),
    30: Fault(
        "a reading thread that fails or a reading process that is killed",
        "an error on that rank and a stop on all",
        "A killed reading process: there is none. Threads of each rank read, and who kills one kills the rank (row 1).",
    ),
}


KINDS = {
    "Processes": (1, 2, 3, 15, 16, 17, 20, 23, 24, 25, 30),
    "Data": (5, 6, 7, 28, 29),
    "Checkpoints": (4, 10, 11, 21, 22, 26),
    "Numbers": (12, 13, 14),
    "Machines and storage": (8, 9, 19),
    "Configs and security": (18, 27),
}
"""The rows by what they are about, as the page has them."""


class Mark(NamedTuple):
    """A test of a row.  test: path and name, as pytest calls them."""

    row: int
    how: str
    test: str


def read_marks(root: Path = ROOT) -> list[Mark]:
    """Every mark on every test, by row and test. Read from the text: nothing is imported."""
    found = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                    row, how = (ast.literal_eval(argument) for argument in decorator.args)
                    found.append(Mark(row, how, f"{path.relative_to(root).as_posix()}::{node.name}"))
    return sorted(found)


def render_page(marks: list[Mark], happened: dict[str, str], day: str) -> str:
    """The page.  happened: by test.  day: of the last run of any of them."""
    tests = {mark.test for mark in marks}
    lines = [
        "# Reliability: the faults that are injected",
        "",
        f"{len(tests)} tests of {len(ROWS)} rows, the last of them run at {day} on 2 CPU cores, no GPU.",
        "",
        "What goes wrong in a training run, what must happen then, how the tests make it go wrong, and what happened.",
        "Real processes train a tiny FLUX-Fill; `make soak` injects faults at random moments, as long as one likes.",
        "Written by `python -m tests.fault_matrix` from the tests that carry a row's mark.",
    ]
    for kind, rows in KINDS.items():
        lines += ["", f"## {kind}", "", "| # | fault | what must happen | how it is injected | what happened |"]
        lines.append("| --- | --- | --- | --- | --- |")
        for row in rows:
            lines += _render_row(row, [mark for mark in marks if mark.row == row], happened)
    return "\n".join([*lines, *render_soaks(SOAKS)]) + "\n"


def render_soaks(path: Path) -> Iterator[str]:
    """The section of the soaks whose results were kept, by `demo/soak.py --results`."""
    yield from ("", "## Soaks", "")
    yield "`make soak`, 60 steps a run, a checkpoint every 5, on a machine busy with other work. Each run must end with"
    yield "losses, weights and moments of one that nothing disturbed, or that was told beforehand what to pass over;"
    yield "where each start was another engine's, with losses and weights within 1e-5."
    yield ""
    yield _line("seed", "minutes", "starts", "faults", "steps lost: kills", "runs, and how far apart", "wrong")
    yield _line(*["---"] * 7)
    for text in path.read_text(encoding="utf-8").splitlines():
        soak = json.loads(text)
        lost: Counter[int] = Counter()
        for steps in soak["lost_by_kills"].values():
            lost.update({int(number): times for number, times in steps.items()})
        runs = [f"{run['run']} {run['apart']:.1e}" if run["apart"] else f"{run['run']} 0" for run in soak["runs"]]
        cells = (
            ", ".join(f"{times} {fault}" for fault, times in soak["faults"].items() if times),
            ", ".join(f"{steps}: {lost[steps]}" for steps in sorted(lost)) or "none",
            ", ".join(runs),
            "; ".join(soak["wrong"]) or "nothing",
        )
        yield _line(str(soak["seed"]), str(soak["minutes"]), str(soak["starts"]), *cells)


def _render_row(row: int, marks: list[Mark], happened: dict[str, str]) -> Iterator[str]:
    fault = ROWS[row]
    head = [str(row), fault.what, fault.must]
    for mark in marks:
        file, _, name = mark.test.partition("::")
        told = happened.get(mark.test, NOT_RUN)
        yield _line(*head, mark.how, f"{told}: [{name}](../{file})")
        head = ["", "", ""]
    if fault.why_not:
        yield _line(*head, "not injected here", fault.why_not)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


@cache
def read_page(path: Path = PAGE) -> dict[str, str]:
    """What happened in each test, as the page says; empty if there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    links = re.findall(r"\| ([^|]*): \[(\w+)\]\(\.\./([\w./]+)\) \|$", text, re.MULTILINE)
    return {f"{file}::{name}": told for told, name, file in links}


def read_day(path: Path = PAGE) -> str:
    """When any of them ran last, as the page says."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r", the last of them run at (\d{4}-\d\d-\d\d) on ", text)
    return found[1] if found is not None else NOT_RUN


class Results:
    """Of a run of pytest: what happened in each marked test, over all its cases."""

    def __init__(self, tests: set[str]) -> None:
        self._tests = tests
        self._cases: dict[str, dict[str, str]] = defaultdict(dict)
        self._told: dict[str, list[str]] = defaultdict(list)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if item.nodeid.partition("[")[0] not in self._tests]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, cases = report.nodeid.partition("[")[0], self._cases[report.nodeid.partition("[")[0]]
        if report.when == "call" or report.outcome != "passed":
            cases[report.nodeid] = report.outcome
            self._told[test] += [str(value) for name, value in report.user_properties if name == "happened"]

    def happened(self) -> Iterator[tuple[str, str]]:
        for test, cases in self._cases.items():
            outcomes = [outcome for outcome in ("failed", "skipped", "passed") if outcome in cases.values()]
            if outcomes:
                number = f" {len(cases)} cases" if len(cases) > 1 else ""
                yield test, "; ".join([f"{outcomes[0]}{number}", *dict.fromkeys(self._told[test])])


def main(arguments: list[str]) -> int:
    """Run the marked tests among those that the arguments choose, and write the page."""
    marks = read_marks()
    results = Results({mark.test for mark in marks})
    paths = (
        []
        if any(not argument.startswith("-") for argument in arguments)
        else sorted({mark.test.partition("::")[0] for mark in marks})
    )
    code = pytest.main(["-m", "not gpu and not slurm", *arguments, *paths], plugins=[results])
    PAGE.write_text(
        render_page(marks, read_page() | dict(results.happened()), date.today().isoformat()), encoding="utf-8"
    )
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
