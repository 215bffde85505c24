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
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.files import (
    TEMPORARY,
    Clip,
    clip_sha256,
    pixels_sha256,
    read_result,
    sha256,
    write_json,
    write_mp4,
    write_png,
    write_tensor,
)
from diffaccel.runs.request import Item

if TYPE_CHECKING:
    from torch import Tensor

MARKERS = ".chunks"
LATENTS = ".safetensors"
_IMAGE = re.compile(r"\d{5,}\.(png|mp4|safetensors)")
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
            ours = [name for name in strangers if read_result(self.path / name) is not None]
            latents = {Path(name).with_suffix(LATENTS).name for name in ours}
            strangers = [name for name in strangers if name not in (*ours, *latents)]
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
        return record.read(self.path / record.RUN, self.new.kind)

    def prepare(self, overwrite: bool = False) -> None:
        """Make the folder, sweep up after a killed run, and say in ``run.json`` which run this is."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in self.path.glob(f".*{TEMPORARY}"):
                name.unlink()
            if overwrite:
                self._clear()
            if self.old() is None:
                self.new.save(self.path / record.RUN)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _clear(self) -> None:
        shutil.rmtree(self.path / MARKERS, ignore_errors=True)
        (self.path / record.RUN).unlink(missing_ok=True)
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
            return all(
                sha256(self.path / image[key]) == image[digest]
                for image in entry["images"]
                for key, digest in (("file", "sha256"), ("latents", "latents_sha256"))
                if key in image
            )
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

        ``noise`` is a hash an image of what it started from, ``latents`` the rows that were decoded.
        """
        with self._while_writing():
            shared = {k: v for k, v in self.new.settings.items() if k not in ("prompts", "num", "seed")}
            shared |= {"format": record.FORMAT, "fingerprint": self.new.fingerprint, "call": call}
            entries = []
            for row, (item, image) in enumerate(zip(self.chunks[number], images, strict=True)):
                about: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "seed": item.seed}
                file = self.path / f"{item.id:05d}"
                if isinstance(image, Clip):
                    about |= {"frames": len(image.frames), "fps": image.fps}
                    file, pixels = file.with_suffix(".mp4"), clip_sha256(image)
                    write_mp4(file, image, {**shared, **about})
                else:
                    file, pixels = file.with_suffix(".png"), pixels_sha256(image)
                    write_png(file, image, {**shared, **about})
                entry = {**about, "file": file.name, "sha256": sha256(file), "pixels_sha256": pixels}
                if noise:
                    entry["noise_sha256"] = noise[row]
                if latents is not None:
                    file = file.with_suffix(LATENTS)
                    write_tensor(file, latents[row])
                    entry |= {"latents": file.name, "latents_sha256": sha256(file)}
                entries.append(entry)
            marker = {"fingerprint": self.new.fingerprint, "chunk": number, "cost": cost, "images": entries}
            (self.path / MARKERS).mkdir(exist_ok=True)
            write_json(self.path / MARKERS / f"{number:05d}.json", marker)

    @contextlib.contextmanager
    def _while_writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFailed(
                f"'{self.path}' cannot be written ({error.strerror or error}). Make room; finished images stay, "
                "and the same command continues."
            ) from error

    def so_far(self, upto: int) -> dict[str, Any]:
        """The record of the first ``upto`` chunks, as if the run ended there; nothing is written.

        Raises:
            RunFailed: when one of them is not there.
        """
        done = self.finished()
        if missing := sum(number not in done for number in range(upto)):
            raise RunFailed(f"{missing} chunks of '{self.path}' went missing or changed while it ran. Run it again.")
        return {**self.new.to_dict(), "images": [image for i in range(upto) for image in done[i]["images"]]}

    def close(self, call: dict[str, Any], *, upto: int | None = None, until: dict[str, Any] | None = None) -> None:
        """Gather the chunks, whoever made them, into the final record, in the order of ids.

        Args:
            call: arguments of the pipeline's calls.
            upto: chunks that the run must have; all by default. Later ones stay in it where none is missing between.
            until: what ended the run before its last picture, or was looked for.
        """
        done, upto = self.finished(), len(self.chunks) if upto is None else upto
        whole = next((i for i in range(len(self.chunks)) if i not in done), len(self.chunks))
        if whole < upto:
            missing = sum(i not in done for i in range(upto))
            raise RunFailed(f"{missing} chunks of '{self.path}' went missing or changed while it ran. Run it again.")
        done = {number: entry for number, entry in done.items() if number < whole}
        old = self.old() or {}
        costs = [entry["cost"] for entry in done.values()]
        peaks = [cost["peak_memory"] for cost in costs if cost["peak_memory"] is not None]
        counted = [key for key in ("nfe", "forwards", "calls") if all(key in cost for cost in costs)]
        total = {key: sum(cost[key] for cost in costs) for key in counted}
        self.new.started = old.get("started", self.new.started)
        self.new.finish(
            call=call or old.get("call", {}),
            cost={
                "seconds": round(sum(cost["seconds"] for cost in costs), 3),
                **total,
                "peak_memory": max(peaks, default=None),
                "parts": _sums([cost.get("parts", {}) for cost in costs]),
                "steps": _typical([cost.get("steps", []) for cost in costs]),
            },
            images=[image for entry in done.values() for image in entry["images"]],
            chunks=[{"chunk": number, "cost": _without_steps(entry["cost"])} for number, entry in done.items()],
            **({} if until is None else {"until": until}),
        )
        self.new.save(self.path / record.RUN)
        shutil.rmtree(self.path / MARKERS, ignore_errors=True)


def _sums(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(part.get(name, 0.0) for part in parts), 3) for name in (parts[0] if parts else {})}


def _typical(steps: list[list[float]]) -> list[float]:
    """Seconds of each network call, the median over the chunks that made as many calls as the first."""
    same = [times for times in steps if steps and len(times) == len(steps[0])]
    return [round(median(times), 5) for times in zip(*same, strict=True)]


def _without_steps(cost: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cost.items() if key != "steps"}
