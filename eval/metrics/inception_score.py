"""Inception Score (Salimans et al., arXiv 1606.03498) from the logits of a classifier, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.feature_matrix import checked


def inception_score(
    logits: Tensor, *, splits: int = 10, shuffle_seed: int | None = 2020, size: int | None = None
) -> tuple[float, float]:
    """Compute mean and standard deviation over splits of ``exp(mean_i KL(p(y|x_i) || p(y)))``, higher is better.

    The marginal ``p(y)`` is the mean of ``p(y|x_i)`` within a split. The score lies between 1 and the number of
    classes. Published variants differ in the logits and in the splits: torch-fidelity takes 1008 classes without bias,
    shuffled with seed 2020; ADM (arXiv 2105.05233) takes contiguous splits of 5000 images, the last of which may be
    smaller: ``size=5000, shuffle_seed=None``.

    Args:
        logits: ``(n, classes)``.
        splits: number of splits of nearly equal size, at most ``n``.
        shuffle_seed: seed of NumPy's legacy generator, or None to keep the order.
        size: rows in a split, in place of ``splits``.
    """
    n = len(checked(logits, "logits"))
    if size is not None and size < 1:
        raise DiffAccelError(f"A split holds at least 1 image; got size {size}.")
    if size is None and not 1 <= splits <= n:
        raise DiffAccelError(f"{n} images cannot be cut into {splits} splits; give 1 to {n}.")
    if size is not None:
        edges = [*range(0, n, size), n]
    else:
        edges = [i * n // splits for i in range(splits + 1)]
    if shuffle_seed is not None:
        # published values come from this generator
        order = np.random.RandomState(shuffle_seed).permutation(n)
        logits = logits[torch.from_numpy(order).to(logits.device)]
    logits = checked(logits, "logits").double()
    p = logits.softmax(1)
    # KL averaged over a split is H(marginal) - mean H(p); xlogy makes 0 log 0 = 0
    negative_entropy = torch.xlogy(p, p).sum(1)
    scores = torch.empty(len(edges) - 1, dtype=torch.float64)
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        part = slice(start, stop)
        marginal = p[part].mean(0)
        scores[i] = (negative_entropy[part].mean() - torch.xlogy(marginal, marginal).sum()).exp()
    return float(scores.mean()), float(scores.std(correction=0))
