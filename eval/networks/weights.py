"""Find weight files on this machine, download them where that is allowed, and load them.

The order: an explicit path; ``$DIFFACCEL_WEIGHTS/<file>``; torch hub's cache; the cache of the Hugging Face hub; and,
where downloads are allowed, the URL.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffaccel.errors import DiffAccelError
from diffaccel.files import atomic
from diffaccel.files import sha256 as sha256_of

VARIABLE = "DIFFACCEL_WEIGHTS"
_TIMEOUT = 30  # seconds without a response
_BLOCK = 1 << 20  # bytes per read of a download
_PAIRED = "PSNR and SSIM need no weights."


class MissingWeights(DiffAccelError):
    """A weight file was in none of the places searched."""

    exit_code = 6


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """Public weight file.

    Attributes:
        files: its names in use; all have the same bytes.
        url: where it is published.
        sha256: the digest, or its first digits; empty where none is published.
        hub: the repository of the Hugging Face hub that has it, if any.
        licence: licence of the weights.
        instead: alternative that needs no such weights, for error messages.
    """

    files: tuple[str, ...]
    url: str
    sha256: str = ""
    hub: str = ""
    licence: str = ""
    instead: str = "Without any weights, --extractor tiny works (for distances; no protocol has it)."


# torch hub puts the first eight digits of a file's sha256 into its name.
KNOWN = {
    "inception": WeightFile(
        files=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        sha256="6726825d",
        licence="Apache-2.0",
    ),
    "dinov2": WeightFile(
        files=("dinov2_vitl14_pretrain.pth",),
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        licence="Apache-2.0",
    ),
    "alexnet": WeightFile(
        files=("alexnet-owt-7be5be79.pth",),
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        sha256="7be5be79",
        licence="BSD-3-Clause",
        instead=_PAIRED,
    ),
    "vgg16": WeightFile(
        files=("vgg16-397923af.pth",),
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af",
        licence="BSD-3-Clause",
        instead=_PAIRED,
    ),
}


@dataclass(frozen=True)
class SearchResult:
    """Path of a weight file, or None, and the places searched."""

    path: Path | None
    places: tuple[str, ...]


def look(
    file: str, path: str | os.PathLike[str] | None = None, *, hub: str = "", elsewhere: bool = True
) -> SearchResult:
    """Search this machine for a weight file, as :func:`find` does, without a download or a read."""
    known = _known(file)
    places = [Path(path).expanduser()] if path is not None else _places(known) if elsewhere else []
    files = [place / name if place.is_dir() else place for place in places for name in known.files]
    searched = [str(candidate) for candidate in dict.fromkeys(files)]
    location = next((candidate for candidate in files if candidate.is_file()), None)
    hub = hub or known.hub
    if path is None and hub:
        searched.append(f"the local Hugging Face cache of {hub}")
        cached = (_in_hub_cache(hub, name) for name in known.files)
        location = location or next((candidate for candidate in cached if candidate is not None), None)
    return SearchResult(location, tuple(searched))


def find(
    file: str,
    path: str | os.PathLike[str] | None = None,
    *,
    hub: str = "",
    elsewhere: bool = True,
    download: bool = False,
    flag: str = "",
) -> Path:
    """Return the path of a weight file.

    Args:
        file: its name, or a key of :data:`KNOWN`.
        path: the file itself, or a folder that holds it; then no other place is searched.
        hub: a repository of the Hugging Face hub whose local cache may have it.
        elsewhere: whether to accept a file of that name outside the hub's cache.
        download: fetch the file from its URL if it is in none of the places.
        flag: the command-line option that gives it, for the message, such as ``--extractor inception:/path``.

    Raises:
        MissingWeights: naming the file, the places searched, and what to do.
        DiffAccelError: for a download that failed, or whose digest is not the published one.
    """
    known, result = _known(file), look(file, path, hub=hub, elsewhere=elsewhere)
    if result.path is not None:
        return result.path
    if path is None and download and known.url:
        return fetch(known.url, _torch_hub() / known.files[-1], known.sha256)
    raise MissingWeights(_missing(known, result.places, flag, path is not None, "" if elsewhere else hub))


def fetch(url: str, target: Path, sha256: str = "") -> Path:
    """Download ``url`` to ``target``, which appears only once it is complete and has the digest (or its first digits).

    Raises:
        DiffAccelError: for another digest, naming both, and for a download that failed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, atomic(target) as file:
            while block := response.read(_BLOCK):
                file.write(block)
            file.flush()
            digest = sha256_of(Path(file.name))
            if not digest.startswith(sha256):
                raise DiffAccelError(
                    f"The download of '{url}' has sha256 {digest}, expected {sha256}...; nothing was kept."
                )
    except OSError as error:  # includes errors of the network
        raise DiffAccelError(
            f"'{url}' could not be downloaded to '{target}' ({error}). Fetch it by other means and put it there."
        ) from error
    return target


def load(path: Path) -> dict[str, Any]:
    """Load the state dict of a safetensors or torch file; nothing else is unpickled.

    Raises:
        DiffAccelError: for a file that holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, SafetensorError, EOFError, ...
        reason = str(error).strip().partition("\n")[0]
        raise DiffAccelError(
            f"'{path}' cannot be read as plain weights ({reason}). Objects other than tensors are not unpickled: "
            "save the state dict as safetensors, or fetch the file again."
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DiffAccelError(f"'{path}' holds no state dict of tensors; save one with torch.save or safetensors.")
    return state


def _known(file: str) -> WeightFile:
    return KNOWN.get(file) or next((k for k in KNOWN.values() if file in k.files), WeightFile(files=(file,), url=""))


def _places(known: WeightFile) -> list[Path]:
    folders = [Path(value).expanduser()] if (value := os.environ.get(VARIABLE)) else []
    return [folder / name for folder in (*folders, _torch_hub()) for name in known.files]


def _torch_hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _in_hub_cache(repository: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file)
    return Path(path) if isinstance(path, str) else None


def _missing(known: WeightFile, places: Sequence[str], flag: str, explicit: bool, only_hub: str) -> str:
    """Write the message of a missing file: the places searched, where it is published, and how to supply it."""
    variable = "" if explicit or only_hub or os.environ.get(VARIABLE) else f" {VARIABLE} is not set."
    put = (
        f"run hf download {only_hub} {known.files[0]}" if only_hub else f"put it into the folder that {VARIABLE} names"
    )
    ways = [f"give its path{f' ({flag})' if flag else ''}", put]
    origin = f" It is published at {known.url}." if known.url else ""
    return (
        f"The weights '{known.files[0]}' were not found; looked for {', '.join(places)}.{variable}{origin} "
        f"To supply them, {' or '.join(ways)}. {known.instead}"
    )
