"""A launcher of the ranks without what it prints of their end: they say why themselves, and the last line repeats it.

    python -P -m launch.without_traceback accelerate.commands.launch ...

torch's launcher logs the first rank that ended, and accelerate's ends with some thirty lines of its own stack, whatever
the ranks' exit codes mean. What a rank cannot say itself, that a signal ended it, is said here in one line. With
$LOGLEVEL set, torch's log is as it is.
"""

import logging
import os
import runpy
import signal
import sys
from subprocess import CalledProcessError

from configs.supervision import ALREADY_RUNNING, BAD_INPUT, FAILED, STOPPED

_TOLD_BY_RANKS = (FAILED, BAD_INPUT, ALREADY_RUNNING, STOPPED)
_LOGS_OF_ENDS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


def main() -> int:
    """MODULE [ARGUMENTS ...]: run it as `python -m` does; returns the exit code."""
    del sys.argv[0]
    if "LOGLEVEL" not in os.environ:
        for name in _LOGS_OF_ENDS:
            logging.getLogger(name).disabled = True
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except CalledProcessError as error:  # accelerate's own launcher, of one process
        _tell_if_silent("the trainer", error.returncode)
    except Exception as error:
        match type(error).__name__:  # torch's, which is not imported here
            case "ChildFailedError":
                for rank, failure in error.failures.items():  # type: ignore[attr-defined]
                    _tell_if_silent(f"rank {rank} (process {failure.pid})", failure.exitcode)
            case "SignalException":  # the launcher was told to stop, and has ended the ranks
                pass
            case _:
                raise
    else:
        return 0
    return FAILED


def _tell_if_silent(who: str, code: int) -> None:
    """A line on how a process ended, if it cannot have said so itself."""
    if code == -signal.SIGTERM:  # by the launcher: another rank had ended
        return
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        print(f"fluxfill: {who} was ended by {names.get(-code, f'signal {-code}')}", file=sys.stderr, flush=True)
    elif code not in _TOLD_BY_RANKS:
        print(f"fluxfill: {who} ended with code {code}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
