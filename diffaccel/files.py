"""Files that are either whole or not there, and what pictures and videos carry of how they were made.

Everything is written beside its name, flushed, and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes ``path`` when the block ends well, and leaves nothing when it does not."""
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


def write_json(path: Path, values: Any) -> None:
    """``values`` as readable JSON; not-a-number and infinity, which JSON lacks, raise ``ValueError``."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """``text`` in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """``data`` as it is."""
    with atomic(path) as file:
        file.write(data)


def write_png(path: Path, image: Image, values: dict[str, Any] | None = None) -> None:
    """A lossless picture that carries ``values``, if any, as JSON text under the key ``diffaccel``."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if values is not None:
        info.add_text(PNG_KEY, json.dumps(values, sort_keys=True, allow_nan=False))
    with atomic(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def read_png(path: Path) -> dict[str, Any] | None:
    """What :func:`write_png` stored in a picture, or None for any other file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            values = json.loads(image.text[PNG_KEY])  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, AttributeError, SyntaxError):
        return None
    return values if isinstance(values, dict) else None


def write_tensor(path: Path, tensor: Tensor) -> None:
    """One tensor as safetensors, under the name of the file."""
    from safetensors.torch import save

    with atomic(path) as file:
        file.write(save({path.stem: tensor.detach().cpu().contiguous()}))


def read_tensor(path: Path) -> Tensor:
    """The inverse of :func:`write_tensor`."""
    from safetensors.torch import load_file

    return load_file(path)[path.stem]


@dataclass(frozen=True)
class Clip:
    """A video: its frames in order, and how many of them make a second."""

    frames: list[Image]
    fps: float


def write_mp4(path: Path, clip: Clip, values: dict[str, Any] | None = None) -> None:
    """An H.264 video that carries ``values``, if any, as JSON text in its comment.

    One thread and no dates: the same frames give the same bytes with the same ffmpeg. Frames are not resized; odd sides
    are kept by storing colours at full resolution. Loss is small (CRF 14), but it is there.
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
        if written != len(clip.frames):  # ffmpeg's exit status does not come through
            raise OSError(f"ffmpeg wrote {written} of {len(clip.frames)} frames; is the disk full?")


def read_mp4(path: Path) -> dict[str, Any] | None:
    """What :func:`write_mp4` stored in a video, or None for any other file."""
    try:
        data = path.read_bytes()
        start = data.index(b"\xa9cmt")  # an atom: its size, this name, a header of 16 bytes, the text
        values = json.loads(data[start + 20 : start - 4 + int.from_bytes(data[start - 4 : start], "big")])
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def read_result(path: Path) -> dict[str, Any] | None:
    """What is stored in a picture or a video of ours, or None for any other file."""
    return read_mp4(path) if path.suffix == ".mp4" else read_png(path)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pixels_sha256(image: Image) -> str:
    """Of a picture's size and pixels alone, whatever file it is in."""
    head = f"{image.mode} {image.width} {image.height} ".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def clip_sha256(clip: Clip) -> str:
    """Of a video's frames alone, as they were before they were encoded."""
    total = hashlib.sha256()
    for frame in clip.frames:
        total.update(f"{frame.mode} {frame.width} {frame.height} ".encode() + frame.tobytes())
    return total.hexdigest()


def folder_digest(folder: Path) -> str:
    """Twelve hex digits that change when a model folder's files change.

    Names and sizes of all files, and of each file its bytes: all of them up to 8 MiB, else 128 blocks spread evenly,
    since tens of gigabytes would take longer to read than to use.
    """
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        size = path.stat().st_size
        total.update(f"{name.as_posix()} {size} ".encode())
        with open(path, "rb") as file:
            if size <= _BLOCK * _BLOCKS:
                total.update(file.read())
                continue
            for i in range(_BLOCKS):
                file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
                total.update(file.read(_BLOCK))
    return total.hexdigest()[:12]
