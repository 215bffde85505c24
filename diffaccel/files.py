"""Atomically written files, with metadata in pictures and videos, and digests of files.

Everything is written under a temporary name in the same folder, flushed, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PNG_KEY = "diffaccel"
TEMPORARY = ".tmp"
_BLOCK, _BLOCKS = 1 << 16, 128


def obstacle(folder: Path) -> str:
    """Return why a folder is none, or could not be created or written; empty where it can.

    Some places say that they may be written and take no file, as ``/proc`` to the administrator: a file without a name
    is made in the nearest folder that exists, and nothing stays.

    Raises:
        OSError: for a path that cannot be looked at.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return f"'{nearest}' is a file"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"no permission in '{nearest}'"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return ""
    except OSError as error:
        return f"no file can be made in '{nearest}': {error.strerror or error}"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that becomes ``path`` when the block succeeds and is deleted when it fails.

    Raises:
        OSError: when it cannot be written, or ``path`` is a device or a pipe, which a file would replace.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileExistsError(errno.EEXIST, "It is no regular file", str(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """Raise ``OSError`` where safetensors cannot write, as on a full disk, which it tells by an error of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove temporary files that a killed process left of files in ``folder`` whose names match ``names``.

    Args:
        names: a regular expression.
    """
    leftover = re.compile(rf"\.({names})\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}")
    for path in folder.glob(f".*{TEMPORARY}"):
        if leftover.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write ``values`` as readable JSON; not-a-number and infinity, which JSON lacks, raise ``ValueError``."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8; lone surrogates, such as of a path that is no UTF-8, as escapes that JSON reads back."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` unchanged."""
    with atomic(path) as file:
        file.write(data)


def write_png(path: Path, image: Image, values: dict[str, Any] | None = None) -> None:
    """Write a lossless picture that carries ``values``, if any, as JSON text under the key ``diffaccel``."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if values is not None:
        info.add_text(PNG_KEY, json.dumps(values, sort_keys=True, allow_nan=False))
    with atomic(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def read_png(path: Path) -> dict[str, Any] | None:
    """Return the values that :func:`write_png` stored in a picture, or None for any other file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            values = json.loads(image.text[PNG_KEY])  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, AttributeError, SyntaxError):
        return None
    return values if isinstance(values, dict) else None


def write_tensor(path: Path, tensor: Tensor) -> None:
    """Write one tensor as safetensors, under the name of the file."""
    from safetensors.torch import save

    with atomic(path) as file:
        file.write(save({path.stem: tensor.detach().cpu().contiguous()}))


def read_tensor(path: Path) -> Tensor:
    """Read the tensor of :func:`write_tensor`."""
    from safetensors.torch import load_file

    return load_file(path)[path.stem]


def holds_tensor(path: Path) -> bool:
    """Return whether a file is one that :func:`write_tensor` wrote: one tensor, under the name of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()) == [path.stem]
    except (OSError, SafetensorError):
        return False


@dataclass(frozen=True)
class Clip:
    """A video: its frames in order, and the frame rate."""

    frames: list[Image]
    fps: float


def write_mp4(path: Path, clip: Clip, values: dict[str, Any] | None = None) -> None:
    """Write an H.264 video that carries ``values``, if any, as JSON text in its comment.

    One thread and no dates: the same frames give the same bytes with the same ffmpeg. Frames are not resized; odd sides
    are kept by storing colours at full resolution. Compression is lossy (CRF 14).
    """
    import imageio_ffmpeg

    first = clip.frames[0]
    even = first.width % 2 == first.height % 2 == 0
    options = ["-preset", "medium", "-crf", "14", "-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact"]
    options += ["-movflags", "+faststart", "-f", "mp4"]
    if values is not None:
        options += ["-metadata", f"comment={json.dumps(values, sort_keys=True, allow_nan=False)}"]
    with atomic(path) as file:
        writer = imageio_ffmpeg.write_frames(
            file.name, first.size, pix_fmt_in="rgb24", pix_fmt_out="yuv420p" if even else "yuv444p", fps=clip.fps,
            codec="libx264", quality=None, macro_block_size=1, ffmpeg_log_level="quiet", ffmpeg_timeout=0,
            output_params=options,
        )  # fmt: skip
        writer.send(None)
        try:
            for frame in clip.frames:
                writer.send(frame.convert("RGB").tobytes())
        finally:
            writer.close()
        try:
            written = imageio_ffmpeg.count_frames_and_secs(file.name)[0]
        except RuntimeError:
            written = 0
        if written != len(clip.frames):  # imageio_ffmpeg does not pass on ffmpeg's exit status
            raise OSError(f"ffmpeg wrote {written} of {len(clip.frames)} frames; is the disk full?")


def read_mp4(path: Path) -> dict[str, Any] | None:
    """Return the values that :func:`write_mp4` stored in a video, or None for any other file."""
    try:
        data = path.read_bytes()
        start = data.index(b"\xa9cmt")  # an atom: its size, this name, a header of 16 bytes, the text
        values = json.loads(data[start + 20 : start - 4 + int.from_bytes(data[start - 4 : start], "big")])
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the values stored in a picture or video of diffaccel, or None for any other file."""
    return read_mp4(path) if path.suffix == ".mp4" else read_png(path)


NUMBER, COUNT, FILE_NAME = "a number", "a whole number, 0 or more", "a file name"  # shapes of JSON values


def misfit(value: Any, shape: Any, name: str = "") -> str:
    """Return which part of a JSON value does not have the expected shape; empty where all have it.

    Args:
        value: as it was read.
        shape: a type, :data:`NUMBER`, :data:`COUNT`, :data:`FILE_NAME`, None, a tuple of shapes one of which is to fit,
            ``[shape]`` of all items of a list, or a dict of shapes by key. Other keys may have any value, and a key
            that ends with "?" may be missing.
        name: of the value, for the result.
    """
    if isinstance(shape, tuple):
        return "" if any(not misfit(value, choice) for choice in shape) else name or "it"
    if isinstance(shape, dict) and isinstance(value, dict):
        parts = [(key, value.get(key.removesuffix("?"), _MISSING), expected) for key, expected in shape.items()]
        present = [part for part in parts if part[1] is not _MISSING or not part[0].endswith("?")]
        names = ((f"{name}.{key}".strip(".").removesuffix("?"), part, expected) for key, part, expected in present)
        return next(filter(None, (misfit(part, expected, key) for key, part, expected in names)), "")
    if isinstance(shape, list) and isinstance(value, list):
        return next(filter(None, (misfit(part, shape[0], f"{name}[{i}]") for i, part in enumerate(value))), "")
    return "" if _has_kind(value, shape) else name or "it"


_MISSING = object()


def _has_kind(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind == FILE_NAME:
        return isinstance(value, str) and value == Path(value).name != ".."
    if kind in (NUMBER, COUNT):
        if not isinstance(value, int | float if kind == NUMBER else int) or isinstance(value, bool):
            return False
        is_held = abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
        return is_held and (kind == NUMBER or value >= 0)
    return isinstance(kind, type) and isinstance(value, kind)


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pixels_sha256(image: Image) -> str:
    """Return the sha256 of a picture's mode, size and pixels, whatever file it is in."""
    header = f"{image.mode} {image.width} {image.height} ".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()


def clip_sha256(clip: Clip) -> str:
    """Return the sha256 of a video's frames before encoding."""
    digest = hashlib.sha256()
    for frame in clip.frames:
        digest.update(f"{frame.mode} {frame.width} {frame.height} ".encode() + frame.tobytes())
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Return twelve hex digits that change when a model folder's files change.

    Digested are names and sizes of all files and their bytes: all bytes of a file up to 8 MiB, else 128 blocks spread
    evenly, since tens of gigabytes would take longer to read than to use.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{name.as_posix()} {size} ".encode())
        with open(path, "rb") as file:
            if size <= _BLOCK * _BLOCKS:
                digest.update(file.read())
                continue
            for i in range(_BLOCKS):
                file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:12]
