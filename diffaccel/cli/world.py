"""What ``rollout`` and ``play`` share: options of a world model's sampler, and the sampler of a model's folder."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import terminal
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.runs.loading import find_folder, pick_device, pick_dtype, quiet_libraries, read_whole
from diffaccel.runs.request import DTYPES
from diffaccel.runs.threads import check_threads

if TYPE_CHECKING:
    from torch import Tensor

    from diffaccel.models.next_frame.beginnings import Beginning
    from diffaccel.models.next_frame.pipeline import NextFramePipeline
    from diffaccel.samplers.nfd.sampler import NextFrameSampler


LEAST_FPS, MOST_FPS = 0.01, 1000


def add_sampler_options(parser: terminal.Parser, draft: str) -> None:
    """Add the model and the options of how its frames are drawn."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder that save_pretrained of a world model wrote, or a zoo name")
    add("--steps", type=int, default=4, metavar="K", help="evaluations of a frame (default 4)")
    add(
        "--window", type=int, metavar="W", help="frames that are looked back at, and the new one (default: the model's)"
    )
    add("--draft", default=draft, metavar="N", help=f"frames of a round: a number, or auto (default {draft})")
    add("--latency", type=float, metavar="MS", help="longest milliseconds from an action to its frame, for auto")
    add("--context-noise", type=float, metavar="T", help="noise level of earlier frames (default: the model's)")
    add(
        "--start", metavar="N|PNG",
        help="one of the model's own beginnings, from 0, or a picture (default: the seed's; grey without any)",
    )  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="of the noise (default 0)")
    add("--no-capture", action="store_true", help="record no CUDA graphs")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")


def check_fps(fps: float, most: int = MOST_FPS, because: str = "") -> None:
    """Raise for a number of frames a second that no file and no page has."""
    if not LEAST_FPS <= fps <= most:
        raise DiffAccelError(f"--fps is {fps:g}; it must be from {LEAST_FPS} to {most} frames a second{because}.")


def parse_draft(text: str) -> Any:
    """Return the number of ``--draft``, or "auto"."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise DiffAccelError(f"--draft is '{text}'; it must be auto or a whole number, 1 or more.") from None


def open_sampler(options: Namespace) -> tuple[NextFrameSampler, Beginning]:
    """Return the sampler that the options describe, with a video begun, and what it began with."""
    if options.dtype not in DTYPES:
        raise unknown("dtype", options.dtype, DTYPES)
    check_threads(options.threads, "--threads")
    if not 0 <= options.seed < 2**63:
        raise DiffAccelError(f"--seed is {options.seed}; it must be from 0 to 2**63 - 1.")
    draft, folder = parse_draft(options.draft), find_folder(options.model)
    if folder is None:
        raise DiffAccelError(f"'{options.model}' is no folder. Give one that save_pretrained of a world model wrote.")
    quiet_libraries(True)
    import torch

    from diffaccel.models.next_frame.pipeline import NextFramePipeline
    from diffaccel.quant import hf_quantizer
    from diffaccel.samplers.nfd.sampler import NextFrameSampler

    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    hf_quantizer.register()  # for models that were saved quantized
    pipe = read_whole(options.model, folder, pick_dtype(options.dtype, device), NextFramePipeline.from_folder)
    pipe = pipe.to(device)
    settings = pipe.settings(options.steps)
    noise = settings.context_noise if options.context_noise is None else options.context_noise
    sampler = NextFrameSampler(
        pipe.transformer.eval(), options.steps, options.window, draft, context_noise=noise, shift=settings.shift,
        rule=settings.rule, capture=False if options.no_capture else None, latency=options.latency,
        seeds=(options.seed,),
    )  # fmt: skip
    start = find_beginning(options.start, options.seed, pipe)
    sampler.reset(*start, truncate=True)
    return sampler, start


def find_beginning(start: str | None, seed: int, pipe: NextFramePipeline) -> Beginning:
    """Return what ``--start`` names: a number of the model's own beginnings, a picture, or the one of the seed."""
    from diffaccel.models.next_frame.beginnings import GREY, Beginning

    own = pipe.beginnings
    if start is not None and not start.removeprefix("-").isdecimal():
        return Beginning(read_start(Path(start).expanduser(), pipe.transformer.frame_shape))
    if start is None:
        return own[seed % len(own)] if own else GREY
    if not 0 <= int(start) < len(own):
        allowed = f"0 to {len(own) - 1}, or a picture" if own else "a picture, for the model has no beginnings"
        raise DiffAccelError(f"--start is {start}; it must be {allowed}.")
    return own[int(start)]


def read_start(path: Path, frame_shape: tuple[int, int, int]) -> Tensor:
    """Return a picture as the first frame ``(1, C, H, W)`` in [-1, 1]."""
    import torch
    from PIL import Image, UnidentifiedImageError

    channels, height, width = frame_shape
    try:
        picture = Image.open(path).convert({1: "L", 3: "RGB", 4: "RGBA"}.get(channels, "RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise DiffAccelError(f"--start '{path}' cannot be read as a picture: {error}.") from error
    if picture.size != (width, height):
        raise DiffAccelError(
            f"--start '{path}' is {picture.width}x{picture.height}; the model's frames are {width}x{height}. Resize it."
        )
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, channels)
    return (data.movedim(-1, 0).float() / 127.5 - 1)[None]


def as_picture(frame: Tensor, scale: int = 1) -> Any:
    """Return a frame ``(C, H, W)`` as a picture, each pixel a square of ``scale`` pixels.

    Raises:
        DiffAccelError: for frames that are no pictures, such as latents.
    """
    from PIL import Image

    from diffaccel.models.next_frame.pipeline import to_uint8

    if frame.shape[0] not in (1, 3):
        raise DiffAccelError(f"The model's frames have {frame.shape[0]} channels; pictures have 1 or 3.")
    data = to_uint8(frame).cpu().numpy()
    picture = Image.fromarray(data[..., 0] if frame.shape[0] == 1 else data).convert("RGB")
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
