"""Options that the commands on sets of images share, and how these commands print what they measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import terminal
from diffaccel.errors import DiffAccelError

if TYPE_CHECKING:
    from diffaccel.eval.comparison.row import Row
    from diffaccel.eval.networks.extractors.base import Extractor
    from diffaccel.eval.networks.protocols import Protocol

STDOUT = "-"


# -- options ----------------------------------------------------------------------------------------------------------


def add_image_options(parser: terminal.Parser) -> None:
    """Add the options that say how images are read and where networks compute."""
    add = parser.add_argument
    add("--num", type=int, metavar="N", help="only the first N images of each set, in the order of their names")
    add("--batch", type=int, default=64, metavar="B", help="images in one call of a network (default 64)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add_json_option(parser)


def add_json_option(parser: terminal.Parser) -> None:
    """Add ``--json``: results for machines."""
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE",
        help="print one JSON object and nothing else, or write it to FILE.json beside what is printed",
    )  # fmt: skip


def add_network_options(parser: terminal.Parser, default: str) -> None:
    """Add the options that choose the feature network and its preprocessing."""
    add = parser.add_argument
    add("--protocol", metavar="NAME", help="network, preprocessing and parameters as published; see eval list")
    add("--extractor", metavar="NAME", help=f"feature network; see eval list (default: {default})")
    add("--allow-unknown-weights", action="store_true", help="Inception weights of another sha256, under another name")
    add("--download", action="store_true", help="fetch published weights that are not on this machine")
    add(
        "--cache",
        type=terminal.output_path,
        metavar="DIR",
        help="keep features here, to go on after a stop and to measure again at once",
    )


def parse(parser: terminal.Parser, argv: list[str]) -> Any:
    """Parse the arguments of a command and check the options that commands share.

    Raises:
        DiffAccelError: for counts below 1, and for a JSON file of another name: a set of images may have been meant.
    """
    options = parser.parse(argv)
    for name in ("num", "batch"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise DiffAccelError(f"--{name} is {value}; it must be at least 1.")
    if options.json not in (None, STDOUT) and not options.json.endswith(".json"):
        raise DiffAccelError(
            f"--json writes a file whose name ends with .json, or prints with '-' or nothing behind it; got "
            f"'{options.json}'. Put the sets before it."
        )
    if options.json not in (None, STDOUT):
        terminal.check_output("--json", terminal.output_path(options.json))
    if getattr(options, "cache", None) is not None:
        terminal.check_output("--cache", options.cache, folder=True)
    return options


def load_network(options: Any, default: str) -> tuple[Extractor, Protocol | None]:
    """Load the extractor that the options name, and look up their protocol; None where none is named.

    Raises:
        MissingWeights: for weights that are not on this machine.
        DiffAccelError: for a protocol and an extractor that do not agree.
    """
    from diffaccel.eval.networks import protocols
    from diffaccel.eval.networks.extractors import extractor
    from diffaccel.runs import loading

    protocol = protocols.protocol(options.protocol) if options.protocol else None
    spec = options.extractor or (protocol.extractor if protocol else default)
    network = extractor(
        spec, device=loading.pick_device(options.device), protocol=protocol, download=options.download,
        allow_unknown_weights=options.allow_unknown_weights,
    )  # fmt: skip
    return network, protocol


def extraction_arguments(options: Any) -> dict[str, Any]:
    """Return the keyword arguments of feature extraction: a progress bar on a terminal, none beside JSON."""
    return {"num": options.num, "batch": options.batch, "progress": shows_progress(options), "cache": options.cache}


def shows_progress(options: Any) -> bool:
    """Return whether progress goes to a terminal that a person watches."""
    return sys.stderr.isatty() and options.json != STDOUT


def progress_printer(options: Any) -> Callable[[str], None]:
    """Return a function that prints the current step on a terminal, and nothing where results are for machines."""
    shown = sys.stderr.isatty() and not options.json
    return lambda text: terminal.write_note(text) if shown else None


# -- results ----------------------------------------------------------------------------------------------------------


def write_rows(options: Any, command: Sequence[str], rows: Sequence[Row], warnings: Sequence[str]) -> None:
    """Write numbers to stdout, a line each, or as JSON; warnings to stderr.

    Raises:
        DiffAccelError: when nothing could be measured.
    """
    if write_machine_rows(options, command, rows, warnings):
        for line in row_lines(rows):
            terminal.write(line)


def write_machine_rows(options: Any, command: Sequence[str], rows: Sequence[Row], warnings: Sequence[str]) -> bool:
    """Write rows as JSON where that is wanted, and warnings; return whether the caller is to print the rows as text.

    Raises:
        DiffAccelError: when nothing could be measured.
    """
    if rows and all(row.missing for row in rows):
        raise DiffAccelError(f"Nothing could be measured: {rows[0].key}: {rows[0].missing}.")
    values = {"command": ["diffaccel", "eval", *command], "metrics": [row.to_dict() for row in rows]}
    return write_json(options, {**values, "warnings": list(dict.fromkeys(warnings))})


def write_json(options: Any, values: dict[str, Any]) -> bool:
    """Write ``values`` as JSON to where ``--json`` says, and their warnings; return whether stdout is free for text."""
    from diffaccel import files, record

    values = {**values, "made": record.now(), "versions": record.versions()}
    if options.json == STDOUT:
        terminal.write_json(values)
        return False
    if options.json is not None:
        file = Path(options.json).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, values)
    for warning in values["warnings"]:
        terminal.write_note(f"warning: {warning}")
    return True


def row_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line for every row, starting with the name of its set where there are several."""
    several = len({row.run for row in rows}) > 1
    return [f"{row.run}: {_line(row)}" if several else _line(row) for row in rows]


def _line(row: Row) -> str:
    if row.missing:
        return f"{row.key}: not measured: {row.missing}"
    value = "identical" if row.value is None else f"{row.value:.6g}{row.unit and ' ' + row.unit}"
    details = [f"95 % {row.interval.low:.4g} to {row.interval.high:.4g}"] if row.interval is not None else []
    details += [f"{name} {row.detail[name]:.4g}" for name in ("std", "std_over_splits", "r2") if name in row.detail]
    if row.delta is not None and row.delta_interval is not None:
        low, high = row.delta_interval.low, row.delta_interval.high
        details.append(f"{row.delta:+.4g} to {row.detail['reference']}'s, 95 % {low:+.4g} to {high:+.4g}")
    details.append(f"n = {row.n or 'unknown'}")
    if "reference" in row.detail:
        details.append(f"m = {row.m or 'unknown'}")
    return f"{row.key}: {value} ({', '.join(details)})"
