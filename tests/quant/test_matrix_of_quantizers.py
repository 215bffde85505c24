"""What users do besides calling a pipeline, on quantized networks: loops compose with them, adapters in every order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import matrix
import mixdq_bed
import pytest
import self_contracts
import torch
from matrix import with_lora

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.families import networks
from diffaccel.quant import W4A8, W4A16, W8A8, QVGen
from diffaccel.quant.swap import quantize_networks
from diffaccel.samplers import Scheduler

FAMILIES = ("flux", "sd")  # scripts/contract_matrix.py runs all
ORDERS = ("flux", pytest.param("sd", marks=pytest.mark.slow), pytest.param("wan", marks=pytest.mark.slow))
CONTRACTS = [name for name in matrix.CONTRACTS if name not in ("lora_fused", "bfloat16")]
METHODS = {
    "w8a8": W8A8(),
    "w8a8-fp8": W8A8(dtype="fp8"),
    "w4a16": W4A16(),
    "w4a8": W4A8(),
    "mixdq": None,  # with a plan of the family
    "mixdq-static": None,
    "qvgen": QVGen(),
    "qvgen-rank": QVGen(weight_bits=3, act_bits=8, keep_rank=4, dense=True),
}


def method_of(name: str, family: str) -> Any:
    if METHODS[name] is not None:
        return METHODS[name]
    return mixdq_bed.uniform(family, activation_scale="tensor" if name.endswith("static") else "token", weight_bits=4.0)


MANY = ["w8a8", *(pytest.param(name, marks=pytest.mark.slow) for name in list(METHODS)[1:])]


@dataclass
class QuantizedCase(matrix.Case):
    """A case whose pipelines have quantized networks to begin with; the method is a loop on them."""

    quantizer: Any = None

    @property
    def close(self) -> dict[str, float]:
        """A sum of another order may take an activation of 4 bits to its next code."""
        return {"rtol": 1e-2, "atol": 1e-2} if self.quantizer.name == "qvgen" else super().close

    def make(self, place: bool = True) -> Any:
        pipe = super().make(place)
        quantize_networks(networks(pipe), self.quantizer)
        return pipe


def run(contract: str, case: matrix.Case) -> None:
    try:
        matrix.CONTRACTS[contract](case)
    except matrix.NotHere as reason:
        pytest.skip(str(reason))


def cells() -> list[Any]:
    """Return the contracts of one quantizer of each class of layers; of the others those that their format can break.

    Adapters on all of them are below. The others' networks are compiled in one family: their layers alone, convolutions
    too, are in ``test_layers.py``.
    """
    shown = []
    for family, quantizer, contract in itertools.product(FAMILIES, METHODS, CONTRACTS):
        is_shown = contract in ("stock", "batch") or (contract == "compiled" and family == "flux")
        if is_shown or quantizer in ("w8a8", "mixdq", "qvgen-rank"):
            is_fast = quantizer == "w8a8" and contract != "compiled" and (family == "flux" or contract == "stock")
            shown.append(pytest.param(family, quantizer, contract, marks=[pytest.mark.slow] * (not is_fast)))
    return shown


@pytest.mark.parametrize(("family", "quantizer", "contract"), cells())
def test_a_loop_on_quantized_networks(family: str, quantizer: str, contract: str) -> None:
    run(contract, QuantizedCase(family, Scheduler(), quantizer=method_of(quantizer, family)))


@pytest.mark.parametrize("name", ("w8a8", pytest.param("mixdq-static", marks=pytest.mark.slow)))
def test_a_row_of_the_contract_matrix(name: str) -> None:
    case = matrix.Case("flux", self_contracts.QUANTIZERS[name]("flux"))
    self_contracts.stock(case)
    with pytest.raises(matrix.NotHere, match="Fuse before quantizing"):
        self_contracts.fusing_refused(case)


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", MANY)
@pytest.mark.parametrize("family", ORDERS)
def test_adapters_before_after_swapped_and_unloaded(family: str, quantizer: str) -> None:
    case = matrix.Case(family, method_of(quantizer, family))
    stock = case.call(plain := with_lora(case, case.make(), "one", 1))
    before = case.wrap(with_lora(case, case.make(), "one", 1))
    after = with_lora(case, case.wrap(case.make()), "one", 1)
    expected = case.call(before)
    assert torch.equal(case.call(after), expected) and not torch.equal(expected, case.call(case.wrap(case.make())))
    for pipe in (before, after):
        with_lora(case, pipe, "two", 2)
        pipe.set_adapters(["two"])
    swapped = case.call(before)
    assert torch.equal(case.call(after), swapped) and not torch.equal(swapped, expected)
    before.set_adapters(["one"])
    assert torch.equal(case.call(before), expected)
    diffaccel.remove(before)  # the adapters stay
    assert torch.equal(case.call(before), stock)
    after.unload_lora_weights()
    assert torch.equal(case.call(after), case.call(case.wrap(case.make())))
    diffaccel.remove(after)
    plain.unload_lora_weights()
    assert torch.equal(case.call(after), case.call(plain))


@pytest.mark.parametrize("family", ORDERS)
def test_fusing_is_refused_before_anything_changes(family: str) -> None:
    case = matrix.Case(family, W8A8())
    pipe = case.wrap(with_lora(case, case.make(), "one", 1))
    expected = case.call(pipe)
    with pytest.raises(DiffAccelError, match="Fuse before quantizing"):
        pipe.fuse_lora()
    pipe.unfuse_lora()  # nothing is fused
    assert torch.equal(case.call(pipe), expected)
    fused = with_lora(case, case.make(), "one", 1)
    fused.fuse_lora()
    merged = case.call(fused)
    close = case.call(case.wrap(fused))
    assert float((close - merged).norm() / merged.norm()) < 0.25 and not torch.equal(close, merged)
    with pytest.raises(DiffAccelError, match="Fuse before quantizing"):
        fused.unfuse_lora()
    assert torch.equal(case.call(diffaccel.remove(fused)), merged)
    fused.unfuse_lora()  # after removal it is the network's own again


@pytest.mark.slow
def test_adapters_on_a_loaded_model_and_in_its_dtype(tmp_path) -> None:
    case = matrix.Case("flux", W8A8())
    case.wrap(case.make().to(torch.bfloat16)).save_pretrained(tmp_path)
    pipe = type(case.make()).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    other = with_lora(case, case.wrap(case.make().to(torch.bfloat16)), "one", 1)
    with_lora(case, pipe, "one", 1)
    assert torch.equal(case.call(pipe), case.call(other))
    with pytest.raises(DiffAccelError, match="Fuse before quantizing"):
        pipe.fuse_lora()
    adapters = [p for name, p in pipe.transformer.named_parameters() if "lora_" in name]
    assert adapters and {p.dtype for p in adapters} == {torch.bfloat16}


def test_adapters_can_be_trained_on_quantized_weights() -> None:
    from peft import LoraConfig

    network = matrix.Case("flux", None).make().transformer
    quantize_networks([network], W8A8())
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    trained = [p for p in network.parameters() if p.requires_grad and p.is_floating_point()]
    codes = {name: p.clone() for name, p in network.named_parameters() if "base_layer" in name}
    draws = torch.Generator().manual_seed(0)
    side = network.config.in_channels
    inputs = {
        "hidden_states": torch.randn(1, 16, side, generator=draws),
        "encoder_hidden_states": torch.randn(1, 8, network.config.joint_attention_dim, generator=draws),
        "pooled_projections": torch.randn(1, network.config.pooled_projection_dim, generator=draws),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3), "return_dict": False,
    }  # fmt: skip
    optimizer = torch.optim.SGD(trained, lr=10.0)
    losses = []
    for _ in range(6):
        loss = network(**inputs)[0].square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, codes[name]) for name, p in network.named_parameters() if name in codes)
