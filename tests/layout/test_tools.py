"""The tools see every file of the package, and see it once; ruff and mypy find nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.layout import tree


def real(names) -> list[Path]:
    return sorted((tree.ROOT / name).resolve() for name in names)


def test_ruff_sees_each_file_once():
    shown = tree.python("-m", "ruff", "check", "--show-files", ".", cwd=tree.ROOT).stdout.splitlines()
    files = real(name for name in shown if name.endswith(".py"))
    assert len(files) == len(set(files))
    assert set(real(tree.modules().values())) <= set(files)


def test_ruff_finds_nothing():
    tree.python("-m", "ruff", "check", "--no-cache", ".", cwd=tree.ROOT)


@pytest.mark.slow
def test_mypy_sees_each_file_once_and_finds_nothing():
    """A file met under two names would be counted twice, or reported as an error."""
    done = tree.python("-m", "mypy", "--no-color-output", cwd=tree.ROOT, check=False)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"no issues found in (\d+) source files", done.stdout)[1]) == len(tree.modules())


@pytest.mark.slow
def test_coverage_sees_each_file_once(tmp_path):
    """Files that ran and files that did not; only the first are looked for under their link."""
    env = {"COVERAGE_FILE": str(tmp_path / "data")}
    names = ["diffaccel.errors", *(f"diffaccel.{name}" for name in tree.FOLDERS)]
    script = tmp_path / "run.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(tree.ROOT)!r})\nimport {', '.join(names)}\n")
    tree.python("-m", "coverage", "run", script, cwd=tree.ROOT, **env)
    tree.python("-m", "coverage", "json", "-q", "-o", tmp_path / "out.json", cwd=tree.ROOT, **env)
    report = json.loads((tmp_path / "out.json").read_text())["files"]
    files = real(report)
    assert len(files) == len(set(files))
    assert set(files) == set(real(tree.modules().values()))
    ran = {name for name, entry in report.items() if entry["summary"]["covered_lines"]}
    assert {(tree.ROOT / name).resolve() for name in ran} >= set(real([tree.modules()[name] for name in names]))


@pytest.mark.parametrize(
    ("twice", "workers"),
    [
        (False, 0),
        pytest.param(False, 1, marks=pytest.mark.slow),
        pytest.param(True, 0, marks=pytest.mark.slow),
        (True, 1),
    ],
)
def test_the_suite_fails_when_a_file_is_loaded_twice(tmp_path, twice, workers):
    (tmp_path / "tests").mkdir()
    shutil.copy(tree.ROOT / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\npythonpath = .\n")
    (tmp_path / "samplers").mkdir()
    (tmp_path / "samplers" / "planted.py").touch()
    (tmp_path / "diffaccel").mkdir()
    (tmp_path / "diffaccel" / "samplers").symlink_to("../samplers")
    imports = ["diffaccel.samplers.planted", *(["samplers.planted"] if twice else [])]
    (tmp_path / "tests" / "test_it.py").write_text(f"def test_it():\n    import {', '.join(imports)}\n")
    words = ["-q", "-p", "no:cacheprovider", f"--numprocesses={workers}"]
    done = tree.python("-m", "pytest", *words, cwd=tmp_path, check=False)
    assert "1 passed" in done.stdout
    assert ("loaded under two names" in done.stdout) is twice
    assert done.returncode == int(twice)
