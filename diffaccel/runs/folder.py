"""The folder of a run: which chunks are complete, how one is written, and the final record.

A finished chunk leaves its pictures or videos, and a marker with their sha256 under ``.chunks/``. A chunk without a
marker, or whose files have other bytes than its marker lists, is not finished. At the end the markers become the lists
in ``run.json``.
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
    """A run that could not go on; its finished images are kept."""

    exit_code = 3


def unwritable(path: Path, why: OSError | str) -> DiffAccelError:
    """Return the error for an output folder that cannot be used."""
    text = why if isinstance(why, str) else why.strerror or str(why)
    return DiffAccelError(f"The output folder '{path}' cannot be written ({text}). Choose another with --out.")


def check_writable(path: Path) -> None:
    """Raise when ``path`` is no folder, or could not be created or written; nothing is created."""
    try:
        nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    except OSError as error:
        raise unwritable(path, error) from error
    if not nearest.is_dir():
        raise unwritable(path, f"'{nearest}' is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise unwritable(path, f"no permission in '{nearest}'")


class RunFolder:
    """The folder of one run, new or to be continued.

    Args:
        path: the folder; it need not exist.
        new: the record of the run as it starts now.
        chunks: the images of every pipeline call.
    """

    def __init__(self, path: Path, new: record.Record, chunks: list[list[Item]]) -> None:
        self.path, self.new, self.chunks = path, new, chunks

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
            latents = {Path(name).with_suffix(LATENTS).name for name in ours}
            foreign = [name for name in foreign if name not in (*ours, *latents)]
        elif (old := self.old()) is not None:
            changed = record.differences(old["settings"], self.new.settings)
            if changed:
                raise DiffAccelError(f"'{self.path}' holds another run; differing: {'; '.join(changed[:6])}. {_ADVICE}")
            return
        if foreign:
            raise DiffAccelError(
                f"'{self.path}' holds {foreign[0]}, which is no image of this run. Move it, or choose another --out."
            )

    def old(self) -> dict[str, Any] | None:
        """Return the record that the folder holds, or None."""
        return record.read(self.path / record.RUN, self.new.kind)

    def prepare(self, overwrite: bool = False) -> None:
        """Create the folder, remove temporary files of a killed run, and write the started record to ``run.json``."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for temporary in self.path.glob(f".*{TEMPORARY}"):
                temporary.unlink()
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
                path.unlink()  # check() made sure that all are ours

    def abandon(self) -> None:
        """Remove everything of a run that failed before its first chunk was finished."""
        if any((self.path / MARKERS).glob("*.json")) or (self.old() or {}).get("state") == "finished":
            return
        self._clear()
        with contextlib.suppress(OSError):
            self.path.rmdir()  # fails when something else is in it

    def finished(self) -> dict[int, dict[str, Any]]:
        """Return the entries of all complete chunks by number: every file has the bytes noted when it was written."""
        old = self.old() or {}
        images = {image["id"]: image for image in old.get("images", [])}
        entries = {}
        for entry in old.get("chunks", []):
            listed = [images[item.id] for item in self.chunks[entry["chunk"]] if item.id in images]
            entries[entry["chunk"]] = {**entry, "images": listed}
        for path in (self.path / MARKERS).glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                entry = json.loads(path.read_text(encoding="utf-8"))
                if entry.pop("fingerprint") == self.new.fingerprint:
                    entries[entry["chunk"]] = entry
        return {i: entries[i] for i in sorted(entries) if i < len(self.chunks) and self._complete(i, entries[i])}

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
            (self.path / MARKERS).mkdir(exist_ok=True)
            write_json(self.path / MARKERS / f"{number:05d}.json", marker)

    def _write_image(self, item: Item, image: Any, shared: dict[str, Any]) -> dict[str, Any]:
        """Write one picture or video with its metadata, and return its entry in the record."""
        metadata: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "seed": item.seed}
        file = self.path / f"{item.id:05d}"
        if isinstance(image, Clip):
            metadata |= {"frames": len(image.frames), "fps": image.fps}
            file, pixels = file.with_suffix(".mp4"), clip_sha256(image)
            write_mp4(file, image, {**shared, **metadata})
        else:
            file, pixels = file.with_suffix(".png"), pixels_sha256(image)
            write_png(file, image, {**shared, **metadata})
        return {**metadata, "file": file.name, "sha256": sha256(file), "pixels_sha256": pixels}

    def _write_latents(self, item: Item, latents: Tensor) -> dict[str, str]:
        file = self.path / f"{item.id:05d}{LATENTS}"
        write_tensor(file, latents)
        return {"latents": file.name, "latents_sha256": sha256(file)}

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
            cost=_total([entry["cost"] for entry in complete]),
            images=[image for entry in complete for image in entry["images"]],
            chunks=[{"chunk": number, "cost": _without_steps(entry["cost"])} for number, entry in enumerate(complete)],
            **({} if until is None else {"until": until}),
        )
        self.new.save(self.path / record.RUN)
        shutil.rmtree(self.path / MARKERS, ignore_errors=True)

    def _require(self, entries: dict[int, dict[str, Any]], upto: int) -> None:
        if missing := sum(number not in entries for number in range(upto)):
            raise RunFailed(f"{missing} chunks of '{self.path}' went missing or changed while it ran. Run it again.")


def _total(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the cost of a run from those of its chunks: sums, the highest peak, the median time of each step."""
    peaks = [cost["peak_memory"] for cost in costs if cost["peak_memory"] is not None]
    counts = [key for key in ("nfe", "forwards", "calls") if all(key in cost for cost in costs)]
    return {
        "seconds": round(sum(cost["seconds"] for cost in costs), 3),
        **{key: sum(cost[key] for cost in costs) for key in counts},
        "peak_memory": max(peaks, default=None),
        "parts": _sum_parts([cost.get("parts", {}) for cost in costs]),
        "steps": _median_steps([cost.get("steps", []) for cost in costs]),
    }


def _sum_parts(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(part.get(name, 0.0) for part in parts), 3) for name in (parts[0] if parts else {})}


def _median_steps(steps: list[list[float]]) -> list[float]:
    """Return the seconds of each network call, the median over the chunks that made as many calls as the first."""
    equal = [times for times in steps if steps and len(times) == len(steps[0])]
    return [round(median(times), 5) for times in zip(*equal, strict=True)]


def _without_steps(cost: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cost.items() if key != "steps"}
