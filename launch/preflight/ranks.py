"""A node's ranks of the all-reduce: started at once, as importing torch takes longest; killed at their deadline."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

from configs.supervision import stop_with_parent

_KEPT_LINES = 5  # of what a rank prints to standard error


class Ranks:
    """The ranks of one node, as processes."""

    def __init__(self, node: int, processes: int, environment: Mapping[str, str] | None = None) -> None:
        self._found: list[dict] = [
            {"rank": node * processes + local, "stage": "importing"} for local in range(processes)
        ]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "launch.preflight.all_reduce", str(found["rank"]), str(local)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={"OMP_NUM_THREADS": "1", **os.environ, **(environment or {})},
                preexec_fn=stop_with_parent,
            )
            for local, found in enumerate(self._found)
        ]
        self._readers = [
            threading.Thread(target=read, args=pair, daemon=True)
            for pair in zip(self._processes, self._found, strict=True)
            for read in (_read_stages, _read_errors)
        ]
        for reader in self._readers:
            reader.start()

    def run(self, go: Mapping, deadline: float) -> list[dict]:
        """How far each came until the deadline (of the monotonic clock): its rank, last stage, and figures."""
        for process in self._processes:
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(go) + "\n")
                process.stdin.flush()
            except BrokenPipeError:  # it has failed, and said so
                continue
        for process in self._processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                continue
        self.close()
        return self._found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join(5)


def _read_stages(process: "subprocess.Popen[str]", found: dict) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            told = json.loads(line)
        except ValueError:  # a library's own words
            continue
        if told["stage"] == "failed":  # beside the stage that it had come to
            found |= {"error": told["error"], "failed_after": told["failed_after"]}
        else:
            found.update(told)


def _read_errors(process: "subprocess.Popen[str]", found: dict) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        found["said"] = [*found.get("said", []), line.rstrip()][-_KEPT_LINES:]
