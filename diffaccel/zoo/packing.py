"""Packed model folders: weights as int8 rows with scales, a sha256 manifest; packing and unpacking.

A packed folder is flat and holds

- ``weights-00001-of-0000N.zip``: every tensor of the model, cut into shards, each one deflated safetensors file,
- ``files.zip``: configurations, tokenizers and other small files, as they are,
- ``manifest.json``: format version, sizes and sha256 of both, and the dtype that every tensor is unpacked to.

A model may share tensors with another packed one, its base, which lies beside it: those that are equal to the bit once
they are unpacked, in files of the same name, are stored once. Matrices that differ may be stored as a change of low
rank, ``W = base + up down``, with both factors in int8.

A matrix W is stored as ``q = round(W / s)`` in int8 with one scale ``s = max|row| / 127`` per output row; convolutions
are flattened to (out, in * kernel). Tensors of fewer than two dimensions stay fp32: they are small and sensitive.
The row maximum is rounded to the tensor's own dtype before it becomes a scale, so packing an unpacked bf16 folder
gives the same codes and the same scales again.
"""

from __future__ import annotations

import fnmatch
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from diffaccel.errors import DiffAccelError
from diffaccel.files import sha256
from diffaccel.zoo import low_rank

if TYPE_CHECKING:
    import torch

FORMAT = "diffaccel-packed"
VERSION = 1
MANIFEST = "manifest.json"
FILES = "files.zip"
SHARD_BYTES = 15 * 2**20
_SHARD = "weights.safetensors"
_HEADER_ENTRY = 96  # bytes of a shard's JSON header that one tensor takes at most, beside its name
_SKIPPED = (".gitattributes", ".DS_Store")


def pack(
    folder: str | Path, out: str | Path, *, keep: Sequence[str] = (), shard_bytes: int = SHARD_BYTES,
    base: str | Path | None = None, change_bytes: int = 0,
) -> Path:  # fmt: skip
    """Pack a plain model folder (safetensors and text files) into ``out`` and return ``out``.

    Args:
        folder: the plain folder.
        out: the packed folder; an older packing in it is replaced.
        keep: patterns such as ``"vae/*"``; safetensors files that match are stored in their own dtype, not int8.
        shard_bytes: largest size of a packed file of weights.
        base: a packed folder to share tensors with; it must lie beside ``out`` when that is unpacked.
        change_bytes: of the changes of low rank that stand for matrices which differ from the base's; ranks are chosen
            so that so many bytes change the weights the most. 0 stores such matrices whole.

    Raises:
        DiffAccelError: for a folder without files, a tensor that is not finite, or one larger than a shard.
    """
    folder, out = Path(folder), Path(out)
    sources = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _SKIPPED)
    if not sources:
        raise DiffAccelError(f"There is nothing to pack: '{folder}' holds no files; give a saved model folder.")
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("weights-*"), out / FILES, out / MANIFEST]:
        old.unlink(missing_ok=True)

    tensors: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    plain = [p for p in sources if p.suffix != ".safetensors"]
    if change_bytes and base is None:
        raise DiffAccelError(f"change_bytes is {change_bytes}, but there is no base to change. Give base.")
    shared = None if base is None else _Base(Path(base))
    changes: dict[str, Any] = {}
    for source in sources:
        if source.suffix == ".safetensors":
            relative = source.relative_to(folder).as_posix()
            exact = any(fnmatch.fnmatch(relative, pattern) for pattern in keep)
            changed = changes if change_bytes else None
            weights[relative] = _encode_file(source, relative, exact, tensors, shared, changed)
    for key, parts in low_rank.factors(changes, change_bytes).items():
        for part, factor in zip(("up", "down"), parts, strict=True):
            tensors[_key(key, part)], tensors[_scale_key(_key(key, part))] = quantize_rows(factor)
    _write_zip(out / FILES, {p.relative_to(folder).as_posix(): p.read_bytes() for p in plain})
    packed = [FILES, *_write_shards(out, tensors, shard_bytes)]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "packed": {name: _fingerprint(out / name) for name in packed},
        "files": [p.relative_to(folder).as_posix() for p in plain],
        "weights": weights,
        **({"base": Path(base).name} if base is not None else {}),
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return out


