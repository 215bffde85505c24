"""What the commands on sets of images share: their options, and how they print what they measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import terminal as console
from diffaccel.errors import DiffAccelError

if TYPE_CHECKING:
    from diffaccel.eval.comparison.row import Row
    from diffaccel.eval.networks.extractors.base import Extractor
    from diffaccel.eval.networks.protocols import Protocol

STDOUT = "-"


def add_images(parser: console.Parser) -> None:
    """How images are read and where networks compute."""
    add = parser.add_argument
    add("--num", type=int, metavar="N", help="only the first N images of each set, in the order of their names")
    add("--batch", type=int, default=64, metavar="B", help="images in one call of a network (default 64)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add_json(parser)


def add_json(parser: console.Parser) -> None:
    """``--json``: results for machines."""
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE",
        help="print one JSON object and nothing else, or write it to FILE.json beside what is printed",
    )  # fmt: skip


def add_network(parser: console.Parser, default: str) -> None:
    """Which network looks at the images, and after what."""
    add = parser.add_argument
    add("--protocol", metavar="NAME", help="network, preprocessing and parameters as published; see eval list")
    add("--extractor", metavar="NAME", help=f"feature network; see eval list (default: {default})")
    add("--allow-unknown-weights", action="store_true", help="Inception weights of another sha256, under another name")
    add("--download", action="store_true", help="fetch published weights that are not on this machine")
    add("--cache", metavar="DIR", help="keep features here, to go on after a stop and to measure again at once")


def checked(options: Any) -> Any:
    """The options, when their values are possible.

    Raises:
        DiffAccelError: for counts below 1, and for a JSON file of another name: a set of images may have been meant.
    """
    for name in ("num", "batch"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise DiffAccelError(f"--{name} is {value}; it must be at least 1.")
    if options.json not in (None, STDOUT) and not options.json.endswith(".json"):
        raise DiffAccelError(
            f"--json writes a file whose name ends with .json, or prints with '-' or nothing behind it; got "
            f"'{options.json}'. Put the sets before it."
        )
    return options


def network(options: Any, default: str) -> tuple[Extractor, Protocol | None]:
    """The extractor, and the protocol where one is named.

    Raises:
        MissingWeights: for weights that are not on this machine.
        DiffAccelError: for a protocol and an extractor that do not agree.
    """
    from diffaccel.eval.networks import protocols
    from diffaccel.eval.networks.extractors import extractor
    from diffaccel.runs import loading as opening

    chosen = protocols.protocol(options.protocol) if options.protocol else None
    spec = options.extractor or (chosen.extractor if chosen else default)
    found = extractor(
        spec, device=opening.pick_device(options.device), protocol=chosen, download=options.download,
        allow_unknown_weights=options.allow_unknown_weights,
    )  # fmt: skip
    return found, chosen


def extraction(options: Any) -> dict[str, Any]:
    """How features are extracted: a bar on a terminal, nothing beside JSON."""
    return {"num": options.num, "batch": options.batch, "progress": progress(options), "cache": options.cache}


def progress(options: Any) -> bool:
    """Whether somebody is watching."""
    return sys.stderr.isatty() and options.json != STDOUT


def progress_of(options: Any) -> Callable[[str], None]:
    """Tells a terminal what is done now; nothing where results are for machines."""
    shown = sys.stderr.isatty() and not options.json
    return lambda text: console.write_note(text) if shown else None


def report(options: Any, command: Sequence[str], rows: Sequence[Row], warnings: Sequence[str]) -> None:
    """Numbers to stdout, a line each, or as JSON; warnings to stderr.

    Raises:
        DiffAccelError: when nothing could be measured.
    """
    if finish(options, command, rows, warnings):
        for line in lines(rows):
            console.write(line)


def finish(options: Any, command: Sequence[str], rows: Sequence[Row], warnings: Sequence[str]) -> bool:
    """JSON where it is wanted, and warnings; returns whether the caller is to print the rows for people.

    Raises:
        DiffAccelError: when nothing could be measured.
    """
    if rows and all(row.missing for row in rows):
        raise DiffAccelError(f"Nothing could be measured: {rows[0].key}: {rows[0].missing}.")
    warnings = list(dict.fromkeys(warnings))
    made = {"command": ["diffaccel", "eval", *command], "metrics": [row.to_dict() for row in rows]}
    return write_json(options, {**made, "warnings": warnings})


def write_json(options: Any, values: dict[str, Any]) -> bool:
    """``values`` as JSON to where ``--json`` says, else their warnings to stderr; returns whether stdout is free."""
    from diffaccel import files, record

    values = {**values, "made": record.now(), "versions": record.versions()}
    if options.json == STDOUT:
        console.write_json(values)
        return False
    if options.json is not None:
        file = Path(options.json).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, values)
    for warning in values["warnings"]:
        console.write_note(f"warning: {warning}")
    return True


def lines(rows: Sequence[Row]) -> list[str]:
    """A line for every number, after the set it is of where there are several."""
    several = len({row.run for row in rows}) > 1
    return [f"{row.run}: {_line(row)}" if several else _line(row) for row in rows]


def _line(row: Row) -> str:
    if row.missing:
        return f"{row.key}: not measured: {row.missing}"
    value = "identical" if row.value is None else f"{row.value:.6g}{row.unit and ' ' + row.unit}"
    about = [f"95 % {row.interval.low:.4g} to {row.interval.high:.4g}"] if row.interval is not None else []
    about += [f"{name} {row.detail[name]:.4g}" for name in ("std", "std_over_splits", "r2") if name in row.detail]
    if row.delta is not None and row.delta_interval is not None:
        low, high = row.delta_interval.low, row.delta_interval.high
        about.append(f"{row.delta:+.4g} to {row.detail['reference']}'s, 95 % {low:+.4g} to {high:+.4g}")
    about.append(f"n = {row.n or 'unknown'}")
    if "reference" in row.detail:
        about.append(f"m = {row.m or 'unknown'}")
    return f"{row.key}: {value} ({', '.join(about)})"
