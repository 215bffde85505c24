"""Feature networks by name: uint8 pictures in, one row of features each out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffaccel import zoo
from diffaccel.errors import DiffAccelError, unknown

if TYPE_CHECKING:
    import torch

    from diffaccel.eval.extractors.base import Extractor
    from diffaccel.eval.extractors.clip import ClipExtractor

_CLIP = "open_clip:local-dir:"


def extractor(spec: str, *, device: str | torch.device = "cpu") -> Extractor:
    """The extractor of a word.

    Args:
        spec: ``tiny``, the embedded one; ``open_clip:local-dir:FOLDER``; or a CLIP of the zoo, as ``emoji-clip-judge``.
        device: where it computes.

    Raises:
        DiffAccelError: for an unknown name, or a folder that holds no CLIP.
    """
    import torch

    where = torch.device(device)
    if spec == "tiny":
        from diffaccel.eval.extractors.tiny import tiny

        return tiny(where)
    if spec in clips() or spec.startswith(_CLIP):
        from diffaccel.eval.extractors.clip import clip

        folder = zoo.path(spec) if spec in clips() else Path(spec.removeprefix(_CLIP)).expanduser()
        if not (folder / "open_clip_config.json").is_file():
            raise DiffAccelError(f"'{folder}' holds no open_clip_config.json. Give a folder in open_clip's layout.")
        return clip(folder, name=spec if spec in clips() else folder.resolve().name, device=where)
    raise unknown("extractor", spec, ["tiny", *clips(), f"{_CLIP}FOLDER"])


def as_clip(found: Extractor) -> ClipExtractor:
    """An extractor that reads texts too; others are refused."""
    from diffaccel.eval.extractors.clip import ClipExtractor

    if not isinstance(found, ClipExtractor):
        raise DiffAccelError(f"'{found.name}' reads no texts. Give a CLIP: {', '.join(clips())}, or {_CLIP}FOLDER.")
    return found


def clips() -> list[str]:
    """The CLIPs of the zoo."""
    return [name for name in zoo.names() if "clip" in name.split("-")]
