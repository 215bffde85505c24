"""One image file to RGB pixels, exactly or not at all.

What has one form in 8 bits a channel is converted: greyscale, palettes, two-colour images, and an alpha channel that is
opaque everywhere. What would need a choice is refused: see-through pixels (over which background?), 16 bits (which
rounding?), CMYK and other colour models (which profile?), animations (which frame?).
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

if TYPE_CHECKING:
    from PIL.Image import Image

Data = bytes | bytearray
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_EXACT = ("RGB", "L", "P", "1")
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_BITS_PER_SAMPLE = 258  # the TIFF tag
_PNG_START = 1024  # bytes in which pixels begin, unless much text comes first
_SMALL = 1 << 26  # pixels; of more, Pillow decides whether it is a bomb


@dataclass(frozen=True)
class Header:
    """What a file says before its pixels are read: (height, width), and whether it was coded with loss.

    A ``simple`` one is an 8-bit RGB PNG, which all decoders agree on.
    """

    size: tuple[int, int]
    lossy: bool
    simple: bool = False


def header(file: BinaryIO, name: str) -> Header:
    """Read the header of an open file, and refuse what :func:`decode` would refuse without looking at pixels.

    Raises:
        DiffAccelError: naming the file, for what is no image, or one that has no exact RGB form.
    """
    if (found := _plain_png(file.read(_PNG_START))) is not None:
        return found
    file.seek(0)
    with _open(file, name) as image:
        lossy = image.format in ("JPEG", "MPO") or (image.format == "WEBP" and _lossy_webp(file))
        return Header((image.height, image.width), lossy)


def decode(data: Data, name: str) -> Tensor:
    """The pixels, uint8 ``(3, H, W)``.

    Raises:
        DiffAccelError: naming the file, as :func:`header` does, and for one that is cut off or not opaque.
    """
    if (found := _plain_png(data[:_PNG_START])) is not None and found.simple and _sound(data):
        with contextlib.suppress(RuntimeError, ImportError):  # a torchvision without libpng, or one that gave it up
            return _by_torch(data)
    with _open(io.BytesIO(data), name) as image:
        try:
            image.load()
        except (OSError, ValueError, SyntaxError, struct.error) as error:
            raise DiffAccelError(
                f"The image '{name}' cannot be read ({error}). It is cut off: make it again."
            ) from error
        if image.mode in _ALPHA or "transparency" in image.info:
            whole = image.convert("RGBA")
            lowest = cast(int, whole.getchannel("A").getextrema()[0])
            if lowest < 255:
                raise DiffAccelError(
                    f"The image '{name}' is see-through in places (alpha down to {lowest}), and its colour there "
                    "depends on the background. Compose it over one and save it as RGB."
                )
            pixels = np.asarray(whole)[..., :3]
        else:
            pixels = np.asarray(image.convert("RGB"))
    # NumPy copies, because PyTorch would start threads of its own in every thread that decodes
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _open(file: BinaryIO, name: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        raise DiffAccelError(
            f"The file '{name}' is not an image, or is cut off. Remove it, or make it again."
        ) from error
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise DiffAccelError(f"The image '{name}' cannot be read ({error}). Make it again.") from error
    reason = _refused(image, file)
    if reason:
        raise DiffAccelError(f"The image '{name}' {reason}. Save it as 8-bit RGB, for example as PNG.")
    return image


def _refused(image: Image, file: BinaryIO) -> str:
    """Why an image has no exact RGB form, or nothing."""
    if getattr(image, "n_frames", 1) > 1:
        return f"has {getattr(image, 'n_frames', 1)} frames"
    # Pillow opens 16-bit colour as RGB and drops the low byte, so the mode alone does not tell
    bits: tuple[int, ...] = (8,)
    if image.format == "PNG":
        bits = (_read(file, 24, 1)[0],)
    elif image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        bits = tuple(np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 1)).tolist())
    if max(bits) > 8 or image.mode.startswith(("I", "F")):
        return f"has more than 8 bits a channel (mode {image.mode})"
    if image.mode not in _EXACT + _ALPHA:
        return f"has the colour model {image.mode}"
    return ""


def _sound(data: Data) -> bool:
    """Whether every chunk of a PNG has the checksum that was written with it, to the last. Torch's decoder has to be
    kept from all others: it may crash where libpng finds an error."""
    position = 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if zlib.crc32(memoryview(data)[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position = end + 4
    return False


def _by_torch(data: Data) -> Tensor:
    """The pixels of a simple PNG. Unlike Pillow, it lets other threads run all the time."""
    from torchvision.io import ImageReadMode, decode_png

    writable = data if isinstance(data, bytearray) else bytearray(data)  # PyTorch warns of what is not
    return cast(Tensor, decode_png(torch.frombuffer(writable, dtype=torch.uint8), ImageReadMode.RGB))


def _plain_png(start: Data) -> Header | None:
    """The header of a PNG that leaves no question open; None: ask Pillow, which takes four times as long.

    Sets have tens of thousands of files. Plain is: 8 bits a channel or fewer, and pixels that begin soon, before
    any chunk of an animation (PNG specification, third edition, sections 5 and 11).
    """
    if start[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" or len(start) < 33:
        return None
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", start[16:29])
    sound = zlib.crc32(start[12:29]) == int.from_bytes(start[29:33], "big")
    if not sound or bits > 8 or not 0 < width * height <= _SMALL:
        return None
    position, simple = 33, (bits, colour, interlaced) == (8, 2, 0)
    while (kind := start[position + 4 : position + 8]) not in (b"IDAT", b"acTL", b""):
        position += 12 + int.from_bytes(start[position : position + 4], "big")
        simple = simple and kind != b"tRNS"  # a colour that is see-through
    return Header((height, width), lossy=False, simple=simple) if kind == b"IDAT" else None


def _lossy_webp(file: BinaryIO) -> bool:
    """Whether a WebP file holds a lossy bitstream: a chunk ``VP8 ``, where a lossless one is ``VP8L`` (RFC 9649)."""
    position = 12
    while len(chunk := _read(file, position, 8)) == 8:
        if chunk[:4] in (b"VP8 ", b"VP8L"):
            return chunk[:4] == b"VP8 "
        length = int.from_bytes(chunk[4:], "little")
        position += 8 + length + length % 2
    return False


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    """Some bytes, without moving the position that the decoder goes on from."""
    here = file.tell()
    file.seek(start)
    data = file.read(length)
    file.seek(here)
    return data
