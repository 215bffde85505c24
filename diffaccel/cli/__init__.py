"""The command line: a table of commands, each imported when it runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from diffaccel.errors import DiffAccelError, unknown

# command -> function from its arguments to the exit status, and one line of help
COMMANDS = {
    "sample": ("diffaccel.cli.sample:run", "generate images from prompts, or video"),
    "eval": ("diffaccel.eval.commands:main", "what an acceleration costs and buys: runs, comparisons, reports"),
    "doctor": ("diffaccel.cli.doctor:run", "what this machine can do, which methods are fast here, and why"),
    "list": ("diffaccel.cli.listing:run_list", "the methods and the embedded models"),
    "explain": ("diffaccel.cli.listing:run_explain", "one method or one model: what it is, its options, an example"),
}
BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 0, 2 for bad input, 3 for a failure while running, 130 when interrupted, and 128 and its number for another
    signal that ended it; commands may have others for what they tell.
    """
    argv = sys.argv[1:] if argv is None else argv
    received = [INTERRUPTED - 128]
    try:
        from diffaccel.terminal import share_cpu

        share_cpu()
        with _signals_interrupt(received):
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
        _report(f"error: {type(error).__name__}: {error} (DIFFACCEL_DEBUG=1 shows where)")
        return FAILED


@contextlib.contextmanager
def _signals_interrupt(received: list[int]) -> Iterator[None]:
    """Let TERM and HUP interrupt the block as Ctrl-C does, and append their numbers to ``received``.

    Signals that the caller ignores or handles are left alone, as nohup asks. So are those of a launch: a process that
    waits for others in a collective would not answer, and its launcher has the last word anyway.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread() or "RANK" in os.environ:
        numbers = []

    def interrupt(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _run(argv: list[str]) -> int:
    from diffaccel.terminal import Parser, write

    parser = Parser(prog="diffaccel", description="Diffusion and flow pipelines, faster, smaller and better.")
    parser.add_argument("--version", action="store_true", help="the version of diffaccel, and nothing else")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below; each has its own --help")
    width = max(map(len, COMMANDS)) + 2
    parser.epilog = "commands:\n" + "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
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
