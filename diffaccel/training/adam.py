"""Adam without momentum: half of its state, and what distillation by scores needs of its assistant."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diffaccel.training.shards import local


class MomentumlessAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) with ``beta1 = 0``: ``p -= lr g / (sqrt(v / (1 - beta2^n)) + eps)``, one moment ``v``.

    The update is that of ``torch.optim.Adam(betas=(0, beta2))``; the average of gradients, which would be the gradient
    itself, is neither kept nor computed. Of weights that are shared out each process steps its own part, and ``v`` is a
    plain tensor of that part.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, beta2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if not with_gradient:
                continue
            for p in with_gradient:
                if not self.state[p]:
                    self.state[p] = {
                        "step": 0,
                        "exp_avg_sq": torch.zeros_like(local(p), memory_format=torch.preserve_format),
                    }
                self.state[p]["step"] += 1
            gradients = [local(p.grad) for p in with_gradient]
            squares = [self.state[p]["exp_avg_sq"] for p in with_gradient]
            torch._foreach_mul_(squares, group["beta2"])
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["beta2"])
            corrections = [(1 - group["beta2"] ** int(self.state[p]["step"])) ** 0.5 for p in with_gradient]
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, corrections)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_([local(p) for p in with_gradient], gradients, roots, -group["lr"])
