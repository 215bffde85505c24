"""Shared by all commands: a parser of options, results on stdout, errors and notes on stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from diffaccel.errors import DiffAccelError, unknown


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
        namespace, unparsed = self.parse_known_intermixed_args(argv)
        if unparsed:
            wrong = next((word for word in unparsed if word.startswith("-")), unparsed[0])
            names = {name for name in self._option_string_actions if name not in ("-h", "--help")}
            raise unknown("option", wrong.partition("=")[0], names.union(extra or ()))
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raise argparse's own error as a :class:`DiffAccelError`."""
        raise DiffAccelError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def add_model_options(parser: Parser) -> None:
    """Add the options that choose the model, its dtype and its device."""
    from diffaccel import zoo

    add = parser.add_argument
    add("--model", default=zoo.DEFAULT, help=f"zoo name, folder, or owner/name on the hub (default {zoo.DEFAULT})")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")


def write(text: str) -> None:
    """Write a line of the result to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_json(values: Any) -> None:
    """Write one JSON value to stdout, on one line."""
    write(json.dumps(values, ensure_ascii=False, allow_nan=False))


def write_error(text: str) -> None:
    """Write one sentence about what went wrong to stderr."""
    sys.stderr.write(f"diffaccel: {' '.join(text.split())}\n")
    sys.stderr.flush()


def write_note(text: str) -> None:
    """Write a line about progress to stderr, apart from the results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def write_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout, as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=sys.stdout).print(table)


def share_cpu() -> None:
    """Let waiting CPU threads spin for a moment before they sleep, unless the environment says otherwise.

    On a busy machine, spinning threads lose a time slice at every parallel region to a thread that another process has
    displaced; on an idle machine, threads that sleep at once wake late. 5,000 rounds of spinning cost little in either
    case (``scripts/bench_threads.py``). GNU's OpenMP, which torch ships on Linux, reads the variable when torch loads;
    results do not change.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
