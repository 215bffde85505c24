"""What a network is trained on: clean samples in the coordinates of its pipeline, with their prompts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffaccel.errors import DiffAccelError, first_line, size_text
from diffaccel.processes import Processes
from diffaccel.quant.identity import pipeline_hash
from diffaccel.session import open_session
from diffaccel.training.checkpoint import load_tensors, save_tensors

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, eq=False)
class CleanSamples:
    """Clean samples.

    Attributes:
        x0: fp32 on the CPU, ``(N, C, H, W)``, or with frames, as the pipeline's sampler sees them.
        prompts: one a sample.
        kind: "given", "encoded" pictures, or "drawn" by the network that is followed.
    """

    x0: Tensor
    prompts: tuple[str, ...]
    kind: str = "given"

    def __post_init__(self) -> None:
        if len(self.x0) != len(self.prompts) or not self.prompts:
            raise DiffAccelError(
                f"There are {len(self.x0)} samples and {len(self.prompts)} prompts; give one for each."
            )
        if not bool(torch.isfinite(self.x0).all()):
            raise DiffAccelError("The samples hold infinities or not-a-numbers. Repair the data.")

    @property
    def identity(self) -> str:
        """A hash of samples and prompts."""
        digest = hashlib.sha256("\n".join(self.prompts).encode())
        digest.update(self.x0.double().flatten(1).sum(dim=1).numpy().tobytes())
        return digest.hexdigest()[:16]

    def rows(self, group: int, count: int) -> Tensor:
        """Return the samples of a group of ``count`` prompts; after the last comes the first."""
        places = [place % len(self.prompts) for place in range(group * count, (group + 1) * count)]
        return self.x0[places]

    def save(self, path: Path) -> None:
        """Write one safetensors file: ``x0``, and ``prompts`` as JSON in its metadata."""
        save_tensors({"x0": self.x0}, path, {"prompts": json.dumps(self.prompts), "kind": self.kind})


def read_samples(path: Path) -> CleanSamples:
    """Read what :meth:`CleanSamples.save` wrote.

    Raises:
        DiffAccelError: for a file without samples or prompts, and for one that is damaged.
    """
    try:
        tensors, values = load_tensors(path)
        x0, prompts = tensors["x0"], json.loads(values["prompts"])
        if not (isinstance(prompts, list) and all(isinstance(text, str) for text in prompts) and x0.ndim > 1):
            raise ValueError("prompts are no list of texts, or x0 is no batch")
    except DiffAccelError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DiffAccelError(
            f"'{path}' holds no samples ({first_line(error, 90)}). It must be a safetensors file with a tensor x0 and "
            "a JSON list 'prompts' in its metadata."
        ) from error
    return CleanSamples(x0.float(), tuple(prompts), values.get("kind", "given"))


def encoded_pictures(pipe: Any, folder: Path, arguments: dict[str, Any]) -> CleanSamples:
    """Encode a folder of pictures with captions, scaled and cropped to the size of the call.

    A caption is the text of ``NAME.txt`` beside ``NAME.png``, or ``text`` of the picture's line in ``metadata.jsonl``.

    Raises:
        DiffAccelError: for a folder without pictures, a picture without caption, and pipelines of videos.
    """
    captions = _captions(folder)
    with open_session(pipe, prompt="x", **arguments) as session:
        if session.x.ndim != 4:
            raise DiffAccelError(
                f"{type(pipe).__name__} draws videos. Give clips as encoded samples, a safetensors file with x0 and "
                "prompts."
            )
        size, family, shape, device = (
            (session.height, session.width),
            session.family,
            session.x.shape[1:],
            session.device,
        )
    rows = []
    for file in captions:
        with torch.no_grad():
            latents = family.encode(pipe, _pixels(file, size)[None].to(device)).float().cpu()
        if latents.shape[1:] != shape:
            raise DiffAccelError(
                f"'{file.name}' is encoded to {tuple(latents.shape[1:])}, but the call at {size_text(*size)} has "
                f"{tuple(shape)}. Give encoded samples."
            )
        rows.append(latents)
    return CleanSamples(torch.cat(rows), tuple(captions.values()), "encoded")


def _captions(folder: Path) -> dict[Path, str]:
    lines = folder / "metadata.jsonl"
    listed: dict[str, str] = {}
    if lines.is_file():
        for line in _text(lines).splitlines():
            entry = _entry(lines, line)
            if "file_name" in entry:
                listed[str(entry["file_name"])] = str(entry.get("text", entry.get("prompt", "")))
    found = {}
    for file in sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES):
        beside = file.with_suffix(".txt")
        caption = listed.get(file.name) or (_text(beside).strip() if beside.is_file() else None)
        if caption is None:
            raise DiffAccelError(
                f"'{file}' has no caption: write it to {beside.name}, or into metadata.jsonl beside the pictures."
            )
        found[file] = caption
    if not found:
        raise DiffAccelError(f"'{folder}' has no pictures ({', '.join(PICTURES)}).")
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DiffAccelError(f"'{file}' is no text in UTF-8 ({first_line(error, 90)}). Write it again.") from error


def _entry(file: Path, line: str) -> dict[str, Any]:
    """Return what a line of ``metadata.jsonl`` says."""
    try:
        entry = json.loads(line) if line.strip() else {}
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise DiffAccelError(f"'{file}' has the line {line[:60]!r}, which is no JSON object. Repair it.")
    return entry


def _pixels(file: Path, size: tuple[int, int]) -> Tensor:
    """Return a picture ``(3, H, W)`` in [-1, 1], scaled to cover the size and cropped at its middle."""
    import numpy
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS)
    except OSError as error:
        raise DiffAccelError(
            f"'{file}' is no whole picture ({first_line(error, 90)}). Replace or remove it."
        ) from error
    array = numpy.asarray(fitted, dtype=numpy.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1)


def drawn_samples(
    pipe: Any,
    prompts: Sequence[str],
    arguments: dict[str, Any],
    folder: Path,
    *,
    batch: int,
    seed: int = 0,
    processes: Processes | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> CleanSamples:
    """Let the pipeline draw its own samples, in parts that are kept in a folder, so that a killed run goes on.

    Row i depends on prompt i and ``seed + i``, and on which prompts are drawn with it. Parts that another model drew,
    or one with other weights, are not taken.
    """
    launch = processes or Processes()
    parts = math.ceil(len(prompts) / batch)
    origin = [list(prompts), batch, seed, _told(arguments), pipeline_hash(pipe)]
    key = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
    files = [folder / f"drawn-{key}-{part:05d}.safetensors" for part in range(parts)]
    for part in range(launch.rank, parts, launch.size):
        if not files[part].is_file():
            texts = tuple(prompts[part * batch : (part + 1) * batch])
            CleanSamples(_drawn(pipe, texts, arguments, seed + part * batch), texts, "drawn").save(files[part])
            tell(f"drawn: {min((part + 1) * batch, len(prompts))} of {len(prompts)} samples")
    launch.wait()
    read = [read_samples(file) for file in files]
    return CleanSamples(torch.cat([p.x0 for p in read]), tuple(text for p in read for text in p.prompts), "drawn")


def _told(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if isinstance(value, str | int | float | bool | list)}


def _drawn(pipe: Any, texts: tuple[str, ...], arguments: dict[str, Any], seed: int) -> Tensor:
    extra = dict(arguments)
    if isinstance(extra.get("negative_prompt"), str):
        extra["negative_prompt"] = [extra["negative_prompt"]] * len(texts)
    generators = [torch.Generator("cpu").manual_seed(seed + row) for row in range(len(texts))]
    call = {"prompt": list(texts), "generator": generators, **extra}
    with torch.no_grad():
        out = pipe(**call, output_type="latent", return_dict=False)[0]
    with open_session(pipe, **call) as session:
        rows = session.family.unwrap(out, session.conds[0].arguments)
        x0 = session.family.spatial(pipe, rows, session.height, session.width)
        if x0.shape != session.x.shape:
            raise DiffAccelError(
                f"{type(pipe).__name__} returns latents of {tuple(x0.shape)} and samples {tuple(session.x.shape)}. "
                "Give encoded samples, a safetensors file with x0 and prompts."
            )
    return x0.float().cpu()
