"""Block after block, the rounding of a quantized network is learned against the blocks of the exact one.

For the linears of a block together, ``|B_q(x_q) - B(x)|^2`` is lowered over calls of the network, ``x_q`` being what
the blocks before it give with their rounding as it was learned, and ``x`` what the exact network gives the block. Soft
shares harden by the penalty of AdaRound (arXiv 2004.10568), whose weight grows from 0.01 to 1000 of the
error of round-to-nearest.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.families.facts import facts_of
from diffaccel.quant.linear import QLinear
from diffaccel.quant.options import QuantizationOptions
from diffaccel.quant.reconstruction.calls import Call, block_calls, block_outputs, copied, tensors_of
from diffaccel.quant.reconstruction.layer import LEARNED, LearnedLinear
from diffaccel.quant.swap import QuantizedNetworks, quantize_networks
from diffaccel.training.steps import backward, differentiable_attention

RATE = 1e-2
PENALTY_FROM, PENALTY_TO = 0.01, 1000.0  # of the error of round-to-nearest, for each weight
CALLS = 8  # whose rows single codes are flipped by
FIRST, LAST = 20.0, 2.0  # exponents of the penalty, annealed; none in the first fifth

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockReport:
    """Mean squared error of a block's outputs over that of the exact network's, by the sum of their squares.

    Attributes:
        nearest, learned: under round-to-nearest and the learned rounding, on the same inputs.
    """

    name: str
    layers: int
    nearest: float
    learned: float


def reconstruct(
    network: Any,
    config: QuantizationOptions,
    calls: Sequence[Call],
    *,
    iterations: int = 1000,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[QuantizedNetworks, list[BlockReport]]:
    """Quantize a network in place, and learn the rounding of its linears.

    Args:
        network: in full precision.
        config: ``W8A8()``, ``W4A8()`` or ``W4A16()``; scales are those that it takes without data.
        calls: of the network, as :func:`diffaccel.quant.reconstruction.calls.recording` keeps them.
        iterations: of Adam for each block, each on one call.
        tell: called with a line for each block.

    Returns:
        What takes the quantized layers off again, and a report for each block.

    Raises:
        DiffAccelError: without a call, for a network without blocks that are listed, a format whose codes are no whole
            numbers, and a loss that is not finite.
    """
    if not calls:
        raise DiffAccelError("No call of the network was recorded. Draw at least one picture while recording.")
    if iterations < 1:
        raise DiffAccelError(f"iterations is {iterations}; it must be 1 or more.")
    names = block_names(network)
    exact = copy.deepcopy(network).eval().requires_grad_(False)
    handle = quantize_networks([network], config)
    reports = []
    try:
        for name in names:
            report = _reconstruct_block(network, exact, name, calls, iterations, seed)
            if report is not None:
                reports.append(report)
                tell(f"{name}: {report.layers} layers, error {report.nearest:.2e} to {report.learned:.2e}")
        if not reports:
            raise DiffAccelError(
                f"'{config.name}' quantizes no linear of the {len(names)} blocks of {type(network).__name__} to whole "
                f"codes ({', '.join(LEARNED)}). Take W8A8(), W4A8() or W4A16()."
            )
    except BaseException:
        handle.remove()
        raise
    return handle, reports


def block_names(network: nn.Module) -> list[str]:
    """Return the names of a network's blocks, in the order in which they run.

    Raises:
        DiffAccelError: for a network that is not listed.
    """
    names = []
    for path in facts_of(network).blocks:
        part = getattr(network, path, None)
        if isinstance(part, nn.ModuleList):
            names += [f"{path}.{number}" for number in range(len(part))]
        elif part is not None:
            names.append(path)
    return names


def _reconstruct_block(
    network: nn.Module, exact: nn.Module, name: str, calls: Sequence[Call], iterations: int, seed: int
) -> BlockReport | None:
    """Learn the rounding of one block's linears; None where it has none."""
    block = network.get_submodule(name)
    quantized = {n: m for n, m in block.named_modules() if type(m) is QLinear and m.form.name in LEARNED}
    if not quantized:
        return None
    inputs = block_calls(network, block, calls)
    targets = block_outputs(exact, exact.get_submodule(name), calls)
    size = sum(float(t.float().square().sum()) for tensors in targets for t in tensors)
    nearest = _error(block, inputs, targets)
    own = exact.get_submodule(name)
    with torch.inference_mode(False), torch.enable_grad():
        learned = {n: LearnedLinear(layer, own.get_submodule(n).get_parameter("weight"))
                   for n, layer in quantized.items()}  # fmt: skip
        try:
            _swap(block, learned)
            learn_rounding(block, list(learned.values()), inputs, targets, iterations, seed)
        finally:
            _swap(block, {n: layer for n, layer in quantized.items()})
    for layer in learned.values():
        layer.finished()
    error = _error(block, inputs, targets)
    return BlockReport(name, len(quantized), nearest / max(size, 1e-30), error / max(size, 1e-30))


