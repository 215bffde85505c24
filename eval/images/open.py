"""Open images as a :class:`Source`: one function for each kind of container, and ``open_source`` for all."""

from __future__ import annotations

import os
import posixpath
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from diffaccel import record
from diffaccel.errors import DiffAccelError, size_text
from diffaccel.eval.images import decode, names
from diffaccel.eval.images.folders import files_below
from diffaccel.eval.images.prefetch import ahead
from diffaccel.eval.images.recorded import check_files, check_finished
from diffaccel.eval.images.source import Source, count_sizes, to_uint8

STATISTICS = ("mu", "sigma")
PIXELS = "arr_0"
_HEADERS_AT_ONCE = 256  # read by one thread
_ENCRYPTED = 1  # flag of a zip's entry


def open_source(
    source: str | os.PathLike[str] | Tensor | np.ndarray[Any, Any],
    *,
    num: int | None = None,
    ids: Sequence[str] | None = None,
) -> Source:
    """Open the images in a folder (recursive), a zip, an npz with ``arr_0`` (N, H, W, 3), or a tensor (N, 3, H, W).

    An npz with ``mu`` and ``sigma`` instead becomes a source of kind "statistics". Floats in a tensor are in [0, 1].

    Args:
        source: a path, or the images themselves.
        num: take the first ``num`` in the order of ids.
        ids: ids of the images of a tensor.

    Raises:
        DiffAccelError: for a path that does not exist or holds no images, for fewer images than ``num``, for ids that
            are not unique, and for files that have no exact RGB form, naming the first.
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
    """Open the ``files`` of a folder; by default a run's pictures, or every image below it that is not hidden.

    Links are followed; a warning counts those that lead nowhere, or to files that are there already.
    """
    listed, warnings = list(files) if files is not None else _files_of_run(path), []
    if listed is None:
        below = files_below(path)
        listed = below.names
        if below.broken:
            warnings.append(f"{len(below.broken)} links in '{path}' lead nowhere, the first '{below.broken[0]}'.")
        if below.again:
            warnings.append(
                f"{len(below.again)} links in '{path}' lead to folders whose files are there already, the first "
                f"'{below.again[0]}'."
            )

    def read(name: str) -> bytearray:  # writable memory, which torch's decoder takes without a copy
        with open(f"{path}/{name}", "rb") as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            del data[file.readinto(data) :]
        return data

    source = _of_files(path, "folder", listed, num, read, lambda name: open(f"{path}/{name}", "rb", buffering=0))
    source.warnings += warnings
    return source


def _files_of_run(path: Path) -> list[str] | None:
    """List the pictures of a finished run of diffaccel; return None for other folders.

    The folder of a run may also hold plots and the candidates of a search.
    """
    try:
        run = record.read(path / record.RUN, record.SAMPLE)
    except DiffAccelError:  # a file of that name from another program
        return None
    if run is None:
        return None
    record.check_run(run, path)
    check_finished(run, path)
    check_files(run, path)
    return [entry["file"] for entry in run["images"]]


def of_zip(path: Path, num: int | None) -> Source:
    """Open every image in a zip archive."""
    archives: dict[int, zipfile.ZipFile] = {}

    def archive() -> zipfile.ZipFile:
        """Open the archive once a process: forked processes share a file's position and would disturb each other."""
        if (process := os.getpid()) not in archives:
            archives[process] = zipfile.ZipFile(path)
        return archives[process]

    try:
        entries = [entry for entry in archive().infolist() if not entry.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise DiffAccelError(f"'{path}' cannot be read as a zip ({error}). Make it again.") from error

    def read(name: str) -> bytes:
        try:
            return archive().read(name)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, zlib.error) as error:
            raise DiffAccelError(f"'{name}' in '{path}' cannot be read ({error}). Make the zip again.") from error

    if encrypted := [entry.filename for entry in entries if entry.flag_bits & _ENCRYPTED]:
        raise DiffAccelError(
            f"{len(encrypted)} of {len(entries)} files in '{path}' are encrypted, the first '{encrypted[0]}', and no "
            "password can be given. Unpack it into a folder."
        )
    listed = [entry.filename for entry in entries]
    return _of_files(path, "zip", listed, num, read, lambda name: archive().open(name))  # type: ignore[arg-type,return-value]


