"""Runs: sets of generated pictures as folders, and which picture of one run belongs to which of another.

A folder of ``diffaccel sample`` or ``diffaccel eval run`` knows the prompt and the seed of every picture; any other
folder of images is paired by file names and has no prompts.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.images import names
from diffaccel.eval.images.folders import files_below
from diffaccel.eval.images.open import of_folder, open_source
from diffaccel.eval.images.recorded import check_files, check_finished
from diffaccel.eval.images.source import Source
from diffaccel.eval.images.video_files import read_video

VIDEO = ".mp4"
Pairs = list[tuple[int, int]]  # positions of pictures that belong together, in two runs


@dataclass(frozen=True)
class Picture:
    """One picture of a run."""

    id: str
    file: Path
    prompt: str | None = None
    seed: int | None = None
    noise: str | None = None
    latents: Path | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Key that is equal for pictures of two runs that belong together."""
        return (self.id,) if self.seed is None else (self.prompt, self.seed)


@dataclass(frozen=True)
class Run:
    """A set of pictures, or of videos.

    Attributes:
        name: as tables show it.
        path: the folder.
        pictures: in the order of their ids.
        record: the run's ``run.json``; empty for a plain folder.
        notes: warnings of what was left out when the folder was opened.
    """

    name: str
    path: Path
    pictures: tuple[Picture, ...]
    record: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of every picture; None where one of them has no prompt."""
        prompts = [picture.prompt for picture in self.pictures]
        return None if None in prompts else [str(prompt) for prompt in prompts]

    @property
    def is_video(self) -> bool:
        """Whether its pictures are videos."""
        return self.pictures[0].file.suffix.lower() == VIDEO

    def video(self, index: int) -> Tensor:
        """Read the frames of one video, uint8 (T, 3, H, W)."""
        return read_video(self.pictures[index].file)

    @property
    def warnings(self) -> list[str]:
        """Warnings about its pictures or videos that a report must print."""
        return list(dict.fromkeys((*self.notes, *([] if self.is_video else self.source.warnings))))

    @cached_property
    def source(self) -> Source:
        """The pictures as a source of images, by their ids."""
        if not self.path.is_dir():  # an archive
            return open_source(self.path)
        files = [picture.file.relative_to(self.path).as_posix() for picture in self.pictures]
        return of_folder(self.path, files=files)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {image: i for i, image in enumerate(self.source.ids)}

    def image(self, index: int) -> Tensor:
        """Read the pixels of one picture, uint8 (3, H, W).

        Raises:
            DiffAccelError: for a file that is no whole picture, with the run's name: others have files of that name.
        """
        position = self._positions[self.pictures[index].id]
        try:
            return self.source.image(position)
        except DiffAccelError as error:
            raise DiffAccelError(f"{self.name}: {error}") from error


def open_run(path: str | Path) -> Run:
    """Open a folder made by diffaccel, or any folder of images or of ``.mp4`` videos, under the folder's name.

    Raises:
        DiffAccelError: for a folder that is not there, holds neither, or holds an unfinished run.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DiffAccelError(f"There is no run folder '{path}'. Make one with diffaccel eval run.")
    run_record = record.read_run(folder)
    name = folder.resolve().name
    if run_record is None:
        return _plain_run(name, folder)
    check_finished(run_record, path)
    run = run_from_record(folder, run_record)
    check_files(run_record, folder)
    return run


def _plain_run(name: str, folder: Path) -> Run:
    """Return the run of a folder without a record: of its videos where it holds some, else of its pictures."""
    below = files_below(folder).names
    visible = sorted((file for file in below if not names.is_hidden(file)), key=names.natural)
    videos = [file for file in visible if file.lower().endswith(VIDEO)]
    if not videos:
        source = open_source(folder)
        pictures = tuple(Picture(id=image, file=folder / file) for image, file in source.files.items())
        return Run(name, folder, pictures, notes=tuple(source.warnings))
    ids = [posixpath.splitext(file)[0] for file in videos]
    names.order(ids, None, f"'{folder}'")
    images = sum(map(names.is_image, below))
    notes = (f"'{folder}' holds {len(videos)} videos, and its {images} pictures are left out.",) if images else ()
    pairs = zip(ids, videos, strict=True)
    return Run(name, folder, tuple(Picture(id=stem, file=folder / file) for stem, file in pairs), notes=notes)


def run_from_record(folder: Path, run_record: dict[str, Any]) -> Run:
    """Return the run of the pictures that a record lists, under the folder's name.

    Raises:
        DiffAccelError: for a picture or a video that is not there.
    """
    pictures = []
    if not run_record["images"]:
        raise DiffAccelError(
            f"'{folder / record.RUN}' lists no pictures. Move it away, and repeat the command of the run."
        )
    for entry in run_record["images"]:
        file = folder / entry["file"]
        if not file.is_file():
            raise DiffAccelError(f"'{file}' is missing from its run. Repeat the command that made it.")
        latents = folder / entry["latents"] if "latents" in entry else None
        pictures.append(Picture(file.stem, file, entry["prompt"], entry["seed"], entry.get("noise_sha256"), latents))
    return Run(folder.resolve().name, folder, tuple(pictures), run_record)


