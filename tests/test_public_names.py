"""What ``dir`` and tab show of the packages that users import from: their own names, and no helpers' imports."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

PUBLIC = (
    "diffaccel", "diffaccel.samplers", "diffaccel.samplers.rewards", "diffaccel.quant", "diffaccel.eval",
    "diffaccel.zoo",
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_a_package_shows_its_own_names_only(name: str) -> None:
    package = import_module(name)
    shown = dir(package)
    assert set(package.__all__) <= set(shown)
    for attribute in shown:
        value = getattr(package, attribute)
        owner = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "diffaccel")
        assert owner.partition(".")[0] == "diffaccel" or isinstance(value, str | dict), attribute
        assert not attribute.startswith("_") or attribute == "__version__"


def test_the_first_page_of_names() -> None:
    names = {"DiffAccelError", "__version__", "accelerate", "load", "open_session", "remove", "set_quality", "summary"}
    assert names <= set(dir(import_module("diffaccel"))) <= names | {"eval", "quant", "samplers", "zoo"}
