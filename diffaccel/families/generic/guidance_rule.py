"""The rule by which a pipeline joins its network's predictions, found from its answers to known random ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.families.generic.watching import NotIdentified

TOLERANCE = 1e-4
ELEMENTS = 2**20  # more do not make the fit better


@dataclass(frozen=True)
class GuidanceRule:
    """``guided = sign * (negative + scale * (positive - negative))``, classifier-free guidance (arXiv 2207.12598).

    Attributes:
        scale: None where there is one prediction only.
        sign: of the network's output; some networks are trained on ``x0 - eps``.
        positive: which prediction of the two is the positive one.
        around_positive: whether the pipeline writes it ``positive + (scale - 1) (positive - negative)``.
    """

    scale: float | None
    sign: int
    positive: int = 0
    around_positive: bool = False

    def combine(self, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        """The guided prediction; both carry their sign already."""
        if self.around_positive:
            return positive + (scale - 1) * (positive - negative)
        return negative + scale * (positive - negative)

    def __call__(self, predictions: list[Tensor]) -> Tensor:
        signed = [p if self.sign > 0 else -p for p in predictions]
        if self.scale is None:
            return signed[0]
        return self.combine(signed[1 - self.positive], signed[self.positive], self.scale)

    def check_count(self, count: int, step: int) -> None:
        """Raise when ``step`` has another number of predictions."""
        usual = 1 if self.scale is None else 2
        if count != usual:
            raise NotIdentified(f"it joins {usual} predictions at its first step and {count} at step {step}.")

    def check(self, predictions: list[Tensor], guided: Tensor, step: int) -> None:
        """Raise when the pipeline did something else at ``step``."""
        residual = _residual(self(predictions), guided)
        if residual > TOLERANCE:
            weights = [round(w, 4) for w in _weights(predictions, guided)[0]]
            raise NotIdentified(
                f"its guidance changes from step to step: at step {step} its weights are {weights} (residual of the "
                f"first step's rule {residual:.1e})."
            )


def fit_guidance(predictions: list[Tensor], guided: Tensor) -> GuidanceRule:
    """The rule that made ``guided`` of independent random ``predictions``.

    Raises:
        NotIdentified: for more than two predictions and for rules that are no classifier-free guidance, by name.
    """
    if any(p.shape != guided.shape for p in predictions):
        raise NotIdentified(
            f"its network's output has shape {tuple(predictions[0].shape)}, what it steps {tuple(guided.shape)}."
        )
    weights, residual = _weights(predictions, guided)
    shown = f"fitted weights {[round(w, 4) for w in weights]}, residual {residual:.1e}"
    if len(predictions) > 2:
        raise NotIdentified(
            f"it joins {len(predictions)} predictions a step (as perturbed or skip-layer guidance does; {shown})."
        )
    if residual > TOLERANCE:
        raise NotIdentified(f"its guidance is not linear: {_name_nonlinear(predictions, guided)} ({shown}).")
    total = sum(weights)
    if abs(abs(total) - 1) > TOLERANCE * max(1.0, *map(abs, weights)):
        raise NotIdentified(
            f"its guidance is not linear: the guided prediction is rescaled, as guidance_rescale does ({shown}, "
            f"sum {total:.4f} instead of 1)."
        )
    sign = 1 if total > 0 else -1
    if len(weights) == 1:
        return GuidanceRule(None, sign)
    if min(w * sign for w in weights) > TOLERANCE:
        raise NotIdentified(f"it blends two predictions, and which is the negative one does not show ({shown}).")
    positive = 0 if weights[0] * sign > weights[1] * sign else 1
    fitted = weights[positive] * sign
    written = float(f"{fitted:.6g}")  # as somebody wrote it
    rules = [GuidanceRule(s, sign, positive, around) for s in (written, fitted) for around in (False, True)]
    return next((rule for rule in rules if torch.equal(rule(predictions), guided)), rules[2])


def _weights(predictions: list[Tensor], guided: Tensor) -> tuple[list[float], float]:
    """Least squares of ``guided`` on ``predictions``, and the relative residual."""
    stride = max(1, guided.numel() // ELEMENTS)
    basis = torch.stack([p.flatten()[::stride].double() for p in predictions], dim=1)
    target = guided.flatten()[::stride].double()
    # normal equations: independent noise is as good as orthogonal, and only a small matrix leaves the device
    fit = torch.linalg.solve((basis.T @ basis).cpu(), (basis.T @ target).cpu())
    return fit.tolist(), float((basis @ fit.to(basis.device) - target).norm() / target.norm())


def _residual(made: Tensor, guided: Tensor) -> float:
    return float((made - guided).norm() / guided.norm()) if made.shape == guided.shape else float("inf")


def _name_nonlinear(predictions: list[Tensor], guided: Tensor) -> str:
    """What a rule is that no weights describe, as far as it shows."""
    norm = guided.norm(dim=-1)
    if any(torch.allclose(p.norm(dim=-1), norm, rtol=1e-3) for p in predictions):
        return "the guided prediction is brought to the norm of an unguided one (norm-preserving guidance)"
    rows = [_weights([p[i] for p in predictions], guided[i])[1] for i in range(len(guided))]
    if max(rows) < TOLERANCE:
        return "the guided prediction is rescaled row by row (as guidance_rescale does)"
    return "a rule unknown here"
