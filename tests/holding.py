"""Holding a started program where a test wants it, and its preflight patient: hold/sitecustomize.py says how."""

from pathlib import Path

HOLD = Path(__file__).parent / "hold"  # for PYTHONPATH


def go_file(run: Path) -> Path:
    """Where a test says that a run may go on: beside its folder, which need not be there yet."""
    return run.with_name(f"{run.name}.go")


def held_file(run: Path) -> Path:
    """There while a process of the run is held."""
    return Path(f"{go_file(run)}.held")
