"""``diffaccel eval list``: metrics, protocols, extractors and scorers, and whether they work here without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffaccel import terminal
from diffaccel.eval.commands.options import add_json_option, parse, write_json

if TYPE_CHECKING:
    from diffaccel.eval.commands.availability import Entry

TITLES = {"metric": "Metrics", "protocol": "Protocols", "extractor": "Extractors", "scorer": "Scorers"}


def run_listing(argv: list[str]) -> int:
    """Run ``eval list`` and return its exit status."""
    parser = terminal.Parser(
        prog="diffaccel eval list",
        description="What can be measured here without a network, what the rest needs, and where it was looked for.",
    )
    add_json_option(parser)
    options = parse(parser, argv)
    from diffaccel.eval.commands import availability

    entries = availability.entries()
    values = {"command": ["diffaccel", "eval", "list", *argv], "warnings": []}
    if write_json(options, {**values, "entries": [entry.to_dict() for entry in entries]}):
        _print(entries)
    return 0


def _print(entries: list[Entry]) -> None:
    width = max(len(entry.name) for entry in entries)
    for kind, title in TITLES.items():
        terminal.write(f"{title}: here, name, what it is")
        for entry in entries:
            if entry.kind == kind:
                available = "yes" if entry.available else "no "
                terminal.write(f"  {available:<5}{entry.name:<{width}}  {_description(entry)}")
    places = dict.fromkeys(place for entry in entries if not entry.available for place in entry.looked)
    if places:
        terminal.write("Weights that are not here were looked for at:")
        for place in places:
            terminal.write(f"  {place}")


def _description(entry: Entry) -> str:
    needs = "" if entry.needs == "nothing" else f"; needs {entry.needs}"
    location = f"; {entry.where}" if entry.available and entry.where else ""
    return f"{entry.what}{needs}{location}{entry.why and ': ' + entry.why}"
