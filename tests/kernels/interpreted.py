"""Run as a script with TRITON_INTERPRET=1: every kernel on the CPU against its formula; prints one JSON line.

The interpreter truncates where a GPU rounds to bf16 and differs in float8, so that kernels write fp32 here, and float8
is compared by the share of equal codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from diffaccel.kernels.activate_rows import gelu_codes
from diffaccel.kernels.int4_weight import dequantize_int4_reference, expand_int4_reference, pack_int4
from diffaccel.kernels.int8_conv import int8_conv2d
from diffaccel.kernels.int8_linear import int8_linear_reference
from diffaccel.kernels.quantize_pictures import quantize_pictures_reference
from diffaccel.kernels.quantize_rows import quantize_rows_reference
from diffaccel.kernels.rope import joint_heads_reference, rotate
from diffaccel.kernels.streams import (
    gated_sum_fp32,
    gated_sums,
    modulate,
    modulate_fp32,
    norm_modulate,
    norm_modulate_codes,
)
from diffaccel.kernels.triton_activate import launch_gelu_codes
from diffaccel.kernels.triton_conv import ConvSizes, ConvTile, launch_int8_conv
from diffaccel.kernels.triton_int8 import Tile, launch_int8_linear
from diffaccel.kernels.triton_pictures import launch_quantize_pictures
from diffaccel.kernels.triton_rope import launch_rope
from diffaccel.kernels.triton_rows import launch_quantize_rows
from diffaccel.kernels.triton_streams import launch_affine, launch_norm
from diffaccel.kernels.triton_weights import launch_gemv, launch_int4, launch_int8
from diffaccel.kernels.weight_linear import weight_linear_reference

DRAWS = torch.Generator().manual_seed(0)
TILE = Tile(16, 32, 32, 4, 2)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAWS)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=DRAWS, dtype=torch.int8)


def same(x: torch.Tensor, y: torch.Tensor, tolerance: float = 0.0) -> bool:
    if tolerance == 0:
        return torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0))
    return bool(torch.allclose(x.float(), y.float(), rtol=tolerance, atol=tolerance, equal_nan=True))


def rows_of_integers() -> bool:
    x = normal(7, 300)
    x[1], x[2, 5], x[3, 299], x[4, 0] = 0, float("nan"), float("inf"), -float("inf")
    x[5, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]) * 0.25
    results = []
    for block in (x, x[:, ::2], x.half(), x[:1], x[:0]):
        (q, scale), (q_exact, scale_exact) = launch_quantize_rows(block, "int8"), quantize_rows_reference(block, "int8")
        results.append(same(q, q_exact) and same(scale, scale_exact))
    return all(results)


def rows_longer_than_a_block() -> bool:
    x = normal(2, 20000)
    x[1, 19999] = float("nan")
    (q, scale), (q_exact, scale_exact) = launch_quantize_rows(x, "int8"), quantize_rows_reference(x, "int8")
    return same(q, q_exact) and same(scale, scale_exact)


def rows_of_floats() -> bool:
    x = normal(5, 64)
    x[1], x[2, 5] = 0, float("nan")
    (q, scale), (q_exact, scale_exact) = launch_quantize_rows(x, "fp8"), quantize_rows_reference(x, "fp8")
    equal = (q.float() == q_exact.float()).float().mean()  # the interpreter misses the carry into the next power of two
    return float(equal) > 0.9 and same(scale, scale_exact) and not q[1:3].float().any()


def products(descriptors: bool) -> bool:
    results = []
    for m, n, k in ((33, 50, 112), (1, 7, 16), (64, 96, 160), (0, 5, 16), (17, 33, 48)):
        for bias in (None, normal(n)):
            a, w = codes(m, k), codes(n, k)
            scales = normal(m, 1).abs(), normal(n, 1).abs()
            y = launch_int8_linear(a, scales[0], w, scales[1], bias, torch.float32, TILE, descriptors)
            exact = int8_linear_reference(a, scales[0], w, scales[1], bias, torch.float32)
            results.append(same(y, exact, 1e-6 if bias is not None else 0.0) or same(y, exact, 2e-7))
    return all(results)


def products_of_any_depth() -> bool:
    a, w, one = codes(3, 33), codes(5, 33), torch.ones(5, 1)
    y = launch_int8_linear(a, one[:3], w, one, None, torch.float32, TILE, False)
    extreme = torch.full((1, 15360), 127, dtype=torch.int8)
    large = launch_int8_linear(extreme, one[:1], -extreme, one[:1], None, torch.float32, TILE, True)
    return same(y, int8_linear_reference(a, one[:3], w, one, None, torch.float32)) and float(large) == -247_741_440.0


def a_row_that_is_no_number() -> bool:
    a, w, scale = codes(4, 32), codes(6, 32), torch.ones(4, 1)
    scale[2] = float("nan")
    y = launch_int8_linear(a, scale, w, torch.ones(6, 1), None, torch.float32, TILE, True)
    return bool(y[2].isnan().all()) and bool(y[[0, 1, 3]].isfinite().all())


def pictures() -> bool:
    """To the bit, in both memory formats, odd sizes and parts of a picture that more than one program reads."""
    results = []
    for shape in ((3, 16, 5, 7), (2, 70, 9, 3), (1, 3, 1, 1), (0, 16, 4, 4), (2, 20, 64, 65)):
        x = normal(*shape)
        if shape[0] > 2:
            x[1], x[2, 5, 4, 6] = 0, float("nan")
        if shape[0] == 2:
            x[1, -1, -1, -1] = -float("inf")
        for block in (x, x.contiguous(memory_format=torch.channels_last), x.half(), x[:, ::2]):
            (q, scale), (q_exact, scale_exact) = launch_quantize_pictures(block), quantize_pictures_reference(block)
            results += [same(q, q_exact), same(scale, scale_exact), q.stride() == q_exact.stride()]
    return all(results)


def convolved(
    x: torch.Tensor, w: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int], descriptors: bool,
    bias: torch.Tensor | None, last: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The kernel's result, in memory that held not-a-numbers, and the formula's."""
    scales = normal(x.shape[0], 1).abs(), normal(w.shape[0], 1).abs()
    exact = int8_conv2d(x, scales[0], w, scales[1], bias, stride, padding, torch.float32, last, "reference")
    y = torch.full_like(exact, float("nan"))
    sizes = ConvSizes(*x.shape[:1], *x.shape[2:], *y.shape[2:], x.shape[1], *w.shape[:1], *w.shape[2:], stride, padding)
    tile = ConvTile(16, 16, 32, 4, 2, descriptors=descriptors)
    launch_int8_conv(x, scales[0], w, (scales[1], bias), y, sizes, last, tile)
    return y, exact


