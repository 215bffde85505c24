"""Where weight files are found without a network, and how one is fetched when that is allowed.

The order: the path that was given; ``$DIFFACCEL_WEIGHTS/<file>``; the cache of the Hugging Face hub; torch hub's cache;
and, when downloads are allowed, its address.
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
_TIMEOUT = 30  # seconds without an answer
_PIECE = 1 << 20
_PAIRED = "PSNR and SSIM need no weights."


class MissingWeights(DiffAccelError):
    """A weight file that is in none of the places where it was looked for."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class Known:
    """A public weight file.

    Attributes:
        files: the names it goes by; all have the same bytes.
        url: where it is published.
        sha256: the digest, or how it starts; empty when it is not published.
        hub: the repository of the Hugging Face hub that has it, if any.
        licence: of the weights.
        instead: what works without them.
    """

    files: tuple[str, ...]
    url: str
    sha256: str = ""
    hub: str = ""
    licence: str = ""
    instead: str = "Without any weights, --extractor tiny works (for distances; no protocol has it)."


# torch hub puts the first eight digits of a file's sha256 into its name.
KNOWN = {
    "inception": Known(
        files=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        sha256="6726825d",
        licence="Apache-2.0",
    ),
    "dinov2": Known(
        files=("dinov2_vitl14_pretrain.pth",),
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        licence="Apache-2.0",
    ),
    "alexnet": Known(
        files=("alexnet-owt-7be5be79.pth",),
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        sha256="7be5be79",
        licence="BSD-3-Clause",
        instead=_PAIRED,
    ),
    "vgg16": Known(
        files=("vgg16-397923af.pth",),
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af",
        licence="BSD-3-Clause",
        instead=_PAIRED,
    ),
}


@dataclass(frozen=True)
class Looked:
    """Where a weight file is, if it is anywhere, and where it was looked for."""

    path: Path | None
    places: tuple[str, ...]


def look(file: str, path: str | os.PathLike[str] | None = None, *, hub: str = "", elsewhere: bool = True) -> Looked:
    """Look for a weight file on this machine, as :func:`find` does; nothing is fetched or read."""
    known = _known(file)
    places = [Path(path).expanduser()] if path is not None else _places(known) if elsewhere else []
    files = [place / name if place.is_dir() else place for place in places for name in known.files]
    looked = [str(one) for one in dict.fromkeys(files)]
    found = next((candidate for candidate in files if candidate.is_file()), None)
    hub = hub or known.hub
    if path is None and hub:
        looked.append(f"the local Hugging Face cache of {hub}")
        cached = (_in_hub_cache(hub, name) for name in known.files)
        found = found or next((one for one in cached if one is not None), None)
    return Looked(found, tuple(looked))


def find(
    file: str,
    path: str | os.PathLike[str] | None = None,
    *,
    hub: str = "",
    elsewhere: bool = True,
    download: bool = False,
    flag: str = "",
) -> Path:
    """The path of a weight file.

    Args:
        file: its name, or a key of :data:`KNOWN`.
        path: the file itself, or a folder that holds it; then nowhere else is looked.
        hub: a repository of the Hugging Face hub whose local cache may have it.
        elsewhere: whether a file of that name outside the hub's cache is the one that is meant.
        download: fetch it from its address when it is in none of the places.
        flag: how the command line gives it, for the message, such as ``--extractor inception:/path``.

    Raises:
        MissingWeights: naming the file, where it was looked for, and what to do.
        DiffAccelError: for a download whose digest is not the published one, or that failed.
    """
    known, looked = _known(file), look(file, path, hub=hub, elsewhere=elsewhere)
    if looked.path is not None:
        return looked.path
    if path is None and download and known.url:
        return fetch(known.url, _torch_hub() / known.files[-1], known.sha256)
    raise MissingWeights(_missing(known, looked.places, flag, path is not None, "" if elsewhere else hub))


def fetch(url: str, target: Path, sha256: str = "") -> Path:
    """Download ``url`` to ``target``, which appears only when it is whole and has the digest (or its start).

    Raises:
        DiffAccelError: for another digest, naming both, and for a download that failed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, atomic(target) as file:
            while piece := answer.read(_PIECE):
                file.write(piece)
            file.flush()
            got = sha256_of(Path(file.name))
            if not got.startswith(sha256):
                raise DiffAccelError(
                    f"The download of '{url}' has sha256 {got}, expected {sha256}...; nothing was kept."
                )
    except OSError as error:  # of the network too
        raise DiffAccelError(
            f"'{url}' could not be downloaded to '{target}' ({error}). Fetch it by other means and put it there."
        ) from error
    return target


def load(path: Path) -> dict[str, Any]:
    """The state dict in a safetensors or torch file. Nothing else is unpickled.

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


def _known(file: str) -> Known:
    return KNOWN.get(file) or next((k for k in KNOWN.values() if file in k.files), Known(files=(file,), url=""))


def _places(known: Known) -> list[Path]:
    folders = [Path(value).expanduser()] if (value := os.environ.get(VARIABLE)) else []
    return [folder / name for folder in (*folders, _torch_hub()) for name in known.files]


def _torch_hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _in_hub_cache(repository: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def _missing(known: Known, places: Sequence[str], flag: str, explicit: bool, only_hub: str) -> str:
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
