"""Records of runs in plain JSON: the settings that decide the result, the environment, and the results."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diffaccel.errors import DiffAccelError, shortened
from diffaccel.files import COUNT, FILE_NAME, NUMBER, misfit, write_json
from diffaccel.files import read_mp4 as read_mp4  # its former place

if TYPE_CHECKING:
    import torch

FORMAT = 1
RUN = "run.json"  # the record in a folder of generated pictures
SAMPLE = "sample"  # the kind of that record
PARTS = {"text?": NUMBER, "network?": NUMBER, "decode?": NUMBER}
COST = {
    "seconds": NUMBER, "peak_memory": (NUMBER, None), "nfe?": NUMBER, "forwards?": NUMBER, "calls?": NUMBER,
    "joules?": NUMBER, "parts?": PARTS, "steps?": [NUMBER], "resumed?": {"nfe": COUNT},
}  # fmt: skip
IMAGE = {
    "id": COUNT, "prompt": (str, None), "seed": COUNT, "file": FILE_NAME, "sha256": str, "latents?": FILE_NAME,
    "latents_sha256?": str, "noise_sha256?": str, "frames?": COUNT, "fps?": NUMBER,
}  # fmt: skip
SIDE_FILE = {"folder": FILE_NAME, "file": FILE_NAME, "sha256": str}
_STARTED = {
    "settings": {"prompts?": [(str, None)], "methods?": [{"name": str}], "num?": COUNT, "seed?": COUNT},
    "fingerprint": str, "state": str, "started": str, "command": [str], "versions": dict, "device": {"type": str},
}  # fmt: skip
_FINISHED = {
    **_STARTED, "call": {"num_inference_steps?": COUNT}, "cost": COST, "images": [IMAGE],
    "chunks?": [{"chunk": COUNT, "cost": dict, "side_files?": [SIDE_FILE]}],
    "until?": {"rule": str, "chunks": COUNT, "verdict": str},
}  # fmt: skip
PACKAGES = ("diffaccel", "torch", "diffusers", "transformers", "accelerate")


@dataclass(kw_only=True)
class Record:
    """The record of one run.

    Attributes:
        kind: the command or function that was run, such as "sample".
        settings: everything that decides the result; its sha256 is the fingerprint.
        command: the command line, empty when called from Python.
        state: "running", or "finished" once the results are complete.
        results: results under keys that depend on ``kind``.
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
        """Sixteen hex digits that identify the settings."""
        return fingerprint(self.settings)

    def finish(self, **results: Any) -> Self:
        """Set the results and the finishing time, and return the record."""
        self.results, self.state, self.finished = results, "finished", now()
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the record JSON-ready, results at the top level."""
        values = asdict(self)
        results = values.pop("results")
        return {"format": FORMAT, "fingerprint": self.fingerprint, **values, **results}

    def save(self, path: Path) -> None:
        """Write the record to ``path``, atomically."""
        write_json(path, self.to_dict())


def read(path: Path, kind: str) -> dict[str, Any] | None:
    """Return the record in a file, or None where there is no file.

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


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the checked record of the run in a folder, or None where there is none.

    Raises:
        DiffAccelError: as :func:`read` does, and for a record that is damaged, naming the first part of it that is.
    """
    values = read(folder / RUN, SAMPLE)
    if values is not None:
        check_run(values, folder)
    return values


def written_files(folder: Path, images: Sequence[dict[str, Any]]) -> Iterator[tuple[Path, str | None]]:
    """Yield every picture, video and file of latents that a record lists, with the sha256 it tells; None for none."""
    for entry in images:
        for name, digest in (("file", "sha256"), ("latents", "latents_sha256")):
            if name in entry:
                yield folder / entry[name], entry.get(digest)


def side_files(folder: Path, chunks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Path, str]]:
    """Yield every file that a record lists beside the pictures of its chunks, such as a search's, with its sha256."""
    for chunk in chunks:
        for entry in chunk.get("side_files", ()):
            yield folder / entry["folder"] / f"{chunk['chunk']:05d}" / entry["file"], entry["sha256"]


def check_format(values: dict[str, Any], known: int, what: str) -> None:
    """Raise DiffAccelError where a file says that a later version wrote it, in a format above ``known``."""
    if isinstance(values.get("format"), int) and values["format"] > known:
        raise DiffAccelError(
            f"{what} has format {shortened(str(values['format']), 20)}, and this diffaccel reads up to {known}. Update "
            "diffaccel."
        )


def check_run(values: dict[str, Any], folder: Path) -> None:
    """Raise when the record of a run lacks a part or has one of another kind, naming the first."""
    if part := misfit(values, _FINISHED if values.get("state") == "finished" else _STARTED):
        raise DiffAccelError(
            f"'{folder / RUN}' is a damaged record: {part} is missing or no such value. Move it away, and repeat the "
            "command that made the run."
        )


def fingerprint(settings: dict[str, Any]) -> str:
    """Return sixteen hex digits of the sha256 of ``settings`` as canonical JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Return ``key: old -> new`` for every setting that differs, nested keys dotted."""
    changes = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changes += _changes(f"{prefix}{key}", old, new)
    return changes


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """Return how a value changed; of long texts and lists that begin alike, where they begin to differ."""
    if _short(old) != _short(new):
        return [f"{name}: {_short(old)} -> {_short(new)}"]
    if isinstance(old, dict) and isinstance(new, dict):
        return differences(old, new, f"{name}.")
    if isinstance(old, str) and isinstance(new, str):
        alike = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        start = max(0, alike - 10)
        return [f"{name}, from letter {start}: {_short(old[start:])} -> {_short(new[start:])}"]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        changed = [i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
        more = [f"{len(changed) - 1} more of {name}"] if len(changed) > 1 else []
        return [*_changes(f"{name}[{changed[0]}]", old[changed[0]], new[changed[0]]), *more]
    sizes = [f"{len(value)} values" if isinstance(value, list) else _short(value) for value in (old, new)]
    return [f"{name}: {sizes[0]} -> {sizes[1]}"]


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result, without importing them."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return type and name of a device, and for a CPU its cores and the threads in use."""
    import torch

    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    if device.type == "cpu":
        return {"type": "cpu", "name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"type": device.type, "name": device.type}


def cpu_name() -> str:
    """Return the processor's model name as the system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int | None:
    """Return peak memory in bytes: allocated on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