def convolutions(descriptors: bool) -> bool:
    results = []
    for (b, ci, height, width), (co, rows, columns), stride, padding in (
        ((2, 16, 5, 7), (20, 3, 3), (1, 1), (1, 1)), ((1, 48, 4, 4), (16, 3, 3), (1, 1), (0, 2)),
        ((3, 16, 2, 2), (7, 3, 3), (1, 1), (1, 1)), ((2, 32, 6, 3), (33, 1, 1), (1, 1), (0, 0)),
        ((1, 16, 6, 20), (5, 5, 2), (1, 1), (2, 1)), ((0, 16, 5, 5), (4, 3, 3), (1, 1), (1, 1)),
        ((2, 16, 7, 6), (18, 3, 3), (2, 2), (1, 1)), ((1, 48, 9, 5), (16, 3, 2), (2, 3), (0, 1)),
    ):  # fmt: skip
        if descriptors and stride != (1, 1):
            continue
        for last in (True, False):
            for bias in (None, normal(co)):
                x, w = codes(b, ci, height, width), codes(co, ci, rows, columns)
                y, exact = convolved(x, w, stride, padding, descriptors, bias, last)
                results.append(same(y, exact, 1e-6 if bias is not None else 2e-7))
    return all(results)


def extremes_of_convolutions() -> bool:
    """Codes of 127 alone have known sums: 9 taps inside, 6 at an edge, 4 in a corner."""
    x, w, one = (torch.full(shape, 127, dtype=torch.int8) for shape in ((1, 64, 4, 4), (3, 64, 3, 3), (1, 1, 1, 1)))
    results = []
    for descriptors in (True, False):
        y = torch.full((1, 3, 4, 4), float("nan")).contiguous(memory_format=torch.channels_last)
        sizes = ConvSizes(1, 4, 4, 4, 4, 64, 3, 3, 3, (1, 1), (1, 1))
        unit, tile = torch.ones(3, 1), ConvTile(16, 16, 32, 4, 2, descriptors=descriptors)
        launch_int8_conv(x, unit[:1], -w, (unit, None), y, sizes, True, tile)
        taps = torch.nn.functional.conv2d(one.float().expand(1, 1, 4, 4) / 127, torch.ones(1, 1, 3, 3), padding=1)
        results.append(torch.equal(y, (-(127**2) * 64 * taps).expand(1, 3, 4, 4)))
    return all(results)


