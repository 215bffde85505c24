"""Run as a script: compile the kernels of few bits for sm_90 without a GPU; prints one JSON line a kernel."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffaccel.kernels import triton_low_bit
from diffaccel.kernels.triton_int8 import Tile
from tests.kernels.compiled import _resources

POINTERS = {"c_ptr": "*bf16", "x_ptr": "*bf16", "bias_ptr": "*bf16", "packed_ptr": "*u8", "clip_ptr": "*fp32"}
POINTERS |= {
    "a_stats_ptr": "*fp32",
    "w_scale_ptr": "*fp32",
    "w_zero_ptr": "*fp32",
    "w_sum_ptr": "*fp32",
    "stats_ptr": "*fp32",
}
TOKENS = {"LARGEST": 15.0, "HALF": 8.0, "INVERSE": 1 / 15, "LEAST": 1e-9, "SYMMETRIC": False}


def product(tile: Tile, is_int8: bool) -> dict[str, Any]:
    kind = "i8" if is_int8 else "fp8e4nv"
    types = {"a_desc": f"tensordesc<{kind}[{tile.m},{tile.k}]>", "w_desc": f"tensordesc<{kind}[{tile.n},{tile.k}]>"}
    constants = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP_M": 8, "HAS_BIAS": True, "PROGRAMS": 132}
    return {"kernel": triton_low_bit.low_bit_descriptors_kernel, "types": {**POINTERS, **types},
            "constants": {**constants, "IS_INT8": is_int8}, "warps": tile.warps, "stages": tile.stages}  # fmt: skip


def by_pointers(tile: Tile, is_int8: bool) -> dict[str, Any]:
    kind = "*i8" if is_int8 else "*fp8e4nv"
    constants = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP_M": 8, "HAS_BIAS": True, "IS_INT8": is_int8}
    return {"kernel": triton_low_bit.low_bit_pointers_kernel, "types": {**POINTERS, "a_ptr": kind, "w_ptr": kind},
            "constants": constants, "warps": tile.warps, "stages": tile.stages}  # fmt: skip


def simple(kernel: Any, constants: dict[str, Any], warps: int, **types: str) -> dict[str, Any]:
    return {"kernel": kernel, "types": {**POINTERS, **types}, "constants": constants, "warps": warps, "stages": 3}


def name_of(tile: Tile) -> str:
    return f"{tile.m}x{tile.n} {tile.warps} warps"


EXPAND, ROWS = triton_low_bit.expand_codes_kernel, triton_low_bit.quantize_tokens_kernel
CASES: dict[str, dict[str, Any]] = {
    **{f"fp8 {name_of(t)}": product(t, False) for t, _ in triton_low_bit.LOW_BIT_TILES},
    **{f"int8 {name_of(t)}": product(t, True) for t, _ in triton_low_bit.LOW_BIT_TILES},
    "fp8 pointers": by_pointers(triton_low_bit.FLOAT8_POINTER_TILE, False),
    "int8 pointers": by_pointers(triton_low_bit.POINTER_TILE, True),
    "expand 4": simple(EXPAND, {"CENTER": 8, "BITS": 4, "BN": 16, "BK": 256}, 4, out_ptr="*fp8e4nv"),
    "expand 3": simple(EXPAND, {"CENTER": 4, "BITS": 3, "BN": 16, "BK": 256}, 4, out_ptr="*i8"),
    "tokens": simple(ROWS, {**TOKENS, "BLOCK": 4096, "IS_LONG": False}, 4, q_ptr="*fp8e4nv"),
    "tokens long": simple(ROWS, {**TOKENS, "BLOCK": 8192, "IS_LONG": True}, 8, q_ptr="*i8"),
}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> dict[str, Any]:
    """Compile one kernel and return what its PTX and its resource usage say."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in ("K", "stride_a", "stride_w")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": kernel is not ROWS}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = binary.asm["ptx"]
    return {
        "float8 tensor cores": len(re.findall(r"wgmma\.mma_async\S*f32\.e4m3\.e4m3", ptx)),
        "int8 tensor cores": len(re.findall(r"wgmma\.mma_async\S*s32\.s8\.s8", ptx)),
        "additions": len(re.findall(r"add\.(?:rn\.)?f32", ptx)),
        "fused multiplies": len(re.findall(r"fma\.rn\.f32", ptx)),
        "shared": binary.metadata.shared,
        **_resources(binary.asm["cubin"]),
    }


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        print(json.dumps({"name": name, **compiled(**CASES[name])}), flush=True)
