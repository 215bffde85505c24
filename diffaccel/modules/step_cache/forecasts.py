"""Forecasts: weights of what was computed at earlier real steps, whose sum stands in for a skipped step.

Every forecast is linear in the features and its weights depend on the numbers of the steps alone. They are computed in
float64 on the host, and the features are summed in float32 on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Center = Literal["last", "none"]
Form = Literal["newton", "taylor"]


class Forecast:
    """Weights of the features of real steps.

    Attributes:
        needs: number of real steps without which there is no forecast.
        keeps: number of the latest real steps that it looks at.
    """

    needs: int = 1
    keeps: int = 1

    def weights(self, real: list[int], step: int, steps: int) -> list[float]:
        """Return one weight for each of the real steps ``real``, in their order, for a forecast at ``step``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Last(Forecast):
    """The latest real step's."""

    def weights(self, real: list[int], step: int, steps: int) -> list[float]:
        return [*[0.0] * (len(real) - 1), 1.0]


@dataclass(frozen=True)
class Differences(Forecast):
    """Extrapolation of order ``order`` from divided differences of the latest ``order + 1`` real steps.

    ``form="newton"`` is the polynomial through them, exact for polynomials of that degree at any spacing;
    ``form="taylor"`` the sum ``sum_k f_k (t - t_i)^k / k!`` with ``f_k`` the k-th difference over the latest spacing
    (arXiv 2503.06923). Both are linear extrapolation for order 1, and of a lower order until enough steps are known.
    """

    order: int = 1
    form: Form = "newton"

    @property
    def needs(self) -> int:  # type: ignore[override]
        return 1

    @property
    def keeps(self) -> int:  # type: ignore[override]
        return self.order + 1

    def weights(self, real: list[int], step: int, steps: int) -> list[float]:
        skipped = max(0, len(real) - self.keeps)
        times = np.array(real[skipped:], dtype=np.float64)
        rows = _lagrange(times, step) if self.form == "newton" else _taylor(times, step)
        return [*[0.0] * skipped, *rows.tolist()]


@dataclass(frozen=True)
class Chebyshev(Forecast):
    """Ridge regression on Chebyshev polynomials of the step, blended with linear extrapolation (arXiv 2603.01623).

    ``h(t) = blend x(tau) C + (1 - blend) h_lin(t)`` with ``C = (X^T X + ridge I)^-1 X^T H``, rows
    ``x(tau) = [T_0(tau) ... T_degree(tau)]`` and ``tau = 2 t / T - 1`` for ``T`` steps.

    Args:
        center: fit the differences to the latest real step's features, so that a constant is forecast exactly
            ("last"), or the features themselves, whose constant part the ridge shrinks too ("none", as published).
        window: number of the latest real steps that are fitted.
    """

    degree: int = 4
    ridge: float = 0.1
    blend: float = 1.0
    center: Center = "last"
    window: int = 16

    needs = 2

    @property
    def keeps(self) -> int:  # type: ignore[override]
        return self.window

    def weights(self, real: list[int], step: int, steps: int) -> list[float]:
        skipped = max(0, len(real) - self.window)
        times = np.array(real[skipped:], dtype=np.float64)
        design = self.basis(times, steps)
        target = self.basis(np.array([step], dtype=np.float64), steps)[0]
        # the least squares solution by the augmented matrix, which stays accurate for small ridges
        augmented = np.concatenate([design, np.sqrt(self.ridge) * np.eye(self.degree + 1)])
        fit = target @ np.linalg.pinv(augmented)[:, : len(times)]
        if self.center == "last":
            fit[-1] += 1.0 - fit.sum()
        linear = np.zeros(len(times))
        linear[-2:] = _lagrange(times[-2:], step)
        return [*[0.0] * skipped, *(self.blend * fit + (1.0 - self.blend) * linear).tolist()]

    def basis(self, times: np.ndarray, steps: int) -> np.ndarray:
        """Return ``T_0 ... T_degree`` of the steps ``times``, ``(len(times), degree + 1)``."""
        return np.polynomial.chebyshev.chebvander(2.0 * times / max(1, steps) - 1.0, self.degree)


def _lagrange(times: np.ndarray, step: float) -> np.ndarray:
    """Return the weights of the polynomial through ``times``, at ``step``."""
    weights = np.ones(len(times))
    for i, time in enumerate(times):
        others = np.delete(times, i)
        weights[i] = np.prod((step - others) / (time - others))
    return weights


def _taylor(times: np.ndarray, step: float) -> np.ndarray:
    """Return the weights of the Taylor sum at the last of ``times``.

    At each real step the difference of order ``k + 1`` is that of the differences of order ``k`` at this and at the
    real step before, over the spacing of both.
    """
    units = np.eye(len(times))
    factors = [units[0]]
    for i in range(1, len(times)):
        fresh = [units[i]]
        for before in factors:
            fresh.append((fresh[-1] - before) / (times[i] - times[i - 1]))
        factors = fresh
    distance, term, total = step - times[-1], 1.0, np.zeros(len(times))
    for order, factor in enumerate(factors):
        total += term * factor
        term *= distance / (order + 1)
    return total
