"""House rules that a syntax tree shows: docstrings, papers, lengths of files and functions, no prints, no asserts."""

from __future__ import annotations

import ast
import io
import re
import tokenize

import pytest

from tests.layout import tree

DOCUMENTED = tuple(f"diffaccel.{name}" for name in tree.FOLDERS)
ARXIV = re.compile(r"arXiv[: ]\d{4}\.\d{4,5}")
LONGEST = 400
LONGEST_FUNCTION = 60  # lines of code
LONGER: dict[str, str] = {}  # function to reason; at most three
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


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
        for node in tree.nodes(module)
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
    )


def function_lengths(text: str) -> dict[str, int]:
    """Lines of code of every function and method, those inside it included: no docstrings, comments or blank lines."""
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    module = ast.parse(text)
    docstrings = {
        line
        for node in tree.nodes(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    lengths = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    lengths[name] = len(code & set(range(child.lineno, child.end_lineno + 1)) - docstrings)
                visit(child, f"{name}.")
            elif not isinstance(child, ast.expr):  # which holds no functions
                visit(child, prefix)

    visit(module, "")
    return lengths


def test_public_names_are_documented():
    missing = {
        name: found
        for name, file in tree.modules().items()
        if name.startswith(DOCUMENTED) and (found := undocumented(tree.parse(file)))
    }
    assert missing == {}


def test_methods_name_their_paper():
    """Every registered method's config says in its docstring or its ``citation`` field which paper it follows."""
    files = tree.modules()
    silent = []
    for name in sorted(tree.method_modules()):
        if name in files:
            found = configs(tree.parse(files[name]))
            silent += [name] if not found else []
            silent += [f"{name}:{config.name}" for config in found if not ARXIV.search(ast.unparse(config))]
    assert silent == []


def test_one_class_a_name():
    """Two classes of one name are two meanings of one word."""
    places: dict[str, list[str]] = {}
    for name, file in tree.modules().items():
        for node in tree.parse(file).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_registered_methods_exist():
    assert tree.method_modules() <= set(tree.modules())


def test_package_code_neither_prints_nor_asserts():
    found = {name: lines for name, file in tree.modules().items() if (lines := unwanted(tree.parse(file)))}
    assert found == {}


def test_files_stay_readable():
    files = [*tree.modules().values(), *(tree.ROOT / "scripts").rglob("*.py")]
    lengths = {str(file.relative_to(tree.ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_functions_stay_readable():
    """One that grew past the limit is split along its steps; an exception that is short again is taken off the list."""
    long = {
        f"{name}:{function}"
        for name, file in tree.modules().items()
        for function, length in function_lengths(file.read_text(encoding="utf-8")).items()
        if length > LONGEST_FUNCTION
    }
    assert long == set(LONGER) and len(LONGER) <= 3 and all(LONGER.values())


LENGTHS = '''
class C:
    """Doc."""

    def method(self):
        """Two
        lines."""
        # a comment

        text = """code
        of three
        lines"""

        def inner():
            "Doc."
            return (
                1  # code and a comment
            )

        return inner
'''


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


def test_lines_of_code_are_counted():
    """A decorator is no line of its function; a text of several lines is."""
    assert function_lengths(LENGTHS) == {"C.method": 9, "C.method.inner": 4}
    assert function_lengths("@a\ndef f(): pass") == {"f": 1}