def pair(baseline: Run, run: Run, *, partial: bool = False) -> Pairs:
    """Pair the pictures of two runs: the same prompt and seed, or the same file name.

    Args:
        baseline, run: two runs.
        partial: leave out pictures that only one of them has.

    Returns:
        Positions in the baseline and in the run, in the order of the baseline.

    Raises:
        DiffAccelError: when one of the runs has a picture that the other lacks, naming the first; where ``partial``,
            only when no picture is in both.
    """
    place = {picture.key: i for i, picture in enumerate(run.pictures)}
    missing = [picture for picture in baseline.pictures if picture.key not in place]
    if partial and len(missing) < len(baseline):
        return [(i, place[picture.key]) for i, picture in enumerate(baseline.pictures) if picture.key in place]
    if missing or len(place) != len(baseline):
        extra = len(place) - (len(baseline) - len(missing))
        example = f", such as {_describe(missing[0])}" if missing else ""
        raise DiffAccelError(
            f"'{run.name}' is not paired with '{baseline.name}': {len(missing)} of {len(baseline)} pictures of the "
            f"baseline are missing in it{example}, and {extra} are in it alone. Make both alike in prompts and seeds"
            f"{'' if partial else ', or compare what they share with --allow-mixed-n'}."
        )
    return [(i, place[picture.key]) for i, picture in enumerate(baseline.pictures)]


def _describe(picture: Picture) -> str:
    return f"'{picture.id}'" if picture.seed is None else f"seed {picture.seed} of '{picture.prompt}'"


def same_noise(baseline: Run, run: Run, pairs: Pairs) -> bool | None:
    """Return whether paired pictures started from equal noise; None where a record does not tell."""
    hashes = [(baseline.pictures[i].noise, run.pictures[j].noise) for i, j in pairs]
    if any(None in both for both in hashes):
        return None
    return all(baseline_noise == noise for baseline_noise, noise in hashes)


def pair_by_prompt(baseline: Run, others: Run) -> Pairs:
    """Pair a run of other seeds with the baseline: the k-th picture of a prompt with the k-th of that prompt.

    Raises:
        DiffAccelError: when the prompts are not the same, in the same order.
    """
    prompts = [[(picture.prompt, picture.seed is None) for picture in run.pictures] for run in (baseline, others)]
    if prompts[0] != prompts[1] or any(no_seed for _, no_seed in prompts[0]):
        raise DiffAccelError(
            f"'{others.name}' was not drawn from the prompts of '{baseline.name}'. "
            "Make it with the same prompts and another seed."
        )
    return [(i, i) for i in range(len(baseline))]


def cut_to_shortest(
    baseline: Run, runs: Sequence[Run], others: Run | None
) -> tuple[Run, list[Run], Run | None, list[str]]:
    """Cut all runs to the pictures of the shortest one that stopped early.

    A run that stopped once its question was answered (``eval run --until``) has the first pictures of its baseline and
    no others; whatever else it is compared with is compared on the same ones. Other runs are returned as they are.

    Args:
        baseline, runs: runs of one comparison.
        others: the baseline with other seeds.

    Returns:
        The baseline, the runs and the run of other seeds, and a sentence that says so where pictures were cut.
    """
    stopped = [run for run in runs if run.record.get("until") and len(run) < len(baseline)]
    if not stopped:
        return baseline, list(runs), others, []
    shortest = min(stopped, key=len)
    keys = {picture.key for picture in shortest.pictures}
    count = len(shortest)
    note = f"Compared on the first {count} of {len(baseline)} pictures, where {shortest.name} stopped: "
    note += f"{shortest.record['until']['sentence']}."
    cut = [_restricted(run, keys) for run in (baseline, *runs)]
    cut_others = None if others is None else _restricted(others, {p.key for p in others.pictures[:count]})
    return cut[0], cut[1:], cut_others, [note]


def _restricted(run: Run, keys: set[tuple[Any, ...]]) -> Run:
    """Return the run with the pictures of these keys, and with the same share of what the whole run cost."""
    pictures = tuple(picture for picture in run.pictures if picture.key in keys)
    if len(pictures) == len(run):
        return run
    share, run_record = len(pictures) / len(run), dict(run.record)
    if cost := run_record.get("cost"):
        scaled = {key: cost[key] * share for key in ("seconds", "nfe", "forwards", "calls") if key in cost}
        parts = {part: seconds * share for part, seconds in cost.get("parts", {}).items()}
        run_record["cost"] = {**cost, **scaled, "parts": parts}
    return replace(run, pictures=pictures, record=run_record)
