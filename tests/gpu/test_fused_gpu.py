"""Passes over streams on a GPU: fresh random numbers at each run, to the bit of torch, or against float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import matrix
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

import diffaccel
from diffaccel.kernels.activate_rows import gelu_codes, gelu_joined
from diffaccel.kernels.rope import agrees, joint_heads, joint_heads_reference
from diffaccel.kernels.streams import (
    gated_sum_fp32,
    gated_sums,
    modulate,
    modulate_fp32,
    norm_modulate,
    norm_modulate_codes,
)
from diffaccel.kernels.triton_rope import launch_rope
from diffaccel.modules import Capture, FusedBlocks
from diffaccel.quant import W8A8

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [(1, (512, 4096), 3072), (2, (77, 1000), 1536), (3, (33, 50), 112), (1, (1, 1), 5120)]


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed by the system: new numbers at every run; a failure shows the seed."""
    value = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(value)
    print(f"seed {value}")
    with torch.no_grad():
        yield value


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda", dtype=torch.float32) * scale).to(dtype)


def streams_of(size: Any, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    batch, lengths, width = size
    streams, gated = [], []
    for length in lengths:
        scale, shift, gate = normal(batch, 3 * width, dtype=dtype).chunk(3, dim=1)
        streams.append((normal(batch, length, width, dtype=dtype, scale=3.0), scale, shift))
        gated.append((normal(batch, length, width, dtype=dtype), gate))
    return streams, gated


def equal(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", WIDTHS, ids=str)
def test_sums_and_modulations_have_the_bits_of_torch(size: Any, dtype: torch.dtype) -> None:
    streams, gated = streams_of(size, dtype)
    triples = [(y, gate, x) for (y, gate), (x, _, _) in zip(gated, streams, strict=True)]
    for group in (1, 2):
        assert equal(modulate(streams[:group], "fused"), modulate(streams[:group], "reference"))
        assert equal(gated_sums(triples[:group], "fused"), gated_sums(triples[:group], "reference"))
    for pairs in (None, gated):
        ours, theirs = (norm_modulate(streams, 1e-6, pairs, mode=mode) for mode in ("fused", "reference"))
        assert equal(ours[0], theirs[0]) and equal(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streams_with_fp32_vectors_have_the_bits_of_torch(dtype: torch.dtype) -> None:
    for batch, length, width in ((1, 4000, 1536), (3, 33, 112)):
        x, y = normal(batch, length, width, dtype=dtype), normal(batch, length, width, dtype=dtype)
        scale, shift, gate = normal(batch, 3, width, dtype=torch.float32).unbind(1)
        ours = gated_sum_fp32(y, gate, x, "fused"), modulate_fp32(x.float(), scale, shift, dtype, "fused")
        assert torch.equal(ours[0], gated_sum_fp32(y, gate, x, "reference"))
        assert torch.equal(ours[1], modulate_fp32(x.float(), scale, shift, dtype, "reference"))


def bound_of_codes(modulated: Tensor, exact: Tensor, step: Tensor, codes: str) -> Tensor:
    """Return how far each code may be from ``exact = modulated + shift``, for any numbers.

    The norm, ``1 + scale``, their product and the sum are each rounded to bf16, off by 2^-8 of itself at most. A code
    in int8 is half a step off; one in float8 (e4m3) 2^-4 of itself, or half of its smallest step, 2^-9. What is of
    second order, and fp32, is in the factor of 1.05.
    """
    rounding = 2.0**-8 * (3 * modulated.abs() + exact.abs())
    coding = step / 2 if codes == "int8" else torch.maximum((exact.abs() + rounding) * 2.0**-4, step * 2.0**-10)
    return 1.05 * (rounding + coding)


@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("size", WIDTHS, ids=str)
def test_codes_of_norms_against_float64(size: Any, codes: Any) -> None:
    streams, gated = streams_of(size, torch.bfloat16)
    for pairs in (None, gated):
        sums, ours = norm_modulate_codes(streams, 1e-6, codes, pairs, "fused")
        theirs_sums, theirs = norm_modulate_codes(streams, 1e-6, codes, pairs, "reference")
        assert equal(sums, theirs_sums)
        for (q, s), (q_exact, s_exact), x, (_, scale, shift) in zip(ours, theirs, sums, streams, strict=True):
            same = (q.float() == q_exact.float()).double().mean()
            assert float(same) > 0.98 and torch.allclose(s, s_exact, rtol=1e-2)
            normed = F.layer_norm(x.double(), (x.shape[2],), None, None, 1e-6) * (1 + scale.double()[:, None])
            exact = normed + shift.double()[:, None]
            error = (q.double() * s).view_as(exact) - exact
            assert bool((error.abs() <= bound_of_codes(normed, exact, s.double().view(*x.shape[:2], 1), codes)).all())


def test_the_folded_form_against_float64() -> None:
    streams, gated = streams_of(WIDTHS[0], torch.bfloat16)
    sums, ours = norm_modulate(streams, 1e-6, gated, folded=True, mode="fused")
    assert equal(sums, gated_sums([(y, g, x) for (y, g), (x, _, _) in zip(gated, streams, strict=True)], "reference"))
    for y, x, (_, scale, shift) in zip(ours, sums, streams, strict=True):
        exact = F.layer_norm(x.double(), (x.shape[2],), None, None, 1e-6) * (1 + scale.double()[:, None])
        exact += shift.double()[:, None]
        assert float((y.double() - exact).norm() / exact.norm()) < 2.0**-8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [128, 64, 16])
def test_heads_have_the_bits_of_torch(head: int, dtype: torch.dtype) -> None:
    for batch, lengths, count in ((1, (512, 1024), 24), (2, (33,), 5), (3, (7, 50), 3)):
        streams = [tuple(normal(batch, t, 3 * head * count, dtype=dtype).chunk(3, 2)) for t in lengths]
        norms = [(1 + normal(head, dtype=dtype), 1 + normal(head, dtype=dtype)) for _ in lengths]
        rotary = (normal(sum(lengths), head, dtype=torch.float32), normal(sum(lengths), head, dtype=torch.float32))
        for angles in (rotary, None):
            ours = joint_heads(streams, norms, angles, head, 1e-6, "fused")  # type: ignore[arg-type]
            assert equal(ours, joint_heads_reference(streams, norms, angles, head, 1e-6))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_heads_in_the_kernel_has_the_bits_of_torch_on_this_device(dtype: torch.dtype) -> None:
    """Where it has not, torch's norm runs before the kernel: the same bits by two launches more."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert agrees(device, dtype, 128), "the sum of squares of torch's norm is added in another order than the kernel's"


def test_heads_against_float64() -> None:
    stream = tuple(normal(1, 64, 8 * 128) for _ in range(3))
    norms, rotary = [(normal(128), normal(128))], (normal(64, 128, dtype=torch.float32),) * 2
    q, _, _ = launch_rope([stream], norms, rotary, 128, 1e-6)  # type: ignore[arg-type]
    x = stream[0].double().unflatten(2, (-1, 128))
    x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norms[0][0].double()
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(3)
    exact = (x + turned) * rotary[0].double()[None, :, None]
    assert float((q.double() - exact).norm() / exact.norm()) < 2.0**-7


@pytest.mark.parametrize("formula", ["tanh", "none"])
@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_activated_rows(codes: Any, formula: str) -> None:
    for width, beside in ((12288, 3072), (12288, None), (100, 36)):
        x, side = normal(1, 700, width), None if beside is None else normal(1, 700, beside)
        x[0, 1], x[0, 2, 5], x[0, 3, 7] = 0, float("nan"), float("inf")
        (q, s), (q_exact, s_exact) = (gelu_codes(side, x, codes, formula, mode) for mode in ("fused", "reference"))
        assert float((q.float() == q_exact.float()).double().mean()) > 0.98
        assert torch.allclose(s, s_exact, rtol=1e-2, equal_nan=True) and bool(s[2:4].isnan().all())
    x, side = normal(2, 300, 12288), normal(2, 300, 3072)
    assert torch.equal(gelu_joined(side, x), torch.cat([side, F.gelu(x, approximate="tanh")], dim=-1))


# -- blocks ------------------------------------------------------------------------------------------------------------


def flux(dtype: torch.dtype = torch.bfloat16, heads: int = 4) -> Any:
    """A small pipeline with heads of FLUX's own size."""
    pipe = tiny.make("flux")
    torch.manual_seed(0)
    pipe.transformer = tiny._stir(
        FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=128,
            num_attention_heads=heads, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 56, 56),
        )
    )  # fmt: skip
    return pipe.to("cuda", dtype)


