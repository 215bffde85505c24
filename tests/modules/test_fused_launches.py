"""Launches of FLUX's blocks by counting operations: what fusing saves does not depend on a device's products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffaccel.kernels import streams
from diffaccel.modules.fused import flux
from diffaccel.modules.fused.forward import Forward

VIEWS = {"_unsafe_view", "split_with_sizes", "empty"}


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel; what :meth:`as_one` wraps is one, whatever it does inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.depth = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        self.counts[name] += not (self.depth or operation.is_view or name in VIEWS)
        return operation(*args, **(kwargs or {}))

    def as_one(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            try:
                result = function(*args, **kwargs)
            finally:
                self.depth -= 1
            self.counts[function.__name__] += 1
            return result

        return counted


@pytest.mark.parametrize(
    ("kind", "stock", "fused"), [(FluxTransformerBlock, 66, 28), (FluxSingleTransformerBlock, 35, 15)]
)
def test_a_block_launches_so_many(kind: type[nn.Module], stock: int, fused: int, monkeypatch: Any) -> None:
    """15 (7) of them are products and attention, the same in both: fusing takes 51 others to 13, and 28 to 8."""
    count = Launches()
    for module, name in ((nn.RMSNorm, "forward"), (streams, "modulate"), (streams, "gated_sums"),
                         (flux, "gated_sums"), (flux, "joint_heads")):  # fmt: skip
        monkeypatch.setattr(module, name, count.as_one(getattr(module, name)))
    block = kind(64, 2, 32).to(torch.bfloat16)
    inputs = [torch.randn(size, dtype=torch.bfloat16) for size in ((1, 8, 64), (1, 4, 64), (1, 64))]
    rotary = torch.randn(12, 32), torch.randn(12, 32)
    with torch.no_grad():
        for expected in (stock, fused):
            count.counts.clear()
            with count:
                block(*inputs, rotary)
            assert sum(count.counts.values()) == expected, count.counts
            Forward(block, next(k for k in flux.KINDS if k.block is kind), folded=False).put_on()
