"""Modulation of low rank for any timestep: where a network's modulation depends on the timestep alone, it is a curve.

The input ``u(t) = SiLU(h_t)`` of every such linear lies near a space of few dimensions: ``u(t) = c(t) B`` with
orthonormal rows ``B (r, D)``, from the singular vectors of ``u`` at Chebyshev nodes of t and at the schedule's
timesteps. Then ``W u + b = (W B^T) c + b``, and ``W B^T (N, r)`` takes the place of ``W (N, D)``. SiLU after a sum with
pooled text, guidance or a class leaves no such curve: there, tables are the way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.families.facts import facts_of
from diffaccel.modules.temporal.arguments import CallArguments
from diffaccel.modules.temporal.places import PLACE, give_back, take
from diffaccel.modules.temporal.program import Program, numbers_in, operations_for, program_of
from diffaccel.modules.temporal.trace import CallTrace, watch

NODES = 257
RANDOM_TIMES = 1024
RANKS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
DEPENDS = {  # on what else the modulation of a network depends
    "FluxTransformer2DModel": "pooled text and guidance",
    "SD3Transformer2DModel": "pooled text",
    "HunyuanVideoTransformer3DModel": "pooled text and guidance",
    "DiTTransformer2DModel": "the class",
}

logger = logging.getLogger(__name__)


class LowRankLinear(nn.Module):
    """``y = (x B^T) W'^T + b`` in float32, for inputs on the curve; casts leave it in float32."""

    def __init__(self, linear: nn.Linear, basis: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        folded = (linear.weight.detach().double() @ basis.double().T).float()
        self.register_buffer("basis", basis.float(), persistent=False)  # (r, D)
        self.register_buffer("folded", folded, persistent=False)  # (N, r)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the modulation for ``x (..., D)``, in its dtype."""
        c = F.linear(x.float(), self.basis)  # type: ignore[arg-type]
        return F.linear(c, self.folded, self.bias).to(x.dtype)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer[:0]).device)
        return self


@dataclass(frozen=True)
class Bound:
    """The largest error of low-rank modulation over a dense grid of timesteps.

    Attributes:
        ulps: in units in the last place of bfloat16 at each feature's largest magnitude over all timesteps.
        relative: ``|exact - low rank| / |exact|`` of a linear's output at one timestep.
    """

    ulps: float
    relative: float


