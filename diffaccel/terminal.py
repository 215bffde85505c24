"""Shared by all commands: a parser of options, results on stdout, errors and notes on stderr."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.files import obstacle

# all but tab and line feed, lone surrogates, and characters that turn the direction of text
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one sentence, with the nearest match for an unknown option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse(self, argv: list[str], extra: list[str] | None = None) -> argparse.Namespace:
        """Parse options and positionals in any order.

        Args:
            argv: the words after the command.
            extra: further option names that an unknown option may be meant to be.
        """
        if _DESCRIBING.get():
            raise _ParserReached(self)
        namespace, unparsed = self.parse_known_intermixed_args(argv)
        if unparsed:
            wrong = next((word for word in unparsed if word.startswith("-")), unparsed[0])
            names = {name for name in self._option_string_actions if name not in ("-h", "--help")}
            raise unknown("option", wrong.partition("=")[0], names.union(extra or ()))
        return namespace

    def described_actions(self) -> list[argparse.Action]:
        """Return the options and positionals that the help describes."""
        return [action for action in self._actions if action.help != argparse.SUPPRESS]

    def format_help(self) -> str:
        """Return the help; names of plugins in it may hold control characters."""
        return printable(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Raise argparse's own error as a :class:`DiffAccelError`."""
        raise DiffAccelError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


class _ParserReached(BaseException):
    """A command that is only described has made its parser."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser


_DESCRIBING: ContextVar[bool] = ContextVar("describing", default=False)


def parser_of(command: Callable[[list[str]], int]) -> Parser:
    """Return the parser of a command, which runs up to its parsing and no further."""
    token = _DESCRIBING.set(True)
    try:
        command([])
    except _ParserReached as reached:
        return reached.parser
    finally:
        _DESCRIBING.reset(token)
    raise DiffAccelError(f"The command {command.__module__} parses no options.")


def add_model_options(parser: Parser) -> None:
    """Add the options that choose the model, its dtype and its device."""
    from diffaccel import zoo

    add = parser.add_argument
    add("--model", default=zoo.DEFAULT, help=f"zoo name, folder, or owner/name on the hub (default {zoo.DEFAULT})")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")


def output_path(text: str) -> Path:
    """Return the path that an option names: the type of options that say where to write. ``~`` is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; name one, or leave the option out")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"'{text}' names no home folder ({error})") from error


def check_output(option: str, path: Path, *, folder: bool = False) -> None:
    """Raise when an option's output could not be written, before anything is computed; nothing is created.

    Args:
        option: that names the output.
        path: of the file, or of the folder.
        folder: whether it is to be a folder.
    """
    try:
        reason = obstacle(path if folder else path.parent)
        if not folder and path.exists() and not path.is_file():
            reason = "it is a folder" if path.is_dir() else "it is no regular file"
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error)
    if reason:
        raise DiffAccelError(f"{option} '{path}' cannot be written ({reason}). Name another.")


def write(text: str) -> None:
    """Write a line of the result to stdout."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def write_json(values: Any) -> None:
    """Write one JSON value to stdout, on one line."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    write(_CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def write_error(text: str) -> None:
    """Write one sentence about what went wrong to stderr."""
    sys.stderr.write(f"diffaccel: {printable(' '.join(text.split()))}\n")
    sys.stderr.flush()


def write_note(text: str) -> None:
    """Write a line about progress to stderr, apart from the results."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """Return a text whose control characters are written as escapes: a terminal would obey them."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def write_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout, as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=printable(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(file=sys.stdout)
    with console.capture() as capture:  # rich itself would end the process when the reader of a pipe has left
        console.print(table)
    sys.stdout.write(capture.get())
    sys.stdout.flush()


def share_cpu() -> None:
    """Let waiting CPU threads spin for a moment before they sleep, unless the environment says otherwise.

    On a busy machine, spinning threads lose a time slice at every parallel region to a thread that another process has
    displaced; on an idle machine, threads that sleep at once wake late. 5,000 rounds of spinning cost little in either
    case (``scripts/bench_threads.py``). GNU's OpenMP, which torch ships on Linux, reads the variable when torch loads;
    results do not change.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
