"""Stale locks of torch's extension builds: one that was killed leaves its lock, and torch waits for it for ever."""

import logging
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger("fluxfill")

STALE_SECONDS = 15 * 60  # DeepSpeed's own extension takes one minute to build


def clear_stale_build_locks(*, stale_seconds: float = STALE_SECONDS) -> list[Path]:
    """Remove the locks that are older than any build takes; returns them, and logs each."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    cleared = []
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        try:
            age = time.time() - lock.stat().st_mtime
            if age > stale_seconds:
                lock.unlink()
                cleared.append(lock)
                log.warning("%s: removed, left %.0f minutes ago by a build that did not finish", lock, age / 60)
        except FileNotFoundError:  # another rank was quicker, or the build has just finished
            continue
    return cleared
