"""The Triton kernels without a GPU: run by the interpreter on the CPU, and compiled for sm_90."""

from __future__ import annotations

import ast
import json
import sys
from functools import cache
from typing import Any

import pytest

from diffaccel.kernels.winners import key, winner
from tests.layout import tree

triton = pytest.importorskip("triton")
IS_NEW = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
HERE = tree.ROOT / "tests" / "kernels"


def names_of(script: str) -> list[str]:
    """The literal names in a script's table, which only a process of its own may import."""
    table = next(
        node.value
        for node in tree.parse(HERE / f"{script}.py").body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "CHECKS"
    )
    return [ast.literal_eval(name) for name in table.keys]  # type: ignore[attr-defined]


@cache
def interpreted() -> dict[str, bool]:
    done = tree.python("-m", "tests.kernels.interpreted", cwd=tree.ROOT, TRITON_INTERPRET="1")
    return json.loads(done.stdout.splitlines()[-1])


@cache
def compiled() -> dict[str, dict[str, Any]]:
    done = tree.python("-W", "ignore", "-m", "tests.kernels.compiled", cwd=tree.ROOT)
    return {row.pop("name"): row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.skipif(not IS_NEW, reason="older interpreters cannot loop to a runtime bound with this numpy")
@pytest.mark.parametrize("name", names_of("interpreted"))
def test_a_kernel_under_the_interpreter(name: str) -> None:
    assert interpreted()[name]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiled_for_hopper() -> None:
    rows = compiled()
    assert len(rows) == 22 + 13
    for name, row in rows.items():
        assert row["local"] == 0 and row["stack"] <= (0 if IS_NEW else 8), f"{name} spills registers"
        assert row["shared"] <= 232_448, name
        assert (row["int8 tensor cores"] > 0) == name.startswith("int8"), name
    assert all(
        row["fused multiplies"] == 0
        for name, row in rows.items()
        if name.startswith(("rows", "streams", "activated", "pictures"))
    )
    assert all(
        row["wide loads"] > 0
        for name, row in rows.items()
        if name.startswith(("streams", "activated", "heads", "pictures"))
    )
    assert all(row["tensor copies"] > 0 for name, row in rows.items() if "warps" in name)


def test_rows_of_a_table_are_counted_in_powers_of_two() -> None:
    assert key("int8_linear", (9, 0), 4608, 3072, 12288) == "int8_linear sm9.0 3072 12288 8192"
    assert key("int8_linear", (9, 0), 1, 8, 8).endswith(" 1")
    assert key("int8_linear", (9, 0), 4096, 8, 8) != key("int8_linear", (9, 0), 4097, 8, 8)
    assert winner("int8_linear", (0, 0), 1, 1, 1) is None
