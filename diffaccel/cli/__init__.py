"""The command line: a table of commands, each imported when it runs."""

from __future__ import annotations

import os
import sys
from importlib import import_module

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
    """Run a command and return 0, 2 for bad input, 3 for a failure while running, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        from diffaccel.terminal import share_cpu

        share_cpu()
        return _run(argv)
    except KeyboardInterrupt as stop:
        _report(str(stop) or "Stopped.")
        return INTERRUPTED
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
    """Write an error to stderr; of processes that a launcher started, only the first one writes it."""
    from diffaccel.terminal import write_error

    if os.environ.get("RANK", "0") == "0" or "Out of memory" in text:
        write_error(text)
