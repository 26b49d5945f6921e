import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.storage.processes import is_hidden, parent_of, process_start, this_place


def test_a_process_is_known_by_its_number_and_its_start():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert parent_of(child.pid) == os.getpid()
    assert process_start(child.pid) >= process_start(os.getpid()) > 0
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(child.pid) is None  # a zombie, which its parent has not asked for yet
    child.communicate()
    assert process_start(child.pid) is None and parent_of(child.pid) is None


@pytest.mark.parametrize("hidepid", [FileNotFoundError, PermissionError])
def test_a_process_that_proc_hides_is_no_dead_one(monkeypatch, hidepid):
    """Another user's, by hidepid 2 and 1."""

    def hide(path, *_, **__):
        raise hidepid(path)

    def refuse(pid, signal):
        if pid == os.getpid():
            raise PermissionError("another user's")
        raise ProcessLookupError

    assert not is_hidden(os.getpid())
    monkeypatch.setattr(Path, "read_text", hide)
    monkeypatch.setattr(os, "kill", refuse)
    assert process_start(os.getpid()) is None and parent_of(os.getpid()) is None
    assert is_hidden(os.getpid()) and not is_hidden(os.getpid() + 1)


def test_a_place_is_one_kernel_and_one_container():
    boot, _, namespace = this_place().partition("/")
    assert len(boot) == 36 and namespace.startswith("pid:[")
