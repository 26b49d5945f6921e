#!/usr/bin/env bash
# Pillow 13.0.0 with littlecms 2.19, numpy 2.4.6. Seconds to install.
# A colour transform with ImageCms' default flags is computed on a coarse grid and read off between its points, unless
# both profiles are plain RGB matrices. Dark colours are then far off, in 8 bits: a grey profile of gamma 1, one curve,
# loses half of its darkest levels' light, and Lab pixels are off by up to 12. Flags.NOOPTIMIZE gives the exact values.
# Seen:
#   gamma 1, levels 0 to 3   default [0, 6, 12, 19]   NOOPTIMIZE [0, 13, 22, 28]   sRGB's formula [0, 13, 22, 28]
#   Lab pixel 12 130 120     default (12, 15, 28)   NOOPTIMIZE (15, 15, 28)
#   40,000 Lab pixels        differ by up to 12 levels
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --no-deps --target packages pillow==13.0.0 numpy==2.4.6
PYTHONPATH=packages python3 - <<'PY'
import io
import struct
import sys

import numpy as np
from PIL import Image, ImageCms

curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 1 << 8) + bytes(2)  # gamma 1 as 8.8 fixed point
white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
tags = b"kTRC" + struct.pack(">II", 156, len(curve)) + b"wtpt" + struct.pack(">II", 156 + len(curve), len(white))
head = struct.pack(">I4xI4s4s4s12x4s28x3i48x", 156 + len(curve + white), 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp",
                   63190, 65536, 54061)
grey = ImageCms.ImageCmsProfile(io.BytesIO(head + struct.pack(">I", 2) + tags + curve + white))
lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")


def converted(profile, mode, pixels, flags):
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    transform = ImageCms.buildTransform(profile, srgb, mode, "RGB", renderingIntent=intent, flags=flags)
    picture = Image.merge(mode, [Image.fromarray(band[None]) for band in pixels.T])
    return np.asarray(transform.apply(picture))[0].astype(int)


flags = (ImageCms.Flags.NONE, ImageCms.Flags.NOOPTIMIZE)
levels = np.arange(4, dtype=np.uint8)[:, None]
light = levels[:, 0] / 255
formula = np.rint(255 * np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))
many = np.random.default_rng(0).integers((0, 112, 112), (256, 144, 144), (40_000, 3), dtype=np.uint8)
seen = {
    "gamma 1": [converted(grey, "L", levels, flag)[:, 0].tolist() for flag in flags],
    "Lab": [converted(lab, "LAB", np.array([[12, 130, 120]], np.uint8), flag)[0].tolist() for flag in flags],
    "off by": int(np.abs(np.subtract(*(converted(lab, "LAB", many, flag) for flag in flags))).max()),
}
print(seen, "formula:", formula.tolist())
expected = {"gamma 1": [[0, 6, 12, 19], [0, 13, 22, 28]], "Lab": [[12, 15, 28], [15, 15, 28]], "off by": 12}
sys.exit(seen != expected and f"changed: {expected} before")
PY
