"""Temporal features of a quantized temporal information block (TFMQ-DM, arXiv 2311.16503 and 2407.19547).

The block alone is reconstructed against its own features in full precision, over the timesteps that are used (TIAR),
and every activation inside of it has a scale and a zero point for each timestep, by its smallest and largest value
there (finite-set calibration). Beside it, features can be kept as codes of their own, made in full precision (cache).
Of both, each feature takes the one with the smaller mean error ``|F_q(t) - F(t)| / |F(t)|`` (disturbance-aware
selection).

After the learned rounding of all layers together, single codes are flipped layer after layer while that lowers the
layer's own error on its quantized inputs: few timesteps leave most of the weights free to make up for each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffaccel.modules.temporal.program import Fetch, Program
from diffaccel.quant.learned_rounding import SoftRounding, nearest
from diffaccel.training.steps import backward, differentiable_attention

Method = Literal["auto", "tiar", "cache", "nearest"]
Features = list[dict[int, Tensor]]
Revise = Callable[[int, Tensor], Tensor]

BATCH = 4  # timesteps of one iteration
RATE = 5e-2
PENALTY_FROM, PENALTY_TO = 0.01, 1000.0  # of the first loss, for each weight
FIRST, LAST = 20.0, 2.0  # exponents of the penalty, annealed; none in the first fifth
PRODUCTS = ("aten::addmm", "aten::mm", "aten::linear", "aten::matmul", "aten::bmm")

logger = logging.getLogger(__name__)


def affine_codes(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return ``s (clip(round(x / s) + z, 0, 2^b - 1) - z)`` for the range from ``low`` to ``high``, which holds 0."""
    low, high, levels = low.clamp(max=0).float(), high.clamp(min=0).float(), 2**bits - 1
    scale = ((high - low) / levels).clamp_min(1e-12)
    zero = (-low / scale).round()
    codes = ((x.float() / scale).round() + zero).clamp(0, levels)
    return ((codes - zero) * scale).to(x.dtype)


