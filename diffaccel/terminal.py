"""What the commands share: reading options, and writing results to stdout and errors to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from diffaccel.errors import DiffAccelError, unknown


class Parser(argparse.ArgumentParser):
    """argparse with our errors: one sentence, and the nearest match for an unknown option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse(self, argv: list[str], extra: list[str] | None = None) -> argparse.Namespace:
        """Options and positionals in any order; ``extra`` are further option names to suggest."""
        namespace, rest = self.parse_known_intermixed_args(argv)
        if rest:
            wrong = next((word for word in rest if word.startswith("-")), rest[0])
            known = {name for name in self._option_string_actions if name not in ("-h", "--help")}
            raise unknown("option", wrong.partition("=")[0], known.union(extra or ()))
        return namespace

    def error(self, message: str) -> NoReturn:
        raise DiffAccelError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def add_model_options(parser: Parser) -> None:
    """Which model to open, in which dtype, on which device."""
    from diffaccel import zoo

    add = parser.add_argument
    add("--model", default=zoo.DEFAULT, help=f"zoo name, folder, or owner/name on the hub (default {zoo.DEFAULT})")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")


def write(text: str) -> None:
    """A line of result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_json(values: Any) -> None:
    """One JSON value, on one line."""
    write(json.dumps(values, ensure_ascii=False, allow_nan=False))


def write_error(text: str) -> None:
    """One sentence about what went wrong."""
    sys.stderr.write(f"diffaccel: {' '.join(text.split())}\n")
    sys.stderr.flush()


def write_note(text: str) -> None:
    """A line about what is going on, apart from the results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def write_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=sys.stdout).print(table)


def share_cpu() -> None:
    """Let CPU threads that wait spin for a moment and then sleep, unless the environment says otherwise.

    While a spinning thread waits for one that a busy neighbour has put off its core, both lose a time slice at every
    parallel region; a thread that sleeps at once is woken late on an idle machine. 5,000 rounds cost little of either
    (``scripts/bench_threads.py``). GNU's OpenMP, which torch brings on Linux, reads this when torch loads; results
    are the same.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
