"""Who may import whom, read from the syntax tree: what is written in a file counts, even when it runs later.

``python -m tests.layout.rules`` prints the table of CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.layout import tree

# The floors of the house, from the ground up. A module sees lower floors and its own room; rooms of one floor do not
# see each other. A room is a module or a package by its name under ``diffaccel``; the longest name that fits counts.
FLOORS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("errors", "files", "flow", "former", "kernels", "lazy", "modules.capture.graphs"),
        "the one exception, whole files, noise paths, GPU operations, names imported when asked for, recorded launches",
    ),
    (
        (
            "record",
            "folder_lock",
            "processes",
            "noise",
            "schedules",
            "zoo",
            "modules",
            "models",
            "training",
            "eval.errors",
        ),
        "records, locks of folders, processes of a launch, noise of generators, noise levels, embedded models, what is "
        "done to a network, networks of ours, training",
    ),
    (("eval.images", "eval.uncertainty", "whole_folder"), "sets of images, intervals and tests, whole folders"),
    (("eval.metrics",), "numbers of features and pairs"),
    (("eval.networks",), "networks that look at pictures"),
    (("families",), "what is known of a pipeline"),
    (("session",), "what a sampler sees"),
    (("config",), "what a method's options are"),
    (("registry", "samplers.rewards"), "names to methods; what a search climbs"),
    (("samplers.search", "samplers.caches"), "what all searches share; step caches"),
    (
        ("samplers", "quant", "distill", "modules.capture", "modules.fused"),
        "the methods: none sees another, and nothing but the registry names one",
    ),
    (("runtime", "presets"), "one pipeline call; files of methods with their certificate"),
    (("active",), "which methods are on a pipeline"),
    (("lending",), "methods on a network for a part of a call"),
    (("compose",), "methods on a pipeline, and off it"),
    (("runs", "terminal"), "one run: many calls into a folder; what commands share"),
    (("eval.features",), "features of a set of images, and files of their statistics"),
    (("eval.sets",), "runs, prompts and candidates of a comparison"),
    (("eval.comparison",), "runs against a baseline"),
    (("eval.timing",), "turns on one machine, early stop, equal time"),
    (("eval.report",), "pages and files of a comparison"),
    (("eval.api", "eval.tuning"), "compare; the search for the fastest methods that keep a promise"),
    (("eval", "eval.commands"), "the commands of the evaluation"),
    (("cli",), "the command line"),
)
# What users import from: names that are loaded lazily, or gathered from everywhere below.
DOORS = (
    "diffaccel", "diffaccel.__main__", "diffaccel.eval", "diffaccel.modules", "diffaccel.samplers", "diffaccel.quant",
    "diffaccel.distill",
)  # fmt: skip
LIGHT = ("diffaccel.errors", "diffaccel.cli")  # what may load before a command is known
OUTSIDE = ("tests", "scripts", *tree.FOLDERS)
ROOMS = {f"diffaccel.{room}": number for number, (rooms, _) in enumerate(FLOORS) for room in rooms}


@dataclass(frozen=True)
class Import:
    name: str
    line: int
    at_start: bool  # runs when the module is imported
    typing_only: bool = False


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room_of(name: str) -> str | None:
    """The room that a module lies in."""
    return max((room for room in ROOMS if within(name, room)), key=len, default=None)


def imports(file: Path, known: set[str]) -> list[Import]:
    """Every module that a file names in an import, or in ``import_module`` with a literal."""
    return _imports(tree.parse(file), frozenset(known))


@functools.cache
def _imports(module: ast.Module, known: frozenset[str]) -> list[Import]:
    def visit(node: ast.AST, at_start: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_start, typing_only)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield Import(full if full in known else module, node.lineno, at_start, typing_only)
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), node.lineno, at_start)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_start = False
        for_types = node.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) else []
        for child in ast.iter_child_nodes(node):
            hidden = child in for_types
            yield from visit(child, at_start and not hidden, typing_only or hidden)

    return list(visit(module, True, False))


def allowed(importer: str, imported: Import, methods: set[str]) -> bool:
    name = imported.name
    if name.startswith(".") or name.partition(".")[0] in OUTSIDE:
        return False
    if not within(name, "diffaccel"):
        return True
    if name in methods and importer not in DOORS and importer != name:
        return False
    if importer in ("diffaccel.cli", "diffaccel.__main__") and name not in LIGHT and imported.at_start:
        return False
    if importer in DOORS:
        return True
    mine, theirs = room_of(importer), room_of(name)
    if name == "diffaccel":
        return mine == "diffaccel.cli"
    if mine is None or theirs is None or name in DOORS:
        return False
    return mine == theirs or ROOMS[theirs] < ROOMS[mine]


def violations(root: Path = tree.ROOT) -> list[str]:
    """Every import that breaks a rule, as ``importer:line imports what``."""
    found = tree.modules(root)
    methods = tree.method_modules(root)
    return [
        f"{importer}:{imported.line} imports {imported.name}"
        for importer, file in found.items()
        for imported in imports(file, set(found))
        if not allowed(importer, imported, methods)
    ]


def circles(root: Path = tree.ROOT) -> list[list[str]]:
    """Modules that import each other, round by round; imports for types alone are no part of a circle."""
    known = tree.modules(root)
    sees = {
        name: sorted({i.name for i in imports(file, set(known)) if not i.typing_only and i.name in known} - {name})
        for name, file in known.items()
    }
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter(sees)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return [error.args[1]]
    return []


def private_names_across_rooms(root: Path = tree.ROOT) -> list[str]:
    """Uses of an underscored name of ours in a module that does not define it, as ``module:line name``."""
    trees = {name: tree.parse(file) for name, file in tree.modules(root).items()}
    defined = {name: _private_definitions(module) for name, module in trees.items()}
    rooms: dict[str | None, set[str]] = {}
    for name, names in defined.items():
        rooms.setdefault(room_of(name), set()).update(names)
    everywhere = set().union(*rooms.values())
    return [
        f"{name}:{line} {used}"
        for name, module in trees.items()
        for used, line in _private_uses(module)
        if used in everywhere and used not in rooms[room_of(name)]
    ]


def _private_definitions(module: ast.Module) -> set[str]:
    """Underscored functions, classes, and names that are assigned to, of a module and on ``self`` in it."""
    names = set()
    for node in tree.nodes(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else set()
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def _private_uses(module: ast.Module) -> Iterator[tuple[str, int]]:
    for node in tree.nodes(module):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffaccel"):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.startswith("_"))


def table() -> str:
    """The floors as CONTRIBUTING.md shows them, from the top down."""
    lines = ["| floor | rooms | what lies there |", "|---|---|---|"]
    for number, (rooms, what) in reversed(list(enumerate(FLOORS, 1))):
        lines.append(f"| {number} | {', '.join(f'`{room}`' for room in rooms)} | {what} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
