import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from data.storage import file_locks
from data.storage.file_locks import lock, require_file_locks, try_lock, unlock
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[3]

HOLDS = "import sys, data.storage.file_locks as f; h = open(sys.argv[1]); f.lock(h); print('held', flush=True); input()"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.touch()
    return path


def test_a_lock_ends_with_its_process(path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with path.open() as file:
        assert not try_lock(file) and not try_lock(file, shared=True)
        other.kill()
        other.communicate(timeout=PATIENCE)
        lock(file)


def test_a_shared_lock_lets_others_share(path):
    with path.open() as first, path.open() as second:
        assert try_lock(first, shared=True) and try_lock(second, shared=True)
        assert not try_lock(second)
        unlock(first)
        assert try_lock(second)


def test_a_system_without_locks_is_named(monkeypatch):
    require_file_locks("a cache")
    monkeypatch.setattr(file_locks, "fcntl", None)
    with pytest.raises(InputError, match="a cache needs file locks, which this system does not have"):
        require_file_locks("a cache")
