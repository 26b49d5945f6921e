"""preflight.json in a run's folder: the end of a preflight, by which a job decides what comes next."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.errors import InputError
from configs.supervision import BAD_INPUT, FAILED
from data.storage.atomic_write import write_text_atomically
from launch.preflight.compare import Finding


@dataclass(frozen=True)
class Result:
    """code: 0; 2, which a restart would not change; 1, which one without `bad_nodes` may; 75, told to stop."""

    code: int
    reason: str
    bad_nodes: tuple[str, ...] = ()


def result_file(run: Path) -> Path:
    """The preflight.json of a run's folder."""
    return run / "slurm" / "preflight.json"


def conclude(findings: Sequence[Finding]) -> Result:
    """The result of what was found."""
    errors = [finding for finding in findings if finding.check.state == "error"]
    if not errors:
        return Result(0, "preflight found nothing wrong")
    bad = tuple(sorted({node for finding in errors if finding.hardware for node in finding.nodes}))
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    reason = f"preflight: {_with_nodes(first)}{more}"
    if all(finding.hardware for finding in errors):
        return Result(FAILED, reason, bad)
    return Result(BAD_INPUT, reason, bad)


def _with_nodes(finding: Finding) -> str:
    where = f"{', '.join(finding.nodes)}: " if finding.nodes else ""
    return f"{where}{finding.check.what}"


def write_result(file: Path, result: Result, findings: Sequence[Finding]) -> None:
    """Raises InputError if it cannot be written, as the run itself could not."""
    told = {"result": asdict(result), "findings": [asdict(finding) for finding in findings]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(told, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}). Point run.dir elsewhere.") from error


def read_result(file: Path) -> Result | None:
    """None where no preflight has come to an end."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))["result"]
        return Result(int(told["code"]), str(told["reason"]), tuple(told["bad_nodes"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