def expansions() -> bool:
    results = []
    for n, k, groups in ((5, 64, 1), (33, 256, 8), (70, 600, 6)):
        packed = pack_int4(torch.randint(-7, 8, (n, k), generator=DRAWS, dtype=torch.int8))
        multipliers = torch.randint(1, 19, (n, groups), generator=DRAWS, dtype=torch.uint8)
        expanded = launch_int4(packed, multipliers, torch.int8)
        results.append(same(expanded, expand_int4_reference(packed, multipliers)))
        scales = normal(n, groups).abs()
        dense = launch_int4(packed, scales, torch.float32)
        results.append(same(dense, dequantize_int4_reference(packed, scales, torch.float32)))
        rows = normal(n, 1).abs()
        results.append(same(launch_int8(w := codes(n, k), rows, torch.float32), w.float() * rows))
    return all(results)


def few_rows() -> bool:
    results = []
    for m, n, k in ((1, 70, 256), (2, 64, 320), (16, 33, 128)):
        x = normal(m, k).half()
        for bias in (None, normal(n)):
            w, scale = codes(n, k), normal(n, 1).abs() * 0.01
            exact = weight_linear_reference(x.double(), w, scale, bias)
            results.append(same(launch_gemv(x, w, scale, bias), exact, 1e-2))
            packed, scales = pack_int4(w.clamp(-7, 7)), normal(n, k // 64).abs() * 0.1
            exact = weight_linear_reference(x.double(), packed, scales, bias)
            results.append(same(launch_gemv(x, packed, scales, bias), exact, 1e-2))
    return all(results)


def streams_of(dtype: torch.dtype, batch: int, lengths: tuple[int, ...], width: int) -> tuple[list, list]:  # type: ignore[type-arg]
    """Streams ``(x, scale, shift)``, and ``(y, gate)`` of each; the vectors are parts of longer ones."""
    streams, gated = [], []
    for length in lengths:
        scale, shift, gate = normal(batch, 3 * width).to(dtype).chunk(3, dim=1)
        x, y = normal(batch, length, width).to(dtype), normal(batch, length, width).to(dtype)
        streams.append((x, scale, shift))
        gated.append((y, gate))
    return streams, gated


SIZES = ((2, (5, 11), 40), (1, (3, 4), 64), (3, (9,), 1100), (1, (0, 6), 16))


def sums_and_modulations() -> bool:
    """To the bit in fp32 and fp16, which the interpreter rounds as a GPU does."""
    results = []
    for dtype in (torch.float32, torch.float16):
        for size in SIZES:
            streams, gated = streams_of(dtype, *size)
            results += map(same, launch_affine(streams, False), modulate(streams, "reference"))
            triples = [(y, gate, x) for (y, gate), (x, _, _) in zip(gated, streams, strict=True)]
            results += map(same, launch_affine(triples, True), gated_sums(triples, "reference"))
            (x, scale, shift), (y, gate) = streams[-1], gated[-1]
            vectors = scale.float(), shift.float(), gate.float()
            (wide,) = launch_affine([(x.float(), *vectors[:2])], False, dtype)
            results.append(same(wide, modulate_fp32(x.float(), *vectors[:2], dtype, "reference")))
            (wide,) = launch_affine([(y, vectors[2], x)], True, dtype)
            results.append(same(wide, gated_sum_fp32(y, vectors[2], x, "reference")))
            strided = [(x[:, ::2], scale, shift) for x, scale, shift in streams]
            results += map(same, launch_affine(strided, False), modulate(strided, "reference"))
    return all(results)


def norms_of_streams() -> bool:
    results = []
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-2)):
        for size in SIZES:
            streams, gated = streams_of(dtype, *size)
            for rounds in (True, False):
                for pairs in (None, gated):
                    sums, outputs, _ = launch_norm(streams, pairs, 1e-6, None, rounds)
                    exact_sums, exact = norm_modulate(streams, 1e-6, pairs, mode="reference")
                    results += [same(y, z, tolerance) for y, z in zip(outputs, exact, strict=True)]
                    results += map(same, sums, exact_sums if pairs else [])
    return all(results)


def codes_of_norms() -> bool:
    """Within one code of torch's norm, since sums are added in another order; a row that is no number is none."""
    results = []
    for size in SIZES:
        streams, gated = streams_of(torch.float32, *size)
        if streams[-1][0].numel():
            streams[-1][0][0, 2, 3] = float("nan")
        for pairs in (None, gated):
            _, outputs, scales = launch_norm(streams, pairs, 1e-6, "int8", True)
            _, exact = norm_modulate_codes(streams, 1e-6, "int8", pairs, mode="reference")
            for q, scale, (q_exact, scale_exact) in zip(outputs, scales, exact, strict=True):
                results.append(bool(((q.flatten(0, 1).int() - q_exact.int()).abs() <= 1).all()))
                results.append(same(scale.flatten(0, 1), scale_exact, 1e-5))
    return all(results)


