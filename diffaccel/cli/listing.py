"""``diffaccel list`` and ``diffaccel explain``: all methods and embedded models, and one of them in detail.

``list`` reads the methods' source without importing it, so that it needs no torch. ``explain`` imports the one method
that it describes.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from pathlib import Path
from typing import Any

from diffaccel import registry, terminal, zoo
from diffaccel.cli import config_source, model_card
from diffaccel.cli.docstrings import description, documented_arguments, first_sentence
from diffaccel.errors import unknown

# package of a method -> kind of method
KINDS = {
    "diffaccel.samplers.caches": "cache",
    "diffaccel.samplers": "sampler",
    "diffaccel.modules": "module",
    "diffaccel.quant.tib": "module",
    "diffaccel.quant": "quantizer",
    "diffaccel.distill": "distillation",
}


def run_list(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = terminal.Parser(prog="diffaccel list", description="The methods and the embedded models.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse(argv)
    methods, models = list_methods(), list_models()
    if options.json:
        terminal.write_json({"methods": methods, "models": models})
        return 0
    rows = [[m["name"], m["kind"], m["summary"], m["paper"]] for m in methods]
    terminal.write_table("Methods", ["name", "kind", "what", "paper"], rows)
    rows = [[m["name"], f"{m['bytes'] / 1e6:.1f} MB", m["state"], m["summary"]] for m in models]
    terminal.write_table("Embedded models", ["name", "size", "state", "what"], rows)
    terminal.write("diffaccel explain NAME tells more.")
    return 0


def run_explain(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = terminal.Parser(prog="diffaccel explain", description="One method or one embedded model.")
    parser.add_argument("name", metavar="NAME", help="as diffaccel list shows it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse(argv)
    methods, models = registry.names(), zoo.names()
    if options.name in methods:
        details = explain_method(options.name)
    elif options.name in registry.TRAINERS:
        details = explain_trainer(options.name)
    elif options.name in models:
        vocabulary = zoo.vocabulary_of(options.name)
        details = {"name": options.name, "kind": "model", "bytes": _bytes(options.name), "card": zoo.card(options.name)}
        details |= {} if vocabulary is None else {"vocabulary": dataclasses.asdict(vocabulary)}
    else:
        raise unknown("method or model", options.name, [*methods, *registry.TRAINERS, *models])
    if options.json:
        terminal.write_json(details)
    elif "options" in details:
        _write_method(details)
    else:
        model_card.write(details, vocabulary)
    return 0


# -- methods ----------------------------------------------------------------------------------------------------------


def list_methods() -> list[dict[str, str]]:
    """Return name, kind, first sentence and paper of every method; nothing of them is imported."""
    methods = []
    for name, reference in {**registry.names(), **registry.TRAINERS}.items():
        source = config_source.read(reference)
        summary = "(not importable)" if source is None else source.summary
        paper = "" if source is None else str(source.variables.get("citation", ""))
        methods.append({"name": name, "kind": _kind(reference), "summary": summary, "paper": paper})
    return methods


def _kind(module: str) -> str:
    return next((kind for package, kind in KINDS.items() if module.startswith(f"{package}.")), "plugin")


def explain_method(name: str) -> dict[str, Any]:
    """Return a method's docstring, paper, options and an example."""
    cls = registry.config_class(name)
    kind = _kind(cls.__module__)
    option = {"sampler": "--sampler", "cache": "--method", "module": "--method", "quantizer": "--method"}
    command = f'diffaccel sample "a red apple" {option[kind]} {name}' if kind in option else ""
    plan = 'plan="plan.json"' if getattr(cls, "worker", "") else ""
    if plan:
        command = f"diffaccel quantize MODEL --method {name} --out DIR"
    return {
        "name": name,
        "kind": kind,
        "touches": cls.touches,
        "summary": first_sentence(sys.modules[cls.__module__].__doc__ or ""),
        "description": description(inspect.cleandoc(cls.__doc__ or "")),
        "paper": cls.citation,
        "conflicts": list(cls.conflicts),
        "options": options_of(cls),
        "command": cls.command or command,
        "python": f"diffaccel.accelerate(pipe, {cls.__name__}({plan}))",
        "import": f"from {_package_of(cls)} import {cls.__name__}",
    }


def explain_trainer(name: str) -> dict[str, Any]:
    """Return docstring, paper, options and an example of a method that makes a model."""
    cls, train = registry.trainer(name)
    return {
        "name": name,
        "kind": _kind(cls.__module__),
        "touches": "nothing: it makes a model of its own",
        "summary": first_sentence(sys.modules[cls.__module__].__doc__ or ""),
        "description": description(inspect.cleandoc(cls.__doc__ or "")),
        "paper": cls.citation,
        "conflicts": [],
        "options": options_of(cls),
        "command": f"diffaccel distill MODEL --method {name}",
        "python": f"{train.__name__}(pipe, prompts, {cls.__name__}(), folder)",
        "import": f"from {_package_of(cls)} import {cls.__name__}",
    }


def _package_of(cls: type[Any]) -> str:
    """Return the nearest package above a class from which it can be imported; else its module."""
    package = cls.__module__.rpartition(".")[0]
    while package and getattr(sys.modules.get(package), cls.__name__, None) is not cls:
        package = package.rpartition(".")[0]
    return package or cls.__module__


def options_of(cls: type[Any]) -> list[dict[str, str]]:
    """Return a config's fields with type, default and the help of its docstring, or of a base's."""
    hints = typing.get_type_hints(cls)
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= documented_arguments(inspect.cleandoc(base.__doc__ or ""))
    return [
        {"name": f.name, "type": _type_name(hints[f.name]), "default": _default(f), "help": texts.get(f.name, "")}
        for f in dataclasses.fields(cls)
    ]


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join("None" if member is type(None) else _type_name(member) for member in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default) or '""'
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "required"


def _write_method(details: dict[str, Any]) -> None:
    terminal.write(f"{details['name']} ({details['kind']}): {details['summary']}.\n\n{details['description']}\n")
    terminal.write(f"Paper: {details['paper']}")
    if details["conflicts"]:
        terminal.write(f"Not together with: {', '.join(details['conflicts'])}")
    rows = [[f"--{details['name']}.{o['name']}", o["type"], o["default"], o["help"]] for o in details["options"]]
    terminal.write_table("\nOptions", ["option", "type", "default", "what"], rows)
    terminal.write(
        "Example\n" + "\n".join(f"  {line}" for line in (details["command"], details["import"], details["python"]))
    )


# -- models -----------------------------------------------------------------------------------------------------------


def list_models() -> list[dict[str, Any]]:
    """Return name, packed size, state and title of every embedded model."""
    models = []
    for name in zoo.names():
        card = zoo.card(name)
        state, title = str(card.get("state", "unknown")), str(card.get("title", ""))
        models.append({"name": name, "bytes": _bytes(name), "state": state, "summary": title})
    return models


def _bytes(name: str) -> int:
    folder = Path(zoo.__file__).parent / name
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
