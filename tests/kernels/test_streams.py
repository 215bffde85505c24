"""Passes over streams of tokens on the CPU: torch's own operations, and how streams lie in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels.activate_rows import gelu_codes, gelu_joined
from diffaccel.kernels.quantize_rows import quantize_rows
from diffaccel.kernels.rope import joint_heads
from diffaccel.kernels.streams import (
    adjacent_rows,
    gated_sums,
    joined_tokens,
    modulate,
    norm_modulate,
    norm_modulate_codes,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def vectors(batch: int, width: int, count: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, count * width, dtype=torch.bfloat16).chunk(count, dim=1)


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_of_a_block_are_those_of_torch(batch: int) -> None:
    x, y = (torch.randn(batch, 6, 32, dtype=torch.bfloat16) for _ in range(2))
    scale, shift, gate = vectors(batch, 32, 3)
    total = x + gate.unsqueeze(1) * y
    expected = F.layer_norm(total, (32,), None, None, 1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert torch.equal(gated_sums([(y, gate, x)])[0], total)
    assert torch.equal(modulate([(x, scale, shift)])[0], x * (1 + scale[:, None]) + shift[:, None])
    (sums,), (result,) = norm_modulate([(x, scale, shift)], 1e-6, [(y, gate)])
    assert torch.equal(sums, total) and torch.equal(result, expected)
    (sums,), ((q, q_scale),) = norm_modulate_codes([(x, scale, shift)], 1e-6, "int8", [(y, gate)])
    assert torch.equal(sums, total)
    assert all(map(torch.equal, (q, q_scale), quantize_rows(expected.flatten(0, 1), "int8")))
    assert torch.equal(norm_modulate([(x, scale, shift)], 1e-6, folded=True)[0][0], x)


def test_streams_behind_each_other_are_normed_at_once_and_equal_themselves() -> None:
    rows = torch.randn(10, 32)
    text, image = rows[:4].view(2, 2, 32), rows[4:].view(2, 3, 32)
    joint = adjacent_rows(text, image)
    assert joint is not None and joint.data_ptr() == rows.data_ptr() and torch.equal(joint, rows)
    assert adjacent_rows(image, text) is None and adjacent_rows(text, image.clone()) is None
    assert adjacent_rows(text[:, :1], image) is None
    zeros = torch.zeros(2, 32)
    together = norm_modulate([(text, zeros, zeros), (image, zeros, zeros)], 1e-6)[1]
    apart = [norm_modulate([(x.clone(), zeros, zeros)], 1e-6)[1][0] for x in (text, image)]
    assert all(map(torch.equal, together, apart))


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_that_lie_in_one_tensor_are_joined_without_a_copy(batch: int) -> None:
    tokens = torch.randn(batch, 7, 16)
    first, second = tokens[:, :3], tokens[:, 3:]
    joined = joined_tokens(first, second)
    assert torch.equal(joined, tokens) and joined.data_ptr() == tokens.data_ptr()
    for others in ((second, first), (first.clone(), second), (first, second.clone()), (first[:, :2], second)):
        joined = joined_tokens(*others)
        assert torch.equal(joined, torch.cat(others, dim=1)) and joined.data_ptr() != tokens.data_ptr()


def test_streams_that_lie_one_behind_the_other_are_not_the_tokens_of_several_samples() -> None:
    rows = torch.randn(10, 16)
    text, image = rows[:4].view(2, 2, 16), rows[4:].view(2, 3, 16)
    assert torch.equal(joined_tokens(text, image), torch.cat([text, image], dim=1))
    one = joined_tokens(rows[None, :4], rows[None, 4:])
    assert torch.equal(one[0], rows) and one.data_ptr() == rows.data_ptr()


def test_heads_are_normed_turned_and_joined_as_the_processor_does() -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    streams = [tuple(torch.randn(2, t, 48, dtype=torch.bfloat16) for _ in range(3)) for t in (3, 5)]
    weights = torch.randn(4, 16, dtype=torch.bfloat16)
    rotary = (torch.randn(8, 16), torch.randn(8, 16))
    q, k, v = joint_heads(streams, [(weights[0], weights[1]), (weights[2], weights[3])], rotary, 16, 1e-6)  # type: ignore[arg-type]
    heads = [[x.unflatten(-1, (-1, 16)) for x in stream] for stream in streams]
    for index, mine in ((0, q), (1, k)):
        parts = [F.rms_norm(stream[index], (16,), weights[2 * i + index], 1e-6) for i, stream in enumerate(heads)]
        assert torch.equal(mine, apply_rotary_emb(torch.cat(parts, dim=1), rotary, sequence_dim=1))
    assert torch.equal(v, torch.cat([heads[0][2], heads[1][2]], dim=1))


@pytest.mark.parametrize("formula", ["tanh", "none"])
def test_activated_rows_are_those_of_torch(formula: str) -> None:
    beside, x = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(2, 3, 24, dtype=torch.bfloat16)
    both = torch.cat([beside, F.gelu(x, approximate=formula)], dim=-1)
    assert all(map(torch.equal, gelu_codes(beside, x, "int8", formula), quantize_rows(both.flatten(0, 1), "int8")))
    alone = quantize_rows(both[..., 8:].flatten(0, 1), "int8")
    assert all(map(torch.equal, gelu_codes(None, x, "int8", formula), alone))
    if formula == "tanh":
        assert torch.equal(gelu_joined(beside, x), both)


def test_what_no_kernel_takes_is_said() -> None:
    x, scale = torch.randn(1, 2, 8), torch.zeros(1, 8)
    with pytest.raises(ValueError, match="cannot run fused on cpu"):
        modulate([(x, scale, scale)], "fused")
    with pytest.raises(ValueError, match="got 3"):
        gated_sums([(x, scale, x)] * 3)