class LowRankModulation:
    """The low-rank modulation of one network, made in its first call; its weights are then those of that moment."""

    def __init__(self, network: nn.Module, rank: int, timesteps: Callable[[], Tensor | None]) -> None:
        if (name := type(network).__name__) in DEPENDS:
            raise _refusal(name, DEPENDS[name])
        self.network, self.rank, self.timesteps = network, rank, timesteps
        self.originals: dict[str, nn.Linear] = {}
        self.bound: Bound | None = None
        self.one_ulp_at: int | None = None

    def install(self) -> None:
        """Watch the network's next call."""
        take(self.network, self, is_network=True)

    def remove(self) -> None:
        """Put all linears back; may be called twice."""
        self.let_go(True)
        place = vars(self.network).get(PLACE)
        if place is not None and place.owner is self:
            give_back(self.network)

    def let_go(self, forget: bool) -> None:
        """Put the linears back; the next call makes low-rank ones again."""
        for name, linear in self.originals.items():
            parent, _, attribute = name.rpartition(".")
            replaced = self.network.get_submodule(name)
            setattr(self.network.get_submodule(parent), attribute, linear.to(replaced.basis.device))  # type: ignore
        self.originals = {}

    def forget_if_changed(self) -> None:
        """Do nothing: the linears are made again at the next call."""

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the network; the first one makes the low-rank linears, and has them too.

        Raises:
            DiffAccelError: for a network whose modulation depends on more than the timestep.
        """
        original: Any = vars(self.network)[PLACE].original
        if not self.originals and not torch.is_grad_enabled():
            call = CallArguments.of(self.network, args, kwargs)
            trace, _ = watch(self.network, call, lambda: original.__call__(self.network, *args, **kwargs))
            self._fold_linears(trace, call)
        return original.__call__(self.network, *args, **kwargs)

    def _fold_linears(self, trace: CallTrace, call: CallArguments) -> None:
        name = type(self.network).__name__
        program = program_of(trace, call)
        if isinstance(program, str):
            raise DiffAccelError(f"'tib' with a rank finds no modulation in {name}: {program}. Leave out the rank.")
        if program.conditions:
            raise _refusal(name, " and ".join(program.conditions))
        if call.tensors[program.time].ndim > 1:
            raise _refusal(name, "the place of a token, whose timesteps differ")
        linears = _last_linears(self.network, trace, program)
        curve = _Curve(trace, program, call, {number for number, _ in linears.values()})
        bases = curve.bases(self._nodes(call.tensors[program.time]))
        dense = self._dense(call.tensors[program.time])
        inputs = curve.inputs(dense)
        rank = min(self.rank, min(len(basis) for basis in bases.values()))
        self.bound = _bound(linears, inputs, bases, rank)
        ranks = sorted({rank, *(r for r in RANKS if r <= min(len(basis) for basis in bases.values()))})
        self.one_ulp_at = next((r for r in ranks if _bound(linears, inputs, bases, r).ulps <= 1), None)
        logger.info(
            f"tib: {len(linears)} linears of {name} at rank {rank}, error at most {self.bound.ulps:.3g} ulp of "
            f"bfloat16, {self.bound.relative:.2g} relative"
        )
        for place, (number, linear) in linears.items():
            parent, _, attribute = place.rpartition(".")
            low = LowRankLinear(linear, bases[number][:rank]).train(linear.training)
            setattr(self.network.get_submodule(parent), attribute, low)
            self.originals[place] = linear.to("cpu")

    def _nodes(self, time: Tensor) -> list[float]:
        low, high = self._range()
        nodes = [math.cos(math.pi * (i + 0.5) / NODES) for i in range(NODES)]
        return [low + (high - low) * (node + 1) / 2 for node in nodes] + self._scheduled()

    def _dense(self, time: Tensor) -> list[float]:
        low, high = self._range()
        draw = torch.Generator("cpu").manual_seed(0)
        random = torch.rand(RANDOM_TIMES, generator=draw, dtype=torch.float64, device="cpu")
        even = torch.linspace(0, 1, 1001, dtype=torch.float64, device="cpu")
        return (low + (high - low) * torch.cat([even, random])).tolist() + self._scheduled()

    def _range(self) -> tuple[float, float]:
        try:
            return facts_of(self.network).timestep_range
        except DiffAccelError:
            return 0.0, 1000.0

    def _scheduled(self) -> list[float]:
        timesteps = self.timesteps()
        low, high = self._range()
        return [] if timesteps is None else [float(t) for t in timesteps if low <= float(t) <= high]

    def report(self) -> dict[str, Any]:
        """Return rank and bound; JSON-ready."""
        bound = {} if self.bound is None else {"ulps": self.bound.ulps, "relative": self.bound.relative}
        network = type(self.network).__name__
        return {
            "network": network,
            "rank": self.rank,
            "linears": len(self.originals),
            **bound,
            "one_ulp_at": self.one_ulp_at,
        }


class _Curve:
    """The inputs of linears as functions of the timestep."""

    def __init__(self, trace: CallTrace, program: Program, call: CallArguments, numbers: set[int]) -> None:
        self._program = operations_for(trace, program.time, sorted(numbers), {})
        self._call, self._time = call, call.tensors[program.time]

    def inputs(self, times: list[float]) -> dict[int, Tensor]:
        """Return the inputs at times, one row each, fp64 ``(T, D)``, by number."""
        tensors = [torch.full_like(self._time, time) for time in times]
        device = self._time.device
        values = self._program.evaluate(self._call.tensors, tensors, device, lambda weight, _: weight)
        return {
            number: torch.stack([at[number].reshape(-1, at[number].shape[-1])[0] for at in values]).double()
            for number in self._program.features
        }

    def bases(self, times: list[float]) -> dict[int, Tensor]:
        """Return orthonormal rows ``(min(T, D), D)`` by falling share of the inputs at times, by number."""
        return {n: torch.linalg.svd(u, full_matrices=False).Vh for n, u in self.inputs(times).items()}


def _last_linears(network: nn.Module, trace: CallTrace, program: Program) -> dict[str, tuple[int, nn.Linear]]:
    """Return the temporal linears whose output no other temporal linear reads: their name, input and module."""
    temporal = {
        name: (trace.calls[name], module)
        for name, module in network.named_modules()
        if type(module) is nn.Linear and _is_within(name, program) and trace.calls[name].inputs
    }
    producers = {operation.results: operation.inputs for operation in program.operations}
    read: set[int] = set()
    for calls, _ in temporal.values():
        read |= _ancestors(calls.inputs[0], producers)
    return {
        name: (calls.inputs[0], module)
        for name, (calls, module) in temporal.items()
        if calls.inputs[0] is not None and not read.intersection(numbers_in(calls.results[0]))
    }


def _is_within(name: str, program: Program) -> bool:
    return any(name == outer or name.startswith(outer + ".") for outer in program.modules)


def _ancestors(number: int | None, producers: dict[tuple[int, ...], tuple[int, ...]]) -> set[int]:
    found, waiting = set[int](), [] if number is None else [number]
    by_result = {result: inputs for results, inputs in producers.items() for result in results}
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += by_result.get(current, ())
    return found


def _bound(
    linears: dict[str, tuple[int, nn.Linear]], inputs: dict[int, Tensor], bases: dict[int, Tensor], rank: int
) -> Bound:
    """Return the largest error of all linears at the inputs, before results are rounded to their dtype."""
    ulps = relative = 0.0
    for number, linear in linears.values():
        bias = 0.0 if linear.bias is None else linear.bias.detach().double()
        exact = inputs[number] @ linear.weight.detach().double().T + bias
        low = LowRankLinear(linear, bases[number][:rank])
        error = (low(inputs[number].float()).double() - exact).abs()
        largest = exact.abs().amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        unit = torch.exp2(torch.floor(torch.log2(largest)) - 7)  # bfloat16 has 8 significant bits
        ulps = max(ulps, float((error / unit).max()))
        norm = exact.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        relative = max(relative, float((error.norm(dim=1) / norm).max()))
    return Bound(ulps, relative)


def _refusal(network: str, depends: str) -> DiffAccelError:
    return DiffAccelError(
        f"The modulation of {network} depends on {depends} beside the timestep, so that no low rank serves all of it. "
        "Use the exact tables, TIB() without a rank, which are equal to the bit."
    )
