"""The pixel data of a PNG, checked before a native decoder reads them.

The checksums of a PNG's chunks say nothing about what a writer put in: the compressed rows may be too few, damaged, or
filtered in a way that does not exist. libpng leaves its caller by a long jump then, which may end the process, and
Pillow draws missing rows black. So the rows are inflated here, and the decoder gets them checked and uncompressed,
which costs it next to nothing (PNG specification, third edition, sections 7, 9 and 10; RFC 1950 and 1951).
"""

from __future__ import annotations

import struct
import zlib

Data = bytes | bytearray
SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = 33  # of the signature and IHDR
_END = b"\0\0\0\0IEND\xaeB`\x82"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # samples of a pixel by colour type
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # Adam7
_LAST_FILTER = 4
_MAX_PIXELS = 178_956_970  # Pillow refuses larger pictures as decompression bombs, before it inflates them
_STORED = 65535  # largest stored block of a deflate stream


def with_stored_pixels(data: Data, *, alone: bool = False) -> bytearray | None:
    """Return a PNG with its rows checked and stored without compression; None where there is nothing to check.

    Args:
        data: a file of at most 8 bits a sample; for other files, and for one that is cut, the result is None.
        alone: leave out everything but the header and the pixels.

    Raises:
        ValueError: saying what is wrong with the pixel data.
    """
    rows = _rows(data)
    if rows is None:
        return None
    first, end, parts, is_whole = _pixel_chunks(data)
    if not parts:
        if is_whole:
            raise ValueError("it has no pixel data")
        return None
    expected = sum(count * length for count, length in rows)
    stream = parts[0] if len(parts) == 1 else b"".join(parts)
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(stream, expected + 1)
    except zlib.error as error:
        raise ValueError(f"its pixel data are damaged: {error}") from error
    if len(raw) > expected or (not inflater.eof and not is_whole):
        return None
    if len(raw) < expected or not inflater.eof:
        raise ValueError(f"its pixel data end after {len(raw)} of {expected} bytes")
    _check_filters(raw, rows)
    checksum = bytes(stream[: len(stream) - len(inflater.unused_data)][-4:])
    before, after = (data[:_HEADER_END], _END) if alone else (data[:first], data[end:])
    return _assemble(before, raw, checksum, after)


def _rows(data: Data) -> list[tuple[int, int]] | None:
    """Return number and bytes of the rows of each pass, with their filter byte; None for another kind of file."""
    if data[:16] != SIGNATURE + b"\0\0\0\rIHDR" or len(data) < _HEADER_END:
        return None
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    if colour not in _SAMPLES or bits not in (1, 2, 4, 8) or not 0 < width * height <= _MAX_PIXELS:
        return None
    rows = []
    for left, top, across, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, count = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and count > 0:
            rows.append((count, 1 + (columns * bits * _SAMPLES[colour] + 7) // 8))
    return rows


def _pixel_chunks(data: Data) -> tuple[int, int, list[memoryview], bool]:
    """Return where the pixel chunks begin and end, their contents, and whether the file goes on to its last chunk."""
    view = memoryview(data)
    position, first, end = _HEADER_END, 0, 0
    parts: list[memoryview] = []
    while position + 8 <= len(data):
        kind, start = data[position + 4 : position + 8], position + 8
        length = int.from_bytes(data[position : position + 4], "big")
        if kind == b"IDAT":
            first, end = first or position, min(start + length + 4, len(data))
            parts.append(view[start : start + length])
        elif kind == b"IEND":
            return first, end, parts, True
        position = start + length + 4
    return first, end, parts, False


def _check_filters(raw: bytes, rows: list[tuple[int, int]]) -> None:
    start = 0
    for count, length in rows:
        if (highest := max(raw[start : start + count * length : length])) > _LAST_FILTER:
            raise ValueError(f"its pixel data have a row with filter {highest}; there are filters 0 to {_LAST_FILTER}")
        start += count * length


def _assemble(before: Data, raw: bytes, checksum: bytes, after: Data) -> bytearray:
    """Return a PNG with rows in stored blocks of one pixel chunk."""
    view = memoryview(raw)
    blocks: list[bytes | bytearray | memoryview] = [before, b"", b"IDAT\x78\x01"]
    length = 2 + len(raw) + len(checksum)
    for start in range(0, len(raw), _STORED):
        block = view[start : start + _STORED]
        is_last = start + _STORED >= len(raw)
        blocks += [struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF), block]
        length += 5
    blocks[1] = length.to_bytes(4, "big")
    png = bytearray().join([*blocks, checksum, b"\0\0\0\0", after])
    start = len(before) + 4
    end = start + 4 + length
    png[end : end + 4] = zlib.crc32(memoryview(png)[start:end]).to_bytes(4, "big")
    return png
