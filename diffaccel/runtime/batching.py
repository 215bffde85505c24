"""Requests that fit together, joined into one batch of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.runtime.row_selection import CondRows, rows_of
from diffaccel.session import Branch, Eval, Session


@dataclass(frozen=True, eq=False)
class Batch:
    """Requests that share network calls, their rows concatenated.

    Attributes:
        x: ``(R, C, H, W)`` latents in the session's coordinates.
        sigma: noise level, scalar or one per row ``(R,)``.
        conds: conditioning and rows of every request.
    """

    session: Session
    x: Tensor
    sigma: Tensor
    branch: Branch
    conds: list[CondRows]


def share_calls(session: Session, evals: list[Eval]) -> bool:
    """Return whether all requests to ``session`` have one resolution, one branch and one latent shape."""
    first = evals[0]
    return all(
        (request.at or session) is (first.at or session)
        and request.branch == first.branch
        and request.x.shape[1:] == first.x.shape[1:]
        for request in evals[1:]
    )


def join(session: Session, evals: list[Eval]) -> Batch:
    """Concatenate requests for which :func:`share_calls` holds; a noise level common to all of them stays a scalar."""
    first = evals[0]
    session = first.at or session
    conds = [(request.cond, rows_of(session, request)) for request in evals]
    if len(evals) == 1:
        return Batch(session, first.x, first.sigma, first.branch, conds)
    x, sigma = torch.cat([request.x for request in evals]), first.sigma
    if sigma.ndim or not all(r.sigma is sigma or (r.sigma.ndim == 0 and r.sigma == sigma) for r in evals):
        sigma = torch.cat([request.sigma.expand(len(request.x)) for request in evals])
    return Batch(session, x, sigma, first.branch, conds)
