"""``diffaccel eval list``: metrics, protocols, extractors and scorers, and whether they work here without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffaccel import terminal as console
from diffaccel.eval.commands import options as shared

if TYPE_CHECKING:
    from diffaccel.eval.commands.availability import Entry

TITLES = {"metric": "Metrics", "protocol": "Protocols", "extractor": "Extractors", "scorer": "Scorers"}


def run(argv: list[str]) -> int:
    """The command; returns its exit status."""
    parser = console.Parser(
        prog="diffaccel eval list",
        description="What can be measured here without a network, what the rest needs, and where it was looked for.",
    )
    shared.add_json(parser)
    options = shared.checked(parser.parse(argv))
    from diffaccel.eval.commands import availability

    found = availability.entries()
    made = {"command": ["diffaccel", "eval", "list", *argv], "warnings": []}
    if not shared.write_json(options, {**made, "entries": [entry.to_dict() for entry in found]}):
        return 0
    width = max(len(entry.name) for entry in found)
    for kind, title in TITLES.items():
        console.write(f"{title}: here, name, what it is")
        for entry in found:
            if entry.kind == kind:
                console.write(f"  {'yes' if entry.available else 'no ':<5}{entry.name:<{width}}  {_about(entry)}")
    places = dict.fromkeys(place for entry in found if not entry.available for place in entry.looked)
    if places:
        console.write("Weights that are not here were looked for at:")
        for place in places:
            console.write(f"  {place}")
    return 0


def _about(entry: Entry) -> str:
    needs = "" if entry.needs == "nothing" else f"; needs {entry.needs}"
    here = f"; {entry.where}" if entry.available and entry.where else ""
    return f"{entry.what}{needs}{here}{entry.why and ': ' + entry.why}"
