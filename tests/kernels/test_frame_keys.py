"""Keys and values of new frames in their places: the reference written out, the Triton kernel in its interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffaccel.kernels.frame_keys import frame_keys, frame_keys_reference

INTERPRETED = """
import torch
from diffaccel.kernels.frame_keys import frame_keys_reference, frame_keys_triton
from tests.kernels.test_frame_keys import made
for batch, frames, tokens, written in ((1, 1, 20, 0), (2, 3, 7, 2), (1, 2, 16, 1)):
    inputs, rings = made(batch, frames, tokens, written, torch.float32)
    others = [ring.clone() for ring in rings]
    expected = frame_keys_reference(*inputs, *rings)
    torch.testing.assert_close(frame_keys_triton(*inputs, *others), expected, rtol=1e-5, atol=1e-5)
    for ring, other in zip(rings, others):
        torch.testing.assert_close(other, ring, rtol=1e-5, atol=1e-5)
print("equal")
"""


def made(
    batch: int, frames: int, tokens: int, written: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments for three heads of 16 channels, five places in the ring and two behind it; and the rings."""
    draw = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float32).to(device, dtype)

    angles = torch.randn(frames, tokens, 8, generator=draw, dtype=torch.float32).to(device)
    angles = angles.double() if dtype == torch.float64 else angles
    slots = torch.tensor([4, 1, 0][:written] + [5, 6, 3][: frames - written], device=device)
    inputs = (
        normal(batch, frames, tokens, 3, 3, 16),
        normal(16),
        normal(16),
        angles.cos(),
        angles.sin(),
        slots,
        written,
    )
    rings = [normal(batch, 3, 5 * tokens, 16), normal(batch, 3, 7 * tokens, 16), normal(batch, 3, 7 * tokens, 16)]
    return inputs, rings


def test_equals_what_is_written_out() -> None:
    inputs, rings = made(2, 3, 4, 2, torch.float64)
    qkv, query_norm, key_norm, cos, sin, slots, _ = inputs
    before = [ring.clone() for ring in rings]
    out = frame_keys(*inputs, *rings)

    def turned(x: Tensor, t: int, j: int) -> Tensor:
        pairs = torch.complex(x[:8], x[8:]) * torch.complex(cos[t, j], sin[t, j])
        return torch.cat([pairs.real, pairs.imag])

    touched = {name: set() for name in ("keys", "rotated")}
    for b, t, j, head in ((b, t, j, h) for b in range(2) for t in range(3) for j in range(4) for h in range(3)):
        query, key, value = qkv[b, t, j, :, head]
        query = query / (query.square().mean() + 1e-6).sqrt() * query_norm
        key = key / (key.square().mean() + 1e-6).sqrt() * key_norm
        place = int(slots[t]) * 4 + j
        torch.testing.assert_close(out[b, head, t * 4 + j], turned(query, t, j))
        torch.testing.assert_close(rings[1][b, head, place], turned(key, t, j))
        torch.testing.assert_close(rings[2][b, head, place], value)
        touched["rotated"].add(place)
        if t < 2:
            torch.testing.assert_close(rings[0][b, head, place], key)
            touched["keys"].add(place)
    for ring, old, name in zip(rings, before, ("keys", "rotated", "rotated"), strict=True):
        others = [place for place in range(ring.shape[2]) if place not in touched[name]]
        assert torch.equal(ring[:, :, others], old[:, :, others])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")
def test_the_triton_kernel_in_its_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED], capture_output=True, text=True, env=environment,
        timeout=300, cwd=Path(__file__).resolve().parents[2], check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_the_operation_is_one_that_torch_can_trace() -> None:
    inputs, rings = made(1, 2, 4, 1, torch.float32)
    operation = torch.ops.diffaccel.frame_keys.default
    torch.library.opcheck(operation, (*inputs, *rings), test_utils="test_schema")
    torch.library.opcheck(operation, (*inputs, *rings), test_utils="test_faketensor")


@pytest.mark.gpu
@pytest.mark.parametrize(("frames", "tokens", "written"), [(1, 336, 0), (2, 336, 1), (3, 64, 3)])
def test_on_a_gpu(frames: int, tokens: int, written: int) -> None:
    inputs, rings = made(2, frames, tokens, written, torch.bfloat16, "cuda")
    others = [ring.clone() for ring in rings]
    expected = frame_keys_reference(*inputs, *rings)
    torch.testing.assert_close(frame_keys(*inputs, *others), expected, rtol=2e-2, atol=2e-2)
    for ring, other in zip(rings, others, strict=True):
        torch.testing.assert_close(other, ring, rtol=2e-2, atol=2e-2)
