"""Records of what was run, and files that are either whole or not there.

A record is plain JSON: what decided the result (``settings``, with a fingerprint), what it was run with, and what came
out. Everything is written beside its name, flushed, and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from diffaccel.errors import DiffAccelError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

FORMAT = 1
PNG_KEY = "diffaccel"
PACKAGES = ("diffaccel", "torch", "diffusers", "transformers", "accelerate")
TEMPORARY = ".tmp"
_BLOCK, _BLOCKS = 1 << 16, 128


@dataclass(kw_only=True)
class Record:
    """What one run did.

    Attributes:
        kind: the command or function that made it, such as "sample".
        settings: everything that decides the result; its sha256 is the fingerprint.
        command: the command line, or nothing when called from Python.
        state: "running", or "finished" once the results are complete.
        results: what came out, in the words of ``kind``.
    """

    kind: str
    settings: dict[str, Any]
    command: list[str] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    state: str = "running"
    started: str = field(default_factory=lambda: now())
    finished: str | None = None
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name the settings."""
        return fingerprint(self.settings)

    def finish(self, **results: Any) -> Self:
        """The same record with its results, finished now."""
        self.results, self.state, self.finished = results, "finished", now()
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, results at the top level."""
        values = asdict(self)
        results = values.pop("results")
        return {"format": FORMAT, "fingerprint": self.fingerprint, **values, **results}

    def save(self, path: Path) -> None:
        """Write it to ``path``, atomically."""
        write_json(path, self.to_dict())


def read(path: Path, kind: str) -> dict[str, Any] | None:
    """The record in a file, or None where there is no file.

    Raises:
        DiffAccelError: for a file that is no record, of another kind, or of a format from the future.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DiffAccelError(f"'{path}' is no record of diffaccel ({error}). Move it away.") from error
    if not isinstance(values, dict) or values.get("kind") != kind or not isinstance(values.get("settings"), dict):
        raise DiffAccelError(f"'{path}' is no record of '{kind}'. Move it away, or choose another folder.")
    if values.get("format") != FORMAT:
        raise DiffAccelError(
            f"'{path}' has record format {values.get('format')}; this version of diffaccel reads {FORMAT}."
        )
    return values


def fingerprint(settings: dict[str, Any]) -> str:
    """Sixteen hex digits of the sha256 of ``settings`` as canonical JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for every setting that differs, nested keys dotted."""
    found = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {_short(old)} -> {_short(new)}")
    return found


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; none of them is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe_device(device: torch.device) -> dict[str, Any]:
    """Type and name of a device, and the threads used on a CPU."""
    import torch

    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    if device.type == "cpu":
        return {"type": "cpu", "name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"type": device.type, "name": device.type}


def cpu_name() -> str:
    """The processor's model name as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the highest so far: device memory on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


# -- files -----------------------------------------------------------------------------------------------------------


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
    with atomic(path) as file:
        file.write(text.encode())


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