def draw(pipe: Any, **changes: Any) -> Tensor:
    return torch.as_tensor(pipe(**{**tiny.call_kwargs("flux"), **changes}).images).clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pictures_equal_those_of_the_stock_blocks(dtype: torch.dtype) -> None:
    pipe = flux(dtype)
    for batch in (1, 2):
        stock = draw(pipe, **tiny.call_kwargs("flux", batch=batch))
        diffaccel.accelerate(pipe, FusedBlocks())
        assert torch.equal(draw(pipe, **tiny.call_kwargs("flux", batch=batch)), stock)
        assert not diffaccel.summary(pipe).reports["fused_blocks"]["stock_calls"]
        diffaccel.accelerate(pipe, Capture())
        assert torch.equal(draw(pipe, **tiny.call_kwargs("flux", batch=batch)), stock)
        assert diffaccel.summary(pipe).reports["capture"]["replays"]
        assert torch.equal(draw(diffaccel.remove(pipe), **tiny.call_kwargs("flux", batch=batch)), stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_blocks_of_other_families(family: str, dtype: torch.dtype) -> None:
    case = matrix.Case(family, None, device="cuda")
    pipe = case.make().to(dtype)
    stock = case.call(pipe)
    diffaccel.accelerate(pipe, FusedBlocks())
    assert torch.equal(case.call(pipe), stock)
    report = diffaccel.summary(pipe).reports["fused_blocks"]
    assert report["fused_calls"] and not report["stock_calls"]


def launches(network: Any, inputs: dict[str, Any]) -> int:
    """Return how many kernels one call of a network runs; copies and fills by the memory's engine are none."""
    network(**inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        network(**inputs)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in kernels)


def test_fewer_launches() -> None:
    """By counting, fusing saves 38 launches of a double block and 20 of a single one: tests/modules counts them.

    A ratio cannot be promised: a product is one launch or several, as the library chooses, and so is attention.
    """
    pipe, inputs = flux(), []
    network = pipe.transformer
    handle = network.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    draw(pipe, num_inference_steps=1)
    handle.remove()
    stock = launches(network, inputs[0])
    diffaccel.accelerate(pipe, FusedBlocks())
    blocks = 38 * len(network.transformer_blocks) + 20 * len(network.single_transformer_blocks)
    assert stock - launches(network, inputs[0]) >= blocks


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_quantized_blocks_are_as_near_to_the_plain_ones(dtype: Any) -> None:
    pipe = flux()
    stock = draw(pipe).double()
    apart = draw(diffaccel.accelerate(pipe, W8A8(dtype=dtype))).double()
    fused = draw(diffaccel.accelerate(pipe, FusedBlocks()))
    captured = draw(diffaccel.accelerate(pipe, Capture()))
    errors = [float((x.double() - stock).norm() / stock.norm()) for x in (apart, fused)]
    assert errors[1] < 1.2 * errors[0] + 1e-3 and torch.equal(captured, fused)
    assert torch.equal(draw(diffaccel.remove(pipe)).double(), stock)


@pytest.mark.parametrize("contract", matrix.GPU_CONTRACTS)
@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_contract(family: str, contract: str) -> None:
    try:
        with torch.enable_grad():
            matrix.GPU_CONTRACTS[contract](matrix.Case(family, FusedBlocks(), device="cuda"))
    except matrix.NotHere as reason:
        pytest.skip(str(reason))


def test_sequential_offloading_leaves_the_blocks_to_themselves() -> None:
    pipe = flux()
    stock = draw(pipe)
    pipe = diffaccel.accelerate(pipe.to("cpu"), FusedBlocks())
    pipe.enable_sequential_cpu_offload()
    assert torch.equal(draw(pipe), stock)
    assert diffaccel.summary(pipe).reports["fused_blocks"]["stock_calls"]
