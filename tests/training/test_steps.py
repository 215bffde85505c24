"""Training computes attention by kernels with right gradients, also where activations are computed again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffaccel.training.steps import backward, computing


def test_kernels_and_dtype_hold_forwards_and_in_what_is_computed_again_backwards() -> None:
    seen = []

    def part(x: Tensor) -> Tensor:
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.is_autocast_enabled("cpu")))
        return torch.nn.functional.linear(x, weight)

    before = torch.backends.cuda.cudnn_sdp_enabled()
    weight, x = torch.eye(3, requires_grad=True), torch.ones(2, 3)
    with computing(torch.device("cpu"), torch.bfloat16):
        loss = checkpoint(part, x, use_reentrant=False).float().sum()
    backward(loss)
    assert seen == [(False, True)] * 2
    assert torch.equal(weight.grad, torch.full((3, 3), 2.0)) and torch.backends.cuda.cudnn_sdp_enabled() == before
    with computing(torch.device("cpu"), torch.float32):
        assert part(x).dtype == torch.float32
