"""The last word under a plain `accelerate launch`: the reason for the end, below the launcher's own traceback.

Imports nothing heavy: it is in force before torch is imported.
"""

import os
import subprocess
import sys

_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # variables by which they are known
# Waits for the end of a process, a minute at most, and prints what it was given.
_SCRIPT = """
import contextlib, os, select, sys
reason = sys.stdin.read()
with contextlib.suppress(OSError):
    select.select([os.pidfd_open(int(sys.argv[1]))], [], [], 60)
print(reason, file=sys.stderr)
"""


def repeat_behind_launcher(reason: str) -> None:
    """Print a reason once more as soon as this process's launcher has ended, from a process of its own.

    `fluxfill train` does it itself; without a launcher, or where the kernel does not tell of an end, nothing is done.
    """
    if "FLUXFILL_OUTCOME" in os.environ or not any(name in os.environ for name in _LAUNCHERS):
        return
    if hasattr(os, "pidfd_open"):
        line = [sys.executable, "-I", "-S", "-c", _SCRIPT, str(os.getppid())]
        with subprocess.Popen(line, stdin=subprocess.PIPE, text=True, start_new_session=True) as speaker:
            assert speaker.stdin is not None
            speaker.stdin.write(reason)
            speaker.stdin.close()
            speaker.returncode = 0  # nobody waits for it: it outlives this process
