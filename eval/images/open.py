"""What :func:`diffaccel.eval.images.source.open_source` opens: one function for each kind of container."""

from __future__ import annotations

import itertools
import os
import posixpath
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.images import decode
from diffaccel.eval.images.prefetch import ahead
from diffaccel.eval.images.source import Source, count_sizes, to_uint8

_JUNK = "__MACOSX"
STATISTICS = ("mu", "sigma")
PIXELS = "arr_0"
_AT_ONCE = 256  # headers that a thread reads


def open_source(
    source: str | os.PathLike[str] | Tensor | np.ndarray[Any, Any],
    *,
    num: int | None = None,
    ids: Sequence[str] | None = None,
) -> Source:
    """The images in a folder (recursive), a zip, an npz with ``arr_0`` (N, H, W, 3), or a tensor (N, 3, H, W).

    An npz with ``mu`` and ``sigma`` instead is of kind "statistics". Floats in a tensor are taken as [0, 1].

    Args:
        source: a path, or the images themselves.
        num: take the first ``num`` in the order of ids.
        ids: of the images of a tensor.

    Raises:
        DiffAccelError: for what is not there or holds no images, for fewer than ``num``, for ids that are not unique,
            and for files that have no exact RGB form, naming the first.
    """
    if num is not None and num < 1:
        raise DiffAccelError(f"The number of images must be at least 1; got {num}.")
    if isinstance(source, Tensor | np.ndarray):
        return of_tensor(torch.as_tensor(source), num, ids)
    if ids is not None:
        raise DiffAccelError("Ids are given for tensors only; files are their own ids.")
    path = Path(source).expanduser()
    if path.is_dir():
        return of_folder(path, num)
    if not path.is_file():
        raise DiffAccelError(f"There is no '{source}'. Give a folder of images, a zip, an npz, or a tensor.")
    if path.suffix.lower() == ".zip":
        return of_zip(path, num)
    if path.suffix.lower() == ".npz":
        return of_npz(path, num)
    raise DiffAccelError(f"'{source}' is neither a folder nor a zip nor an npz. Put single images into a folder.")


def of_folder(path: Path, num: int | None = None, files: Sequence[str] | None = None) -> Source:
    """Some files of a folder; without ``files`` a run's pictures, or every image below, hidden files left out."""
    found = list(files) if files is not None else _of_run(path)
    if found is None:
        found = []
        for folder, _, inside in os.walk(path):
            where = "" if Path(folder) == path else f"{Path(folder).relative_to(path).as_posix()}/"
            found += [f"{where}{name}" for name in inside if os.path.isfile(f"{folder}/{name}")]

    def read(name: str) -> bytearray:  # memory that a decoder takes as it is
        with open(f"{path}/{name}", "rb") as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            del data[file.readinto(data) :]
        return data

    return _of_files(path, "folder", found, num, read, lambda name: open(f"{path}/{name}", "rb", buffering=0))


def _of_run(path: Path) -> list[str] | None:
    """The pictures of a run of diffaccel, beside which plots and what a search kept may lie; None for other folders."""
    try:
        made = record.read(path / record.RUN, record.SAMPLE)
    except DiffAccelError:  # a file of that name by someone else
        return None
    if made is None:
        return None
    check_finished(made, path)
    return [entry["file"] for entry in made["images"]]


def check_finished(made: dict[str, Any], path: str | Path) -> None:
    """Refuse the record of a run that was stopped."""
    if made["state"] != "finished":
        raise DiffAccelError(f"The run in '{path}' is unfinished. Repeat the command that made it; it goes on.")


