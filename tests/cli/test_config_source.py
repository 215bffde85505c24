"""A config class read from its source is the class itself, and reading it imports nothing."""

from __future__ import annotations

import sys

import pytest

from diffaccel import registry
from diffaccel.cli import config_source
from diffaccel.cli.listing import options_of
from tests.layout import tree

PLUGIN = '''
"""Draws faster. Really."""
import dataclasses as dc
import typing
from .base import Base as Parent, RULES
from .base import LIMIT

try:
    from .base import Names
except ImportError:
    Names = str

@dc.dataclass(frozen=True, kw_only=True)
class Fast(Parent):
    """Fast.

    Args:
        names: of what
            is kept.
        size, rate: two at once.
    """

    name: typing.ClassVar[str] = "fast"
    _: dc.KW_ONLY
    scale: "dc.InitVar[int]" = 2
    names: Names = dc.field(default_factory=tuple)
    size: "tuple[int, int]" = (1, 2)
    rate: float | None = None
    limit: int = LIMIT
    rule: RULES = "b"
    other: RULES | None = None
    path: str = ""
    must: int
    first: bool = dc.field(default=True)
'''
BASE = '''
from dataclasses import dataclass
from typing import ClassVar, Literal

RULES = Literal["a", "b"]
Names = tuple[str, ...]
LIMIT = 7

class Mixin:
    ignored: int = 3

@dataclass(frozen=True, kw_only=True)
class Base(Mixin):
    """Base.

    Attributes:
        first: of all.
    """

    touches: ClassVar[str] = "loop"
    citation = "P, arXiv 1"
    first: bool = False
'''


@pytest.fixture
def plugin(monkeypatch, tmp_path):
    """A package of two modules whose names are imported from each other in every way."""
    package = tmp_path / "planted_source"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text(PLUGIN)
    (package / "base.py").write_text(BASE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "planted_source.method:Fast"
    for name in [name for name in sys.modules if name.partition(".")[0] == "planted_source"]:
        del sys.modules[name]


def option_of(name):
    return "sampler" if registry.config_class(name).touches == "loop" else "method"


@pytest.mark.parametrize("name", registry.METHODS)
def test_options_from_source_are_those_of_the_class(name):
    cls, source = registry.config_class(name), config_source.read(registry.METHODS[name])
    assert source.options == options_of(cls)
    variables = ("name", "touches", "conflicts", "citation", "evals_per_step", "searches")
    assert all(source.variables[key] == getattr(cls, key) for key in variables if hasattr(cls, key))


def test_a_plugin_is_read_through_its_imports(plugin):
    source = config_source.read(plugin)
    assert "planted_source" not in sys.modules
    assert source.summary == "Draws faster" and source.variables["citation"] == "P, arXiv 1"
    from planted_source.method import Fast

    assert source.options == options_of(Fast)
    assert [option["name"] for option in source.options][:2] == ["first", "names"]


@pytest.mark.parametrize(
    "change",
    [
        ("base.py", BASE, "def"),  # no Python
        ("base.py", BASE.replace("class Base", "class Other"), ""),
        ("method.py", PLUGIN.replace("(Parent)", "(make_parent())"), ""),
    ],
)
def test_a_base_without_readable_source_has_no_options(plugin, tmp_path, change):
    file, text, end = change
    (tmp_path / "planted_source" / file).write_text(text + end)
    assert config_source.read(plugin).options is None


def test_a_module_without_source_is_none(plugin, tmp_path):
    assert config_source.read("nowhere.at_all:M") is None
    assert config_source.read("sys:M") is None
    assert config_source.read("planted_source.method.Fast:M") is None
    (tmp_path / "planted_source" / "method.py").write_text("def")
    assert config_source.read(plugin) is None


def test_help_names_what_it_cannot_read(run, plugin, monkeypatch, capsys):
    names = {"fast": plugin, "gone": "nowhere.at_all:M", "euler": registry.METHODS["euler"]}
    monkeypatch.setattr(registry, "names", lambda: names)
    with pytest.raises(SystemExit) as stop:
        run("sample", "--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "planted_source" not in sys.modules
    assert "  --fast.rule (a|b, default b)\n" in shown and "  --euler.max_batch (int, default 0)\n" in shown
    assert "options of --sampler gone (diffaccel explain gone)\n" in shown and "--gone." not in shown


@pytest.mark.slow
def test_help_of_sample_loads_nothing_heavy(tmp_path):
    code = """
import sys
from diffaccel.cli import main
try:
    main(["sample", "--help"])
except SystemExit as stop:
    loaded = {"torch", "numpy", "diffusers", "transformers", "jsonargparse"} & set(sys.modules)
    sys.exit(f"loads {loaded}" if loaded or stop.code else 0)
"""
    shown = tree.python("-c", code, cwd=tmp_path).stdout
    assert all(f"options of --{option_of(name)} {name} " in shown for name in registry.METHODS)
    assert "  --rbf.path (native|vp|linear, default native)\n" in shown


@pytest.mark.slow
def test_configs_of_samplers_load_no_networks(tmp_path):
    """Those of diffusers take seconds, and ``explain`` needs none of them."""
    code = "import sys, diffaccel.samplers; sys.exit(' '.join({'diffusers', 'transformers'} & set(sys.modules)) or 0)"
    tree.python("-c", code, cwd=tmp_path)