def learn_rounding(
    block: nn.Module,
    layers: Sequence[LearnedLinear],
    inputs: Sequence[Call],
    targets: Sequence[list[Tensor]],
    iterations: int,
    seed: int = 0,
) -> None:
    """Lower the squared error of a block's outputs over the rounding of its layers, which are hard in the end.

    Args:
        inputs: of the block, in each call.
        targets: its outputs, as lists of tensors.

    Raises:
        DiffAccelError: for a loss that is not finite.
    """
    variables = [layer.rounding.variable for layer in layers]
    optimizer = torch.optim.Adam(variables, lr=RATE)
    draw = torch.Generator("cpu").manual_seed(seed)
    for layer in layers:
        layer.is_hard = True
    nearest = _error(block, inputs, targets) / len(inputs)  # of a call; soft rounding begins at the weight, without one
    for layer in layers:
        layer.is_hard = False
    if not nearest < float("inf"):
        raise DiffAccelError(f"The error of a block is {nearest}: its outputs are not finite. Check model and calls.")
    unit = max(nearest, 1e-12) / sum(v.numel() for v in variables)
    for step in range(iterations):
        place = int(torch.randint(len(inputs), (1,), generator=draw, device="cpu"))
        args, kwargs = copied(inputs[place])
        with differentiable_attention():
            made = tensors_of(block(*args, **kwargs))
        loss = torch.stack(
            [(one.float() - other.float()).square().sum() for one, other in zip(made, targets[place], strict=True)]
        ).sum()
        progress = (step / iterations - 0.2) / 0.8
        if progress >= 0:
            beta = LAST + (FIRST - LAST) * (1 - progress)
            weight = unit * PENALTY_FROM * (PENALTY_TO / PENALTY_FROM) ** progress
            loss = loss + weight * torch.stack([layer.rounding.penalty(beta) for layer in layers]).sum()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    flip_codes(block, layers, inputs, targets)


@torch.no_grad()
def flip_codes(
    block: nn.Module, layers: Sequence[LearnedLinear], inputs: Sequence[Call], targets: Sequence[list[Tensor]]
) -> None:
    """Flip single codes of a layer while that lowers its own error, and keep it where the block's error falls too."""
    for layer in layers:
        layer.is_hard = True
    least = _error(block, inputs, targets)
    for layer in layers:
        before, layer.seen = layer.rounding.variable, []
        for call in inputs[:: max(1, len(inputs) // CALLS)]:
            args, kwargs = copied(call)
            block(*args, **kwargs)
        rows, layer.seen = torch.cat(layer.seen).float(), None
        layer.rounding.descend(rows, rows @ (layer.rounding.hard() - layer.rounding.weight).T)
        error = _error(block, inputs, targets)
        if error < least:
            least = error
        else:
            layer.rounding.variable = before


@torch.no_grad()
def _error(block: nn.Module, inputs: Sequence[Call], targets: Sequence[list[Tensor]]) -> float:
    total = 0.0
    for call, expected in zip(inputs, targets, strict=True):
        args, kwargs = copied(call)
        made = tensors_of(block(*args, **kwargs))
        total += sum(float((a.float() - b.float()).square().sum()) for a, b in zip(made, expected, strict=True))
    return total


def _swap(block: nn.Module, layers: dict[str, Any]) -> None:
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(parent) if parent else block, attribute, layer)
