"""Decode one image file to 8-bit RGB pixels, exactly or not at all.

Files with exactly one form in 8 bits a channel are converted: greyscale, palettes, two-colour images, and an alpha
channel that is opaque everywhere. Files that would need a choice are refused: transparent pixels (over which
background?), 16 bits (which rounding?), CMYK and other colour models (which profile?), animations (which frame?).
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.images.png import with_stored_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

Data = bytes | bytearray
_EXACT = ("RGB", "L", "P", "1")
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_BITS_PER_SAMPLE = 258  # the TIFF tag
_PNG_START = 1024  # bytes within which the pixel data begin, unless long text comes first
_MAX_PLAIN_PIXELS = 1 << 26  # for larger images Pillow decides whether they are decompression bombs


@dataclass(frozen=True)
class Header:
    """Properties of an image file that are known before its pixels are decoded.

    Attributes:
        size: (height, width).
        lossy: whether the file was encoded with loss.
        simple: whether it is an 8-bit RGB PNG, on which all decoders agree.
    """

    size: tuple[int, int]
    lossy: bool
    simple: bool = False


def read_header(file: BinaryIO, name: str) -> Header:
    """Read the header of an open file, and refuse what :func:`decode` would refuse without looking at pixels.

    Raises:
        DiffAccelError: naming the file, if it is not an image or has no exact RGB form.
    """
    header = _plain_png_header(file.read(_PNG_START))
    if header is not None:
        return header
    file.seek(0)
    with _open(file, name) as image:
        lossy = image.format in ("JPEG", "MPO") or (image.format == "WEBP" and _lossy_webp(file))
        return Header((image.height, image.width), lossy)


def decode(data: Data, name: str) -> Tensor:
    """Decode the pixels of a file, uint8 ``(3, H, W)``.

    Raises:
        DiffAccelError: naming the file, as :func:`read_header` does, and when it is truncated, damaged or not opaque.
    """
    header = _plain_png_header(data[:_PNG_START])
    simple = header is not None and header.simple and _checksums_hold(data)
    try:
        checked = with_stored_pixels(data, alone=simple)
    except ValueError as error:
        raise DiffAccelError(f"The image '{name}' cannot be read ({error}). It is damaged: make it again.") from error
    if simple and checked is not None:
        with contextlib.suppress(RuntimeError, ImportError):  # a torchvision without its PNG decoder
            return _decode_with_torch(checked)
    with _open(io.BytesIO(data if checked is None else checked), name) as image:
        pixels = _opaque_rgb(image, name)
    # NumPy copies: PyTorch would start its own thread pool in every thread that decodes
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _open(file: BinaryIO, name: str) -> Image:
    """Open an image with Pillow, and refuse one that has no exact RGB form."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        raise DiffAccelError(
            f"The file '{name}' is not an image, or is cut off. Remove it, or make it again."
        ) from error
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise DiffAccelError(f"The image '{name}' cannot be read ({error}). Make it again.") from error
    reason = _refusal(image, file)
    if reason:
        raise DiffAccelError(f"The image '{name}' {reason}. Save it as 8-bit RGB, for example as PNG.")
    return image


def _refusal(image: Image, file: BinaryIO) -> str:
    """Return why an image has no exact RGB form, or an empty string."""
    if getattr(image, "n_frames", 1) > 1:
        return f"has {getattr(image, 'n_frames', 1)} frames"
    # Pillow opens 16-bit colour as RGB and drops the low byte, so the mode alone does not tell
    bits: tuple[int, ...] = (8,)
    if image.format == "PNG":
        bits = (_peek(file, 24, 1)[0],)
    elif image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        bits = tuple(np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 1)).tolist())
    if max(bits) > 8 or image.mode.startswith(("I", "F")):
        return f"has more than 8 bits a channel (mode {image.mode})"
    if image.mode not in _EXACT + _ALPHA:
        return f"has the colour model {image.mode}"
    return ""


def _opaque_rgb(image: Image, name: str) -> np.ndarray:
    """Decode an open image with Pillow to uint8 ``(H, W, 3)``; refuse one that is truncated or not opaque."""
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise DiffAccelError(f"The image '{name}' cannot be read ({error}). It is cut off: make it again.") from error
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    rgba = image.convert("RGBA")
    min_alpha = cast(int, rgba.getchannel("A").getextrema()[0])
    if min_alpha < 255:
        raise DiffAccelError(
            f"The image '{name}' is see-through in places (alpha down to {min_alpha}), and its colour there "
            "depends on the background. Compose it over one and save it as RGB."
        )
    return np.asarray(rgba)[..., :3]


def _checksums_hold(data: Data) -> bool:
    """Check the checksum of every chunk of a PNG up to the last one.

    Torch's decoder must only see files that pass, and checked pixel data: it may crash where libpng finds an error.
    """
    position = 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if zlib.crc32(memoryview(data)[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position = end + 4
    return False


def _decode_with_torch(data: Data) -> Tensor:
    """Decode a simple PNG with torchvision, which lets other threads run all the time, unlike Pillow.

    The registered operator is called directly: its wrapper ``torchvision.io.decode_png`` emits a DeprecationWarning
    for every picture (since torchvision 0.29), and warning filters are not thread-safe.

    Raises:
        ImportError, RuntimeError: where torchvision has no PNG decoder.
    """
    from torchvision.io import ImageReadMode  # importing torchvision.io registers the operator

    decode_png = getattr(torch.ops.image, "decode_png", None)
    if decode_png is None:
        raise ImportError("torchvision has no image operators")
    writable = data if isinstance(data, bytearray) else bytearray(data)  # PyTorch warns of read-only buffers
    return cast(Tensor, decode_png(torch.frombuffer(writable, dtype=torch.uint8), ImageReadMode.RGB.value))


def _plain_png_header(start: Data) -> Header | None:
    """Parse the first bytes of a plain PNG; return None where Pillow has to decide, which takes four times as long.

    Sets have tens of thousands of files. A plain PNG has at most 8 bits a channel, and its pixel data begin soon,
    before any chunk of an animation (PNG specification, third edition, sections 5 and 11).
    """
    if start[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" or len(start) < 33:
        return None
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", start[16:29])
    checksum_holds = zlib.crc32(start[12:29]) == int.from_bytes(start[29:33], "big")
    if not checksum_holds or bits > 8 or not 0 < width * height <= _MAX_PLAIN_PIXELS:
        return None
    position, simple = 33, (bits, colour, interlaced) == (8, 2, 0)
    while (chunk_type := start[position + 4 : position + 8]) not in (b"IDAT", b"acTL", b""):
        position += 12 + int.from_bytes(start[position : position + 4], "big")
        simple = simple and chunk_type != b"tRNS"  # one colour is declared transparent
    return Header((height, width), lossy=False, simple=simple) if chunk_type == b"IDAT" else None


def _lossy_webp(file: BinaryIO) -> bool:
    """Check whether a WebP file holds a lossy bitstream: a chunk ``VP8 ``, not ``VP8L`` (RFC 9649)."""
    position = 12
    while len(chunk := _peek(file, position, 8)) == 8:
        if chunk[:4] in (b"VP8 ", b"VP8L"):
            return chunk[:4] == b"VP8 "
        length = int.from_bytes(chunk[4:], "little")
        position += 8 + length + length % 2
    return False


def _peek(file: BinaryIO, start: int, length: int) -> bytes:
    """Read bytes from a position of a file, and leave its current position as it was."""
    position = file.tell()
    file.seek(start)
    data = file.read(length)
    file.seek(position)
    return data
