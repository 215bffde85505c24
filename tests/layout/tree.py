"""The source tree as these tests see it: the packages and modules on disk, by import name."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("samplers", "quant", "distill", "kernels", "eval")


def project(root: Path = ROOT) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def packages(root: Path = ROOT) -> dict[str, Path]:
    """Every folder under ``diffaccel/`` that holds Python files, links followed: import name to folder."""
    found = {}
    for folder, subfolders, files in os.walk(root / "diffaccel", followlinks=True):
        subfolders[:] = [name for name in subfolders if name != "__pycache__"]
        if any(name.endswith(".py") for name in files):
            found[".".join(Path(folder).relative_to(root).parts)] = Path(folder)
    return found


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package: import name to file."""
    return {
        name if file.stem == "__init__" else f"{name}.{file.stem}": file
        for name, folder in packages(root).items()
        for file in sorted(folder.glob("*.py"))
    }


def import_name(file: Path) -> str:
    """The import name of a file given by its place in the tree."""
    parts = file.with_suffix("").parts
    parts = parts if parts[0] == "diffaccel" else ("diffaccel", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(file: Path) -> ast.Module:
    """The tree of a file, which several checks look at: none may change it."""
    return _parsed(file.read_text(encoding="utf-8"), str(file))


@functools.cache
def _parsed(text: str, name: str) -> ast.Module:
    return ast.parse(text, name)


@functools.cache
def nodes(module: ast.Module) -> list[ast.AST]:
    """All nodes of a module, as ``ast.walk`` gives them."""
    return list(ast.walk(module))


def method_modules(root: Path = ROOT) -> set[str]:
    """The modules that the registry names: one method each."""
    return named_in(root / "diffaccel" / "registry.py")


def named_in(file: Path) -> set[str]:
    """The modules of lazy references, ``"diffaccel.module:name"``, in a file."""
    nodes = ast.walk(parse(file))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {text.partition(":")[0] for text in texts if text.startswith("diffaccel.") and ":" in text}


def run(*command: str | Path, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command with output captured; on failure the error carries that output."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")} | env
    environment.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    command = tuple(str(part) for part in command)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if check and done.returncode:
        output = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        raise AssertionError(f"{' '.join(command)}\nexit {done.returncode}\n{output}")
    return done


def python(*arguments: str | Path, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments, cwd=cwd, check=check, **env)
