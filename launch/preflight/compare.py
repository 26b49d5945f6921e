"""The reports of all nodes, compared: what is wrong, with which node, and whether it is the node's hardware."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launch.check.result import Check, State, ok
from launch.preflight.all_reduce import STAGES
from launch.preflight.node import HARDWARE, NodeReport
from launch.preflight.place import Place

_CLOCK_WARNING, _CLOCK_ERROR = 2.0, 300.0  # seconds; object stores refuse requests that are 15 minutes off
_SLOW = 2.0  # times the median
_AT_ONCE = 3.0  # seconds, within which failures belong together
_TELL = "Exclude the node (slurm.exclude), and tell who runs the cluster."


@dataclass(frozen=True)
class Finding:
    """Something that was found.  nodes: names of those it concerns; all of them if empty.  hardware: a run may start
    again, without the nodes that are named."""

    check: Check
    nodes: tuple[str, ...] = ()
    hardware: bool = False


def absent_nodes(place: Place, here: Mapping[int, object], what: str) -> list[Finding]:
    """An error for each node that is not `here`."""
    return [
        Finding(Check("nodes", "error", what, _TELL), (place.name(node),), hardware=True)
        for node in range(place.count)
        if node not in here
    ]


def compare_reports(place: Place, reports: Mapping[int, NodeReport], clocks: Mapping[int, float]) -> list[Finding]:
    """What the nodes have found, each thing once, with the nodes that it concerns."""
    have_gpus = any(report.gpus for report in reports.values())
    concerned: dict[Check, list[int]] = defaultdict(list)
    for node, report in reports.items():
        for check in report.checks:
            if check.name == "driver" and have_gpus:  # of the run's nodes this one has none
                check = Check("driver", "error", check.what, _TELL)
            concerned[check].append(node)
    findings = []
    for check, nodes in concerned.items():
        if check.state == "ok" and 0 not in nodes:
            continue  # the first node speaks for those where all is well
        # What all nodes find is the job's fault, not that of one of them.
        own = check.name in HARDWARE and (check.name == "gpus" or have_gpus)
        names = () if len(nodes) == place.count or check.state == "ok" else tuple(place.name(node) for node in nodes)
        hardware = check.state == "error" and own and (len(nodes) < place.count or place.count == 1)
        findings.append(Finding(check, names or _only_name(place, hardware), hardware))
    return [*findings, *_compare_facts(place, reports), *_compare_clocks(place, clocks)]


def _only_name(place: Place, hardware: bool) -> tuple[str, ...]:
    return (place.name(0),) if hardware else ()


def _compare_facts(place: Place, reports: Mapping[int, NodeReport]) -> Iterator[Finding]:
    names = list(dict.fromkeys(name for report in reports.values() for name in report.facts))
    differ = False
    for name in names:
        # A node that has no such fact has said why.
        values = {node: report.facts[name] for node, report in reports.items() if name in report.facts}
        usual, _ = Counter(values.values()).most_common(1)[0]
        for value in sorted(set(values.values()) - {usual}):
            nodes = tuple(place.name(node) for node in values if values[node] == value)
            cure = "Let all nodes use one environment and one copy of the files."
            yield Finding(Check("same", "error", f"{name} is {value}, elsewhere {usual}", cure), nodes)
            differ = True
    if not differ and len(reports) > 1:
        yield Finding(
            ok("same", f"config, manifest, commit and {len(names)} versions are alike on {len(reports)} nodes")
        )


def _compare_clocks(place: Place, clocks: Mapping[int, float]) -> Iterator[Finding]:
    """clocks: seconds that each node's is ahead of the first node's."""
    if len(clocks) < 2:
        return
    middle = statistics.median_low(clocks.values())
    wrong = False
    for node, ahead in clocks.items():
        off = ahead - middle
        if abs(off) > _CLOCK_WARNING:
            wrong = True
            what = f"the clock is {abs(off):,.1f} s {'ahead of' if off > 0 else 'behind'} the others'"
            state: State = "error" if abs(off) > _CLOCK_ERROR else "warning"
            yield Finding(Check("clocks", state, what, "Let it be set by NTP or chrony."), (place.name(node),))
    if not wrong:
        spread = max(clocks.values()) - min(clocks.values())
        yield Finding(ok("clocks", f"within {spread:.3f} s of each other"))


def judge_ranks(place: Place, ranks: Mapping[int, Sequence[Mapping]]) -> list[Finding]:
    """What the ranks of each node made of the all-reduce."""
    every = [rank for of_node in ranks.values() for rank in of_node]
    if broken := {node: of_node for node, of_node in ranks.items() if any(not _is_done(rank) for rank in of_node)}:
        return _name_the_broken(place, broken)
    world, slowest = len(every), max(rank["all_reduce_seconds"] for rank in every)
    rate = min(rank["gigabytes_per_second"] for rank in every)
    if world == 1:  # nothing was exchanged
        return []
    what = f"64 MiB between {world} ranks in {slowest:.3g} s, {rate:.3g} GB/s"
    network = next((rank["network"] for rank in every if rank.get("network")), None)
    what += f"; {network}" if network else ""
    return [Finding(ok("all-reduce", what)), *_name_slow_gpus(place, ranks), *_name_slow_links(place, ranks)]


def _is_done(rank: Mapping) -> bool:
    return rank["stage"] == "done" and "error" not in rank


def _name_the_broken(place: Place, broken: Mapping[int, Sequence[Mapping]]) -> list[Finding]:
    """The nodes that came least far, and of those the ones that failed first or said nothing: what the others say after
    it follows from it."""
    reached = {node: min(STAGES.index(rank["stage"]) for rank in of_node) for node, of_node in broken.items()}
    behind = [node for node in broken if reached[node] == min(reached.values())]
    times = {node: [rank["failed_after"] for rank in broken[node] if "error" in rank] for node in behind}
    silent = [node for node in behind if not times[node]]
    if silent and reached[silent[0]] == 0 and len(silent) == place.count:
        what = "torch is still being imported everywhere: the network was not tried"
        return [
            Finding(Check("all-reduce", "warning", what, "Put the environment on a faster disk, or in a container."))
        ]
    soonest = min((min(found) for found in times.values() if found), default=0.0)
    first = silent or [node for node in behind if min(times[node]) <= soonest + _AT_ONCE]
    findings = []
    for node in first:
        worst = next(
            (rank for rank in broken[node] if "error" in rank),
            min(broken[node], key=lambda rank: STAGES.index(rank["stage"])),
        )
        what = f"rank {worst['rank']} came to {worst['stage']!r}: {worst.get('error', 'no more was heard of it')}"
        check = Check("all-reduce", "error", what, _TELL, tuple(worst.get("said", ())))
        hardware = len(first) < place.count or place.count == 1  # of one node alone it cannot be told
        findings.append(Finding(check, (place.name(node),), hardware))
    return findings


def _name_slow_gpus(place: Place, ranks: Mapping[int, Sequence[Mapping]]) -> Iterator[Finding]:
    usual = statistics.median_low(rank["product_seconds"] for of_node in ranks.values() for rank in of_node)
    for node, of_node in ranks.items():
        slow = [rank for rank in of_node if rank.get("gpu") and rank["product_seconds"] > _SLOW * usual]
        for rank in slow:
            what = f"the GPU of rank {rank['rank']} takes {rank['product_seconds'] / usual:.1f} times as long as others"
            yield Finding(Check("speed", "warning", what, _TELL), (place.name(node),))


def _name_slow_links(place: Place, ranks: Mapping[int, Sequence[Mapping]]) -> Iterator[Finding]:
    """A node whose links are slow to both sides; of fewer than four nodes the ring does not tell which."""
    if place.count < 4:
        return
    times = {node: max(rank["ring_seconds"] for rank in of_node) for node, of_node in ranks.items()}
    usual = statistics.median_low(times.values())
    for node in times:
        around = [times[(node + step) % place.count] for step in (-1, 0, 1)]
        if min(around) > _SLOW * usual:
            what = f"passing data on takes {times[node] / usual:.1f} times as long as elsewhere"
            yield Finding(Check("speed", "warning", what, _TELL), (place.name(node),))
