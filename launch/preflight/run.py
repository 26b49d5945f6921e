"""A preflight, on each node alike; the first one hears all and says what is wrong."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from configs.errors import InputError
from configs.supervision import FAILED, STOP_SIGNALS, STOPPED, exit_code
from launch.check.result import Check, ok
from launch.preflight.compare import Finding, absent_nodes, compare_reports, judge_ranks
from launch.preflight.exchange import Connection, Head
from launch.preflight.node import NodeReport, look_at_node
from launch.preflight.place import Place, own_name
from launch.preflight.ranks import Ranks
from launch.preflight.result import Result, conclude, write_result
from launch.slurm.allocation import interface_address


@dataclass(frozen=True)
class Patience:
    """Seconds until every node must have come, and have handed in its report (both since the head's start); then for
    ranks to meet, to be done, and to be heard of. A container may start later on one node than on another."""

    arrival: float = 60
    report: float = 75
    meeting: float = 20
    ranks: float = 30
    hearing: float = 10

    @property
    def answer(self) -> float:
        """Until the first node answers one that has told something: it waits for the slowest, and judges."""
        return max(self.report, self.meeting + self.ranks + self.hearing) + self.hearing


def run_preflight(
    config_path: str,
    overrides: Sequence[str],
    place: Place,
    file: Path | None,
    tell: Callable[[Finding], object],
    patience: Patience | None = None,
    clock: Callable[[], float] = time.time,
) -> int:
    """Look at this node, compare it with the others, and join the all-reduce; returns the exit code, alike on all.

    file: for the result, which the first node writes; None: nowhere.  tell: hears every finding, on the first node.
    clock: this node's.
    """
    wait = patience or Patience()
    if place.rank != 0:
        with _stopped_by_signals():
            return _take_part(config_path, overrides, place, place.head, place.port, wait, clock)
    head = Head("", place.port, clock, token=place.token)
    findings: list[Finding] = []
    results: list[Result] = []

    def judge() -> None:
        try:
            found, result = _judge(head, place, wait)
        except Exception as error:  # whatever another version of fluxfill reports: no node is to wait for ever
            what = f"the reports cannot be compared ({type(error).__name__}: {error})"
            found = [Finding(Check("nodes", "error", what, "Let all nodes use one copy of fluxfill."))]
            result = conclude(found)
            head.answer("report", None)
        findings.extend(found)
        results.append(result)
        head.answer("ranks", result.code)

    try:
        with _stopped_by_signals():
            judging = threading.Thread(target=judge, daemon=True)
            judging.start()
            own = replace(place, port=head.port)
            _take_part(config_path, overrides, own, "127.0.0.1", head.port, wait, clock)
            judging.join()
            head.wait_until_heard("ranks", 5)
    except SystemExit:
        if file is not None:
            write_result(file, Result(STOPPED, "preflight was told to stop"), [])
        raise
    finally:
        head.close()
    for finding in findings:
        tell(finding)
    if file is not None:
        write_result(file, results[0], findings)
    return results[0].code


def _take_part(
    config_path: str,
    overrides: Sequence[str],
    place: Place,
    host: str,
    port: int,
    patience: Patience,
    clock: Callable[[], float],
) -> int:
    ranks = Ranks(place.rank, place.processes)
    try:
        connection = Connection(place.rank, host, port, patience.arrival, patience.answer, token=place.token)
        connection.tell("hello", own_name())
        ahead = connection.clock_difference(clock)
        report = asdict(look_at_node(config_path, overrides, place))
        about = {"clock": ahead, "interface": _interface_of(connection.address)}
        go = connection.tell("report", report | about)
        found = ranks.run(go, time.monotonic() + patience.ranks) if go is not None else []
        return int(connection.tell("ranks", found))
    except (InputError, OSError) as error:
        print(f"{own_name()}: preflight: {error}", flush=True)
        return exit_code(error) if isinstance(error, InputError) else FAILED
    finally:
        ranks.close()


def _judge(head: Head, place: Place, patience: Patience) -> tuple[list[Finding], Result]:
    start = time.monotonic()
    present = head.wait("hello", place.count, start + patience.arrival)
    place = replace(place, names=tuple(present.get(node) or place.name(node) for node in range(place.count)))
    told = head.wait("report", len(present), start + patience.report)
    findings = absent_nodes(place, present, f"did not come within {patience.arrival:.0f} s: dead, or cut off")
    if late := present.keys() - told.keys():
        what = f"has not looked at its files and GPUs within {patience.report:.0f} s"
        if len(late) < place.count:
            findings += absent_nodes(place, dict.fromkeys(set(range(place.count)) - late), what)
        else:  # a slow disk of all: none is to be excluded
            cure = "Look at the disk that the cache and the model are on."
            findings.append(Finding(Check("nodes", "error", f"every node {what}", cure), hardware=True))
    reports = {node: _parse_report(report) for node, report in sorted(told.items())}
    findings += compare_reports(place, reports, {node: told[node]["clock"] for node in reports})
    if place.count > 1 and len(told) > 1:
        ways = ", ".join(dict.fromkeys(str(report["interface"]) for node, report in told.items() if node != 0))
        findings.append(Finding(ok("network", f"{len(told)} nodes reach {place.name(0)}, over {ways}")))
    lacking = any(finding.hardware for finding in findings if finding.check.state == "error")
    if len(told) < place.count or lacking:
        head.answer("report", None)
        findings.append(Finding(Check("all-reduce", "skipped", "not tried before every node is there with its GPUs")))
        return findings, conclude(findings)
    world = place.count * place.processes
    meet = place.head if place.count > 1 else "127.0.0.1"
    go = {"world": world, "processes": place.processes, "head": meet, "port": _free_port(), "seconds": patience.meeting}
    head.answer("report", go)
    ranks = head.wait("ranks", place.count, time.monotonic() + patience.ranks + patience.hearing)
    findings += absent_nodes(place, ranks, "nothing was heard of it during the all-reduce")
    if len(ranks) == place.count:
        findings += judge_ranks(place, dict(sorted(ranks.items())))
    return findings, conclude(findings)


def _parse_report(told: dict) -> NodeReport:
    checks = [Check(**check | {"found": tuple(check["found"])}) for check in told["checks"]]
    return NodeReport(checks, told["facts"], told["gpus"])


def _interface_of(address: str) -> str:
    """The network interface with an address; the address where none has it."""
    for _, name in socket.if_nameindex():
        try:
            if interface_address(name) == address:
                return name
        except InputError:  # it has no address
            continue
    return address


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SLURM's signals, and a person's, end a preflight as they would a run: it may start again."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(STOPPED)

    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
