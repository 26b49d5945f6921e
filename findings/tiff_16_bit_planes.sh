#!/usr/bin/env bash
# Pillow 13.0.0, tifffile 2026.3.3, numpy 2.4.6. Seconds to install.
# An uncompressed RGB TIFF of 16 bits per sample whose colours lie in planes of their own (PlanarConfiguration 2) opens
# without a word as mode RGB, and its pixels are the single bytes of the samples: low byte, high byte, low byte. The
# first half of each plane fills the whole picture. With TiffImagePlugin.READ_LIBTIFF = True, or from the same samples
# laid out pixel by pixel, Pillow gives the high bytes.
# Seen (red plane, stored 0, 15000, 30000, 45000, as 8 bits 0, 58, 117, 175):
#   planes [0, 0, 152, 58]   planes by libtiff [0, 58, 117, 175]   pixel by pixel [0, 58, 117, 175]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --no-deps --target packages pillow==13.0.0 numpy==2.4.6 tifffile==2026.3.3
PYTHONPATH=packages python3 - <<'PY'
import sys

import numpy as np
import tifffile
from PIL import Image, TiffImagePlugin

picture = np.arange(12, dtype=np.uint16).reshape(2, 2, 3) * 5000
planes = np.moveaxis(picture, -1, 0)
tifffile.imwrite("planes.tif", planes, photometric="rgb", planarconfig="separate", byteorder="<", metadata=None)
tifffile.imwrite("pixels.tif", picture, photometric="rgb", planarconfig="contig", byteorder="<", metadata=None)
assert (tifffile.imread("planes.tif") == planes).all()


def red(path, *, by_libtiff=False):
    TiffImagePlugin.READ_LIBTIFF = by_libtiff
    with Image.open(path) as opened:
        return np.asarray(opened)[..., 0].reshape(-1).tolist()


seen = [red("planes.tif"), red("planes.tif", by_libtiff=True), red("pixels.tif")]
for name, levels in zip(("planes", "planes by libtiff", "pixel by pixel"), seen, strict=True):
    print(f"{name}: {levels}")
sys.exit(seen != [[0, 0, 152, 58], [0, 58, 117, 175], [0, 58, 117, 175]] and "changed")
PY
