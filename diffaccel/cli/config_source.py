"""Read a method's config class from its source, without importing it.

``diffaccel list`` and ``diffaccel sample --help`` describe every method, and importing one loads torch. Options are
collected from the syntax trees of the class and of its bases, across modules, as ``dataclasses`` collects fields.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from diffaccel.cli.docstrings import documented_arguments, first_sentence

_NO_FIELDS = ("typing.ClassVar", "dataclasses.InitVar", "dataclasses.KW_ONLY")
_FACTORIES: dict[str, Any] = {"list": [], "dict": {}, "tuple": (), "set": set()}


@dataclass(frozen=True)
class ConfigSource:
    """A config class as its source describes it.

    Attributes:
        summary: first sentence of its module's docstring.
        variables: literal class variables and defaults, inherited ones included.
        options: name, type, default and help of every field, all as text; None where the class or one of its bases
            has no readable source.
    """

    summary: str
    variables: dict[str, Any]
    options: list[dict[str, str]] | None


def read(reference: str) -> ConfigSource | None:
    """Read the config class that ``module:Class`` names; None where the module has no readable source."""
    module_name, _, class_name = reference.partition(":")
    module = _load(module_name)
    if module is None:
        return None
    cls = _read_class(f"{module_name}.{class_name}")
    options = [{"name": name, **texts, "help": cls.arguments.get(name, "")} for name, texts in cls.fields.items()]
    summary = first_sentence(ast.get_docstring(module.tree) or "")
    return ConfigSource(summary, cls.variables, options if cls.complete else None)


# -- classes ----------------------------------------------------------------------------------------------------------


@dataclass
class _Class:
    """A class and its bases: ``fields`` are those of a dataclass, ``arguments`` the texts of their docstrings."""

    variables: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, dict[str, str]] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    complete: bool = True


def _read_class(name: str) -> _Class:
    """Read a class by its full name; fields of later bases come first, and an override keeps its place."""
    module, node = _find(name)
    if module is None or not isinstance(node, ast.ClassDef):
        return _Class(complete=False)
    cls = _Class()
    for base in reversed(node.bases):
        base_name = module.full_name(base.value if isinstance(base, ast.Subscript) else base)
        if not _is_standard(base_name):
            inherited = _read_class(base_name)
            cls.variables |= inherited.variables
            cls.fields |= inherited.fields
            cls.arguments |= inherited.arguments
            cls.complete &= inherited.complete
    cls.arguments |= documented_arguments(ast.get_docstring(node) or "")
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    for statement in node.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or not isinstance(target, ast.Name):
            continue
        if statement.value is not None:
            cls.variables |= _literal(target.id, statement.value)
        if is_dataclass and isinstance(statement, ast.AnnAssign) and _is_field(module, statement.annotation):
            default = _default_text(module, statement.value)
            cls.fields[target.id] = {"type": _type_text(module, statement.annotation), "default": default}
    return cls


def _literal(name: str, value: ast.expr) -> dict[str, Any]:
    try:
        return {name: ast.literal_eval(value)}
    except (ValueError, TypeError):
        return {}


def _is_field(module: _Module, annotation: ast.expr) -> bool:
    annotation = _parsed(annotation)
    origin = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return module.full_name(origin) not in _NO_FIELDS


def _parsed(annotation: ast.expr) -> ast.expr:
    """Return the expression of an annotation that is written as a string; any other one as it is."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        with contextlib.suppress(SyntaxError):
            return ast.parse(annotation.value, mode="eval").body
    return annotation


def _type_text(module: _Module, annotation: ast.expr) -> str:
    """Return a type as text; an alias is followed to its definition, and a Literal becomes ``a|b``."""
    annotation = _parsed(annotation)
    if isinstance(annotation, ast.Name | ast.Attribute):
        origin, definition = _find(module.full_name(annotation))
        if origin is not None and isinstance(definition, ast.expr):
            return _type_text(origin, definition)
        return ast.unparse(annotation).rpartition(".")[2]
    if isinstance(annotation, ast.Subscript) and module.full_name(annotation.value) == "typing.Literal":
        values = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return "|".join(_value_text(value) for value in values)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return f"{_type_text(module, annotation.left)} | {_type_text(module, annotation.right)}"
    return ast.unparse(annotation).replace("typing.", "")