def of_npz(path: Path, num: int | None) -> Source:
    """Open an npz of ``arr_0`` (N, H, W, 3) uint8, or of statistics. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive.files)
        pixels = _npz_array(path, PIXELS) if PIXELS in keys else None
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:  # also encrypted ones
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
    """Open images in memory: uint8, or floats in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise DiffAccelError(f"Images must have shape (N, 3, H, W); {name} has {tuple(images.shape)}.")
    if ids is not None and len(ids) != len(images):
        raise DiffAccelError(f"{len(images)} images were given with {len(ids)} ids. Give one for each.")
    labels = [f"{i:06d}" for i in range(len(images))] if ids is None else list(ids)
    if images.is_floating_point() and bool((bad := ~images.isfinite().flatten(1).all(1)).any()):
        raise DiffAccelError(
            f"{int(bad.sum())} of {len(images)} images of {name} hold values that are not finite, the first "
            f"'{labels[int(bad.nonzero()[0])]}'. Look at the network that made them."
        )
    images = to_uint8(images)
    order = names.order(labels, num, name)
    if order != list(range(len(images))):
        images = images[order] if order != list(range(len(order))) else images[: len(order)]

    def block(positions: Sequence[int]) -> Tensor:
        start, stop = positions[0], positions[-1] + 1
        contiguous = stop - start == len(positions) and list(positions) == list(range(start, stop))
        return images[start:stop] if contiguous else images[list(positions)]

    return Source(
        name="tensor", kind="tensor", ids=tuple(labels[i] for i in order), block=block,
        sizes={(images.shape[2], images.shape[3]): len(images)},
        image=lambda index: images[index], content=lambda index: _content(images[index]),
    )  # fmt: skip


def _of_files(
    path: Path,
    kind: str,
    candidates: list[str],
    num: int | None,
    read: Callable[[str], decode.Data],
    open_file: Callable[[str], BinaryIO],
) -> Source:
    """Open the images among ``candidates``, the paths of files in a container."""
    files = [(name, clean) for name in candidates if names.is_image(clean := _normalised(name))]
    ids = [posixpath.splitext(clean)[0] for _, clean in files]
    order = names.order(ids, num, f"'{path}'")
    paths = [files[i][0] for i in order]  # not normalised: an archive knows './a.png' by no other name

    def read_header(name: str) -> decode.Header:
        with open_file(name) as file:
            return decode.read_header(file, name)

    # many headers at once in few threads: handing one over takes longer than reading it
    headers = list(ahead(read_header, paths, workers=2, chunk=_HEADERS_AT_ONCE))
    source = Source(
        name=path.stem if kind == "zip" else path.resolve().name, kind=kind, ids=tuple(ids[i] for i in order),
        files=dict(zip((ids[i] for i in order), paths, strict=True)),
        sizes=count_sizes(header.size for header in headers), path=path,
        threads=all(header.simple for header in headers),
        image=lambda index: decode.decode(read(paths[index]), paths[index]), content=lambda index: read(paths[index]),
    )  # fmt: skip
    source.warnings += _warnings(path, headers, source.sizes)
    others = set(candidates).difference(name for name, _ in files)
    if reasons := names.left_out(sorted(others), open_file):
        source.warnings.append(
            f"Files in '{path}' that look like pictures or videos are left out: {', '.join(reasons)}."
        )
    folders = [posixpath.dirname(clean) for _, clean in files]
    used = len({folders[i] for i in order})
    if used < len(set(folders)):
        source.warnings.append(
            f"The first {len(paths)} images of '{path}' come from {used} of its {len(set(folders))} folders."
        )
    return source


def _warnings(path: Path, headers: Sequence[decode.Header], sizes: Mapping[tuple[int, int], int]) -> Iterator[str]:
    """Yield warnings about lossy compression and images of several sizes."""
    lossy = sum(header.lossy for header in headers)
    if lossy:
        yield f"{lossy} of {len(headers)} images in '{path}' are stored with loss (JPEG, lossy WebP): distances move."
    if len(sizes) > 1:
        examples = ", ".join(f"{count} of {size_text(*size)}" for size, count in list(sizes.items())[:4])
        yield f"'{path}' holds images of {len(sizes)} sizes: {examples}{', ...' if len(sizes) > 4 else ''}."


def _normalised(name: str) -> str:
    """Drop the "." and the empty parts that paths in archives may have."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _content(image: Tensor) -> bytes:
    """Serialise the shape and the pixels of an image ``(3, H, W)``."""
    pixels = image.cpu().contiguous()
    return f"{pixels.shape[1]} {pixels.shape[2]} ".encode() + pixels.numpy().tobytes()


def _npz_array(path: Path, key: str) -> np.ndarray[Any, Any]:
    """Read an array of an npz; map it from the disk where it is stored without compression."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        if entry.compress_type == zipfile.ZIP_STORED:
            with archive.open(entry) as file:
                formats = np.lib.format
                version = formats.read_magic(file)
                read_array_header = (
                    formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
                )
                shape, fortran, dtype = read_array_header(file)
                array_header = file.tell()
            if not fortran and not dtype.hasobject:
                return np.memmap(path, dtype, "c", _entry_start(path, entry) + array_header, shape)
    with np.load(path, allow_pickle=False) as loaded:
        return np.asarray(loaded[key])


def _entry_start(path: Path, entry: zipfile.ZipInfo) -> int:
    """Return where the data of a zip's entry begin: after 30 bytes, its name and its extra field."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        return entry.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
