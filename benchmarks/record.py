"""A result of a benchmark, and what it was measured under: a JSON line."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "deepspeed")
_LOAD_BEFORE = os.getloadavg()[0]


def add_result(line: dict[str, Any], out: Path | None) -> None:
    """Print a result with its conditions, and append it to a file."""
    text = json.dumps(line | {"conditions": conditions()})
    print(text, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def conditions() -> dict[str, Any]:
    """The machine, the time, the packages, and how many processes waited for a core: before the benchmark, and now
    (which counts its own)."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": [round(_LOAD_BEFORE, 1), round(os.getloadavg()[0], 1)],
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := _version(package)) is not None},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
