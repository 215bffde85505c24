"""The cells of the contract matrix that need no GPU: all contracts of one method here, the others' as slow tests."""

from __future__ import annotations

import itertools
from typing import Any

import matrix
import pytest
import self_contracts
from matrix import Case

QUICK = {"stock", "batch", "generators"}  # of the other methods, on one family
SOME = ("flux", "sd", "wan")  # families of the other methods here, all but one for quick contracts; the script runs all
QUICKLY = ("flux", "sd")  # families of the one method, of which the others are slow tests


def cell(method: str, contract: str, family: str) -> Any:
    is_slow = family not in QUICKLY or (contract == "compiled" and family != "flux")
    if method != "scheduler":
        is_slow = family != "flux" or contract not in QUICK
    return pytest.param(
        method, contract, family, id=f"{method}-{contract}-{family}", marks=[pytest.mark.slow] * is_slow
    )


def cells(methods: dict[str, Any], contracts: dict[str, Any], refuses: dict[str, dict[str, str]]) -> list[Any]:
    names = itertools.product(methods, contracts, matrix.FAMILIES)
    shown = [name for name in names if name[0] == "scheduler" or name[2] in SOME[: 3 if name[1] in QUICK else 1]]
    return [cell(*name) for name in shown if name[2] not in refuses.get(name[0], {})]


def check(contract: Any, case: Case) -> None:
    try:
        contract(case)
    except matrix.NotHere as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("method", "contract", "family"), cells(matrix.METHODS, matrix.CONTRACTS, matrix.REFUSES))
def test_contract(method: str, contract: str, family: str) -> None:
    reference = matrix.REFERENCES.get(method)
    check(matrix.CONTRACTS[contract], Case(family, matrix.METHODS[method], reference=reference))


@pytest.mark.parametrize(
    ("method", "contract", "family"),
    cells(self_contracts.CHANGING, self_contracts.SELF_CONTRACTS, self_contracts.REFUSES),
)
def test_contract_of_a_method_that_changes_the_result(method: str, contract: str, family: str) -> None:
    check(self_contracts.SELF_CONTRACTS[contract], Case(family, self_contracts.CHANGING[method]))


@pytest.mark.parametrize(
    ("config", "family", "sentence"),
    [
        pytest.param(
            methods[name], family, sentence, id=f"{name}-{family}", marks=[pytest.mark.slow] * (family != "dit")
        )
        for methods, refuses in (
            (matrix.METHODS, matrix.REFUSES),
            (self_contracts.CHANGING, self_contracts.REFUSES),
        )
        for name, families in refuses.items()
        for family, sentence in families.items()
    ],
)
def test_a_pipeline_is_refused_with_a_sentence(config: Any, family: str, sentence: str) -> None:
    assert sentence in matrix.refusal(Case(family, config))
