"""What a file is by its bytes, where Pillow does not say: formats that are not read, and colours without a profile."""

import struct
from collections.abc import Iterator
from itertools import takewhile

# (where they stand, the bytes, the format)
_SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG, damaged or of 12 bits"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypavif", "AVIF, damaged or more than this Pillow reads"),
    (0, b"8BPS", "Photoshop document"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DDS"),
    (0, b"<svg", "SVG"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"P5\n", "PGM"),
    (0, b"P6\n", "PPM"),
    (0, b"qoif", "QOI"),
    (-18, b"TRUEVISION-XFILE.\x00", "TGA"),
)

# Of ITU-T H.273: 1 is sRGB's, 2 says nothing, 5 and 6 differ from it by less than is seen.
_PRIMARIES_OF_SRGB = frozenset({1, 2, 5, 6})
_CURVES_OF_SRGB = frozenset({1, 2, 6, 13, 14, 15})
_CURVES = {4: "gamma 2.2", 5: "gamma 2.8", 8: "linear", 16: "PQ", 18: "HLG"}
_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}


def format_by_signature(data: bytes) -> str:
    """The format of a file that is not read, "" if it is none of those that people keep pictures in."""
    for place, signature, name in _SIGNATURES:
        begin = place if place >= 0 else len(data) + place
        if begin >= 0 and data[begin : begin + len(signature)] == signature:
            return name
    return ""


def png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, content) of a PNG's chunks, in their order."""
    view, place = memoryview(data), 8  # behind the signature
    while len(head := data[place : place + 8]) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, view[place + 8 : place + 8 + length]
        place += length + 12  # with its checksum


def foreign_colours(data: bytes, picture_format: str | None) -> str:
    """The colours that a PNG's cICP chunk or an AVIF's nclx box asks for, "" if sRGB's, or near enough."""
    numbers = b""
    if picture_format == "PNG":
        head = takewhile(lambda chunk: chunk[0] != b"IDAT", png_chunks(data))
        numbers = next((bytes(content[:2]) for kind, content in head if kind == b"cICP"), b"")
    elif picture_format == "AVIF" and (place := data.find(b"colrnclx")) >= 0:
        numbers = data[place + 9 : place + 13 : 2]
    if len(numbers) < 2:
        return ""
    primaries, curve = numbers
    if primaries in _PRIMARIES_OF_SRGB and curve in _CURVES_OF_SRGB:
        return ""
    parts = (_PRIMARIES.get(primaries, f"primaries {primaries}"), _CURVES.get(curve, f"curve {curve}"))
    return ", ".join(parts)
