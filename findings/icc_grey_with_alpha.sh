#!/usr/bin/env bash
# Pillow 13.0.0 with littlecms 2.19. Seconds to install.
# ImageCms takes a picture of mode LA with a grey profile, says nothing, and returns other pixels: it reads one byte a
# pixel, as of mode L, where LA holds four (grey, grey, grey, alpha). Pixel n of a row gets byte n, so every fourth is
# the opacity of one, and three quarters of the row are never read.
# Seen: four opaque pixels of grey 100, 130, 160, 190, by a profile of gamma 2.2
#   as L -> [100, 131, 161, 191]   as LA -> [100, 100, 100, 255]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --no-deps --target packages pillow==13.0.0
PYTHONPATH=packages python3 - <<'PY'
import io
import struct
import sys

from PIL import Image, ImageCms

curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 563) + bytes(2)  # gamma 2.2 as 8.8 fixed point
white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
tags = b"kTRC" + struct.pack(">II", 156, len(curve)) + b"wtpt" + struct.pack(">II", 156 + len(curve), len(white))
head = struct.pack(">I4xI4s4s4s12x4s28x3i48x", 156 + len(curve + white), 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp",
                   63190, 65536, 54061)
grey = ImageCms.ImageCmsProfile(io.BytesIO(head + struct.pack(">I", 2) + tags + curve + white))
seen = {}
for mode in ("L", "LA"):
    picture = Image.new(mode, (4, 1))
    picture.putdata([(level, 255) if mode == "LA" else level for level in (100, 130, 160, 190)])
    rgb = ImageCms.profileToProfile(picture, grey, ImageCms.createProfile("sRGB"), outputMode="RGB")
    seen[mode] = [rgb.getpixel((x, 0))[0] for x in range(4)]
print(seen)
sys.exit(seen != {"L": [100, 131, 161, 191], "LA": [100, 100, 100, 255]} and "changed")
PY