def constant_rows_and_neutral_gates() -> bool:
    """The norm of a constant row is 0, so that the result is the shift; a gate of 0 leaves x; a scale of -1 too."""
    streams, gated = streams_of(torch.float32, 2, (5, 7), 48)
    flat = [(torch.full_like(x, 3.0), scale, shift) for x, scale, shift in streams]
    _, outputs, _ = launch_norm(flat, None, 1e-6, None, True)
    shifts = [shift[:, None].expand_as(x) for x, _, shift in flat]
    erased = [(x, torch.full_like(scale, -1.0), shift) for x, scale, shift in streams]
    closed = [(y, torch.zeros_like(gate), x) for (y, gate), (x, _, _) in zip(gated, streams, strict=True)]
    pairs = [*zip(outputs, shifts, strict=True), *zip(launch_affine(erased, False), shifts, strict=True)]
    return all(same(y, z) for y, z in [*pairs, *zip(launch_affine(closed, True), [x for *_, x in closed], strict=True)])


def heads() -> bool:
    results = []
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-2)):
        for head, count, lengths in ((16, 3, (3, 7)), (8, 5, (4,)), (128, 2, (2, 3)), (64, 9, (5,))):
            width, total = head * count, sum(lengths)
            streams = [tuple(normal(2, t, 3 * width).to(dtype).chunk(3, dim=2)) for t in lengths]
            norms = [(normal(head).to(dtype), normal(head).to(dtype)) for _ in lengths]
            for rotary in (None, (normal(total, head), normal(total, head))):
                ours = launch_rope(streams, norms, rotary, head, 1e-6)
                exact = joint_heads_reference(streams, norms, rotary, head, 1e-6)
                results += [same(x, y, tolerance) for x, y in zip(ours, exact, strict=True)]
                q, k, v = launch_rope(streams, None, rotary, head, 1e-6)
                plain = [torch.cat(parts, 1).unflatten(2, (-1, head)) for parts in zip(*streams, strict=True)]
                turned = plain if rotary is None else [rotate(plain[0], rotary), rotate(plain[1], rotary), plain[2]]
                results += map(same, (q, k, v), turned)
    return all(results)


def identity_of_rotation() -> bool:
    """With cos 1 and sin 0 nothing turns; any angle keeps the length of a pair."""
    stream = tuple(normal(1, 6, 32) for _ in range(3))
    q, _, _ = launch_rope([stream], None, (torch.ones(6, 16), torch.zeros(6, 16)), 16, 1e-6)
    angle = normal(6, 8).repeat_interleave(2, dim=1)
    turned, _, _ = launch_rope([stream], None, (angle.cos(), angle.sin()), 16, 1e-6)
    pairs = stream[0].reshape(1, 6, 2, 8, 2).norm(dim=-1)
    return same(q.flatten(2), stream[0]) and same(turned.unflatten(3, (8, 2)).norm(dim=-1), pairs, 1e-6)


def activations() -> bool:
    """Within one code: the kernel's tanh and torch's differ in the last bits."""
    results = []
    for width, beside in ((300, None), (64, 40), (17, 5)):
        for formula in ("tanh", "none"):
            x = normal(1, 7, width) * 2
            x[0, 1], x[0, 2, 5], x[0, 3, 0] = 0, float("nan"), float("inf")
            side = None if beside is None else normal(1, 7, beside)
            rows = None if side is None else side.flatten(0, 1)
            q, scale = launch_gelu_codes(rows, x.flatten(0, 1), "int8", formula == "tanh")
            q_exact, scale_exact = gelu_codes(side, x, "int8", formula, "reference")
            results.append(bool(((q.int() - q_exact.int()).abs() <= 1).all()) and same(scale, scale_exact, 1e-5))
    return all(results)


CHECKS: dict[str, Callable[[], bool]] = {
    "rows of integers": rows_of_integers,
    "rows longer than a block": rows_longer_than_a_block,
    "rows of floats": rows_of_floats,
    "products by descriptors": lambda: products(True),
    "products by pointers": lambda: products(False),
    "products of any depth": products_of_any_depth,
    "a row that is no number": a_row_that_is_no_number,
    "pictures": pictures,
    "convolutions by descriptors": lambda: convolutions(True),
    "convolutions by pointers": lambda: convolutions(False),
    "extremes of convolutions": extremes_of_convolutions,
    "expansions": expansions,
    "few rows": few_rows,
    "sums and modulations": sums_and_modulations,
    "norms of streams": norms_of_streams,
    "codes of norms": codes_of_norms,
    "constant rows and neutral gates": constant_rows_and_neutral_gates,
    "heads": heads,
    "identity of rotation": identity_of_rotation,
    "activations": activations,
}

if __name__ == "__main__":
    print(json.dumps({name: check() for name, check in CHECKS.items()}))
