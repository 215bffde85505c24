"""The folder ``kernels/`` must not stand in the way of the hub's package of that name."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from tests.layout import tree

PROBE = "tests.layout.probe_kernels"
LAUNCHERS = {
    "python -c": ("-c", f"from {PROBE} import main; main()"),
    "python -m": ("-m", PROBE),
    "accelerate launch": ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", PROBE),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder with a stand-in for the hub's package, metadata included."""
    site = tmp_path_factory.mktemp("hub")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("from kernels.locking import LOCK\ndef get_kernel(): return LOCK\n")
    (site / "kernels" / "locking.py").write_text("LOCK = 'from the hub'\n")
    info = site / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return site


def elsewhere() -> list[str]:
    return [entry for entry in sys.path if Path(entry or ".").resolve() != tree.ROOT]


without_hub = pytest.mark.skipif(
    PathFinder.find_spec("kernels", elsewhere()) is not None, reason="the hub's package is installed here"
)


def launched(present: bool, launcher: str) -> Any:
    marks = [] if present else [without_hub, *[pytest.mark.slow] * (launcher == "accelerate launch")]
    return pytest.param(present, launcher, id=f"{present}-{launcher}", marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("present", "launcher"), [launched(present, launcher) for present in (True, False) for launcher in LAUNCHERS]
)
def test_both_packages_are_themselves(hub, launcher, present):
    """From the repository root, in the process and in a spawned worker."""
    done = tree.python(*LAUNCHERS[launcher], cwd=tree.ROOT, **({"PYTHONPATH": str(hub)} if present else {}))
    for where, seen in json.loads(done.stdout.splitlines()[-1]).items():
        expected = {
            "hub": "from the hub" if present else None,
            "name": "kernels",
            "ours": "diffaccel.kernels",
            "same": False,
            "root_on_path": True,
            "loaded_twice": False,
        }
        assert seen == expected, where


@pytest.mark.slow
@pytest.mark.parametrize("present", [True, pytest.param(False, marks=without_hub)])
def test_availability_is_reported_right(hub, present):
    """transformers imports whatever ``kernels`` it finds without metadata; an error there would stop it."""
    code = (
        "import diffusers.utils, transformers.utils;"
        "print(diffusers.utils.is_kernels_available(), transformers.utils.is_kernels_available());"
        "from transformers.utils.import_utils import _is_package_available as f; print(f('kernels', True))"
    )
    done = tree.python("-c", code, cwd=tree.ROOT, **({"PYTHONPATH": str(hub)} if present else {}))
    installed = "(True, '0.18.2')" if present else "(False, 'N/A')"
    first, second = done.stdout.splitlines()[-2:]
    assert first.split()[0] == str(present) and second == installed


@without_hub
@pytest.mark.parametrize("folder", [".", "diffaccel"])
def test_without_the_hub_nothing_of_ours_answers(folder):
    """Also from inside ``diffaccel/``, where the link of that name stands."""
    code = (
        "import importlib.util, kernels; print(hasattr(kernels, '__file__'), importlib.util.find_spec('kernels'))\n"
        "try:\n    from kernels import get_kernel\nexcept ImportError as error: print(error.name)\n"
        "try:\n    import kernels.locking\nexcept ModuleNotFoundError as error: print(error.name)"
    )
    out = tree.python("-c", code, cwd=tree.ROOT / folder).stdout.splitlines()
    assert out == ["False ModuleSpec(name='kernels', loader=None)", "kernels", "kernels.locking"]


@pytest.mark.parametrize("present", [True, pytest.param(False, marks=without_hub)])
def test_several_checkouts_on_the_path(hub, tmp_path, present):
    """No checkout is taken for the hub's package, whatever comes first."""
    for name in ("first", "second"):
        shutil.copytree(tree.ROOT / "kernels", tmp_path / name / "kernels")
    path = os.pathsep.join(str(entry) for entry in (tmp_path / "first", tmp_path / "second", *[hub] * present))
    code = "import kernels; print(getattr(kernels, 'get_kernel', lambda: None)(), hasattr(kernels, '__file__'))"
    for folder in (tree.ROOT, tmp_path):
        out = tree.python("-c", code, cwd=folder, PYTHONPATH=path).stdout
        assert out == ("from the hub True\n" if present else "None False\n")


def test_an_error_inside_the_hub_package_is_its_own(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError('no driver')\n")
    code = "import sys\ntry:\n    import kernels\nexcept RuntimeError as error: print(error, 'kernels' in sys.modules)"
    assert tree.python("-c", code, cwd=tree.ROOT, PYTHONPATH=str(tmp_path)).stdout == "no driver False\n"


def test_the_guard_comes_first_and_is_short():
    """What the package really holds stands in the guard's ``else``, so that it never runs under the plain name."""
    statements = tree.parse(tree.ROOT / "kernels" / "__init__.py").body[1:]
    guard, *rest = [node for node in statements if not isinstance(node, ast.ImportFrom) or node.module != "__future__"]
    assert isinstance(guard, ast.If) and ast.unparse(guard.test) == "__name__ == 'kernels'"
    assert rest == []
    assert guard.body[-1].end_lineno - guard.lineno < 12


@pytest.mark.slow
def test_other_folders_refuse_to_be_imported_alone():
    """Two copies of a module under two names would be two sets of classes."""
    folders = [name for name in tree.FOLDERS if name != "kernels"]
    alone = "".join(f"try:\n    import {name}\nexcept ImportError as error: print(error)\n" for name in folders)
    done = tree.python("-c", alone + "".join(f"import diffaccel.{name}\n" for name in folders), cwd=tree.ROOT)
    for name in folders:
        assert f"import diffaccel.{name} instead" in done.stdout
