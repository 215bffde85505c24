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
# Methods that drive a pipeline as another one does and differ in what they compute of predictions alone, and families
# whose pipeline and network are another one's: these have the quick contracts here, and the script runs all.
ALIKE = {
    **dict.fromkeys(("euler", "dpmpp2m", "ancestral"), "heun"),
    **dict.fromkeys(("bon", "smc", "svdd", "code", "sop"), "rbf"),
    "seacache": "spectrum", "seacache-0": "spectrum-all-real",
}  # fmt: skip
# Caches that compute every step: their network is compiled as that of the same cache with skipped steps, which gives
# the result of the network that is not compiled; and that is the stock call's where no step is skipped.
COMPILED_ALIKE = {
    "spectrum-all-real": "spectrum", "firstblock-0": "firstblock", "taylorseer-1": "taylorseer",
    "diffusers-cache-0": "diffusers-cache",
}  # fmt: skip
FAMILIES_ALIKE = {"ddim": "ddpm", "pixart_alpha": "pixart", "cogvideox15": "cogvideox", "wan5b": "wan22"}


def cell(method: str, contract: str, family: str) -> Any:
    is_slow = family not in QUICKLY or (contract == "compiled" and family != "flux")
    is_slow |= family == "sd" and contract in ("lora_after", "lora_swapped", "lora_fused")
    if method != "scheduler":
        is_slow = family != "flux" or contract not in QUICK or (method in ALIKE and contract == "generators")
    return pytest.param(
        method, contract, family, id=f"{method}-{contract}-{family}", marks=[pytest.mark.slow] * is_slow
    )


def is_shown(method: str, contract: str, family: str) -> bool:
    """Return whether a cell is a test here."""
    if method == "scheduler":
        return contract in QUICK or family not in FAMILIES_ALIKE
    if method in ALIKE:
        return contract in QUICK and family == "flux"
    if method in COMPILED_ALIKE and contract == "compiled":
        return False
    return family in SOME[: 3 if contract in QUICK else 1]


def cells(methods: dict[str, Any], contracts: dict[str, Any], refuses: dict[str, dict[str, str]]) -> list[Any]:
    names = [name for name in itertools.product(methods, contracts, matrix.FAMILIES) if is_shown(*name)]
    return [cell(*name) for name in names if name[2] not in refuses.get(name[0], {})]


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


def test_what_is_left_out_is_like_what_is_shown() -> None:
    names = [*matrix.METHODS, *self_contracts.CHANGING]
    assert {*ALIKE, *ALIKE.values()} <= {*names} and not {*ALIKE} & {*ALIKE.values()}
    methods = matrix.METHODS | self_contracts.CHANGING
    assert all(methods[one].touches == methods[other].touches for one, other in ALIKE.items())
    assert all(type(methods[one]) is type(methods[other]) for one, other in COMPILED_ALIKE.items())
    networks = {name: type(Case(name, None).network(Case(name, None).make())) for name in
                {*FAMILIES_ALIKE, *FAMILIES_ALIKE.values()}}  # fmt: skip
    assert all(networks[one] is networks[other] for one, other in FAMILIES_ALIKE.items())


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
