"""What a network's output means, and the two differences that distillation by scores is made of.

A network sees ``x_t = a x0 + s eps`` and returns ``N``, from which the clean estimate ``D`` is affine:
``D = k N + (a part of x_t alone)``. So for two networks at one ``x_t``, and for a network and the sample itself,

    v = D_F - D_T = k (N_F - N_T)          r = D_F - x0 = k (N_F - target)

Both are formed from raw outputs first and scaled afterwards: the difference of two clean estimates in half precision
would be rounding noise at small noise levels. Everything here is float32 or wider.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.flow import Prediction, karras_preconditioning, output

Kind = Literal["epsilon", "v_prediction", "sample", "velocity", "edm"]
Space = Literal["x0", "raw", "score"]
KINDS: tuple[Kind, ...] = ("epsilon", "v_prediction", "sample", "velocity", "edm")


def factor(kind: Kind, a: Tensor, s: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Return ``k`` of ``D = k N + ...``: how the clean estimate follows the output.

    Args:
        kind: type of the output; "velocity" is that of the linear path, "edm" the raw network of Karras et al.
            (arXiv 2206.00364), whose input is ``x0 + s eps``.
        a, s: coefficients of the network's input, broadcasting against samples.
        sigma_data: of an "edm" network.
    """
    if kind == "epsilon":
        return -s / a
    if kind == "sample":
        return a * 0 + 1
    if kind == "velocity":
        return -s / (a + s)
    if kind == "v_prediction":
        return -s / (a * a + s * s)
    if kind == "edm":
        return karras_preconditioning(s, sigma_data)[1] + a * 0
    raise DiffAccelError(f"The network's output is '{kind}'; it must be one of {', '.join(KINDS)}.")


def target(kind: Kind, x0: Tensor, eps: Tensor, x_t: Tensor, a: Tensor, s: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Return the output of the network that knew ``x0`` and ``eps``: what denoising regresses to."""
    if kind == "edm":
        c_skip, c_out, _, _ = karras_preconditioning(s, sigma_data)
        return (x0 - c_skip * x_t) / c_out
    prediction: Prediction = kind
    return output(prediction, x0, eps, a, s)


def clean(kind: Kind, out: Tensor, x_t: Tensor, a: Tensor, s: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Return the clean estimate ``D`` of an output at ``x_t``."""
    zero = x_t * 0
    rest = -factor(kind, a, s, sigma_data) * target(kind, zero, x_t / s, x_t, a, s, sigma_data)
    return factor(kind, a, s, sigma_data) * out + rest


def scale(space: Space, kind: Kind, a: Tensor, s: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Return the factor from differences of raw outputs to differences in ``space``.

    In "score" it is that of scores ``(a D - x_t) / s^2``.
    """
    if space == "raw":
        return a * 0 + 1
    k = factor(kind, a, s, sigma_data)
    return k if space == "x0" else k * a / (s * s)
