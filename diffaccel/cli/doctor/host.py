"""Checks of the host for ``diffaccel doctor``: packages, processor, GPUs, disks, the video encoder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel import record
from diffaccel.errors import DiffAccelError, first_line
from diffaccel.files import Clip, write_mp4

OPTIONAL = ("triton", "peft", "kernels", "flash-attn", "sageattention", "xformers")
LOW_DISK = 2 << 30
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One row of the report: whether something works (None: not tried), and the details or the reason why not."""

    name: str
    works: bool | None
    detail: str


def tried(name: str, attempt: Callable[[], str]) -> Check:
    """Run an attempt, which returns details and raises when it fails, and return its outcome."""
    try:
        return Check(name, True, attempt())
    except Exception as error:
        return Check(name, False, reason(error))


def reason(error: BaseException) -> str:
    """Return why something failed, on one line."""
    plain = isinstance(error, DiffAccelError | RuntimeError | OSError) and str(error)
    return first_line(error) if plain else f"{type(error).__name__}: {first_line(error)}"


def software() -> list[Check]:
    """Check Python and the packages that diffaccel requires against the versions it requires; then optional ones."""
    from packaging.requirements import Requirement

    checks = [Check("python", True, f"{platform.python_version()} on {platform.platform(terse=True)}")]
    try:
        requires = importlib.metadata.requires("diffaccel") or ()
        checks.append(Check("diffaccel", True, importlib.metadata.version("diffaccel")))
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path: the requirements are in its metadata
        requires = ()
        checks.append(Check("diffaccel", None, "imported without being installed; pip install -e . to check packages"))
    requirements = [Requirement(line) for line in requires]
    required = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in required:
        checks.append(tried(requirement.name, lambda r=requirement: _package_version(r.name, str(r.specifier))))  # type: ignore[misc]
    for name in OPTIONAL:
        if name not in {r.name for r in required}:
            try:
                checks.append(Check(name, True, importlib.metadata.version(name)))
            except importlib.metadata.PackageNotFoundError:
                checks.append(Check(name, None, "not installed; optional"))
    return checks


def _package_version(name: str, required: str) -> str:
    from packaging.specifiers import SpecifierSet

    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise DiffAccelError(f"not installed; pip install '{name}{required}'") from None
    if not SpecifierSet(required).contains(version, prereleases=True):
        raise DiffAccelError(f"{version}, but diffaccel needs {required}; pip install '{name}{required}'")
    return version


def cpu() -> list[Check]:
    """Check the processor, its memory, torch's threads, and how they wait for each other."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [
        tried("processor", record.cpu_name),
        tried("cores", lambda: f"{usable} of {os.cpu_count()} usable by this process"),
        tried("memory", lambda: f"{memory() / GIB:.1f} GiB" if memory() else "unknown"),
        tried("instructions", lambda: __import__("torch").backends.cpu.get_cpu_capability()),
        tried("threads", lambda: _threads(usable)),
        tried("waiting", _waiting),
    ]


def memory() -> int:
    """Return the machine's memory in bytes; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return 0


def _threads(usable: int) -> str:
    import torch

    count = torch.get_num_threads()
    if count > usable:
        raise DiffAccelError(f"{count} threads share {usable} cores and wait for each other; set OMP_NUM_THREADS")
    return f"{count} (torch), {torch.get_num_interop_threads()} between operations"


def _waiting() -> str:
    """Return which OpenMP torch loaded, and how the environment tells its threads to wait."""
    import torch

    torch.ones(8).sum()
    maps = Path("/proc/self/maps")
    loaded = set(re.findall(r"lib([gi]?omp\d*)", maps.read_text())) if maps.exists() else set()
    settings = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ}
    text = ", ".join(f"{name}={value}" for name, value in settings.items()) or "the library's own default"
    if loaded and "gomp" not in loaded and "OMP_WAIT_POLICY" not in settings:
        text = "the library's own default (it is not GNU's, which GOMP_SPINCOUNT speaks to)"
    return f"{text}; OpenMP library: {', '.join(sorted(loaded)) or 'unknown'}"


def gpus() -> tuple[list[dict[str, Any]], str | None]:
    """Return every CUDA device, each tried with a small matrix product, and why there is none."""
    try:
        import torch

        torch.cuda.init()
        count = torch.cuda.device_count()
    except Exception as error:
        return [], reason(error)
    return [_gpu(number) for number in range(count)], None if count else "torch sees no CUDA device"


def _gpu(number: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(number)
    card = {
        "name": properties.name, "memory": properties.total_memory, "free": None,
        "capability": f"{properties.major}.{properties.minor}", "driver": _driver(), "cuda": torch.version.cuda,
    }  # fmt: skip

    def multiply() -> str:
        card["free"] = torch.cuda.mem_get_info(number)[0]
        x = torch.ones(64, 64, device=f"cuda:{number}")
        if float((x @ x).sum()) != 64.0**3:
            raise DiffAccelError("a product of ones came out wrong")
        return "multiplies"

    check = tried(properties.name, multiply)
    return {**card, "works": check.works, "detail": check.detail}


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    if file.exists() and (version := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text())):
        return version[0]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return process.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def device_without_cuda() -> str:
    """Return the best device when there is no CUDA."""
    try:
        import torch

        return "mps" if torch.backends.mps.is_available() else "cpu"
    except Exception:
        return "cpu"


def storage() -> list[Check]:
    """Check the free space of the folders that are written to, each with a temporary file."""
    from diffaccel.zoo.store import cache_dir

    places: dict[str, Callable[[], Path]] = {
        "diffaccel's cache": cache_dir,
        "hub's cache": lambda: Path(__import__("huggingface_hub").constants.HF_HUB_CACHE),
        "this folder": Path.cwd,
    }
    return [tried(name, lambda place=place: _free_space(place())) for name, place in places.items()]  # type: ignore[misc]


def _free_space(folder: Path) -> str:
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"x")
    except OSError as error:
        raise DiffAccelError(f"'{nearest}' cannot be written ({error.strerror})") from error
    free = shutil.disk_usage(nearest).free
    if free < LOW_DISK:
        raise DiffAccelError(f"only {free / GIB:.1f} GiB free in '{folder}'")
    return f"{free / GIB:.1f} GiB free in {folder}"


def video() -> list[Check]:
    """Check the video encoder."""
    return [tried("mp4", _encode)]


def _encode() -> str:
    """Encode two frames as ``diffaccel sample`` does for video."""
    import imageio_ffmpeg
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="diffaccel-") as scratch:
        file = Path(scratch) / "two.mp4"
        frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
        write_mp4(file, Clip(frames, fps=8))
        return f"{file.stat().st_size} bytes from two frames by ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}"
