"""The rule by which a pipeline combines its network's predictions, fitted on random ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffaccel.families.generic.watching import NotIdentified

TOLERANCE = 1e-4
ELEMENTS = 2**20  # of a prediction in the fit, which more do not improve


@dataclass(frozen=True)
class GuidanceRule:
    """``guided = sign * (negative + scale * (positive - negative))``, classifier-free guidance (arXiv 2207.12598).

    Attributes:
        scale: None where there is one prediction only.
        sign: of the network's output; some networks are trained on ``x0 - eps``.
        positive: index of the positive prediction.
        around_positive: whether the pipeline computes ``positive + (scale - 1) (positive - negative)``.
        weighted: whether it computes ``scale positive - (scale - 1) negative``.
        exact: whether the rule equals the pipeline's to the bit.
    """

    scale: float | None
    sign: int
    positive: int = 0
    around_positive: bool = False
    weighted: bool = False
    exact: bool = True

    def combine(self, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        """Return the guided prediction; the sign was applied to both before."""
        if self.around_positive:
            return positive + (scale - 1) * (positive - negative)
        if self.weighted:
            return scale * positive - (scale - 1) * negative
        return negative + scale * (positive - negative)

    def __call__(self, predictions: list[Tensor]) -> Tensor:
        signed = [p if self.sign > 0 else -p for p in predictions]
        if self.scale is None:
            return signed[0]
        return self.combine(signed[1 - self.positive], signed[self.positive], self.scale)

    def check_count(self, count: int, step: int) -> None:
        """Raise when ``step`` has another number of predictions."""
        expected = 1 if self.scale is None else 2
        if count != expected:
            raise NotIdentified(f"it joins {expected} predictions at its first step and {count} at step {step}.")

    def check(self, predictions: list[Tensor], guided: Tensor, step: int) -> None:
        """Raise when the pipeline combined its predictions otherwise at ``step``."""
        residual = _residual(self(predictions), guided)
        if residual > TOLERANCE:
            weights = [round(weight, 4) for weight in _weights(predictions, guided)[0]]
            raise NotIdentified(
                f"its guidance changes from step to step: at step {step} its weights are {weights} (residual of the "
                f"first step's rule {residual:.1e})."
            )


def fit_guidance(predictions: list[Tensor], guided: Tensor) -> GuidanceRule:
    """Return the rule by which ``guided`` was computed from independent random ``predictions``.

    Raises:
        NotIdentified: for more than two predictions, and for rules that are no classifier-free guidance.
    """
    if any(p.shape != guided.shape for p in predictions):
        raise NotIdentified(
            f"its network's output has shape {tuple(predictions[0].shape)}, what it steps {tuple(guided.shape)}."
        )
    weights, residual = _weights(predictions, guided)
    fit = f"fitted weights {[round(weight, 4) for weight in weights]}, residual {residual:.1e}"
    if len(predictions) > 2:
        raise NotIdentified(
            f"it joins {len(predictions)} predictions a step (as perturbed or skip-layer guidance does; {fit})."
        )
    if residual > TOLERANCE:
        raise NotIdentified(f"its guidance is not linear: {_name_nonlinear(predictions, guided)} ({fit}).")
    total = sum(weights)
    if abs(abs(total) - 1) > TOLERANCE * max(1.0, *map(abs, weights)):
        raise NotIdentified(
            f"its guidance is not linear: the guided prediction is rescaled, as guidance_rescale does ({fit}, "
            f"sum {total:.4f} instead of 1)."
        )
    sign = 1 if total > 0 else -1
    if len(weights) == 1:
        rule = GuidanceRule(None, sign)
        return rule if torch.equal(rule(predictions), guided) else replace(rule, exact=False)
    if min(weight * sign for weight in weights) > TOLERANCE:
        raise NotIdentified(f"it blends two predictions, and which is the negative one does not show ({fit}).")
    positive = 0 if weights[0] * sign > weights[1] * sign else 1
    fitted_scale = weights[positive] * sign
    decimal_scale = float(f"{fitted_scale:.6g}")  # probably what the user passed
    scales = (decimal_scale, fitted_scale)
    forms = ((False, False), (True, False), (False, True))
    rules = [GuidanceRule(scale, sign, positive, *form) for scale in scales for form in forms]
    inexact = GuidanceRule(fitted_scale, sign, positive, exact=False)
    return next((rule for rule in rules if torch.equal(rule(predictions), guided)), inexact)


def _weights(predictions: list[Tensor], guided: Tensor) -> tuple[list[float], float]:
    """Return the least-squares weights of ``predictions`` that fit ``guided``, and the relative residual."""
    stride = max(1, guided.numel() // ELEMENTS)
    basis = torch.stack([p.flatten()[::stride].double() for p in predictions], dim=1)
    target = guided.flatten()[::stride].double()
    # normal equations: independent noise is as good as orthogonal, and only a small matrix leaves the device
    fit = torch.linalg.solve((basis.T @ basis).cpu(), (basis.T @ target).cpu())
    return fit.tolist(), float((basis @ fit.to(basis.device) - target).norm() / target.norm())


def _residual(predicted: Tensor, guided: Tensor) -> float:
    return float((predicted - guided).norm() / guided.norm()) if predicted.shape == guided.shape else float("inf")


def _name_nonlinear(predictions: list[Tensor], guided: Tensor) -> str:
    """Describe a rule that no weights fit, as far as it can be recognized."""
    norm = guided.norm(dim=-1)
    if any(torch.allclose(p.norm(dim=-1), norm, rtol=1e-3) for p in predictions):
        return "the guided prediction is brought to the norm of an unguided one (norm-preserving guidance)"
    row_residuals = [_weights([p[i] for p in predictions], guided[i])[1] for i in range(len(guided))]
    if max(row_residuals) < TOLERANCE:
        return "the guided prediction is rescaled row by row (as guidance_rescale does)"
    return "a rule unknown here"
