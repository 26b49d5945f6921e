#!/usr/bin/env bash
# Pillow 13.0.0, the wheel for Linux (manylinux, x86_64 or aarch64). Seconds to install.
# The wheel brings its own libjpeg, libpng, libtiff and others in pillow.libs, but no zlib: manylinux leaves libz.so.1 to
# the system. Pillow is compiled with zlib-ng and reports that, and PNGs are inflated and deflated by whatever libz the
# system has, here the classic zlib, which is slower.
# Seen on Debian 12:
#   no libz in pillow.libs, libz.so.1 from the system's folders
#   "ZLIB (PNG/ZIP) support ok, loaded 1.2.13, compiled for zlib-ng 2.3.3"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --no-deps --only-binary :all: --target packages pillow==13.0.0
PYTHONPATH=packages python3 - <<'PY'
import io
import os
import sys
from pathlib import Path

from PIL import Image, features

Image.new("RGB", (8, 8)).save(io.BytesIO(), "PNG")
report = io.StringIO()
features.pilinfo(report, supported_formats=False)
print(*[line for line in report.getvalue().splitlines() if "ZLIB" in line])
own = sorted(path.name for path in Path("packages/pillow.libs").iterdir() if path.name.startswith("libz."))
mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libz." in line}
print(f"in pillow.libs: {own}; loaded: {sorted(mapped)}")
from_system = bool(mapped) and not any(path.startswith(os.getcwd()) for path in mapped)
seen = (own, from_system, "zlib-ng" in report.getvalue())
sys.exit(seen != ([], True, True) and "changed")
PY
