"""``diffaccel rollout``: a world model's video under a stream of actions, as a file, and what it cost."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from diffaccel import terminal
from diffaccel.cli.world import add_sampler_options, as_picture, check_fps, open_sampler
from diffaccel.errors import DiffAccelError, first_line

_EXAMPLES = """examples:
  diffaccel rollout coinrun-nfd --actions hold --frames 500 --draft auto --out run.mp4
  diffaccel rollout ./world --actions 7,7,7,8,8,4 --draft 1 --out run.gif
  diffaccel rollout ./world --actions actions.txt --draft 4 --json --out run.mp4

hold draws actions and holds each for --hold frames on average; random draws one for each frame. --draft above 1 drafts
frames while an action is held: it is faster, and draws another video than --draft 1."""


LARGEST_SCALE = 32
GIF_TICKS = 100  # a second, of which a frame takes a whole number


def make_parser() -> terminal.Parser:
    """Return the parser of the command."""
    parser = terminal.Parser(
        prog="diffaccel rollout", description="Draw a world model's video under a stream of actions.", epilog=_EXAMPLES
    )
    add_sampler_options(parser, "auto")
    add = parser.add_argument
    add("--actions", default="hold", metavar="A", help="hold (default), random, numbers as 3,3,1, or a file of them")
    add("--frames", type=int, metavar="N", help="frames to draw (default 100, or all actions that are given)")
    add("--hold", type=float, default=10.0, metavar="M", help="mean frames for which hold holds an action (default 10)")
    add("--oracle", action="store_true", help="drafts know the actions to come: an upper bound, not what play does")
    add("--fps", type=float, default=15.0, metavar="F", help="frames a second of the video file (default 15)")
    add("--scale", type=int, default=4, metavar="S", help="side of the square that shows a pixel (default 4)")
    add("--out", type=terminal.output_path, metavar="FILE", help="video to write, .mp4 or .gif (default: none)")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def run(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    options = make_parser().parse(argv)
    if options.out is not None:
        terminal.check_output("--out", options.out)
        if options.out.suffix not in (".mp4", ".gif"):
            raise DiffAccelError(
                f"--out '{options.out}' has the ending '{options.out.suffix}'; it must be .mp4 or .gif."
            )
        check_writer(options.out)
    if not 1 <= options.scale <= LARGEST_SCALE:
        raise DiffAccelError(f"--scale is {options.scale}; it must be from 1 to {LARGEST_SCALE}.")
    if options.out is not None and options.out.suffix == ".gif":
        check_fps(options.fps, GIF_TICKS, ", for a .gif tells hundredths of a second")
    check_fps(options.fps)
    if (options.frames is not None and options.frames < 1) or not options.hold >= 1:
        raise DiffAccelError(f"--frames is {options.frames} and --hold {options.hold:g}; both must be 1 or more.")
    given = read_actions(options.actions)
    sampler, _ = open_sampler(options)
    actions = stream(options, given, sampler.model.null_action)
    pictures = []
    for frame in sampler.frames(actions, options.oracle):
        if options.out is not None:
            pictures.append(as_picture(frame[0], options.scale))
    if options.out is not None:
        try:
            write_video(options.out, pictures, options.fps)
        except OSError as error:  # such as a full disk; what stood there stays
            reason = error.strerror or first_line(error, 90)
            raise DiffAccelError(
                f"--out '{options.out}' cannot be written ({reason}). Make room, or name another; the command "
                "draws the same frames again."
            ) from error
    stats = sampler.stats.to_dict()
    costs = {str(count): seconds for count, seconds in sampler.step_seconds.items()}
    result: dict[str, Any] = {
        "model": options.model, "frames": len(actions), "steps": options.steps, "window": sampler.window,
        "device": str(sampler.engine.cache.device), "cache_bytes": sampler.engine.cache.bytes, "step_seconds": costs,
        "out": None if options.out is None else str(options.out), **stats,
    }  # fmt: skip
    terminal.write_json(result) if options.json else terminal.write(describe(result))
    return 0


def read_actions(text: str) -> list[int] | None:
    """Return the actions that an option gives, as numbers or as a file of them; None for a stream by name."""
    if text in ("hold", "random"):
        return None
    source = f"--actions '{text}'"
    if not text.strip():
        raise DiffAccelError("--actions is empty; give hold, random, numbers such as 3,3,1, or a file of them.")
    if not re.fullmatch(r"[\s\d,]+", text):
        try:
            text = Path(text).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DiffAccelError(
                f"{source} is neither hold, random, numbers such as 3,3,1, nor a file that can be read: "
                f"{first_line(error)}."
            ) from error
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise DiffAccelError(f"{source} holds something else than whole numbers between commas or spaces.")
    return [int(word) for word in words]


def stream(options: Any, given: list[int] | None, actions: int) -> list[int]:
    """Return the actions to draw frames for."""
    from diffaccel.models.next_frame.inputs import check_actions
    from diffaccel.samplers.nfd.streams import held_actions

    if given is None:
        hold = options.hold if options.actions == "hold" else actions / max(actions - 1, 1)
        return held_actions(100 if options.frames is None else options.frames, actions, hold, options.seed)
    count = len(given) if options.frames is None else options.frames
    if not 1 <= count <= len(given):
        raise DiffAccelError(
            f"--frames is {count}, and --actions has {len(given)}. Give 1 to {len(given)}, or leave it out."
        )
    check_actions(given, actions, "--actions")
    return given[:count]


def check_writer(path: Path) -> None:
    """Raise where an mp4 could not be written when its frames are drawn."""
    if path.suffix == ".mp4":
        try:
            import imageio_ffmpeg

            imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError) as error:
            raise DiffAccelError(
                f"'{path}' needs ffmpeg, which is not there ({first_line(error)}). Install imageio-ffmpeg, or name a "
                ".gif."
            ) from error


def write_video(path: Path, pictures: list[Any], fps: float) -> None:
    """Write pictures as mp4, by the ffmpeg of imageio-ffmpeg, or as an animated GIF; the folder is made if need be."""
    from diffaccel.files import Clip, atomic, write_mp4

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        with atomic(path) as file:
            pictures[0].save(
                file,
                "GIF",
                save_all=True,
                append_images=pictures[1:],
                duration=gif_durations(len(pictures), fps),
                loop=0,
            )
        return
    write_mp4(path, Clip(pictures, fps))


def gif_durations(frames: int, fps: float) -> list[int]:
    """Return the milliseconds of each frame: whole hundredths of a second, whose sums are never off by more than one.

    One duration for all would be cut to hundredths, and 15 frames a second become 16.7.
    """
    ends = [round((frame + 1) * GIF_TICKS / fps) for frame in range(frames)]
    return [(end - begin) * 1000 // GIF_TICKS for begin, end in itertools.pairwise([0, *ends])]


def describe(result: dict[str, Any]) -> str:
    """Return a rollout's cost as a few lines."""
    drafts = ", ".join(f"{rounds} of {count}" for count, rounds in result["drafts"].items())
    lines = [
        f"{result['frames']} frames in {result['seconds']:.2f} s: {result['fps']:.1f} FPS with K = {result['steps']}, "
        f"window {result['window']}, on {result['device']}, without writing the file",
        f"rounds by their frames: {drafts}; {result['discarded']} of {result['computed']} frames thrown away "
        f"({result['discard_rate']:.1%}); {result['evaluations']} evaluations",
    ]
    if result["latency_p99"] is not None:
        measured, asked = result["latency_p99"], result["latency_asked"]
        told = "met" if measured <= asked else "not met"
        lines.append(f"from an action to its frame: {measured:.4g} ms or less in 99 % of rounds; {asked:g} ms {told}")
    if result["is_oracle"]:
        lines.append("drafts knew the actions to come: an upper bound, which live play cannot reach")
    if result["step_seconds"]:
        first = next(iter(result["step_seconds"].values()))
        costs = ", ".join(f"{count}: {seconds / first:.2f}" for count, seconds in result["step_seconds"].items())
        lines.append(f"cost of a round relative to one frame, by its frames: {costs}")
    return "\n".join(lines if result["out"] is None else [*lines, result["out"]])
