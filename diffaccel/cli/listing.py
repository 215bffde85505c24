"""``diffaccel list`` and ``diffaccel explain``: what there is, and what one thing is.

``list`` reads the methods' files without running them, so that it needs no torch. ``explain`` imports the one method it
is asked about.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any

from diffaccel import registry, zoo
from diffaccel import terminal as console
from diffaccel.errors import unknown

# the package of a method's file -> what kind of method it is
KINDS = {
    "diffaccel.samplers": "sampler",
    "diffaccel.quant": "quantizer",
    "diffaccel.distill": "distillation",
}
_ARGS = re.compile(r"^(Args|Attributes):\n((?:[ \t]+.*\n?|\n)+)", re.MULTILINE)


def run_list(argv: list[str]) -> int:
    """The command; returns its exit status."""
    parser = console.Parser(prog="diffaccel list", description="The methods and the embedded models.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse(argv)
    found = {"methods": list_methods(), "models": list_models()}
    if options.json:
        console.write_json(found)
        return 0
    rows = [[m["name"], m["kind"], m["summary"], m["paper"]] for m in found["methods"]]
    console.write_table("Methods", ["name", "kind", "what", "paper"], rows)
    models = [[m["name"], f"{m['bytes'] / 1e6:.1f} MB", m["state"], m["summary"]] for m in found["models"]]
    console.write_table("Embedded models", ["name", "size", "state", "what"], models)
    console.write("diffaccel explain NAME tells more.")
    return 0


def run_explain(argv: list[str]) -> int:
    """The command; returns its exit status."""
    parser = console.Parser(prog="diffaccel explain", description="One method or one embedded model.")
    parser.add_argument("name", metavar="NAME", help="as diffaccel list shows it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse(argv)
    methods, models = registry.names(), zoo.names()
    if options.name in methods:
        about = explain_method(options.name)
    elif options.name in models:
        about = {"name": options.name, "kind": "model", "bytes": _bytes(options.name), "card": zoo.card(options.name)}
    else:
        raise unknown("method or model", options.name, [*methods, *models])
    if options.json:
        console.write_json(about)
    else:
        _write_method(about) if "options" in about else _write_model(about)
    return 0


# -- methods ----------------------------------------------------------------------------------------------------------


def list_methods() -> list[dict[str, str]]:
    """Name, kind, first sentence and paper of every method; nothing of them is imported."""
    found = []
    for name, reference in registry.names().items():
        module, _, cls = reference.partition(":")
        text, values = _read_class(module, cls)
        kind = next((kind for package, kind in KINDS.items() if module.startswith(package + ".")), "plugin")
        found.append({"name": name, "kind": kind, "summary": text, "paper": str(values.get("paper", ""))})
    return found


def _read_class(module: str, cls: str) -> tuple[str, dict[str, Any]]:
    """A module's first sentence and the literal class variables of one of its classes, from its source."""
    path = _source(module)
    if path is None:
        return "(not importable)", {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    values = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == cls:
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
                    try:
                        values[line.target.id] = ast.literal_eval(line.value)
                    except ValueError:
                        continue
    return first_sentence(ast.get_docstring(tree) or ""), values


def _source(module: str) -> Path | None:
    """A module's file by the import system's own finders; ``find_spec`` would run the packages above it."""
    search: Any = None
    spec = None
    for i in range(len(parts := module.split("."))):
        name = ".".join(parts[: i + 1])
        found = (finder.find_spec(name, search) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((s for s in found if s is not None), None)
        if spec is None:
            return None
        search = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.origin else None


def explain_method(name: str) -> dict[str, Any]:
    """A method's docstring, paper, options and an example."""
    cls = registry.config_class(name)
    kind = next((kind for package, kind in KINDS.items() if cls.__module__.startswith(package + ".")), "plugin")
    doc = inspect.cleandoc(cls.__doc__ or "")
    example = {"sampler": f'diffaccel sample "a red apple" --sampler {name}'}
    return {
        "name": name,
        "kind": kind,
        "touches": cls.touches,
        "summary": first_sentence(sys.modules[cls.__module__].__doc__ or ""),
        "description": _ARGS.sub("", doc).strip().replace("``", "`"),
        "paper": cls.paper,
        "conflicts": list(cls.conflicts),
        "options": options_of(cls),
        "command": example.get(kind, ""),
        "python": f"diffaccel.accelerate(pipe, {cls.__name__}())",
        "import": f"from {cls.__module__.rpartition('.')[0]} import {cls.__name__}",
    }


def options_of(cls: type[Any]) -> list[dict[str, str]]:
    """A config's fields with type, default and what its docstring, or a base's, says of them."""
    hints = typing.get_type_hints(cls)
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= documented_arguments(inspect.cleandoc(base.__doc__ or ""))
    return [
        {"name": f.name, "type": _type_name(hints[f.name]), "default": _default(f), "help": texts.get(f.name, "")}
        for f in dataclasses.fields(cls)
    ]


def documented_arguments(doc: str) -> dict[str, str]:
    """``name: text`` entries of a docstring's Args section; an entry may run over several lines, deeper indented."""
    section = _ARGS.search(doc)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (section[2] if section else "").splitlines():
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2].strip())
        elif names and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def first_sentence(doc: str) -> str:
    """Up to the first full stop or blank line, on one line."""
    text = " ".join(doc.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0].rstrip(".").replace("``", "`")


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default) or '""'
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "required"


def _write_method(about: dict[str, Any]) -> None:
    console.write(f"{about['name']} ({about['kind']}): {about['summary']}.\n\n{about['description']}\n")
    console.write(f"Paper: {about['paper']}")
    if about["conflicts"]:
        console.write(f"Not together with: {', '.join(about['conflicts'])}")
    rows = [[f"--{about['name']}.{o['name']}", o["type"], o["default"], o["help"]] for o in about["options"]]
    console.write_table("\nOptions", ["option", "type", "default", "what"], rows)
    console.write("Example\n" + "\n".join(f"  {line}" for line in (about["command"], about["import"], about["python"])))


# -- models -----------------------------------------------------------------------------------------------------------


def list_models() -> list[dict[str, Any]]:
    """Name, packed size, state and title of every embedded model."""
    found = []
    for name in zoo.names():
        card = zoo.card(name)
        state, title = str(card.get("state", "unknown")), str(card.get("title", ""))
        found.append({"name": name, "bytes": _bytes(name), "state": state, "summary": title})
    return found


def _bytes(name: str) -> int:
    folder = Path(zoo.__file__).parent / name
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_model(about: dict[str, Any]) -> None:
    console.write(f"{about['name']} (embedded model, {about['bytes'] / 1e6:.1f} MB)\n")
    console.write("\n".join(_lines(about["card"])))
    if "pipeline" in about["card"]:
        console.write(f'\nExample\n  diffaccel sample "a red apple" --model {about["name"]}')


def _lines(values: Any, indent: str = "") -> list[str]:
    """Nested JSON as indented text."""
    pairs = values.items() if isinstance(values, dict) else (("-", value) for value in values)
    found = []
    for key, value in pairs:
        label = f"{indent}-" if key == "-" else f"{indent}{key}:"
        deep = isinstance(value, dict | list) and bool(value)
        found += [label, *_lines(value, indent + "  ")] if deep else [f"{label} {value}"]
    return found
