#!/usr/bin/env bash
# Pillow 13.0.0, tifffile 2026.3.3, numpy 2.4.6. Seconds to install.
# A grey TIFF may store white as 0 (PhotometricInterpretation 0). Pillow turns such pictures round at 1, 4 and 8 bits
# per sample, and leaves those of 16 bits as they are stored, so the same picture comes out as its negative.
# Seen: stored 0 at every pixel, white -> 1 bit True   8 bits 255   16 bits 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --no-deps --target packages pillow==13.0.0 numpy==2.4.6 tifffile==2026.3.3
PYTHONPATH=packages python3 - <<'PY'
import sys

import numpy as np
import tifffile
from PIL import Image

seen = {}
for kind in (np.bool_, np.uint8, np.uint16):
    path, white = f"{kind.__name__}.tif", np.zeros((4, 8), kind)
    tifffile.imwrite(path, white, photometric="miniswhite", byteorder="<", metadata=None)
    with Image.open(path) as opened:
        seen[kind.__name__] = (opened.mode, np.asarray(opened).max().item())
print(seen)
expected = {"bool": ("1", True), "uint8": ("L", 255), "uint16": ("I;16", 0)}
sys.exit(seen != expected and f"changed: {expected} before")
PY
