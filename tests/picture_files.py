"""Pictures written by the formats' own definitions: PNGs, TIFFs and colour profiles of any layout."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

# --- PNG --------------------------------------------------------------------------------------------------------------

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    samples: np.ndarray, colour_type: int, bits: int, *, chunks: Sequence[bytes] = (), interlaced: bool = False
) -> bytes:
    """samples: [H, W, channels], below 2^bits.  chunks: what stands between header and pixels."""
    height, width, _ = samples.shape
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    lines = b"".join(
        b"\0" + _png_line(line, bits)
        for top, left, down, right in passes
        for line in samples[top::down, left::right]
        if line.size
    )
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, int(interlaced))
    body = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(lines)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def _png_line(line: np.ndarray, bits: int) -> bytes:
    values = line.reshape(-1)
    if bits >= 8:
        return values.astype(f">u{bits // 8}").tobytes()
    planes = values[:, None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(planes.astype(np.uint8)).tobytes()


def png_profile(profile: bytes) -> bytes:
    return png_chunk(b"iCCP", b"any\0\0" + zlib.compress(profile))


# --- TIFF -------------------------------------------------------------------------------------------------------------

_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 5: "I"}


def tiff(tags: dict[int, tuple[int, list[int]]], data: bytes, order: str = "<") -> bytes:
    """One uncompressed strip. tags: code -> (type, values) beside those of the strip; order: "<" or ">"."""
    tags = {**tags, 273: (4, [0]), 279: (4, [len(data)])}
    packed = {code: struct.pack(f"{order}{len(v)}{_TIFF_TYPES[kind]}", *v) for code, (kind, v) in tags.items()}
    end = 8 + 2 + 12 * len(tags) + 4
    long = {code: value + b"\0" * (len(value) % 2) for code, value in sorted(packed.items()) if len(value) > 4}
    packed[273] = struct.pack(order + "I", end + sum(map(len, long.values())))
    entries = b""
    for code, (kind, values) in sorted(tags.items()):
        count = len(values) // 2 if kind == 5 else len(values)
        entries += struct.pack(order + "HHI", code, kind, count)
        if code in long:
            entries += struct.pack(order + "I", end)
            end += len(long[code])
        else:
            entries += packed[code].ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return head + entries + bytes(4) + b"".join(long.values()) + data


def tiff_tags(
    width: int, height: int, *, samples: int = 1, bits: int = 8, photometric: int = 1
) -> dict[int, tuple[int, list[int]]]:
    return {
        256: (3, [width]),
        257: (3, [height]),
        258: (3, [bits] * samples),
        259: (3, [1]),
        262: (3, [photometric]),
        277: (3, [samples]),
        278: (3, [height]),
    }


# --- colour profiles --------------------------------------------------------------------------------------------------

SRGB_PRIMARIES = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3_PRIMARIES = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_PRIMARIES = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
PROPHOTO_PRIMARIES = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
D65, D50 = (0.3127, 0.3290), (0.3457, 0.3585)
D50_XYZ = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_xyz(primaries: Sequence[tuple[float, float]], white: tuple[float, float]) -> np.ndarray:
    """Linear RGB -> XYZ under D50, [3, 3]: the definition of the primaries, adapted after Bradford."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T
    x, y = white
    white_xyz = np.array([x / y, 1.0, (1 - x - y) / y])
    matrix = columns * np.linalg.solve(columns, white_xyz)
    cones = _BRADFORD @ D50_XYZ / (_BRADFORD @ white_xyz)
    return np.linalg.inv(_BRADFORD) @ np.diag(cones) @ _BRADFORD @ matrix


def to_srgb_levels(xyz: np.ndarray) -> np.ndarray:
    """XYZ under D50, [..., 3] -> levels of sRGB, 0 to 255, not rounded."""
    linear = np.clip(xyz @ np.linalg.inv(to_xyz(SRGB_PRIMARIES, D65)).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _tag(kind: bytes, data: bytes) -> bytes:
    return (kind + bytes(4) + data).ljust(-(-(8 + len(data)) // 4) * 4, b"\0")


def _xyz(values: np.ndarray) -> bytes:
    return _tag(b"XYZ ", struct.pack(">3i", *(round(float(value) * 65536) for value in values)))


def _curve(gamma: float | str) -> bytes:
    if gamma == "sRGB":
        numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        return _tag(b"para", struct.pack(">HH5i", 3, 0, *(round(number * 65536) for number in numbers)))
    return _tag(b"para", struct.pack(">HHi", 0, 0, round(float(gamma) * 65536)))


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], name: str) -> bytes:
    text = name.encode("utf-16-be")
    described = _tag(b"mluc", struct.pack(">II4sII", 1, 12, b"enUS", len(text), 28) + text)
    tags = {b"desc": described, b"cprt": described, b"wtpt": _xyz(D50_XYZ), **tags}
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for kind, data in tags.items():
        table += kind + struct.pack(">II", start + len(body), len(data))
        body += data
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x04300000, b"scnr", space, connection) + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", *(round(value * 65536) for value in D50_XYZ))
    return head.ljust(128, b"\0") + table + body


def rgb_profile(
    primaries: Sequence[tuple[float, float]], white: tuple[float, float], gamma: float | str, name: str = "test"
) -> bytes:
    """gamma: of all three, or "sRGB" for its curve."""
    colorants = to_xyz(primaries, white).T
    tags = {kind: _xyz(values) for kind, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True)}
    tags |= {kind: _curve(gamma) for kind in (b"rTRC", b"gTRC", b"bTRC")}
    return _profile(b"RGB ", b"XYZ ", tags, name)


def grey_profile(gamma: float | str) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)}, "grey")


# What each ink takes from white, in Lab: together all of it.
INKS = np.array([[-15.0, -20, -25], [-20, 40, -5], [-5, -5, 50], [-60, -15, -20]])


def cmyk_profile() -> bytes:
    """A printer whose inks add up in Lab as INKS says."""
    corners = np.indices((2, 2, 2, 2)).reshape(4, -1).T @ INKS + [100, 0, 0]  # the first ink varies slowest
    levels = np.rint(corners * [2.55, 1, 1] + [0, 128, 128]).astype(np.uint8)
    identity = np.arange(256, dtype=np.uint8).tobytes()
    matrix = struct.pack(">9i", *(65536 * np.eye(3, dtype=int).reshape(-1)))
    table = struct.pack(">BBBB", 4, 3, 2, 0) + matrix + identity * 4 + levels.tobytes() + identity * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": _tag(b"mft1", table)}, "inks")


def lab_to_xyz(lab: np.ndarray) -> np.ndarray:
    """Lab [..., 3] -> XYZ under D50."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    return np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50_XYZ