def of_zip(path: Path, num: int | None) -> Source:
    """Every image in a zip archive."""
    archives: dict[int, zipfile.ZipFile] = {}

    def archive() -> zipfile.ZipFile:
        """Each process opens its own: forked ones share a file's position, and would move it under each other."""
        if (process := os.getpid()) not in archives:
            archives[process] = zipfile.ZipFile(path)
        return archives[process]

    try:
        names = [entry.filename for entry in archive().infolist() if not entry.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise DiffAccelError(f"'{path}' cannot be read as a zip ({error}). Make it again.") from error

    def read(name: str) -> bytes:
        try:
            return archive().read(name)
        except (zipfile.BadZipFile, OSError) as error:
            raise DiffAccelError(f"'{name}' in '{path}' cannot be read ({error}). Make the zip again.") from error

    return _of_files(path, "zip", names, num, read, lambda name: archive().open(name))  # type: ignore[arg-type,return-value]


def of_npz(path: Path, num: int | None) -> Source:
    """``arr_0`` (N, H, W, 3) uint8, or statistics. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive.files)
        pixels = _array(path, PIXELS) if PIXELS in keys else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DiffAccelError(f"'{path}' cannot be read as an npz ({error}). Make it again.") from error
    if pixels is None:
        if not set(STATISTICS) <= set(keys):
            raise DiffAccelError(
                f"'{path}' holds neither images ('{PIXELS}') nor statistics ('mu' and 'sigma'): its keys are "
                f"{', '.join(sorted(keys)) or 'none'}."
            )
        return Source(path.stem, "statistics", path=path)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise DiffAccelError(
            f"'{PIXELS}' in '{path}' must be uint8 of shape (N, H, W, 3); got {pixels.dtype} of shape {pixels.shape}."
        )
    source = of_tensor(torch.from_numpy(pixels).permute(0, 3, 1, 2), num, None, str(path))
    if set(STATISTICS) <= set(keys):
        source.warnings.append(
            f"'{path.name}' also holds statistics, possibly of more images than the {len(pixels)} in it."
        )
    source.name, source.kind, source.path = path.stem, "npz", path
    return source


def of_tensor(images: Tensor, num: int | None, ids: Sequence[str] | None, name: str = "the tensor") -> Source:
    """Images in memory: uint8, or floats in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise DiffAccelError(f"Images must have shape (N, 3, H, W); {name} has {tuple(images.shape)}.")
    if ids is not None and len(ids) != len(images):
        raise DiffAccelError(f"{len(images)} images were given with {len(ids)} ids. Give one for each.")
    names = [f"{i:06d}" for i in range(len(images))] if ids is None else list(ids)
    if images.is_floating_point() and bool((bad := ~images.isfinite().flatten(1).all(1)).any()):
        raise DiffAccelError(
            f"{int(bad.sum())} of {len(images)} images of {name} hold values that are not finite, the first "
            f"'{names[int(bad.nonzero()[0])]}'. Look at the network that made them."
        )
    images = to_uint8(images)
    order = _chosen(names, num, name)
    if order != list(range(len(images))):
        images = images[order] if order != list(range(len(order))) else images[: len(order)]

    def block(within: Sequence[int]) -> Tensor:
        first, last = within[0], within[-1] + 1
        contiguous = last - first == len(within) and list(within) == list(range(first, last))
        return images[first:last] if contiguous else images[list(within)]

    return Source(
        name="tensor", kind="tensor", ids=tuple(names[i] for i in order), block=block,
        sizes={(images.shape[2], images.shape[3]): len(images)},
        image=lambda index: images[index], content=lambda index: _content(images[index]),
    )  # fmt: skip


def _of_files(
    path: Path,
    kind: str,
    found: list[str],
    num: int | None,
    read: Callable[[str], decode.Data],
    handle: Callable[[str], BinaryIO],
) -> Source:
    files = [(name, clean) for name in found if _wanted(clean := _cleaned(name))]
    ids = [posixpath.splitext(clean)[0] for _, clean in files]
    order = _chosen(ids, num, f"'{path}'")
    folders = len({posixpath.dirname(clean) for _, clean in files})
    files = [files[i] for i in order]
    names = [name for name, _ in files]  # as they were found: an archive knows './a.png' by no other name

    def look(name: str) -> decode.Header:
        with handle(name) as file:
            return decode.header(file, name)

    # many in a row, in few threads: a header takes less than handing it from one to another does
    headers = list(ahead(look, names, workers=2, each=_AT_ONCE))
    source = Source(
        name=path.stem if kind == "zip" else path.resolve().name, kind=kind, ids=tuple(ids[i] for i in order),
        files=dict(zip((ids[i] for i in order), names, strict=True)), sizes=count_sizes(h.size for h in headers),
        path=path, threads=all(h.simple for h in headers),
        image=lambda index: decode.decode(read(names[index]), names[index]), content=lambda index: read(names[index]),
    )  # fmt: skip
    lossy = sum(h.lossy for h in headers)
    if lossy:
        source.warnings.append(
            f"{lossy} of {len(names)} images in '{path}' are stored with loss (JPEG, lossy WebP): distances move."
        )
    if len(source.sizes) > 1:
        some = ", ".join(f"{n} of {w}x{h}" for (h, w), n in list(source.sizes.items())[:4])
        source.warnings.append(
            f"'{path}' holds images of {len(source.sizes)} sizes: {some}{', ...' if len(source.sizes) > 4 else ''}."
        )
    used = len({posixpath.dirname(clean) for _, clean in files})
    if used < folders:
        source.warnings.append(f"The first {len(names)} images of '{path}' come from {used} of its {folders} folders.")
    return source


def _cleaned(name: str) -> str:
    """Without the "." and the empty parts that archives may have in their paths."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _wanted(name: str) -> bool:
    hidden = any(part.startswith(".") or part == _JUNK for part in name.split("/"))
    return posixpath.splitext(name)[1].lower() in decode.SUFFIXES and not hidden


def _chosen(ids: list[str], num: int | None, name: str) -> list[int]:
    """Positions in the order of ids, the first ``num`` of them."""
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    for one, other in itertools.pairwise(order):
        if ids[one] == ids[other]:
            raise DiffAccelError(f"Two images of {name} have the id '{ids[one]}'. Ids must be unique: rename one.")
    if not ids:
        raise DiffAccelError(f"{name} holds no images. Known files: {', '.join(decode.SUFFIXES)}.")
    if num is not None and num > len(ids):
        raise DiffAccelError(f"{num} images were asked for, but {name} holds {len(ids)}. Ask for fewer, or add images.")
    return order[:num]


def _content(image: Tensor) -> bytes:
    """What tells an image's pixels from any other's."""
    pixels = image.cpu().contiguous()
    return f"{pixels.shape[1]} {pixels.shape[2]} ".encode() + pixels.numpy().tobytes()


def _array(path: Path, key: str) -> np.ndarray[Any, Any]:
    """An array of an npz; one that is stored without compression stays on the disk until it is read."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        if entry.compress_type == zipfile.ZIP_STORED:
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                reader = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = reader(file)
                header = file.tell()
            with open(
                path, "rb"
            ) as raw:  # the entry's data come after a header of 30 bytes, its name and its extra field
                raw.seek(entry.header_offset + 26)
                start = entry.header_offset + 30 + sum(np.frombuffer(raw.read(4), "<u2").tolist())
            if not fortran and not dtype.hasobject:
                return np.memmap(path, dtype, "c", start + header, shape)
    with np.load(path, allow_pickle=False) as loaded:
        return np.asarray(loaded[key])