def straight_through(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return :func:`affine_codes` with the gradient of ``x``."""
    return x + (affine_codes(x, low, high, bits) - x).detach()


@dataclass(frozen=True)
class FeatureError:
    """Errors of quantized features against those in full precision.

    Attributes:
        mean, largest: of ``|F_q(t) - F(t)| / |F(t)|`` over features and timesteps.
        confused: share of features and timesteps whose nearest feature in full precision is another timestep's.
        by_feature: mean over the timesteps, by number.
    """

    mean: float
    largest: float
    confused: float
    by_feature: dict[int, float]


@torch.no_grad()
def feature_error(exact: Features, other: Features) -> FeatureError:
    """Compare features over timesteps."""
    by_feature, errors, confused = {}, [], []
    for number in exact[0]:
        rows = torch.stack([values[number].float().flatten() for values in exact])
        others = torch.stack([values[number].float().flatten() for values in other])
        error = (others - rows).norm(dim=1) / rows.norm(dim=1).clamp_min(1e-12)
        by_feature[number] = float(error.mean())
        errors.append(error)
        nearest_time = torch.cdist(others, rows, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
        confused.append((nearest_time != torch.arange(len(rows), device=rows.device)).float())
    together, apart = torch.cat(errors), torch.cat(confused)
    return FeatureError(float(together.mean()), float(together.max()), float(apart.mean()), by_feature)


class TemporalQuantizer:
    """Makes quantized temporal features of one network.

    Args:
        bits: of weights; act_bits: of activations and of features that are kept as codes.
        method: "tiar", "cache", the better of both for each feature ("auto"), or round-to-nearest weights with one
            range of each activation for all timesteps ("nearest"), the form to compare with.
        iterations: of Adam.

    Attributes:
        errors: of each method, after the first calibration.
        chosen: number of features from each method.
        losses: mean loss of each tenth of the iterations.
    """

    def __init__(self, bits: int, act_bits: int, method: Method, iterations: int) -> None:
        self.bits, self.act_bits, self.method, self.iterations = bits, act_bits, method, iterations
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies have: no calibration, which is that of this network's weights."""
        names = ("bits", "act_bits", "method", "iterations")
        return {name: vars(self)[name] for name in names}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)
        self.forget()

    def forget(self) -> None:
        """Forget the calibration; the next features make another."""
        self.errors: dict[str, FeatureError] = {}
        self.losses: list[float] = []
        self._weights: dict[int, Tensor] = {}
        self._cached: frozenset[int] = frozenset()
        self._ranges: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def chosen(self) -> dict[str, int]:
        total = len(next(iter(self.errors.values())).by_feature) if self.errors else 0
        return {
            "cache": len(self._cached),
            self.method if self.method == "nearest" else "tiar": total - len(self._cached),
        }

    def features(
        self, program: Program, tensors: dict[str, Tensor], times: Sequence[Tensor], device: torch.device, fetch: Fetch
    ) -> Features:
        """Return the features at each timestep; the first call calibrates on its timesteps."""
        exact = program.evaluate(tensors, times, device, fetch)
        if not self._weights:
            self._calibrate(program, tensors, times, device, fetch, exact)
        if self.method == "cache":
            return [self._codes(values) for values in exact]
        online = self._online(program, tensors, times, device, fetch)
        mixed = []
        for kept, made in zip(exact, online, strict=True):
            codes = self._codes({number: kept[number] for number in self._cached})
            mixed.append({number: codes.get(number, value) for number, value in made.items()})
        return mixed

    def _calibrate(
        self, program: Program, tensors: dict[str, Tensor], times: Sequence[Tensor], device: torch.device, fetch: Fetch,
        exact: Features,
    ) -> None:  # fmt: skip
        inputs = _activations(program)
        weights = {id(w): fetch(w, device) for w in _weights(program)}
        self._ranges = _ranges(program, tensors, times, device, fetch, inputs)
        self._weights = {key: nearest(weight, self.bits) for key, weight in weights.items()}
        at_first, method = dict(self._weights), self.method
        self.method = "nearest"
        self.errors["nearest"] = feature_error(exact, self._online(program, tensors, times, device, fetch))
        self.method = method
        self.errors["cache"] = feature_error(exact, [self._codes(values) for values in exact])
        if method in ("auto", "tiar"):
            self._reconstruct(program, tensors, times, device, fetch, exact, weights)
            tiar = self._online(program, tensors, times, device, fetch)
            self.errors["tiar"] = feature_error(exact, tiar)
            self._cached = self._select() if method == "auto" else frozenset()
        else:
            self._weights = at_first
            self._cached = frozenset(exact[0]) if method == "cache" else frozenset()
        logger.info("tib: mean error of temporal features %s", {k: round(e.mean, 5) for k, e in self.errors.items()})

    def _select(self) -> frozenset[int]:
        cache, tiar = self.errors["cache"].by_feature, self.errors["tiar"].by_feature
        return frozenset(number for number in cache if cache[number] < tiar[number])

    def _online(
        self, program: Program, tensors: dict[str, Tensor], times: Sequence[Tensor], device: torch.device, fetch: Fetch
    ) -> Features:
        """Return features as the quantized block computes them."""

        def quantized(weight: Tensor, where: torch.device) -> Tensor:
            return self._weights[id(weight)] if id(weight) in self._weights else fetch(weight, where)

        return program.evaluate(tensors, times, device, quantized, self._revise(_activations(program)))

    def _revise(self, inputs: set[int]) -> Revise:
        def revise(number: int, value: Tensor) -> Tensor:
            if number not in inputs:
                return value
            low, high = self._ranges[number] if self.method == "nearest" else (value.amin(), value.amax())
            return straight_through(value, low.detach(), high.detach(), self.act_bits)

        return revise

    def _codes(self, values: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return features as codes of their own range, one for each feature and timestep, dequantized."""
        return {n: affine_codes(value, value.amin(), value.amax(), self.act_bits) for n, value in values.items()}

    def _reconstruct(
        self, program: Program, tensors: dict[str, Tensor], times: Sequence[Tensor], device: torch.device, fetch: Fetch,
        exact: Features, weights: dict[int, Tensor],
    ) -> None:  # fmt: skip
        """Learn the rounding of all weights of the block together, against its features in full precision."""
        with torch.inference_mode(False), torch.enable_grad(), differentiable_attention():
            rounding = {key: SoftRounding(weight.clone(), self.bits) for key, weight in weights.items()}
            targets = [{n: value.clone() for n, value in values.items()} for values in exact]
            own = {place: tensor.clone() for place, tensor in tensors.items()}
            optimizer = torch.optim.Adam([r.variable for r in rounding.values()], lr=RATE)
            draw = torch.Generator("cpu").manual_seed(0)
            losses, soft = [], dict[int, Tensor]()

            def rounded(weight: Tensor, where: torch.device) -> Tensor:
                return soft[id(weight)] if id(weight) in soft else fetch(weight, where).clone()

            revise = self._revise(_activations(program))
            for step in range(self.iterations):
                soft.update((key, r.soft()) for key, r in rounding.items())
                picks = torch.randint(len(times), (min(BATCH, len(times)),), generator=draw, device="cpu").tolist()
                made = program.evaluate(own, [times[i].clone() for i in picks], device, rounded, revise)
                errors = [
                    (values[number] - targets[i][number]).float().square().sum()
                    for values, i in zip(made, picks, strict=True)
                    for number in values
                ]
                loss = torch.stack(errors).sum() / len(picks)
                losses.append(float(loss))
                unit = max(losses[0], 1e-12) / sum(r.variable.numel() for r in rounding.values())
                progress = (step / self.iterations - 0.2) / 0.8
                if progress >= 0:
                    beta = LAST + (FIRST - LAST) * (1 - progress)
                    weight = unit * PENALTY_FROM * (PENALTY_TO / PENALTY_FROM) ** progress
                    loss = loss + weight * sum(r.penalty(beta) for r in rounding.values())
                optimizer.zero_grad()
                backward(loss)
                optimizer.step()
            tenth = max(1, self.iterations // 10)
            self.losses = [
                sum(part) / len(part) for i in range(0, len(losses), tenth) if (part := losses[i : i + tenth])
            ]
        self._weights = {key: r.hard() for key, r in rounding.items()}
        self._descend(program, tensors, times, device, fetch, rounding)

    def _descend(
        self, program: Program, tensors: dict[str, Tensor], times: Sequence[Tensor], device: torch.device, fetch: Fetch,
        rounding: dict[int, SoftRounding],
    ) -> None:  # fmt: skip
        """Flip single codes, layer after layer, each on the quantized inputs that the layers before it give."""
        products = _products(program)
        exact = _recorded(program, tensors, times, device, fetch, {p.output for p in products}, None)

        def quantized(weight: Tensor, where: torch.device) -> Tensor:
            return self._weights[id(weight)] if id(weight) in self._weights else fetch(weight, where)

        revise = self._revise(_activations(program))
        for product in products:
            numbers = {product.input, product.output}
            values = _recorded(program, tensors, times, device, quantized, numbers, revise)
            residual = values[product.output].float() - exact[product.output].float()
            rounding[id(product.weight)].descend(values[product.input], residual)
            self._weights[id(product.weight)] = rounding[id(product.weight)].hard()

    def report(self) -> dict[str, Any]:
        """Return errors and choices; JSON-ready."""
        errors = {
            name: {"mean": e.mean, "largest": e.largest, "confused": e.confused} for name, e in self.errors.items()
        }
        return {"bits": self.bits, "act_bits": self.act_bits, "features": self.chosen, "errors": errors}


def _activations(program: Program) -> set[int]:
    """Return the numbers of the values that products with a quantized weight read."""
    derived = _derived_weights(program)
    return {
        number
        for operation in program.operations
        if operation.name in PRODUCTS and any(n in derived for n in operation.inputs)
        for number in operation.inputs
        if number in program.varying and number in _after_products(program)
    }


def _derived_weights(program: Program) -> set[int]:
    """Return the numbers of matrices and of their transposes."""
    matrices = {n for n, source in program.sources.items() if isinstance(source, Tensor) and source.ndim == 2}
    for operation in program.operations:
        if len(operation.inputs) == 1 and operation.inputs[0] in matrices:
            matrices.update(operation.results)
    return matrices


def _after_products(program: Program) -> set[int]:
    """Return the numbers of values that a product lies before: the first linear of an embedder stays as it is."""
    after: set[int] = set()
    for operation in program.operations:
        is_product = operation.name in PRODUCTS
        if is_product or after.intersection(operation.inputs):
            after.update(operation.results)
    return after


@dataclass(frozen=True, eq=False)
class Product:
    """A product of activations with a matrix: the numbers of its input and output, and the matrix ``(N, K)``."""

    input: int
    output: int
    weight: Tensor


def _products(program: Program) -> list[Product]:
    """Return the products whose activations are quantized, in order."""
    activations, origin = _activations(program), dict[int, Tensor]()
    for number, source in program.sources.items():
        if isinstance(source, Tensor) and source.ndim == 2:
            origin[number] = source
    for operation in program.operations:
        if len(operation.inputs) == 1 and operation.inputs[0] in origin:
            origin |= dict.fromkeys(operation.results, origin[operation.inputs[0]])
    return [
        Product(next(iter(activations.intersection(operation.inputs))), operation.results[0], origin[matrix])
        for operation in program.operations
        if operation.name in PRODUCTS and activations.intersection(operation.inputs)
        for matrix in [n for n in operation.inputs if n in origin][:1]
    ]


def _weights(program: Program) -> list[Tensor]:
    """Return the matrices of the products whose activations are quantized."""
    return list({id(product.weight): product.weight for product in _products(program)}.values())


def _recorded(
    program: Program, tensors: dict[str, Tensor], times: Sequence[Tensor], device: torch.device, fetch: Fetch,
    numbers: set[int], revise: Revise | None,
) -> dict[int, Tensor]:  # fmt: skip
    """Return values at all timesteps, their rows one below the other, by number."""
    rows: dict[int, list[Tensor]] = {number: [] for number in numbers}

    def note(number: int, value: Tensor) -> Tensor:
        value = value if revise is None else revise(number, value)
        if number in rows:
            rows[number].append(value.detach().reshape(-1, value.shape[-1]))
        return value

    program.evaluate(tensors, times, device, fetch, note)
    return {number: torch.cat(parts) for number, parts in rows.items()}


def _ranges(
    program: Program, tensors: dict[str, Tensor], times: Sequence[Tensor], device: torch.device, fetch: Fetch,
    inputs: set[int],
) -> dict[int, tuple[Tensor, Tensor]]:  # fmt: skip
    """Return the smallest and largest value of each activation over all timesteps."""
    ranges: dict[int, tuple[Tensor, Tensor]] = {}

    def note(number: int, value: Tensor) -> Tensor:
        if number in inputs:
            low, high = ranges.get(number, (value.amin(), value.amax()))
            ranges[number] = torch.minimum(low, value.amin()), torch.maximum(high, value.amax())
        return value

    program.evaluate(tensors, times, device, fetch, note)
    return ranges
