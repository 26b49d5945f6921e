"""Tables of Markdown, and the conditions that results were measured under, in words."""

from collections.abc import Sequence
from typing import Any

Lines = Sequence[dict[str, Any]]
_OLD_KEYS = ("cores", "python", "numpy", "torch", "diffusers", "transformers")  # of results without conditions


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers to the right, but in the first column."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in [head, rule, *rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def conditions(lines: Lines) -> str:
    """One sentence for a file's results: those of its last line, which was measured last."""
    found = lines[-1].get("conditions")
    if found is None:
        known = [f"{key} {lines[-1][key]}" for key in _OLD_KEYS if key in lines[-1]]
        return f"Measured before machine, day and load were recorded{_in_brackets(known)}."
    known = [f"{key} {found[key]}" for key in _OLD_KEYS[1:] if key in found]
    known += [f"{key} {found[key]}" for key in ("accelerate", "peft", "deepspeed") if key in found]
    return (
        f"{found['date']}, {found['cores']} cores of {found['processor']}, {found['memory_gib']} GiB; load "
        f"{found['load'][0]} before, {found['load'][1]} at the end{_in_brackets(known)}."
    )


def _in_brackets(known: Sequence[str]) -> str:
    return f" ({', '.join(known)})" if known else ""
