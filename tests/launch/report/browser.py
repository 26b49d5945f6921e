"""Chromium, headless: a page as it is after its scripts ran."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.patience import PATIENCE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")


def dump(url: str, folder: Path, *options: str, width: int = 1280, dark: bool = False) -> str:
    """folder: for the browser's own files."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += [*options, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
