"""The folder of a run: which chunks of it are complete, and how one becomes so.

A finished chunk leaves its pictures or videos, and a marker with their sha256 under ``.chunks/``. What has no marker,
or other bytes than its marker says, is not finished. At the end the markers become the lists in ``run.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.requests import Item

RECORD = "run.json"
MARKERS = ".chunks"
_IMAGE = re.compile(r"\d{5,}\.(png|mp4)")
_ADVICE = "Choose another --out, or pass --overwrite to throw it away."


class RunFailed(DiffAccelError):
    """A run that could not go on; what it finished is kept."""

    exit_code = 3


def unwritable(path: Path, why: OSError | str) -> DiffAccelError:
    """The error for an output folder that cannot be used."""
    text = why if isinstance(why, str) else why.strerror or str(why)
    return DiffAccelError(f"The output folder '{path}' cannot be written ({text}). Choose another with --out.")


def check_writable(path: Path) -> None:
    """Raise when ``path`` is no folder, or could not be made or written; nothing is made."""
    try:
        place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    except OSError as error:
        raise unwritable(path, error) from error
    if not place.is_dir():
        raise unwritable(path, f"'{place}' is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise unwritable(path, f"no permission in '{place}'")


class RunFolder:
    """``path`` as the place of one run.

    Args:
        path: the folder, there or not.
        new: the record of the run as it starts now.
        chunks: the images of every pipeline call.
    """

    def __init__(self, path: Path, new: record.Record, chunks: list[list[Item]]) -> None:
        self.path, self.new, self.chunks = path, new, chunks

    def check(self, overwrite: bool = False) -> None:
        """Look whether the run can be put here, and change nothing.

        Raises:
            DiffAccelError: naming the settings that differ from the run that is here, or what stands in the way.
        """
        check_writable(self.path)
        if not self.path.is_dir():
            return
        strangers = sorted(p.name for p in self.path.iterdir() if _IMAGE.fullmatch(p.name))
        if overwrite:
            strangers = [name for name in strangers if record.read_result(self.path / name) is None]
        elif (old := self.old()) is not None:
            changed = record.differences(old["settings"], self.new.settings)
            if changed:
                raise DiffAccelError(f"'{self.path}' holds another run; differing: {'; '.join(changed[:6])}. {_ADVICE}")
            return
        if strangers:
            raise DiffAccelError(
                f"'{self.path}' holds {strangers[0]}, which is no image of this run. Move it, or choose another --out."
            )

    def old(self) -> dict[str, Any] | None:
        """The record that is here already."""
        return record.read(self.path / RECORD, self.new.kind)

    def prepare(self, overwrite: bool = False) -> None:
        """Make the folder, sweep up after a killed run, and say in ``run.json`` which run this is."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in self.path.glob(f".*{record.TEMPORARY}"):
                name.unlink()
            if overwrite:
                self._clear()
            if self.old() is None:
                self.new.save(self.path / RECORD)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _clear(self) -> None:
        shutil.rmtree(self.path / MARKERS, ignore_errors=True)
        (self.path / RECORD).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if _IMAGE.fullmatch(path.name):
                path.unlink()  # all are ours: check() saw to that

    def abandon(self) -> None:
        """Leave nothing of a run that failed before its first chunk was finished."""
        if any((self.path / MARKERS).glob("*.json")) or (self.old() or {}).get("state") == "finished":
            return
        self._clear()
        with contextlib.suppress(OSError):
            self.path.rmdir()  # stays when something else is in it

    def finished(self) -> dict[int, dict[str, Any]]:
        """The complete chunks: every image is there with the bytes that were noted when it was made."""
        whole = self.old() or {}
        images = {image["id"]: image for image in whole.get("images", [])}
        noted = {}
        for entry in whole.get("chunks", []):
            made = [images[item.id] for item in self.chunks[entry["chunk"]] if item.id in images]
            noted[entry["chunk"]] = {**entry, "images": made}
        for path in (self.path / MARKERS).glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                entry = json.loads(path.read_text(encoding="utf-8"))
                if entry.pop("fingerprint") == self.new.fingerprint:
                    noted[entry["chunk"]] = entry
        return {i: noted[i] for i in sorted(noted) if i < len(self.chunks) and self._complete(i, noted[i])}

    def _complete(self, number: int, entry: dict[str, Any]) -> bool:
        if [image["id"] for image in entry["images"]] != [item.id for item in self.chunks[number]]:
            return False
        try:
            return all(record.sha256(self.path / image["file"]) == image["sha256"] for image in entry["images"])
        except OSError:
            return False

    def add(self, number: int, images: list[Any], call: dict[str, Any], cost: dict[str, Any]) -> None:
        """Write a chunk's pictures, or clips as video, then its marker."""
        try:
            self._add(number, images, call, cost)
        except OSError as error:
            raise RunFailed(
                f"'{self.path}' cannot be written ({error.strerror or error}). Make room; finished images stay, "
                "and the same command continues."
            ) from error

    def _add(self, number: int, images: list[Any], call: dict[str, Any], cost: dict[str, Any]) -> None:
        shared = {k: v for k, v in self.new.settings.items() if k not in ("prompts", "num", "seed")}
        shared |= {"format": record.FORMAT, "fingerprint": self.new.fingerprint, "call": call}
        entries = []
        for item, image in zip(self.chunks[number], images, strict=True):
            about: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "seed": item.seed}
            file = self.path / f"{item.id:05d}"
            if isinstance(image, record.Clip):
                about |= {"frames": len(image.frames), "fps": image.fps}
                file, pixels = file.with_suffix(".mp4"), record.clip_sha256(image)
                record.write_mp4(file, image, {**shared, **about})
            else:
                file, pixels = file.with_suffix(".png"), record.pixels_sha256(image)
                record.write_png(file, image, {**shared, **about})
            entries.append({**about, "file": file.name, "sha256": record.sha256(file), "pixels_sha256": pixels})
        marker = {"fingerprint": self.new.fingerprint, "chunk": number, "cost": cost, "images": entries}
        (self.path / MARKERS).mkdir(exist_ok=True)
        record.write_json(self.path / MARKERS / f"{number:05d}.json", marker)

    def close(self, call: dict[str, Any]) -> None:
        """Gather the chunks, whoever made them, into the final record, in the order of ids."""
        done = self.finished()
        if len(done) < len(self.chunks):
            missing = len(self.chunks) - len(done)
            raise RunFailed(f"{missing} chunks of '{self.path}' went missing or changed while it ran. Run it again.")
        old = self.old() or {}
        costs = [entry["cost"] for entry in done.values()]
        peaks = [cost["peak_memory"] for cost in costs if cost["peak_memory"] is not None]
        total = {key: sum(cost[key] for cost in costs) for key in ("nfe", "forwards", "calls")}
        self.new.started = old.get("started", self.new.started)
        self.new.finish(
            call=call or old.get("call", {}),
            cost={
                "seconds": round(sum(cost["seconds"] for cost in costs), 3),
                **total,
                "peak_memory": max(peaks, default=None),
            },
            images=[image for entry in done.values() for image in entry["images"]],
            chunks=[{"chunk": number, "cost": entry["cost"]} for number, entry in done.items()],
        )
        self.new.save(self.path / RECORD)
        shutil.rmtree(self.path / MARKERS, ignore_errors=True)
