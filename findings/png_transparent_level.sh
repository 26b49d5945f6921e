#!/usr/bin/env bash
# Pillow 13.0.0. Seconds to install.
# A grey PNG may name one level as transparent (tRNS), counted as its pixels are: 0 to 3 at 2 bits, 0 to 15 at 4.
# Pillow spreads the pixels of 2 and 4 bits to 0..255 but not info["transparency"], so convert("LA") finds no pixel of
# that level: all are opaque. At 8 bits the same level works.
# Seen, pixels 0, 1, 2, 3 of which 1 is transparent, as (grey, alpha):
#   2 bits [(0, 255), (85, 255), (170, 255), (255, 255)]   4 bits [(0, 255), (17, 255), (34, 255), (51, 255)]
#   8 bits [(0, 255), (1, 0), (2, 255), (3, 255)]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --no-deps --target packages pillow==13.0.0
PYTHONPATH=packages python3 - <<'PY'
import io
import struct
import sys
import zlib

from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pixels(bits, line):
    """The four pixels of a one-line grey PNG whose level 1 is transparent."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0))
    body = chunk(b"tRNS", struct.pack(">H", 1)) + chunk(b"IDAT", zlib.compress(b"\0" + line)) + chunk(b"IEND", b"")
    picture = Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + body)).convert("LA")
    return [picture.getpixel((x, 0)) for x in range(4)]


seen = {2: pixels(2, b"\x1b"), 4: pixels(4, b"\x01\x23"), 8: pixels(8, b"\0\1\2\3")}
print(seen)
expected = {
    2: [(0, 255), (85, 255), (170, 255), (255, 255)],
    4: [(0, 255), (17, 255), (34, 255), (51, 255)],
    8: [(0, 255), (1, 0), (2, 255), (3, 255)],
}
sys.exit(seen != expected and f"changed: {expected} before")
PY
