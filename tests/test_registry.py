"""Names to methods: built-in ones and those of plugin packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffaccel import registry
from diffaccel.errors import DiffAccelError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, from inside diffusers
SAMPLER = '''
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from diffaccel.config import SamplerConfig
from diffaccel.session import Eval, Step


@dataclass(frozen=True, kw_only=True)
class Halfway(SamplerConfig):
    """Euler on a rescaled velocity."""

    name: ClassVar[str] = "acme-halfway"
    factor: float = 1.0

    def sample(self, session):
        x = session.x
        for sigma, sigma_next in pairwise(session.sigmas):
            pred = yield Eval(x, sigma)
            x = yield Step(x + (sigma_next - sigma) * (self.factor * pred.v), sigma_next)
        return x
'''

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package with entry points on the path, as pip leaves it: a module and a dist-info folder."""
    modules: list[str] = []

    def make(distribution: str, points: dict[str, str], module: str = "", source: str = "") -> Path:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[diffaccel.plugins]\n{lines}")
        if module:
            (site / f"{module}.py").write_text(source)
            modules.append(module)
        monkeypatch.syspath_prepend(str(site))
        return site

    yield make
    for module in modules:
        sys.modules.pop(module, None)


def test_built_in_names() -> None:
    assert {"euler", "heun", "dpmpp2m", "ancestral"} <= set(registry.names())
    for name, where in registry.METHODS.items():
        cls = registry.config_class(name)
        assert f"{cls.__module__}:{cls.__qualname__}" == where


@pytest.mark.parametrize("name, nearest", [("eular", "euler"), ("Heun", "heun"), ("dpmpp", "dpmpp2m")])
def test_unknown_name_gives_the_nearest(name: str, nearest: str) -> None:
    message = rf"Unknown method '{name}'. Did you mean '{nearest}'\? Known: .*ancestral"
    with pytest.raises(DiffAccelError, match=message):
        registry.config_class(name)


def test_a_name_like_no_other_gives_the_list() -> None:
    with pytest.raises(DiffAccelError, match=r"Unknown method 'qqqq'. Known: .*euler"):
        registry.config_class("qqqq")


def test_a_plugin_registers_a_method_that_runs(install: Install) -> None:
    import tiny
    import torch

    import diffaccel

    install("acme_halfway", {"acme-halfway": "acme_halfway:Halfway"}, "acme_halfway", SAMPLER)
    assert registry.names()["acme-halfway"] == "acme_halfway:Halfway"
    pipe = tiny.make("sd")
    stock = pipe(**tiny.call_kwargs("sd", steps=2)).images
    diffaccel.accelerate(pipe, "acme-halfway")
    assert torch.equal(pipe(**tiny.call_kwargs("sd", steps=2)).images, stock)  # its default is Euler
    assert "acme-halfway" in str(diffaccel.summary(pipe))
    halfway = registry.config_class("acme-halfway").from_dict({"factor": 0.5})
    diffaccel.accelerate(diffaccel.remove(pipe), halfway)
    assert not torch.equal(pipe(**tiny.call_kwargs("sd", steps=2)).images, stock)
    diffaccel.remove(pipe)


@pytest.mark.slow
def test_an_installed_plugin_is_found_by_a_fresh_interpreter_without_importing_it(install: Install) -> None:
    site = install("acme_halfway", {"acme-halfway": "acme_halfway:Halfway"}, "acme_halfway", SAMPLER)
    script = (
        "import sys; from diffaccel import registry; print(registry.names()['acme-halfway']);"
        "print('torch' in sys.modules, 'acme_halfway' in sys.modules);"
        "print(registry.config_class('acme-halfway')(factor=0.5).to_dict())"
    )
    path = os.pathsep.join([str(site), str(Path(__file__).resolve().parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    reference, loaded, options = run.stdout.splitlines()
    assert reference == "acme_halfway:Halfway"
    assert loaded == "False False"
    assert options == "{'name': 'acme-halfway', 'state': 'float32', 'max_batch': 0, 'factor': 0.5}"


def test_a_plugin_may_not_take_a_built_in_name(install: Install) -> None:
    install("acme_euler", {"euler": "acme_euler:Euler"})
    with pytest.raises(
        DiffAccelError, match=r"The plugin acme_euler:Euler names its method 'euler', which diffaccel has"
    ):
        registry.names()


def test_two_plugins_may_not_take_one_name(install: Install) -> None:
    install("acme_one", {"acme-one": "acme_one:One"})
    install("other_one", {"acme-one": "other_one:One"})
    with pytest.raises(DiffAccelError, match=r"Two plugins name their method 'acme-one': .*acme_one:One") as error:
        registry.names()
    assert "other_one:One" in str(error.value)


@pytest.mark.parametrize("value", ["acme_absent:Config", "acme_broken:Absent"])
def test_a_plugin_that_cannot_be_imported(install: Install, value: str) -> None:
    install("acme_broken", {"acme-broken": value}, "acme_broken", "")
    assert registry.names()["acme-broken"] == value
    with pytest.raises(DiffAccelError, match=rf"The method 'acme-broken' \({value}\) cannot be imported: "):
        registry.config_class("acme-broken")
    assert registry.config_class("euler").name == "euler"  # the others still work


@pytest.mark.parametrize("source", ["raise RuntimeError('no licence')", "import sys; sys.exit(4)", "1 / 0", "x = = 1"])
def test_a_plugin_that_fails_when_it_is_imported(
    install: Install, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    """Its name is told, and commands that do not need it go on."""
    from diffaccel.cli import main

    install("acme_broken", {"acme-broken\x1b[2J": "acme_broken:Config"}, "acme_broken", source)
    name = next(name for name in registry.names() if name.startswith("acme"))
    with pytest.raises(
        DiffAccelError, match=r"The method 'acme-broken.*' \(acme_broken:Config\) cannot be imported: \w"
    ):
        registry.config_class(name)
    assert main(["list"]) == 0
    with pytest.raises(SystemExit, match="0"):
        main(["sample", "--help"])
    assert main(["explain", name]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and "acme-broken\\x1b[2J" in captured.err


@pytest.mark.parametrize(
    "source", ["Config = dict", SAMPLER.replace("class Halfway", "class Config")], ids=["dict", "name"]
)
def test_a_plugin_that_is_no_config_of_its_name(install: Install, source: str) -> None:
    install("acme_wrong", {"acme-wrong": "acme_wrong:Config"}, "acme_wrong", source)
    with pytest.raises(DiffAccelError, match=r"'acme-wrong' \(acme_wrong:Config\) is no config class of that name"):
        registry.config_class("acme-wrong")
