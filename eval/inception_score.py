"""Inception Score (Salimans et al., arXiv 1606.03498) from the logits of a classifier, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.feature_matrix import checked


def inception_score(logits: Tensor, *, splits: int = 10, shuffle_seed: int | None = 2020) -> tuple[float, float]:
    """Mean and standard deviation over splits of ``exp(mean_i KL(p(y|x_i) || p(y)))``, higher is better.

    The marginal ``p(y)`` is the mean of ``p(y|x_i)`` within a split. The score lies between 1 and the number of
    classes. Published variants differ in the logits and in the splits: torch-fidelity takes 1008 classes without bias,
    shuffled with seed 2020; ADM (arXiv 2105.05233) takes contiguous splits of 5000, here ``shuffle_seed=None``.

    Args:
        logits: ``(n, classes)``.
        splits: number of parts of nearly equal size, at most ``n``.
        shuffle_seed: of NumPy's legacy generator, or None to keep the order.
    """
    n = len(checked(logits, "logits"))
    if not 1 <= splits <= n:
        raise DiffAccelError(f"{n} images cannot be cut into {splits} splits; give 1 to {n}.")
    if shuffle_seed is not None:
        # published values come from this generator
        order = np.random.RandomState(shuffle_seed).permutation(n)
        logits = logits[torch.from_numpy(order).to(logits.device)]
    logits = checked(logits, "logits").double()
    p = logits.softmax(1)
    # KL averaged over a split is H(marginal) - mean H(p); xlogy makes 0 log 0 = 0
    negative_entropy = torch.xlogy(p, p).sum(1)
    scores = torch.empty(splits, dtype=torch.float64)
    for i in range(splits):
        part = slice(i * n // splits, (i + 1) * n // splits)
        marginal = p[part].mean(0)
        scores[i] = (negative_entropy[part].mean() - torch.xlogy(marginal, marginal).sum()).exp()
    return float(scores.mean()), float(scores.std(correction=0))
