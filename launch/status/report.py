"""The report of runs: a page for one, a table for many, or JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from data.sources.problems import printable
from launch.status.run import RunStatus
from launch.status.worries import size, span

_STYLES = {
    "running": "green",
    "finished": "bold green",
    "starting": "cyan",
    "waiting": "cyan",
    "stopped": "yellow",
    "silent": "bold red",
    "failed": "bold red",
    "refused": "bold red",
    "unknown": "dim",
}
_RESTARTS_SHOWN = 5


def render_json(found: Sequence[tuple[RunStatus, Sequence[str]]]) -> str:
    """Runs with their warnings."""
    return json.dumps([asdict(status) | {"warnings": list(worries)} for status, worries in found], indent=2)


def render_page(status: RunStatus, worries: Sequence[str]) -> RenderableType:
    """All that is known of one run."""
    head = Text.assemble(
        (printable(status.name), "bold"), "  ", (status.state, _STYLES[status.state]), f"  {printable(status.run)}"
    )
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(no_wrap=True, style="dim")
    rows.add_column(overflow="fold")
    for name, text in _figures(status):
        rows.add_row(f"  {name}", Text(printable(text)))
    for worry in worries:
        rows.add_row(Text("  warning", style="not dim yellow"), Text(printable(worry), style="yellow"))
    return Group(head, rows)


def _figures(status: RunStatus) -> list[tuple[str, str]]:
    """(name, figure) of each line of the page."""
    rows = [("why", status.reason)] if status.reason else []
    rows.append(("step", _step(status) or "none yet"))
    if status.loss is not None:
        rows.append(("loss", f"{status.loss:.4f}, mean of the last {status.averaged} steps"))
    if status.seconds_per_step is not None:
        left = f", about {span(status.seconds_left)} left" if status.seconds_left else ""
        rows.append(("speed", f"{status.seconds_per_step:.3g} s a step{left}"))
    if status.validation is not None:
        rows.append(("validation", _validation(status)))
    if saved := status.checkpoint:
        rows.append(("checkpoint", f"step {saved.step:,}, {size(saved.bytes)}, {span(saved.age_seconds)} ago"))
    elif status.step is not None:
        rows.append(("checkpoint", "none yet"))
    if slowest := status.slowest_rank:
        waits = f"waits {slowest.wait_seconds:.3g} s a step for data (median {slowest.median_seconds:.3g} s)"
        rows.append(("slowest rank", f"{slowest.rank}, {waits}"))
    if forward := status.slowest_forward:
        takes = f"takes {forward.seconds:.3g} s a step for forward passes (median {forward.median_seconds:.3g} s)"
        rows.append(("", f"{forward.rank}, {takes}"))
    if status.job is not None:
        on = f" on {status.job.nodes}" if status.job.nodes else ", not begun"
        rows.append(("job", f"{status.job.job}{on}"))
    if status.resumed or status.restarts:
        rows.append(("restarts", f"{max(status.resumed, len(status.restarts))}"))
    for restart in status.restarts[-_RESTARTS_SHOWN:]:
        rows.append(("", f"at step {restart.step:,}: {restart.reason}"))
    return rows


def _validation(status: RunStatus) -> str:
    told = status.validation
    assert told is not None
    untrained = f", untrained {told.untrained:.2f}" if told.untrained is not None else ""
    best = f", best {told.best:.2f} at step {told.best_step:,}" if told.best is not None else ""
    score = f"{told.hole_psnr:.2f} dB" if told.hole_psnr is not None else "not finite"
    return f"hole {score} at step {told.step:,}{untrained}{best}"


def _step(status: RunStatus) -> str:
    if status.step is None:
        return ""
    if not status.steps:
        return f"{status.step:,}"
    return f"{status.step:,} of {status.steps:,} ({status.step / status.steps:.0%})"


def render_table(found: Sequence[tuple[RunStatus, Sequence[str]]]) -> RenderableType:
    """A line for each run; its warnings are counted."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", overflow="fold", min_width=12)  # the one that gives way on a narrow screen
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "s/step", "left", "saved", "hole dB", "!"):
        table.add_column(name, justify="right", no_wrap=True)
    for status, worries in found:
        score = status.validation.hole_psnr if status.validation else None
        table.add_row(
            Text(printable(status.name)),
            Text(status.state, style=_STYLES[status.state]),
            "" if status.step is None else f"{status.step}/{status.steps or '?'}",
            "" if status.loss is None else f"{status.loss:.3f}",
            "" if status.seconds_per_step is None else f"{status.seconds_per_step:.3g}",
            "" if not status.seconds_left else _short_span(status.seconds_left),
            "" if status.checkpoint is None else _short_span(status.checkpoint.age_seconds),
            "" if score is None else f"{score:.1f}",
            Text(str(len(worries)) if worries else "", style="yellow"),
        )
    return table


def _short_span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.2g} {unit}" if unit != "min" else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
