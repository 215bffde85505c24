"""Read the frames of a video file with ffmpeg."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, first_line


def read_video(path: Path) -> Tensor:
    """Read every frame of a video, as ffmpeg decodes it: uint8 ``(T, 3, H, W)``.

    Raises:
        DiffAccelError: for a file that ffmpeg cannot read, or one without a frame.
    """
    import imageio_ffmpeg

    try:
        reader = imageio_ffmpeg.read_frames(path, pix_fmt="rgb24")
        width, height = next(reader)["size"]
        frames = [torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3) for frame in reader]
    except (OSError, RuntimeError, StopIteration) as error:
        raise DiffAccelError(f"The video '{path}' cannot be read ({first_line(error)}). Make it again.") from error
    if not frames:
        raise DiffAccelError(f"The video '{path}' has no frame. Make it again.")
    return torch.stack(frames).permute(0, 3, 1, 2).contiguous()
