"""Run as a script: compile every kernel for sm_90 without a GPU; prints what the machine code has as one JSON line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffaccel.kernels import triton_int8, triton_rows, triton_weights

POINTERS = {"a_ptr": "*i8", "w_ptr": "*i8", "c_ptr": "*bf16", "y_ptr": "*bf16", "x_ptr": "*bf16"}
POINTERS |= {"a_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "scale_ptr": "*fp32", "bias_ptr": "*bf16"}
INTEGERS = {"LARGEST": 127.0, "INVERSE": 1 / 127, "SMALLEST": 1e-12, "IS_INT8": True}
FLOATS = {"LARGEST": 448.0, "INVERSE": 1 / 448, "SMALLEST": 1e-12, "IS_INT8": False}
INT8 = {"GROUP_M": 8, "HAS_BIAS": True}


def described(tile: triton_int8.Tile) -> dict[str, Any]:
    types = {**POINTERS, "a_desc": f"tensordesc<i8[{tile.m},{tile.k}]>", "w_desc": f"tensordesc<i8[{tile.n},{tile.k}]>"}
    constants = {"BM": tile.m, "BN": tile.n, "BK": tile.k, **INT8, "PROGRAMS": 132, "SPECIALIZED": tile.specialized}
    return {"kernel": triton_int8.int8_linear_descriptors_kernel, "types": types, "constants": constants,
            "warps": tile.warps, "stages": tile.stages}  # fmt: skip


def case(kernel: Any, constants: dict[str, Any], warps: int, stages: int = 3, **types: str) -> dict[str, Any]:
    return {"kernel": kernel, "types": {**POINTERS, **types}, "constants": constants, "warps": warps, "stages": stages}


CASES: dict[str, dict[str, Any]] = {f"int8 {t.m}x{t.n} {t.warps} warps": described(t) for t, _ in triton_int8.TILES}
_tile = triton_int8.POINTER_TILE
CASES |= {
    "int8 pointers": case(
        triton_int8.int8_linear_pointers_kernel,
        {"BM": _tile.m, "BN": _tile.n, "BK": _tile.k, **INT8}, _tile.warps, _tile.stages,
    ),
    "rows int8": case(
        triton_rows.quantize_rows_kernel,
        {**INTEGERS, "BLOCK": 4096, "IS_LONG": False}, 4, q_ptr="*i8",
    ),
    "rows fp8": case(
        triton_rows.quantize_rows_kernel,
        {**FLOATS, "BLOCK": 16384, "IS_LONG": False}, 16, q_ptr="*fp8e4nv",
    ),
    "rows long": case(
        triton_rows.quantize_rows_kernel,
        {**INTEGERS, "BLOCK": 8192, "IS_LONG": True}, 8, q_ptr="*i8",
    ),
    "int4 to bf16": case(
        triton_weights.int4_kernel, {"BN": 32, "BYTES": 128}, 4,
        packed_ptr="*u8", group_ptr="*fp32", out_ptr="*bf16",
    ),
    "int4 to int8": case(
        triton_weights.int4_kernel, {"BN": 32, "BYTES": 128}, 4, packed_ptr="*u8", group_ptr="*u8", out_ptr="*i8",
    ),
    "codes to bf16": case(triton_weights.int8_kernel, {"BN": 16, "BK": 256}, 4, out_ptr="*bf16"),
    "few rows int8": case(
        triton_weights.int8_gemv_kernel, {"BN": 64, "BK": 128, "ROWS": 16, "HAS_BIAS": True}, 4, 4,
    ),
    "few rows int4": case(
        triton_weights.int4_gemv_kernel, {"BN": 64, "BYTES": 64, "ROWS": 16, "HAS_BIAS": True}, 4, 4, w_ptr="*u8",
    ),
}  # fmt: skip


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> dict[str, Any]:
    """Compile one kernel and return what its PTX and its resource usage say."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or (n.isupper() and n not in constants)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in [*aligned, *_strides(names)]}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    is_rows = kernel is triton_rows.quantize_rows_kernel  # launched without fused multiplies and adds
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": not is_rows}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = binary.asm["ptx"]
    usage = _resources(binary.asm["cubin"])
    return {
        "int8 tensor cores": len(re.findall(r"wgmma\.mma_async\S*s32\.s8\.s8", ptx)),
        "tensor copies": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "specialized": "setmaxnreg" in ptx,
        "fused multiplies": len(re.findall(r"fma\.rn\.f32", ptx)),
        "shared": binary.metadata.shared,
        **usage,
    }


def _strides(names: list[str]) -> list[int]:
    return [i for i, name in enumerate(names) if name.startswith("stride")]


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text.stdout)
    assert found is not None, text.stdout
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[4])}


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        print(json.dumps({"name": name, **compiled(**CASES[name])}), flush=True)
