"""The folder of a run: which chunks are complete, how one is written, and the final record.

A finished chunk leaves its pictures or videos, and a marker with their sha256 under ``.chunks/``. A chunk without a
marker, or whose files have other bytes than its marker lists, is not finished. At the end the markers become the lists
in ``run.json``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.files import (
    COUNT,
    Clip,
    clip_sha256,
    holds_tensor,
    misfit,
    pixels_sha256,
    read_result,
    remove_leftovers,
    sha256,
    write_json,
    write_mp4,
    write_png,
    write_tensor,
)
from diffaccel.folder_lock import FolderLock
from diffaccel.runs import side_files
from diffaccel.runs.cost import total_cost, without_steps
from diffaccel.runs.request import Item
from diffaccel.whole_folder import check_writable, unwritable

if TYPE_CHECKING:
    from torch import Tensor

MARKERS = ".chunks"
LATENTS = ".safetensors"
_MARKER = {
    "fingerprint": str, "chunk": COUNT, "cost": record.COST, "images": [record.IMAGE],
    "side_files?": [record.SIDE_FILE],
}  # fmt: skip
_IMAGE = re.compile(r"\d{5,}\.(png|mp4|safetensors)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = "Choose another --out, or pass --overwrite to throw it away."


class RunFailed(DiffAccelError):
    """A run that could not go on; its finished images are kept."""

    exit_code = 3


def _advice_for(error: OSError) -> str:
    """Return what to do about a file that could not be written."""
    name = Path(error.filename2 or error.filename or "").name
    if error.errno in (errno.EISDIR, errno.ENOTEMPTY):
        return f"Move the folder named {name}, which is in the place of a file"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"Move the file named {name}, which is in the place of a folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Make it writable"
    return "Make room" if error.errno in _FULL else "Mend that"


def is_full(error: BaseException) -> bool:
    """Return whether an error says that a disk or a quota has no room left."""
    return isinstance(error, OSError) and error.errno in _FULL


class RunFolder:
    """The folder of one run, new or to be continued.

    As a context manager it is this process's alone: an existing folder from the start, a new one once it is prepared.

    Args:
        path: the folder; it need not exist.
        new: the record of the run as it starts now.
        chunks: the images of every pipeline call.
    """

    def __init__(self, path: Path, new: record.Record, chunks: list[list[Item]]) -> None:
        self.path, self.new, self.chunks = path, new, chunks
        self._lock = FolderLock(path)
        self._written: set[Path] = set()
        self._replaced: list[str] = []
        self._is_new = False
        self._changed: dict[int, dict[str, Any]] = {}  # entries of chunks that are not as they were written

    def __enter__(self) -> Self:
        if self.path.is_dir():
            self._acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def check(self, overwrite: bool = False) -> None:
        """Check that the run fits into the folder; nothing is changed.

        Raises:
            DiffAccelError: naming the settings that differ from the run in the folder, or a file that is in the way.
        """
        check_writable(self.path)
        if not self.path.is_dir():
            return
        foreign = sorted(p.name for p in self.path.iterdir() if _IMAGE.fullmatch(p.name))
        if overwrite:
            ours = [name for name in foreign if read_result(self.path / name) is not None]
            latents = [name for name in foreign if name.endswith(LATENTS) and holds_tensor(self.path / name)]
            self._replaced = [*ours, *latents]
            foreign = [name for name in foreign if name not in self._replaced]
        elif (old := self.old()) is not None:
            changed = record.differences(old["settings"], self.new.settings)
            if changed:
                raise DiffAccelError(f"'{self.path}' holds another run; differing: {'; '.join(changed[:6])}. {_ADVICE}")
            self._check_places(foreign)
            return
        if foreign:
            raise DiffAccelError(
                f"'{self.path}' holds {foreign[0]}, which is no image of this run. Move it, or choose another --out."
            )

    def _check_places(self, names: list[str]) -> None:
        """Raise for a folder in the place of a file that the run writes."""
        own = {f"{item.id:05d}" for chunk in self.chunks for item in chunk}
        for name in names:
            if name.split(".")[0] in own and (self.path / name).is_dir():
                raise DiffAccelError(
                    f"'{self.path}' holds a folder named {name}, where an image of this run belongs. Move it; the same "
                    "command then continues."
                )

    def old(self) -> dict[str, Any] | None:
        """Return the record that the folder holds, or None."""
        return record.read_run(self.path)

    def prepare(self, overwrite: bool = False) -> None:
        """Create the folder, remove temporary files of a killed run, and write the started record to ``run.json``."""
        try:
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._lock.held:
                self._acquire()
                self.check(overwrite)  # another run may have come in between
            remove_leftovers(self.path, rf"run\.json|{_IMAGE.pattern}")
            if overwrite:
                self._clear()
            if self.old() is None:
                self.new.save(self.path / record.RUN)
                self._written.add(self.path / record.RUN)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _clear(self) -> None:
        """Remove the run that is in the folder: the files that :meth:`check` knew as those of a run."""
        shutil.rmtree(self.path / MARKERS, ignore_errors=True)
        for name in (record.RUN, *self._replaced):
            (self.path / name).unlink(missing_ok=True)
        side_files.remove_all(self.path)

    def abandon(self) -> None:
        """Remove what this process wrote of a run that failed before its first chunk was finished."""
        if any((self.path / MARKERS).glob("*.json")) or (self.old() or {}).get("state") == "finished":
            return
        with contextlib.suppress(OSError):
            for path in self._written:
                path.unlink(missing_ok=True)
            if not any((self.path / MARKERS).glob("*")):
                shutil.rmtree(self.path / MARKERS, ignore_errors=True)
            if self._is_new:
                self._lock.release()
                self.path.rmdir()  # fails when something else is in it

    def finished(self) -> dict[int, dict[str, Any]]:
        """Return the entries of all complete chunks by number: every file has the bytes noted when it was written."""
        old = self.old() or {}
        images = {image["id"]: image for image in old.get("images", [])}
        entries = {}
        for entry in old.get("chunks", []):
            if entry["chunk"] >= len(self.chunks):
                continue
            listed = [images[item.id] for item in self.chunks[entry["chunk"]] if item.id in images]
            entries[entry["chunk"]] = {**entry, "images": listed}
        for path in (self.path / MARKERS).glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                entry = json.loads(path.read_text(encoding="utf-8"))
                if not misfit(entry, _MARKER) and entry.pop("fingerprint") == self.new.fingerprint:
                    entries[entry["chunk"]] = entry
        listed = [i for i in sorted(entries) if i < len(self.chunks)]
        self._changed = {i: entries[i] for i in listed if not self._complete(i, entries[i])}
        return {i: entries[i] for i in listed if i not in self._changed}

    def begin(self, number: int) -> None:
        """Remove the files beside a chunk that have changed since it was written; it is about to be drawn again."""
        with self._while_writing():
            side_files.remove_changed(self.path, self._changed.pop(number, {}))

    def _complete(self, number: int, entry: dict[str, Any]) -> bool:
        if [image["id"] for image in entry["images"]] != [item.id for item in self.chunks[number]]:
            return False
        try:
            files = (*record.written_files(self.path, entry["images"]), *record.side_files(self.path, [entry]))
            return all(sha256(file) == digest for file, digest in files)
        except OSError:
            return False

    def add(
        self,
        number: int,
        images: list[Any],
        call: dict[str, Any],
        cost: dict[str, Any],
        *,
        noise: Sequence[str] = (),
        latents: Tensor | None = None,
    ) -> None:
        """Write a chunk's pictures, or clips as video, then its marker.

        Args:
            number: of the chunk.
            images: pictures or clips, in the order of the chunk's items.
            call: arguments of the pipeline call.
            cost: of the pipeline call.
            noise: hash of each image's initial noise; may be empty.
            latents: the decoder's input, a row per image; None keeps none.
        """
        with self._while_writing():
            shared = {k: v for k, v in self.new.settings.items() if k not in ("prompts", "num", "seed")}
            shared |= {"format": record.FORMAT, "fingerprint": self.new.fingerprint, "call": call}
            entries = []
            for row, (item, image) in enumerate(zip(self.chunks[number], images, strict=True)):
                entry = self._write_image(item, image, shared)
                if noise:
                    entry["noise_sha256"] = noise[row]
                if latents is not None:
                    entry |= self._write_latents(item, latents[row])
                entries.append(entry)
            marker = {"fingerprint": self.new.fingerprint, "chunk": number, "cost": cost, "images": entries}
            marker |= side_files.of_chunk(self.path, number)
            (self.path / MARKERS).mkdir(exist_ok=True)
            write_json(self.path / MARKERS / f"{number:05d}.json", marker)

    def _write_image(self, item: Item, image: Any, shared: dict[str, Any]) -> dict[str, Any]:
        """Write one picture or video with its metadata, and return its entry in the record."""
        metadata: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "seed": item.seed}
        file = self.path / f"{item.id:05d}"
        if isinstance(image, Clip):
            metadata |= {"frames": len(image.frames), "fps": image.fps}
            file, pixels = file.with_suffix(".mp4"), clip_sha256(image)
            self._written.add(file)
            write_mp4(file, image, {**shared, **metadata})
        else:
            file, pixels = file.with_suffix(".png"), pixels_sha256(image)
            self._written.add(file)
            write_png(file, image, {**shared, **metadata})
        return {**metadata, "file": file.name, "sha256": sha256(file), "pixels_sha256": pixels}

    def _write_latents(self, item: Item, latents: Tensor) -> dict[str, str]:
        file = self.path / f"{item.id:05d}{LATENTS}"
        self._written.add(file)
        write_tensor(file, latents)
        return {"latents": file.name, "latents_sha256": sha256(file)}

    @contextlib.contextmanager
    def _while_writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFailed(
                f"'{self.path}' cannot be written ({error.strerror or error}). {_advice_for(error)}; finished images "
                "stay, and the same command continues."
            ) from error

    def so_far(self, upto: int) -> dict[str, Any]:
        """Return the record of the first ``upto`` chunks, as if the run ended there; nothing is written.

        Raises:
            RunFailed: when one of them is missing.
        """
        entries = self.finished()
        self._require(entries, upto)
        return {**self.new.to_dict(), "images": [image for i in range(upto) for image in entries[i]["images"]]}

    def close(self, call: dict[str, Any], *, upto: int | None = None, until: dict[str, Any] | None = None) -> None:
        """Gather the chunks of all processes into the final record, in the order of ids.

        Args:
            call: arguments of the pipeline's calls.
            upto: number of chunks that the run must have; all by default. Later ones are kept up to the first gap.
            until: verdict of the rule that may end a run early.

        Raises:
            RunFailed: when a chunk that the run must have is missing.
        """
        entries = self.finished()
        self._require(entries, len(self.chunks) if upto is None else upto)
        gap = next((i for i in range(len(self.chunks)) if i not in entries), len(self.chunks))
        complete = [entries[number] for number in range(gap)]
        old = self.old() or {}
        self.new.started = old.get("started", self.new.started)
        self.new.finish(
            call=call or old.get("call", {}),
            cost=total_cost([entry["cost"] for entry in complete]),
            images=[image for entry in complete for image in entry["images"]],
            chunks=[
                {"chunk": number, "cost": without_steps(entry["cost"])}
                | ({"side_files": entry["side_files"]} if "side_files" in entry else {})
                for number, entry in enumerate(complete)
            ],
            **({} if until is None else {"until": until}),
        )
        self.new.save(self.path / record.RUN)
        shutil.rmtree(self.path / MARKERS, ignore_errors=True)

    def _require(self, entries: dict[int, dict[str, Any]], upto: int) -> None:
        if missing := sum(number not in entries for number in range(upto)):
            raise RunFailed(f"{missing} chunks of '{self.path}' went missing or changed while it ran. Run it again.")
