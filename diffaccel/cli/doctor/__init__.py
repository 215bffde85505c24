"""``diffaccel doctor``: what this machine can do, found by trying it, and what each method makes of that.

Nothing is guessed from a version or a name: attention runs, matrices are multiplied, a compiler compiles, a file is
written. Whatever fails is a row with its reason. Code of other packages that could end the process runs in a child.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, get_args

from diffaccel import registry
from diffaccel import terminal as console
from diffaccel.cli import listing as catalogue
from diffaccel.cli.doctor import compute as doctor_compute
from diffaccel.cli.doctor import host as doctor_host
from diffaccel.cli.doctor import model as doctor_model
from diffaccel.cli.doctor.host import GIB, reason
from diffaccel.config import Level, Machine

FORMAT = 1


def run(argv: list[str]) -> int:
    """The command; returns its exit status, 0 whatever was found."""
    parser = console.Parser(prog="diffaccel doctor", description="What this machine can do, found by trying it.")
    parser.add_argument("--model", metavar="NAME", help="also: does each method fit this model? Weights are not loaded")
    parser.add_argument("--compile", action="store_true", help="also try torch.compile and Triton (up to a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse(argv)
    model = doctor_model.read(options.model) if options.model else None
    with _working(not options.json):
        report = examine(options.compile)
        if model is not None:
            report["model"] = doctor_model.fit(model)
    console.write_json(report) if options.json else _show(report)
    return 0


def examine(full: bool = False) -> dict[str, Any]:
    """Try everything once; ``full`` also runs ``torch.compile``, which takes its time."""
    cards, no_gpu = doctor_host.gpus()
    device = "cuda" if any(card["works"] for card in cards) else doctor_host.device_without_cuda()
    sections = {
        "software": doctor_host.software(),
        "cpu": doctor_host.cpu(),
        "attention": [*doctor_compute.torch_attention(device), *doctor_compute.diffusers_attention(device)],
        "dtypes": doctor_compute.dtypes(device),
        "compile": doctor_compute.compilers(device, full),
        "video": doctor_host.video(),
        "storage": doctor_host.storage(),
    }
    works = {section: {c.name: c.works for c in checks} for section, checks in sections.items()}
    card = next((card for card in cards if card["works"]), None)
    machine = Machine(
        device=device,
        capability=tuple(map(int, card["capability"].split("."))) if card else None,  # type: ignore[arg-type]
        memory=card["memory"] if card else doctor_host.memory(),
        attention=frozenset(name for name, fine in works["attention"].items() if fine),
        dtypes=frozenset(name for name, fine in works["dtypes"].items() if fine),
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
    """What every registered method says of this machine."""
    kinds = {method["name"]: method["kind"] for method in catalogue.list_methods()}
    found = []
    for name in registry.names():
        level, why = _support(name, machine)
        found.append({"name": name, "kind": kinds[name], "level": level, "reason": why})
    return found


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
def _working(shown: bool) -> Iterator[None]:
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
        console.write_table(title, ["what", "works", "found"], rows)
        if section == "cpu":
            _show_gpus(report)
    rows = [[row["name"], row["kind"], row["level"], row["reason"]] for row in report["methods"]]
    console.write_table("Methods", ["name", "kind", "here", "why"], rows)
    if "model" in report:
        doctor_model.show(report["model"])


def _show_gpus(report: dict[str, Any]) -> None:
    if not report["gpus"]:
        console.write(f"No GPU: {report['no_gpu']}\n")
        return
    rows = [
        [card["name"], f"{card['memory'] / GIB:.1f} GiB", card["capability"], card["driver"], card["detail"]]
        for card in report["gpus"]
    ]
    console.write_table("GPUs", ["name", "memory", "capability", "driver", "found"], rows)
