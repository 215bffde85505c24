"""House rules that a syntax tree shows: docstrings, papers, file length, no prints and no bare asserts."""

from __future__ import annotations

import ast
import re

import pytest

from tests.layout import tree

DOCUMENTED = tuple(f"diffaccel.{name}" for name in tree.FOLDERS)
ARXIV = re.compile(r"arXiv[: ]\d{4}\.\d{4,5}")
LONGEST = 400


def undocumented(module: ast.Module) -> list[str]:
    """Public functions and classes that say nothing."""
    missing = [] if ast.get_docstring(module) else ["the module"]
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                missing.append(node.name)
    return missing


def configs(module: ast.Module) -> list[ast.ClassDef]:
    """Public dataclasses that carry a method's name."""
    return [
        node
        for node in module.body
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(
            isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id == "name"
            for line in node.body
        )
    ]


def unwanted(module: ast.Module) -> list[int]:
    """Lines with a print or an assert statement."""
    return sorted(
        node.lineno
        for node in ast.walk(module)
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
    )


def test_public_names_are_documented():
    missing = {
        name: found
        for name, file in tree.modules().items()
        if name.startswith(DOCUMENTED) and (found := undocumented(tree.parse(file)))
    }
    assert missing == {}


def test_methods_name_their_paper():
    """Every registered method's config says in its docstring or its ``paper`` field which paper it follows."""
    files = tree.modules()
    silent = []
    for name in sorted(tree.method_modules()):
        if name in files:
            found = configs(tree.parse(files[name]))
            silent += [name] if not found else []
            silent += [f"{name}:{config.name}" for config in found if not ARXIV.search(ast.unparse(config))]
    assert silent == []


def test_registered_methods_exist():
    assert tree.method_modules() <= set(tree.modules())


def test_package_code_neither_prints_nor_asserts():
    found = {name: lines for name, file in tree.modules().items() if (lines := unwanted(tree.parse(file)))}
    assert found == {}


def test_files_stay_readable():
    files = [*tree.modules().values(), *(tree.ROOT / "scripts").rglob("*.py")]
    lengths = {str(file.relative_to(tree.ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize(
    ("check", "text", "expected"),
    [
        (undocumented, '"""Doc."""\ndef f(): pass\nclass C: pass\ndef _g(): pass', ["f", "C"]),
        (undocumented, '"""Doc."""\ndef f():\n    """Doc."""', []),
        (undocumented, "x = 1", ["the module"]),
        (unwanted, "print(1)\nassert x\nlogger.print(1)", [1, 2]),
    ],
)
def test_the_checks_see_what_they_are_for(check, text, expected):
    assert check(ast.parse(text)) == expected
