"""Sets of generated pictures as folders, and which picture of one belongs to which of another.

A folder of ``diffaccel sample`` or ``diffaccel eval run`` knows the prompt and the seed of every picture; any other
folder of images is paired by file names and has no prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.images import open as sources
from diffaccel.eval.images import source as images
from diffaccel.eval.images.open import open_source
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
        """Equal for pictures of two runs that belong together."""
        return (self.id,) if self.seed is None else (self.prompt, self.seed)


@dataclass(frozen=True)
class Run:
    """A set of pictures.

    Attributes:
        name: as tables show it.
        path: the folder.
        pictures: in the order of their ids.
        record: the run's ``run.json``; empty for a plain folder.
    """

    name: str
    path: Path
    pictures: tuple[Picture, ...]
    record: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of every picture, or None where there are none."""
        found = [picture.prompt for picture in self.pictures]
        return None if None in found else [str(prompt) for prompt in found]

    @property
    def is_video(self) -> bool:
        """Whether its pictures are videos."""
        return self.pictures[0].file.suffix == VIDEO

    def video(self, index: int) -> Tensor:
        """Frames of one video, uint8 (T, 3, H, W)."""
        return read_video(self.pictures[index].file)

    @cached_property
    def source(self) -> images.Source:
        """The pictures, by their ids."""
        if not self.path.is_dir():  # an archive
            return open_source(self.path)
        files = [picture.file.relative_to(self.path).as_posix() for picture in self.pictures]
        return sources.of_folder(self.path, files=files)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {image: i for i, image in enumerate(self.source.ids)}

    def image(self, index: int) -> Tensor:
        """Pixels of one picture, uint8 (3, H, W)."""
        return self.source.image(self._positions[self.pictures[index].id])


def open_run(path: str | Path) -> Run:
    """The run in a folder made by diffaccel, or any folder of images or of ``.mp4`` videos, under the folder's name.

    Raises:
        DiffAccelError: for a folder that is not there, holds neither, or holds an unfinished run.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DiffAccelError(f"There is no run folder '{path}'. Make one with diffaccel eval run.")
    made = record.read(folder / record.RUN, record.SAMPLE)
    name = folder.resolve().name
    videos = {} if made else {file.stem: file.name for file in sorted(folder.glob(f"*{VIDEO}"))}
    if videos:
        return Run(name, folder, tuple(Picture(id=stem, file=folder / file) for stem, file in videos.items()))
    if made is None:
        files = open_source(folder).files
        return Run(name, folder, tuple(Picture(id=image, file=folder / file) for image, file in files.items()))
    sources.check_finished(made, path)
    return of_record(folder, made)


def of_record(folder: Path, made: dict[str, Any]) -> Run:
    """The pictures that a record lists, under the folder's name.

    Raises:
        DiffAccelError: for a picture or a video that is not there.
    """
    pictures = []
    for entry in made["images"]:
        file = folder / entry["file"]
        if not file.is_file():
            raise DiffAccelError(f"'{file}' is missing from its run. Repeat the command that made it.")
        latents = folder / entry["latents"] if "latents" in entry else None
        pictures.append(Picture(file.stem, file, entry["prompt"], entry["seed"], entry.get("noise_sha256"), latents))
    return Run(folder.resolve().name, folder, tuple(pictures), made)


def pair(baseline: Run, run: Run, *, partial: bool = False) -> Pairs:
    """Positions of the pictures that belong together: the same prompt and seed, or the same file name.

    Args:
        baseline, run: two runs.
        partial: leave out pictures that only one of them has.

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
    """Whether paired pictures started from equal noise; None where a run does not say."""
    noise = [(baseline.pictures[i].noise, run.pictures[j].noise) for i, j in pairs]
    if any(None in both for both in noise):
        return None
    return all(one == other for one, other in noise)


def pair_prompts(baseline: Run, others: Run) -> Pairs:
    """The same for a run of other seeds: the k-th picture of a prompt with the k-th of that prompt.

    Raises:
        DiffAccelError: when the prompts are not the same, in the same order.
    """
    drawn = [[(picture.prompt, picture.seed is None) for picture in run.pictures] for run in (baseline, others)]
    if drawn[0] != drawn[1] or any(unknown for _, unknown in drawn[0]):
        raise DiffAccelError(
            f"'{others.name}' was not drawn from the prompts of '{baseline.name}'. "
            "Make it with the same prompts and another seed."
        )
    return [(i, i) for i in range(len(baseline))]


def first_pictures(
    baseline: Run, runs: Sequence[Run], others: Run | None
) -> tuple[Run, list[Run], Run | None, list[str]]:
    """All runs cut to the pictures of the shortest one that stopped early, and a sentence that says so.

    A run that stopped once its question was answered (``eval run --until``) has the first pictures of its baseline and
    no others; whatever else it is compared with is compared on the same ones. Other runs are returned as they are.
    """
    stopped = [run for run in runs if run.record.get("until") and len(run) < len(baseline)]
    if not stopped:
        return baseline, list(runs), others, []
    shortest = min(stopped, key=len)
    keys = {picture.key for picture in shortest.pictures}
    count = len(shortest)
    said = f"Compared on the first {count} of {len(baseline)} pictures, where {shortest.name} stopped: "
    said += f"{shortest.record['until']['sentence']}."
    cut = [_only(run, keys) for run in (baseline, *runs)]
    first = None if others is None else _only(others, {picture.key for picture in others.pictures[:count]})
    return cut[0], cut[1:], first, [said]


def _only(run: Run, keys: set[tuple[Any, ...]]) -> Run:
    """The pictures of these keys, with as large a share of what the whole run cost."""
    kept = tuple(picture for picture in run.pictures if picture.key in keys)
    if len(kept) == len(run):
        return run
    share, made = len(kept) / len(run), dict(run.record)
    if cost := made.get("cost"):
        scaled = {key: cost[key] * share for key in ("seconds", "nfe", "forwards", "calls") if key in cost}
        parts = {part: seconds * share for part, seconds in cost.get("parts", {}).items()}
        made["cost"] = {**cost, **scaled, "parts": parts}
    return replace(run, pictures=kept, record=made)
