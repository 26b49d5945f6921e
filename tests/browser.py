"""Chromium, headless: a page as it is after its scripts ran."""

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.patience import PATIENCE

# What it does by itself asks for hosts that a test has no business with; a container's /dev/shm may hold 64 MB.
_QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *_QUIET)


@functools.cache
def _chromium() -> str:
    """Its path; skips the test where there is none that starts (chromium-browser may be a snap's stub)."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    pytest.skip("no Chromium is installed (apt-get install chromium)")


def dump(url: str, folder: Path, *options: str, width: int = 1280, dark: bool = False) -> str:
    """folder: for the browser's own files."""
    command = [_chromium(), *_OPTIONS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", *options, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
