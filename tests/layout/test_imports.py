"""Who may import whom, and what an import costs."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.layout import rules, tree

COMMANDS = 'COMMANDS = {"planted": "diffaccel.cli.planted:run"}\n'
PLANTED = {
    "flow.py": ("diffaccel/flow.py", "from diffaccel.session import Session"),
    "errors.py": ("diffaccel/errors.py", "import diffaccel.flow"),
    "kernel to core": ("kernels/planted.py", "from diffaccel import errors"),
    "sampler to quantizer": ("samplers/planted.py", "from diffaccel.quant import MixDQ"),
    "quantizer to sampler": ("quant/planted.py", "def f():\n    from diffaccel.samplers import euler"),
    "sampler to sampler": ("samplers/euler.py", "from diffaccel.samplers.heun import heun"),
    "sampler to driver": ("samplers/planted.py", "from diffaccel.runtime.native import Native"),
    "evaluator in distillation": ("distill/planted.py", "import diffaccel.eval"),
    "core to method": ("diffaccel/compose.py", "def f():\n    import diffaccel.samplers.euler"),
    "core to method by name": ("diffaccel/compose.py", "importlib.import_module('diffaccel.samplers.euler')"),
    "evaluation to method": ("eval/planted.py", "from diffaccel.samplers.euler import euler"),
    "upwards in the evaluation": ("eval/metrics/planted.py", "from diffaccel.eval.comparison import compare_runs"),
    "rooms of one floor": ("eval/images/planted.py", "from diffaccel.eval.uncertainty import intervals"),
    "core to evaluation": ("diffaccel/compose.py", "from diffaccel.eval import compare"),
    "a module without a room": ("diffaccel/planted.py", "from diffaccel import errors"),
    "command line at start": ("diffaccel/cli/__init__.py", COMMANDS + "from diffaccel import eval"),
    "types only": ("samplers/planted.py", "if TYPE_CHECKING:\n    from diffaccel.runtime.call import generate"),
    "a former name": ("eval/metrics/planted.py", "from diffaccel.requests import Request"),
    "the package itself": ("diffaccel/compose.py", "import diffaccel"),
    "relative": ("samplers/planted.py", "from . import euler"),
    "folder by its own name": ("samplers/planted.py", "from samplers import euler"),
    "tests": ("diffaccel/compose.py", "import tests.support.tiny"),
}
PERMITTED = {
    "leaf": ("diffaccel/flow.py", "import torch"),
    "own room": ("kernels/planted.py", "from diffaccel.kernels import other"),
    "lower floor": ("samplers/planted.py", "from diffaccel.session import Eval\nfrom diffaccel.kernels import op"),
    "what searches share": ("samplers/planted.py", "from diffaccel.samplers.search import engine"),
    "command line when it runs": (
        "diffaccel/cli/__init__.py", COMMANDS + "def f():\n    from diffaccel.eval.api import compare",
    ),
    "command": ("diffaccel/cli/planted.py", "import diffaccel\nfrom diffaccel.eval.api import compare"),
    "evaluation downwards": ("eval/planted.py", "from diffaccel.compose import accelerate"),
}  # fmt: skip


def test_the_tree_keeps_the_rules():
    assert rules.violations() == []


def test_no_module_imports_itself_over_others():
    assert rules.circles() == []


def test_a_planted_circle_is_found(plain_tree):
    (plain_tree / "diffaccel" / "flow.py").write_text("def f():\n    from diffaccel.errors import DiffAccelError\n")
    (plain_tree / "diffaccel" / "errors.py").write_text("import diffaccel.flow\n")
    try:
        assert {"diffaccel.flow", "diffaccel.errors"} == set(rules.circles(plain_tree)[0])
    finally:
        for name in ("flow", "errors"):
            (plain_tree / "diffaccel" / f"{name}.py").write_text("")


@pytest.fixture(scope="module")
def plain_tree(tmp_path_factory):
    """The tree's modules without their contents, apart from the registry."""
    root = tmp_path_factory.mktemp("tree")
    for folder in tree.FOLDERS:
        (root / folder).mkdir()
        (root / folder / "__init__.py").touch()
    (root / "diffaccel").mkdir()
    for folder in tree.FOLDERS:
        (root / "diffaccel" / folder).symlink_to(f"../{folder}")
    (root / "diffaccel" / "cli").mkdir()
    for name in ("images", "metrics"):
        (root / "eval" / name).mkdir()
        (root / "eval" / name / "__init__.py").touch()
    for name in ("__init__", "errors", "flow", "session", "compose", "requests"):
        (root / "diffaccel" / f"{name}.py").touch()
    shutil.copy(tree.ROOT / "diffaccel" / "registry.py", root / "diffaccel")
    (root / "diffaccel" / "cli" / "__init__.py").write_text(COMMANDS)
    for name in ("euler", "heun"):
        (root / "samplers" / f"{name}.py").touch()
    return root


def with_file(root: Path, name: str, text: str) -> list[str]:
    file = root / name
    before = file.read_text() if file.exists() else None
    file.write_text(text)
    try:
        return rules.violations(root)
    finally:
        file.unlink() if before is None else file.write_text(before)


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_found(plain_tree, case):
    name, text = PLANTED[case]
    found = with_file(plain_tree, name, text)
    assert len(found) == 1 and tree.import_name(Path(name)) in found[0]


@pytest.mark.parametrize("case", PERMITTED)
def test_a_permitted_import_is_left_alone(plain_tree, case):
    assert with_file(plain_tree, *PERMITTED[case]) == []


def test_every_module_has_a_room():
    assert {name for name in tree.modules() if rules.room_of(name) is None} <= set(rules.DOORS)


def test_every_room_is_there():
    """Rooms come with what lies in them; none is listed in advance."""
    found = tree.modules()
    assert {room for room in rules.ROOMS if room not in found} == set()


def test_no_private_name_is_used_in_another_room():
    assert rules.private_names_across_rooms() == []


def test_contributing_shows_the_floors():
    assert rules.table() in (tree.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_third_party_imports_are_declared():
    """What loads with a module is a dependency; what loads inside a function may be one of an extra."""

    def normal(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()

    project = tree.project()["project"]
    required = {normal(r) for r in project["dependencies"]}
    optional = required | {normal(r) for extra in project["optional-dependencies"].values() for r in extra}
    required |= {"numpy", "huggingface-hub", "timm"}  # torch, diffusers and open-clip-torch bring these
    owners = importlib.metadata.packages_distributions()
    missing = []
    known = tree.modules()
    for module, file in known.items():
        for found in rules.imports(file, set(known)):
            top = found.name.partition(".")[0]
            if top in ("diffaccel", "__future__") or top in sys.stdlib_module_names:
                continue
            names = {normal(owner) for owner in owners.get(top, [top])}
            if not names & (required if found.at_start else required | optional):
                missing.append(f"{module}:{found.line} imports {found.name}")
    assert missing == []


def test_import_is_light(tmp_path):
    """Importing the package loads neither torch nor anything that does."""
    out = tree.python("-c", "import sys, diffaccel; print(*sys.modules)", cwd=tmp_path)
    heavy = {"torch", "numpy", "diffusers", "transformers", "triton", "open_clip", "matplotlib", "rich"}
    assert heavy.isdisjoint(out.stdout.split())


def test_help_is_light(tmp_path):
    """Naming the commands needs no torch."""
    done = tree.python("-X", "importtime", "-m", "diffaccel", "--help", cwd=tmp_path)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "diffaccel.cli" in loaded
    assert {"torch", "diffusers", "transformers", "numpy"}.isdisjoint(loaded)
