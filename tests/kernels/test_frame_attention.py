"""Attention of frames to frames: its reference, the Triton kernel in its interpreter and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffaccel.kernels.frame_attention import MOST_SPLITS, frame_attention, frame_attention_reference, splits_of

INTERPRETED = """
import torch
from diffaccel.kernels.frame_attention import Tiling, frame_attention_reference, frame_attention_triton
draw = torch.Generator().manual_seed(0)
for queries, keys, tokens, splits in ((1, 1, 5, 1), (1, 4, 20, 3), (3, 5, 17, 2), (2, 9, 16, 4)):
    parts = [torch.randn(2, tokens * count, 3, 16, generator=draw).transpose(1, 2) for count in (queries, keys, keys)]
    frames = torch.rand(queries, keys, generator=draw) < 0.5
    frames[:, 0] = True
    expected = frame_attention_reference(*(part.double() for part in parts), frames, tokens)
    got = frame_attention_triton(*parts, frames, tokens, Tiling(16, 16, 4, 1, splits))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
print("equal")
"""


def made(queries: int, keys: int, tokens: int, device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(1)
    parts = [
        torch.randn(1, tokens * count, 4, 64, generator=draw, dtype=torch.float32).transpose(1, 2).to(device, dtype)
        for count in (queries, keys, keys)
    ]
    frames = torch.rand(queries, keys, generator=draw) < 0.7
    frames[:, -1] = True
    return parts, frames.to(device)


def test_equals_the_sum_written_out() -> None:
    (query, key, value), frames = made(2, 3, 4, "cpu", torch.float64)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / 8
    mask = frames.repeat_interleave(4, 0).repeat_interleave(4, 1)
    expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value
    torch.testing.assert_close(frame_attention(query, key, value, frames, 4), expected)


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
    parts, frames = made(2, 3, 4, "cpu", torch.float32)
    operation = torch.ops.diffaccel.frame_attention.default
    torch.library.opcheck(operation, (*parts, frames, 4), test_utils="test_schema")
    torch.library.opcheck(operation, (*parts, frames, 4), test_utils="test_faketensor")


def test_keys_are_split_until_the_device_is_full() -> None:
    assert splits_of(48, 132, 168) == 5  # one frame of 336 tokens, 16 heads
    assert splits_of(96, 132, 168) == 2
    assert splits_of(1000, 132, 168) == 1
    assert splits_of(1, 132, 2) == 2 and splits_of(1, 132, 1000) == MOST_SPLITS


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys", "tokens"), [(1, 33, 336), (2, 34, 336), (4, 12, 64), (1, 2, 7)])
def test_on_a_gpu(queries: int, keys: int, tokens: int) -> None:
    parts, frames = made(queries, keys, tokens, "cuda", torch.bfloat16)
    expected = frame_attention_reference(*(part.double() for part in parts), frames, tokens)
    found = frame_attention(*parts, frames, tokens)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(found, frame_attention(*parts, frames, tokens))
