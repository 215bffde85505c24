"""Who may import whom, read from the syntax tree: what is written in a file counts, even when it runs later."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.layout import tree

# What a method's file may see: the language, the session's types, family facts, networks of ours, kernels.
LANGUAGE = ("errors", "files", "flow", "schedules", "config", "session", "families", "models", "kernels")
SHARED = tuple(f"diffaccel.{name}" for name in LANGUAGE)
METHODS = ("diffaccel.samplers", "diffaccel.quant", "diffaccel.distill")
# The most specific entry decides; a package may always see its own modules. Names without an entry are the core.
MAY_SEE: dict[str, tuple[str, ...]] = {
    "diffaccel.errors": (),
    "diffaccel.flow": (),
    "diffaccel.kernels": (),
    "diffaccel.samplers": SHARED,
    "diffaccel.samplers.rewards": (*SHARED, "diffaccel.zoo"),  # which of the zoo's CLIPs may be a reward
    "diffaccel.quant": SHARED,
    "diffaccel.distill": SHARED,
}
# The public API, which is all that the evaluation sees: these modules, and the names the packages export.
PUBLIC_MODULES = tuple(
    f"diffaccel.{name}"
    for name in (
        "errors", "files", "config", "zoo", "registry", "compose",
        "requests", "variants", "opening", "sampling", "world", "outputs", "record",  # how runs are made and kept
        "console",
    )
)  # fmt: skip
PUBLIC_PACKAGES = ("diffaccel", *METHODS)
# The core reaches methods through the registry's strings; nothing reaches the command line or the tests.
CORE_NEVER = (*METHODS, "diffaccel.eval", "diffaccel.cli")
COMMAND_LINE = ("diffaccel.cli", "diffaccel.__main__")
LIGHT = ("diffaccel.errors", "diffaccel.cli")  # what may load before a command is known
OUTSIDE = ("tests", "scripts", *tree.FOLDERS)


@dataclass(frozen=True)
class Import:
    name: str
    line: int
    at_start: bool  # runs when the module is imported
    typing_only: bool = False


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(file: Path, known: set[str]) -> Iterator[Import]:
    """Every module that a file names in an import, or in ``import_module`` with a literal."""

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
        for child in ast.iter_child_nodes(node):
            hidden = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body
            yield from visit(child, at_start and not hidden, typing_only or hidden)

    yield from visit(tree.parse(file), True, False)


def allowed(importer: str, imported: Import, methods: set[str], commands: set[str]) -> bool:
    name = imported.name
    if name.startswith(".") or name.partition(".")[0] in OUTSIDE:
        return False
    if not within(name, "diffaccel"):
        return True
    if importer in methods and name in methods and name != importer:
        return False
    if within(importer, "diffaccel.eval"):
        public = any(within(name, module) for module in PUBLIC_MODULES) or name in PUBLIC_PACKAGES
        return public or within(name, "diffaccel.eval")
    if importer in COMMAND_LINE:
        return name in ("diffaccel", *LIGHT) or not imported.at_start
    if importer in commands:
        return name not in COMMAND_LINE
    owner = max((rule for rule in MAY_SEE if within(importer, rule)), key=len, default=None)
    if owner is not None:
        return within(name, owner) or any(within(name, package) for package in MAY_SEE[owner])
    return not any(within(name, package) for package in CORE_NEVER)


def violations(root: Path = tree.ROOT) -> list[str]:
    """Every import that breaks a rule, as ``importer:line imports what``."""
    found = tree.modules(root)
    methods, commands = tree.method_modules(root), tree.command_modules(root)
    return [
        f"{importer}:{imported.line} imports {imported.name}"
        for importer, file in found.items()
        for imported in imports(file, set(found))
        if not allowed(importer, imported, methods, commands)
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
