"""The report of the checks: a line each as they are made, a count at the end; or JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.sources.problems import printable
from launch.check.result import Check

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red", "skipped": "dim"}
_STATE_WIDTH, _NAME_WIDTH = 7, 15
_SHOWN = 10  # things found; --json has all


def print_check(console: Console, check: Check) -> None:
    """One check: its state, its subject and what was found, wrapped under itself on a terminal; in a log one line, so
    that a search finds it. What to do, and the single things where something is wrong, stand below."""
    text = Text(printable(check.what))
    below = [f"{printable(line)}" for line in check.found[:_SHOWN]] if check.state in ("warning", "error") else []
    if below and len(check.found) > _SHOWN:
        below.append(f"... and {len(check.found) - _SHOWN} more, which --json lists")
    for line in below:
        text.append(f"\n  {line}")
    if check.cure:
        text.append(f"\n{printable(check.cure)}", style="cyan")
    state = Text(check.state, style=_STYLES[check.state])
    if console.is_terminal:
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=_STATE_WIDTH)
        row.add_column(width=_NAME_WIDTH)
        row.add_column(overflow="fold")
        row.add_row(state, check.name, text)
        console.print(row)
        return
    margin = " " * (_STATE_WIDTH + 2 + _NAME_WIDTH + 2)
    first = f"{check.state:<{_STATE_WIDTH}}  {check.name:<{_NAME_WIDTH}}  "
    console.print(Text(first + text.plain.replace("\n", f"\n{margin}")), soft_wrap=True)


def count_states(checks: Sequence[Check]) -> str:
    """ "3 errors, 1 warning": what is to be mended, or that nothing is."""
    counts = Counter(check.state for check in checks)
    named = [f"{counts[state]} {state}{'s' * (counts[state] != 1)}" for state in ("error", "warning") if counts[state]]
    return ", ".join(named) or "all is right"


def render_json(checks: Sequence[Check]) -> str:
    """{"checks": [{name, state, what, cure, found}], "errors": 3, "warnings": 1}."""
    counts = Counter(check.state for check in checks)
    told = {
        "checks": [asdict(check) for check in checks],
        "errors": counts["error"],
        "warnings": counts["warning"],
    }
    return json.dumps(told, indent=2, ensure_ascii=False)