def unpack(packed: str | Path, out: str | Path, *, base: str | Path | None = None) -> Path:
    """Unpack a packed folder into the plain folder ``out`` and return ``out``; the packed files are verified first.

    Args:
        base: the packed folder that it shares tensors with; by default the one of that name beside it.
    """
    from safetensors.torch import save_file

    packed, out = Path(packed), Path(out)
    manifest = read_manifest(packed)
    verify(packed, manifest["packed"], "Packed model file", "reinstall diffaccel or restore the file")
    out.mkdir(parents=True, exist_ok=True)
    _read_zip(packed / FILES, out, manifest["files"])
    tensors = _read_shards(packed, manifest["packed"])
    shared = _Base(Path(base or packed.parent / manifest["base"])) if "base" in manifest else None
    for relative, entry in manifest["weights"].items():
        decoded = {}
        for name, dtype in entry["dtypes"].items():
            if shared is not None and name in entry.get("changed", ()):
                decoded[name] = _changed(shared, tensors, relative, name, dtype)
            elif shared is not None and name in entry.get("shared", ()):
                decoded[name] = shared.tensor(relative, name, dtype)
            else:
                decoded[name] = _decode(tensors, relative, name, dtype)
        target = _inside(out, relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(decoded, target, metadata=entry["metadata"] or None)
    return out


def read_manifest(packed: str | Path) -> dict[str, Any]:
    """Read the manifest of a packed folder, checked for format and version."""
    path = Path(packed) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise DiffAccelError(f"'{packed}' is not a packed model: it has no {MANIFEST}.") from None
    except (OSError, ValueError) as error:
        raise DiffAccelError(f"'{path}' cannot be read ({error}); reinstall diffaccel or restore the file.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DiffAccelError(f"'{path}' is not a {FORMAT} manifest; reinstall diffaccel or restore the file.")
    if manifest.get("version") != VERSION:
        raise DiffAccelError(
            f"'{path}' has format version {manifest.get('version')}; this diffaccel reads version {VERSION}: "
            "install the diffaccel that wrote it, or a newer one."
        )
    return manifest


def fingerprints(folder: str | Path, files: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of files below ``folder`` (all of them by default), by relative name."""
    folder = Path(folder)
    names = files if files is not None else (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name: _fingerprint(folder / name) for name in sorted(names)}


def verify(folder: str | Path, expected: dict[str, dict[str, Any]], kind: str, fix: str) -> None:
    """Compare files with their recorded size and sha256, and raise for the first that differs.

    Args:
        folder: that holds the files.
        expected: size and sha256 by relative name.
        kind: what the files are, for the message.
        fix: what to do about it, for the message.
    """
    for name, entry in expected.items():
        path = _inside(Path(folder), name)
        if not path.is_file():
            raise DiffAccelError(f"{kind} '{path}' is missing; {fix}.")
        size = path.stat().st_size
        if size != entry["size"]:
            raise DiffAccelError(f"{kind} '{path}' has {size} bytes, expected {entry['size']}; {fix}.")
        digest = sha256(path)
        if digest != entry["sha256"]:
            raise DiffAccelError(f"{kind} '{path}' has sha256 {digest[:12]}, expected {entry['sha256'][:12]}; {fix}.")


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight to int8 codes of its shape and fp32 scales ``(rows,)``, with weight ~= codes * scale."""
    import torch

    rows = weight.detach().float().flatten(1)
    # The maximum is kept representable in the weight's dtype: 127 * s then decodes to it exactly, and packing the
    # decoded matrix again finds the same scale.
    scale = rows.abs().amax(1).to(weight.dtype).float() / 127
    codes = torch.round(rows / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).clamp_(-127, 127)
    return codes.to(torch.int8).view(weight.shape), scale


def dequantize_rows(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the fp32 matrix of int8 codes and row scales."""
    return codes.float() * scale.view(-1, *[1] * (codes.dim() - 1))


class _Base:
    """The tensors of a packed folder that another shares."""

    def __init__(self, packed: Path) -> None:
        manifest = read_manifest(packed)
        verify(packed, manifest["packed"], "Packed model file", "reinstall diffaccel or restore the file")
        self.weights = manifest["weights"]
        self.tensors = _read_shards(packed, manifest["packed"])

    def tensor(self, relative: str, name: str, dtype: str) -> torch.Tensor:
        """Return a tensor as it is unpacked."""
        return _decode(self.tensors, relative, name, dtype)

    def alike(self, relative: str, name: str, tensor: torch.Tensor) -> bool:
        """Return whether the base has a finite matrix of this dtype and shape where ``tensor`` is one."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dim() < 2 or self.weights.get(relative, {}).get("dtypes", {}).get(name) != dtype:
            return False
        return tensor.is_floating_point() and self.tensor(relative, name, dtype).shape == tensor.shape

    def has(self, relative: str, name: str, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is equal to the base's, in dtype and to the bit."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if self.weights.get(relative, {}).get("dtypes", {}).get(name) != dtype:
            return False
        own = self.tensor(relative, name, dtype)
        return own.shape == tensor.shape and bool((own == tensor).all())


def _encode_file(
    source: Path, relative: str, exact: bool, tensors: dict[str, Any], base: _Base | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Add the encoded tensors of a safetensors file to ``tensors`` and return its entry in the manifest.

    Matrices that the base has too go into ``changes`` instead, if that is given, as what they differ by.
    """
    from safetensors import safe_open

    dtypes: dict[str, str] = {}
    shared: list[str] = []
    changed: list[str] = []
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() or {}
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            dtypes[name] = str(tensor.dtype).removeprefix("torch.")
            key = _key(relative, name)
            if base is not None and base.has(relative, name, tensor):
                shared.append(name)
            elif changes is not None and base is not None and not exact and base.alike(relative, name, tensor):
                changed.append(name)
                changes[key] = tensor.float() - base.tensor(relative, name, "float32")
            elif exact or not tensor.is_floating_point() or tensor.numel() == 0:
                tensors[key] = tensor.contiguous()
            elif tensor.dim() < 2:
                tensors[key] = tensor.float()
            else:
                if not tensor.isfinite().all():
                    raise DiffAccelError(f"Tensor '{name}' in '{source}' is not finite; train or export it again.")
                tensors[key], tensors[_scale_key(key)] = quantize_rows(tensor)
    lists = {"shared": shared, "changed": changed}
    return {"dtypes": dtypes, "metadata": metadata, **{kind: names for kind, names in lists.items() if names}}


def _decode(tensors: dict[str, torch.Tensor], relative: str, name: str, dtype: str) -> torch.Tensor:
    import torch

    key = _key(relative, name)
    if key not in tensors:
        raise DiffAccelError(f"The packed weights lack tensor '{name}' of '{relative}'; restore the packed folder.")
    tensor, scale = tensors[key], tensors.get(_scale_key(key))
    if scale is not None:
        tensor = dequantize_rows(tensor, scale)
    return tensor.to(getattr(torch, dtype)).contiguous()


def _changed(base: _Base, tensors: dict[str, torch.Tensor], relative: str, name: str, dtype: str) -> torch.Tensor:
    """Return a matrix of the base with its change of low rank, if it has one."""
    import torch

    matrix, key = base.tensor(relative, name, dtype).float(), _key(relative, name)
    parts = [_key(key, part) for part in ("up", "down")]
    if parts[0] in tensors:
        up, down = (dequantize_rows(tensors[part], tensors[_scale_key(part)]) for part in parts)
        matrix = matrix + (up @ down).view_as(matrix)
    return matrix.to(getattr(torch, dtype)).contiguous()


def _key(relative: str, name: str) -> str:
    return f"{relative}|{name}"


def _scale_key(key: str) -> str:
    return f"{key}|scale"


def _write_shards(out: Path, tensors: dict[str, torch.Tensor], limit: int) -> list[str]:
    from safetensors.torch import save

    shards: list[dict[str, torch.Tensor]] = []
    room = 0
    for key in sorted(tensors):
        size = tensors[key].numel() * tensors[key].element_size() + len(key) + _HEADER_ENTRY
        if size > limit - _HEADER_ENTRY:
            raise DiffAccelError(f"Tensor '{key}' needs {size} bytes, a shard has {limit}; raise shard_bytes.")
        if not shards or size > room:
            shards.append({})
            room = limit - _HEADER_ENTRY
        shards[-1][key] = tensors[key]
        room -= size
    names = [f"weights-{i:05d}-of-{len(shards):05d}.zip" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_zip(out / name, {_SHARD: save(shard)})  # deflated: int8 codes of weights hold about seven bits each
    return names


def _read_shards(packed: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if name.startswith("weights-"):
            with zipfile.ZipFile(packed / name) as archive:
                tensors.update(load(archive.read(_SHARD)))
    return tensors


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            # A fixed date keeps the archive's bytes the same whenever the same files are packed.
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            archive.writestr(info, data, zipfile.ZIP_DEFLATED, 9)


def _read_zip(path: Path, out: Path, names: Sequence[str]) -> None:
    with zipfile.ZipFile(path) as archive:
        if sorted(archive.namelist()) != sorted(names):
            raise DiffAccelError(f"'{path}' does not hold the files its manifest names; restore the packed folder.")
        for name in names:
            target = _inside(out, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))


def _inside(folder: Path, relative: str) -> Path:
    """Return ``folder / relative``; raise for a name that would leave the folder."""
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or "\\" in relative or ":" in relative:
        raise DiffAccelError(f"A manifest names '{relative}', which is outside its folder; restore the packed folder.")
    return folder / relative


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "size": os.path.getsize(path)}
