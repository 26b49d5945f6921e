import logging
import os
import time

from trainer.engines.build_lock import clear_stale_build_locks


def test_only_locks_older_than_any_build_are_removed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)  # a run in this process may have cut it off
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, fresh = tmp_path / "py311_cpu" / "shm" / "lock", tmp_path / "fused" / "lock"
    for lock in (stale, fresh):
        lock.parent.mkdir(parents=True)
        lock.touch()
    an_hour_ago = time.time() - 3600
    os.utime(stale, (an_hour_ago, an_hour_ago))
    assert clear_stale_build_locks() == [stale]
    assert not stale.exists()
    assert fresh.exists()
    assert "left 60 minutes ago by a build that did not finish" in caplog.text
