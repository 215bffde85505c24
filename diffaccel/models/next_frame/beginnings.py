"""What the videos of a world model's folder begin with: one picture of frames, a row a video, with their actions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffaccel.errors import DiffAccelError
from diffaccel.files import read_png, write_png

if TYPE_CHECKING:
    from torch import Tensor

FILE = "beginnings.png"


class Beginning(NamedTuple):
    """What one video begins with; neither is given for a grey frame.

    Attributes:
        frames: ``(P, C, H, W)`` in [-1, 1].
        actions: ``(P,)`` that produced them.
    """

    frames: Tensor | None = None
    actions: Tensor | None = None


GREY = Beginning()


def write(folder: Path, frames: Tensor, actions: Tensor) -> None:
    """Write beginnings ``(N, P, C, H, W)`` in bytes, and their actions ``(N, P)``, into a model's folder."""
    from PIL import Image

    count, length, channels, height, width = frames.shape
    rows = frames.permute(0, 3, 1, 4, 2).reshape(count * height, length * width, channels).cpu().numpy()
    picture = Image.fromarray(rows[..., 0] if channels == 1 else rows)
    write_png(folder / FILE, picture, {"actions": actions.tolist()})


def write_all(folder: Path, beginnings: Sequence[Beginning]) -> None:
    """Write beginnings, as :func:`read` returned them, into a folder; where there are none, remove those of another."""
    import torch

    pairs = [(one.frames, one.actions) for one in beginnings if one.frames is not None and one.actions is not None]
    if pairs:
        frames, actions = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        write(folder, ((frames + 1) * 127.5).round().to(torch.uint8), actions)
    else:
        (folder / FILE).unlink(missing_ok=True)


def read(folder: Path, frame_shape: tuple[int, int, int]) -> list[Beginning]:
    """Return the beginnings of a model's folder; none where it has no such file.

    Args:
        folder: of the model.
        frame_shape: channels, height and width of a frame.

    Raises:
        DiffAccelError: for a picture that is not made of such frames, or does not tell an action of each.
    """
    import torch
    from PIL import Image

    channels, height, width = frame_shape
    file = folder / FILE
    if not file.is_file():
        return []
    try:
        numbers = [[operator.index(action) for action in row] for row in (read_png(file) or {})["actions"]]
        told = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        with Image.open(file) as picture:
            if picture.size != (told.shape[1] * width, told.shape[0] * height):
                raise ValueError(f"{picture.width}x{picture.height} pixels for actions {tuple(told.shape)}")
            data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        rows = data.view(told.shape[0], height, told.shape[1], width, channels)
    except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise DiffAccelError(
            f"'{file}' is no picture of frames {width}x{height} with an action of each ({error}). Copy the model "
            "again, or delete this file to begin with a grey frame."
        ) from error
    frames = rows.permute(0, 2, 4, 1, 3).float() / 127.5 - 1
    return [Beginning(*pair) for pair in zip(frames, told, strict=True)]
