"""``diffaccel doctor``: what this machine can do, found by trying it, and how each method fares on it.

Nothing is guessed from a version or a name: attention runs, matrices are multiplied, a compiler compiles, a file is
written. Whatever fails is a row with its reason. Code of other packages that could end the process runs in a child.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, get_args

from diffaccel import registry, terminal
from diffaccel.cli.doctor import compute, host, model
from diffaccel.cli.doctor.host import GIB, reason
from diffaccel.cli.listing import list_methods
from diffaccel.config import Level, Machine

FORMAT = 1


def run(argv: list[str]) -> int:
    """Run the command and return its exit status, 0 whatever works on this machine."""
    parser = terminal.Parser(prog="diffaccel doctor", description="What this machine can do, found by trying it.")
    parser.add_argument("--model", metavar="NAME", help="also: does each method fit this model? Weights are not loaded")
    parser.add_argument("--compile", action="store_true", help="also try torch.compile and Triton (up to a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse(argv)
    description = model.read(options.model) if options.model else None
    with _status(not options.json):
        report = examine(options.compile)
        if description is not None:
            report["model"] = model.fit(description)
    terminal.write_json(report) if options.json else _show(report)
    return 0


def examine(full: bool = False) -> dict[str, Any]:
    """Try everything once and return the report; ``full`` also runs ``torch.compile``, which takes up to a minute."""
    cards, no_gpu = host.gpus()
    device = "cuda" if any(card["works"] for card in cards) else host.device_without_cuda()
    sections = {
        "software": host.software(),
        "cpu": host.cpu(),
        "attention": [*compute.torch_attention(device), *compute.diffusers_attention(device)],
        "dtypes": compute.dtypes(device),
        "compile": compute.compilers(device, full),
        "video": host.video(),
        "storage": host.storage(),
    }
    works = {section: {c.name: c.works for c in checks} for section, checks in sections.items()}
    card = next((card for card in cards if card["works"]), None)
    machine = Machine(
        device=device,
        capability=tuple(map(int, card["capability"].split("."))) if card else None,  # type: ignore[arg-type]
        memory=card["memory"] if card else host.memory(),
        attention=frozenset(name for name, ok in works["attention"].items() if ok),
        dtypes=frozenset(name for name, ok in works["dtypes"].items() if ok),
        triton=bool(works["compile"].get("triton")),
        compiles=works["compile"].get("torch.compile"),
    )
    return {
        "format": FORMAT,
        "device": device,
        **{section: [asdict(check) for check in checks] for section, checks in sections.items()},
        "gpus": cards,
        "no_gpu": no_gpu,
        "methods": methods(machine),
    }


# -- methods ----------------------------------------------------------------------------------------------------------


def methods(machine: Machine) -> list[dict[str, str]]:
    """Return how well every registered method is supported on a machine, and why."""
    kinds = {method["name"]: method["kind"] for method in list_methods()}
    rows = []
    for name in registry.names():
        level, why = _support(name, machine)
        rows.append({"name": name, "kind": kinds[name], "level": level, "reason": why})
    return rows


def _support(name: str, machine: Machine) -> tuple[str, str]:
    try:
        config_class = registry.config_class(name)
    except Exception as error:
        return "unsupported", reason(error)
    if not hasattr(config_class, "support"):
        return "unknown", "the method does not say what it needs"
    try:
        level, why = config_class.support(machine)
    except Exception as error:
        return "unknown", f"its own check failed: {reason(error)}"
    if level not in get_args(Level):
        return "unknown", f"its own check answered '{level}', which is none of {', '.join(get_args(Level))}"
    return level, str(why)


# -- output -----------------------------------------------------------------------------------------------------------


@contextmanager
def _status(shown: bool) -> Iterator[None]:
    if not shown or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("Trying what this machine can do"):
        yield


def _show(report: dict[str, Any]) -> None:
    mark = {True: "yes", False: "no", None: "-"}
    titles = {
        "software": "Software", "cpu": "CPU", "attention": f"Attention on {report['device']}",
        "dtypes": f"Matrix products on {report['device']}", "compile": "Compilers", "video": "Video",
        "storage": "Storage",
    }  # fmt: skip
    for section, title in titles.items():
        rows = [[row["name"], mark[row["works"]], row["detail"]] for row in report[section]]
        terminal.write_table(title, ["what", "works", "found"], rows)
        if section == "cpu":
            _show_gpus(report)
    rows = [[row["name"], row["kind"], row["level"], row["reason"]] for row in report["methods"]]
    terminal.write_table("Methods", ["name", "kind", "here", "why"], rows)
    if "model" in report:
        model.show(report["model"])


def _show_gpus(report: dict[str, Any]) -> None:
    if not report["gpus"]:
        terminal.write(f"No GPU: {report['no_gpu']}\n")
        return
    rows = [
        [card["name"], f"{card['memory'] / GIB:.1f} GiB", card["capability"], card["driver"], card["detail"]]
        for card in report["gpus"]
    ]
    terminal.write_table("GPUs", ["name", "memory", "capability", "driver", "found"], rows)
