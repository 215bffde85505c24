"""What is built from the tree, and that the package imports the same from every place it can be found in."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.layout import tree

WHEEL_LIMIT = 80e6  # bytes; an index takes at most 100 MB a file
NOT_SHIPPED = ("*.py[co]", "*.tmp", ".*")


def shipped(root: Path) -> set[str]:
    """The files of the package as a wheel names them: everything in the package's folders on disk."""
    files = set()
    for folder, subfolders, names in os.walk(root / "diffaccel", followlinks=True):
        subfolders[:] = [name for name in subfolders if name != "__pycache__" and not name.startswith(".")]
        kept = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in NOT_SHIPPED)]
        files |= {str((Path(folder) / name).relative_to(root)) for name in kept}
    return files


def copy_tree(target: Path) -> Path:
    """The checkout without what a checkout leaves out, links kept."""
    names = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "diffaccel", "tests", *tree.FOLDERS)
    target.mkdir()
    for name in names:
        source = tree.ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True)
        else:
            shutil.copy(source, target / name)
    return target


def environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages but not an editable diffaccel; returns its Python."""
    tree.python("-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy with data files of every place they may stand in, and with what must not be shipped lying about."""
    root = copy_tree(tmp_path_factory.mktemp("build") / "checkout")
    planted = ("diffaccel/zoo/planted/card.md", "diffaccel/zoo/planted/tokenizer/t.json", "eval/report/page.html.jinja")
    for data in planted:
        (root / data).parent.mkdir(parents=True, exist_ok=True)
        (root / data).touch()
    for folder in ("diffaccel/zoo/__pycache__", "eval/__pycache__"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "stale.cpython-311.pyc").touch()
    (root / "diffaccel" / "zoo" / "half-written.tmp").touch()
    return root


@pytest.fixture(scope="module")
def built(checkout) -> dict[str, Path]:
    """An sdist, the wheel made from it, and the wheel made from the tree."""
    out = checkout.parent
    build = ("-m", "build", "--no-isolation", ".")
    tree.python(*build, "--wheel", "--outdir", out / "direct", cwd=checkout)
    shutil.rmtree(checkout / "build")
    tree.python(*build, "--outdir", out / "dist", cwd=checkout)
    found = {"sdist": "dist/*.tar.gz", "wheel": "dist/*.whl", "direct": "direct/*.whl"}
    return {kind: next(out.glob(pattern)) for kind, pattern in found.items()}


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {re.sub(r"^diffaccel-[^/]*\.dist-info", "info", name) for name in archive.namelist()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "direct"])
def test_wheel_holds_the_package_and_nothing_else(built, checkout, kind):
    info = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE", "licenses/NOTICE"}
    assert contents(built[kind]) == shipped(checkout) | {f"info/{name}" for name in info}
    assert built[kind].stat().st_size < WHEEL_LIMIT


@pytest.mark.slow
def test_sdist_holds_what_a_wheel_is_made_from(built, checkout):
    with tarfile.open(built["sdist"]) as archive:
        members = archive.getmembers()
    names = {name for member in members if (name := member.name.partition("/")[2]) and member.isfile()}
    assert {"LICENSE", "NOTICE", "README.md", "pyproject.toml", "diffaccel/py.typed"} <= names
    extra = {name for name in names - shipped(checkout) if not name.startswith("diffaccel.egg-info/")}
    assert shipped(checkout) <= names  # links have become folders
    assert extra == {"LICENSE", "NOTICE", "README.md", "MANIFEST.in", "PKG-INFO", "pyproject.toml", "setup.cfg"}
    assert not any(member.issym() or member.islnk() for member in members)


