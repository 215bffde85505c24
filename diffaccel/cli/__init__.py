"""The command line: a table of commands, each imported when it runs."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from diffaccel.errors import DiffAccelError, first_line, unknown

# command -> function from its arguments to the exit status, and one line of help
COMMANDS = {
    "sample": ("diffaccel.cli.sample:run", "generate images from prompts, or video"),
    "eval": ("diffaccel.eval.commands:main", "what an acceleration costs and buys: runs, comparisons, reports"),
    "tune": ("diffaccel.cli.tune:run", "the fastest mix of methods that keeps a promise, with its certificate"),
    "quantize": ("diffaccel.cli.quantize:run", "a model with weights of 8 or 4 bits, saved for from_pretrained"),
    "distill": (
        "diffaccel.cli.distill:run",
        "a student that draws in one network call, without pictures to learn from",
    ),
    "rollout": ("diffaccel.cli.rollout:run", "a world model's video under a stream of actions, as mp4 or gif"),
    "play": ("diffaccel.cli.play:run", "a world model in a page of the browser, by the keyboard"),
    "doctor": ("diffaccel.cli.doctor:run", "what this machine can do, which methods are fast here, and why"),
    "list": ("diffaccel.cli.listing:run_list", "the methods and the embedded models"),
    "explain": ("diffaccel.cli.listing:run_explain", "one method or one model: what it is, its options, an example"),
    "completion": ("diffaccel.cli.completion:run", "tab completion for bash, zsh or fish"),
}
BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 0, 2 for bad input, 3 for a failure while running, 130 when interrupted, and 128 and its number for another
    signal that ended it; commands may have others for what they tell.
    """
    argv = sys.argv[1:] if argv is None else argv
    _open_standard_streams()
    received = [INTERRUPTED - 128]
    try:
        from diffaccel.cli.signals import interrupting
        from diffaccel.terminal import share_cpu

        share_cpu()
        with interrupting(received, _report):
            return _run(argv)
    except KeyboardInterrupt as stop:
        _report(str(stop) or "Stopped.")
        return 128 + received[-1]
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except DiffAccelError as error:
        if os.environ.get("DIFFACCEL_DEBUG"):
            raise
        _report(f"error: {error}")
        return getattr(error, "exit_code", BAD_INPUT)
    except Exception as error:
        if os.environ.get("DIFFACCEL_DEBUG"):
            raise
        _report(f"error: {type(error).__name__}: {first_line(error, 700)} (DIFFACCEL_DEBUG=1 shows where)")
        return FAILED


def _open_standard_streams() -> None:
    """Let a standard stream that was closed (``>&-``, some services) be the null device, and no file that is opened.

    An opened file gets the lowest free number, and would be written as standard output by whatever knows it as 1.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _run(argv: list[str]) -> int:
    from diffaccel.terminal import Parser, write

    parser = Parser(prog="diffaccel", description="Diffusion and flow pipelines, faster, smaller and better.")
    parser.add_argument("--version", action="store_true", help="the version of diffaccel, and nothing else")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below; each has its own --help")
    width = max(map(len, COMMANDS)) + 2
    parser.epilog = "commands:\n" + "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
    parser.epilog += '\n\nto begin with:\n  diffaccel sample "red apple, fluent 3d"\n  diffaccel explain emoji-flux'
    first = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    options = parser.parse(argv[: first + 1])
    if options.version:
        from diffaccel import __version__

        write(__version__)
        return 0
    if options.command is None:
        parser.print_help()
        return BAD_INPUT
    if options.command not in COMMANDS:
        raise unknown("command", options.command, COMMANDS)
    module, _, function = COMMANDS[options.command][0].partition(":")
    return getattr(import_module(module), function)(argv[first + 1 :])


def _report(text: str) -> None:
    """Write an error to stderr; processes of a launch other than the first one say which they are."""
    from diffaccel.terminal import write_error

    rank = os.environ.get("RANK", "0")
    write_error(text if rank == "0" else f"process {rank} of the launch: {text}")
