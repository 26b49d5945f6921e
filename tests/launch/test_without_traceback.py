import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from launch import without_traceback

KILLED = "fluxfill: rank 1 (process 4711) was ended by SIGKILL"


def run(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> int:
    """What becomes of a launcher that ends so."""

    def end(*_: object, **__: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("runpy.run_module", end)
    monkeypatch.setattr(sys, "argv", ["program", "module", "--option"])
    return without_traceback.main()


def ranks_that_ended(*codes: int) -> ChildFailedError:
    failures = {rank: ProcessFailure(rank, 4710 + rank, code, "no file") for rank, code in enumerate(codes)}
    return ChildFailedError("main.py", failures)


@pytest.mark.parametrize(
    "error, told",
    [
        (ranks_that_ended(2, 2), []),
        (ranks_that_ended(75), []),
        (ranks_that_ended(1, -signal.SIGKILL), [KILLED]),
        (ranks_that_ended(-signal.SIGTERM, -signal.SIGKILL), [KILLED]),
        (ranks_that_ended(66), ["fluxfill: rank 0 (process 4710) ended with code 66"]),
        (ranks_that_ended(-36), ["fluxfill: rank 0 (process 4710) was ended by signal 36"]),
        (subprocess.CalledProcessError(2, "main.py"), []),
        (subprocess.CalledProcessError(-signal.SIGSEGV, "main.py"), ["fluxfill: the trainer was ended by SIGSEGV"]),
        (SignalException("told to stop", sigval=signal.SIGTERM), []),
    ],
)
def test_of_ranks_that_ended_only_what_they_cannot_say_is_told(monkeypatch, capsys, error, told):
    assert run(monkeypatch, error) == 1
    assert capsys.readouterr().err.splitlines() == told


def test_an_error_of_the_launcher_itself_keeps_its_traceback_and_an_end_without_one_is_0(monkeypatch):
    assert run(monkeypatch, None) == 0
    with pytest.raises(ConnectionError):
        run(monkeypatch, ConnectionError("no rank 0 at 10.0.0.1"))


def test_it_runs_a_module_as_python_does(tmp_path: Path):
    (tmp_path / "shown.py").write_text("import sys\nprint(__name__, sys.argv[1:])\nsys.exit(7)\n")
    line = [sys.executable, "-m", "launch.without_traceback", "shown", "--config", "a b"]
    root = Path(without_traceback.__file__).parents[1]
    done = subprocess.run(line, cwd=root, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("__main__ ['--config', 'a b']\n", 7), done.stderr
