"""Names of images: their order, which files of a container are images, and which look like images and are left out."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from diffaccel.errors import DiffAccelError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAC_FOLDER, MAC_PREFIX = "__MACOSX", "._"  # copies of a file's attributes that macOS puts into archives
# pictures and videos of kinds that are not read
OTHER_SUFFIXES = (
    ".apng", ".avif", ".avifs", ".dng", ".exr", ".hdr", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpf", ".jpx",
    ".jxl", ".jxr", ".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".qoi", ".svg", ".tga", ".avi", ".m4v", ".mkv", ".mov",
    ".mp4", ".webm",
)  # fmt: skip
_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_BEGINNING = 8  # bytes
_DIGITS = re.compile(r"([0-9]+)")
SortKey = tuple[tuple[tuple[bool, int, str], ...], ...]


def natural(name: str) -> tuple[SortKey, str]:
    """Return the sort key by which numbers in names count as numbers: ``2`` before ``10``, folder by folder.

    Names whose numbers have equal numbers of digits, such as ``00010``, are in the order of their letters too.
    """
    return tuple(tuple(_pieces(part)) for part in name.split("/")), name


def _pieces(part: str) -> Iterator[tuple[bool, int, str]]:
    """Yield the numbers of a name by size, and the texts between them, which come after a number in the same place."""
    for place, piece in enumerate(_DIGITS.split(part)):
        if place % 2:
            digits = piece.lstrip("0")
            yield False, len(digits), digits
        elif piece:
            yield True, 0, piece


def order(ids: Sequence[str], num: int | None, name: str) -> list[int]:
    """Return the positions of the first ``num`` images in the natural order of ids.

    Raises:
        DiffAccelError: for no image, fewer than ``num``, two of one id, and a name that is no text.
    """
    if len(set(ids)) < len(ids):
        duplicate = next(text for text, count in Counter(ids).items() if count > 1)
        raise DiffAccelError(f"Two images of {name} have the id '{duplicate}'. Ids must be unique: rename one.")
    if broken := next((text for text in ids if not is_text(text)), None):
        raise DiffAccelError(f"The name {broken!a} in {name} is no text in UTF-8. Rename that file.")
    if not ids:
        raise DiffAccelError(f"{name} holds no images. Known files: {', '.join(SUFFIXES)}.")
    if num is not None and num > len(ids):
        raise DiffAccelError(f"{num} images were asked for, but {name} holds {len(ids)}. Ask for fewer, or add images.")
    return sorted(range(len(ids)), key=lambda i: natural(ids[i]))[:num]


def is_text(name: str) -> bool:
    """Return whether a name can be written: file systems may hold bytes that are no UTF-8, read as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def are_consecutive(names: Sequence[str]) -> bool:
    """Return whether names in natural order differ in one number alone, which counts up by one from 0 or 1."""
    split = [_DIGITS.split(name) for name in names]
    if len({len(pieces) for pieces in split}) > 1:
        return False
    changing = [place for place, pieces in enumerate(zip(*split, strict=True)) if len(set(pieces)) > 1]
    if len(changing) != 1 or changing[0] % 2 == 0:
        return len(names) == 1
    numbers = [int(pieces[changing[0]]) for pieces in split]
    return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def is_image(name: str) -> bool:
    """Return whether a file is an image by its suffix, in any case, and not hidden."""
    return posixpath.splitext(name)[1].lower() in SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether a file or one of its folders has a name that begins with a dot, or is macOS's own."""
    return any(part.startswith(".") or part == MAC_FOLDER for part in name.split("/"))


def left_out(names: Sequence[str], open_file: Callable[[str], BinaryIO]) -> list[str]:
    """Return in words how many files look like pictures and are none of the set, by the reason; nothing for none.

    Files without a suffix are known by their first bytes.

    Args:
        names: of the files of a container that are not among its images.
        open_file: opens one of them.
    """
    hidden, other, bare = 0, Counter[str](), 0
    for name in names:
        base, suffix = posixpath.basename(name), posixpath.splitext(name)[1].lower()
        if base.startswith(MAC_PREFIX) or MAC_FOLDER in name.split("/"):
            continue
        if is_hidden(name):
            hidden += suffix in SUFFIXES
        elif suffix in OTHER_SUFFIXES:
            other[suffix] += 1
        elif not suffix:
            with open_file(name) as file:
                bare += file.read(_BEGINNING).startswith(_BEGINNINGS)
    reasons = [f"{count} {suffix}" for suffix, count in sorted(other.items())]
    reasons += [f"{bare} without a suffix"] if bare else []
    return [*reasons, *([f"{hidden} hidden"] if hidden else [])]