def _default_text(module: _Module, value: ast.expr | None) -> str:
    """Return a field's default as text; a name is followed to its value."""
    if isinstance(value, ast.Call) and module.full_name(value.func) == "dataclasses.field":
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in keywords:
            return _factory_text(keywords["default_factory"])
        value = keywords.get("default")
    if value is None:
        return "required"
    if isinstance(value, ast.Name | ast.Attribute):
        origin, definition = _find(module.full_name(value))
        if origin is not None and isinstance(definition, ast.expr):
            return _default_text(origin, definition)
    return _value_text(value) or '""'


def _value_text(value: ast.expr) -> str:
    """Return a literal's value as text; what is no literal stays an expression."""
    try:
        return str(ast.literal_eval(value))
    except (ValueError, TypeError):
        return ast.unparse(value)


def _factory_text(factory: ast.expr) -> str:
    if isinstance(factory, ast.Lambda):
        return ast.unparse(factory.body)
    name = ast.unparse(factory)
    return str(_FACTORIES[name]) if name in _FACTORIES else f"{name}()"


# -- modules ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    """A module's syntax tree.

    Attributes:
        definitions: classes, and values of assignments, at its top level.
        names: full name of everything that it defines or imports there.
    """

    tree: ast.Module
    definitions: dict[str, ast.ClassDef | ast.expr]
    names: dict[str, str]

    def full_name(self, expression: ast.expr) -> str:
        """Return the full name of a name or an attribute in this module, such as ``diffaccel.config.Config``.

        It is empty for any other expression, and for a name of unknown origin.
        """
        if not isinstance(expression, ast.Name | ast.Attribute):
            return ""
        head, dot, rest = ast.unparse(expression).partition(".")
        origin = self.names.get(head) or (f"builtins.{head}" if hasattr(builtins, head) else "")
        return origin and origin + dot + rest


def _find(name: str) -> tuple[_Module | None, ast.ClassDef | ast.expr | None]:
    """Find a definition and its module by its full name, through modules that only import it."""
    module_name, _, attribute = name.rpartition(".")
    module = _load(module_name) if module_name and not _is_standard(name) else None
    if module is None:
        return None, None
    if attribute in module.definitions:
        return module, module.definitions[attribute]
    return _find(module.names[attribute]) if attribute in module.names else (None, None)


def _is_standard(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _load(name: str) -> _Module | None:
    """Read a module's source; None where it has none."""
    path = _source_file(name)
    if path is None or path.suffix != ".py":
        return None
    return _parse(name, path)


@functools.cache
def _parse(name: str, path: Path) -> _Module | None:
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    definitions: dict[str, ast.ClassDef | ast.expr] = {}
    imported: dict[str, str] = {}
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in _statements(tree):
            if isinstance(node, ast.ClassDef):
                definitions[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                definitions |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.Import):
                imported |= {alias.asname: alias.name for alias in node.names if alias.asname}
                tops = [alias.name.partition(".")[0] for alias in node.names if not alias.asname]
                imported |= {top: top for top in tops}
            elif isinstance(node, ast.ImportFrom):
                origin = resolve_name("." * node.level + (node.module or ""), package)
                imported |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
    except (OSError, SyntaxError, ValueError, ImportError):
        return None
    return _Module(tree, definitions, imported | {local: f"{name}.{local}" for local in definitions})


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements at the top level of a module, those inside ``if`` and ``try`` included.

    Those of an ``except`` are left out: they stand in for an import that is there.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try):
            yield from _statements(child)
        elif isinstance(child, ast.stmt):
            yield child


def _source_file(module: str) -> Path | None:
    """Return a module's file by the import system's own finders; ``find_spec`` would run the packages above it."""
    search: Any = None
    spec = None
    parts = module.split(".")
    for i in range(len(parts)):
        if i and search is None:  # the part before is no package
            return None
        name = ".".join(parts[: i + 1])
        candidates = (finder.find_spec(name, search) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((candidate for candidate in candidates if candidate is not None), None)
        if spec is None:
            return None
        search = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.origin else None