def test_licence_texts_are_whole():
    licence = (tree.ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert "diffaccel/zoo" in (tree.ROOT / "NOTICE").read_text()


def test_a_new_subpackage_needs_no_list(tmp_path):
    """setuptools finds packages through the tracked links."""
    from setuptools import find_packages

    root = copy_tree(tmp_path / "checkout")
    (root / "eval" / "added").mkdir()
    (root / "eval" / "added" / "__init__.py").touch()
    settings = tree.project(root)["tool"]["setuptools"]["packages"]["find"]
    assert set(find_packages(str(root), **settings)) == set(tree.packages(root)) >= {"diffaccel.eval.added"}


def test_links_are_relative_and_stay_inside():
    links = {str(path.relative_to(tree.ROOT)) for path in (tree.ROOT / "diffaccel").rglob("*") if path.is_symlink()}
    assert links == {f"diffaccel/{name}" for name in tree.FOLDERS}
    for link in links:
        assert os.readlink(tree.ROOT / link) == f"../{Path(link).name}"


def test_links_are_tracked_as_links():
    done = subprocess.run(["git", "ls-files", "-s", "diffaccel"], cwd=tree.ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        pytest.skip("not a git checkout")
    entries = (line.split(maxsplit=3) for line in done.stdout.splitlines())
    assert {path for mode, _, _, path in entries if mode == "120000"} == {f"diffaccel/{name}" for name in tree.FOLDERS}


@pytest.fixture(scope="module")
def pythons(built, checkout) -> dict[str, Path]:
    """Interpreters with the package installed from the wheel, installed editable, and not at all."""
    out = checkout.parent
    found = {kind: environment(out / kind) for kind in ("wheel-env", "editable-env", "bare-env")}
    pip = ("-m", "pip", "--python")
    options = ("install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation")
    tree.python(*pip, found["wheel-env"], *options, built["wheel"], cwd=out)
    tree.python(*pip, found["editable-env"], *options, "--editable", checkout, cwd=out)
    return found


def origins(interpreter: Path, checkout: Path, cwd: Path) -> dict[str, Path]:
    """Where each module of the package would come from; parents are imported on the way."""
    names = sorted(tree.modules(checkout))
    found = f"{{name: find_spec(name).origin for name in {names}}}"
    code = f"import json; from importlib.util import find_spec; print(json.dumps({found}))"
    out = tree.run(interpreter, "-c", code, cwd=cwd).stdout
    return {name: Path(file) for name, file in json.loads(out).items()}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["elsewhere", "root"])
@pytest.mark.parametrize("kind", ["wheel-env", "editable-env"])
def test_installed_package_imports_from_anywhere(pythons, checkout, tmp_path, kind, where):
    """From the repository root the tree's own files win, else the installed ones; never a mixture."""
    found = origins(pythons[kind], checkout, checkout if where == "root" else tmp_path)
    home = pythons[kind].parents[1] if kind == "wheel-env" and where == "elsewhere" else checkout
    assert {name for name, file in found.items() if not file.is_relative_to(home)} == set()
    assert len({file.resolve() for file in found.values()}) == len(found)


@pytest.mark.slow
def test_checkout_works_without_installing(pythons, checkout):
    found = origins(pythons["bare-env"], checkout, checkout)
    assert all(file.is_relative_to(checkout) for file in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("safe_path", ["", "1"], ids=["python -m pytest", "pytest"])
def test_tests_run_without_installing(pythons, checkout, safe_path):
    """``python -m pytest``, and bare ``pytest``, which does not put the root on the path by itself."""
    test = checkout / "tests" / "test_planted.py"
    test.write_text("def test_import():\n    import diffaccel.kernels, diffaccel.samplers\n")
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_planted.py")
    assert "1 passed" in tree.run(pythons["bare-env"], *command, cwd=checkout, PYTHONSAFEPATH=safe_path).stdout


@pytest.mark.slow
def test_command_line_runs_without_installing(pythons, checkout, tmp_path):
    assert "usage" in tree.run(pythons["bare-env"], "-m", "diffaccel", "--help", cwd=checkout).stdout.lower()
    script = pythons["wheel-env"].with_name("diffaccel")
    assert "usage" in tree.run(script, "--help", cwd=tmp_path).stdout.lower()


@pytest.mark.slow
def test_every_module_imports_once():
    """All modules load, in one process, from one file each."""
    code = (
        "import importlib, os, sys\n"
        f"for name in {sorted(tree.modules())}: importlib.import_module(name)\n"
        "files = [os.path.realpath(m.__file__) for n, m in list(sys.modules.items())"
        " if getattr(m, '__file__', None) and n.partition('.')[0] in ('diffaccel', *sys.argv[1:])]\n"
        "print(len(files) - len(set(files)))"
    )
    assert tree.python("-c", code, *tree.FOLDERS, cwd=tree.ROOT).stdout.splitlines()[-1] == "0"


def test_this_environment_has_the_package():
    """The suite tests the tree it lies in, whatever else is installed."""
    import diffaccel

    assert Path(diffaccel.__file__).resolve().is_relative_to(tree.ROOT)
    assert sys.modules["diffaccel"] is diffaccel
