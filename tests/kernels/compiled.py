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

from diffaccel.kernels import (
    triton_activate,
    triton_conv,
    triton_int8,
    triton_pictures,
    triton_rope,
    triton_rows,
    triton_streams,
    triton_weights,
)

POINTERS = {"a_ptr": "*i8", "w_ptr": "*i8", "c_ptr": "*bf16", "y_ptr": "*bf16", "x_ptr": "*bf16"}
POINTERS |= {"x_scale_ptr": "*fp32", "part_ptr": "*fp32"}
POINTERS |= {"a_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "scale_ptr": "*fp32", "bias_ptr": "*bf16"}
INTEGERS = {"LARGEST": 127.0, "INVERSE": 1 / 127, "SMALLEST": 1e-12, "IS_INT8": True}
FLOATS = {"LARGEST": 448.0, "INVERSE": 1 / 448, "SMALLEST": 1e-12, "IS_INT8": False}
TOKENS = dict.fromkeys(
    ("x_a", "x_b", "y_a", "y_b", "gate_a", "gate_b", "scale_a", "scale_b", "shift_a", "shift_b", "factor_a", "factor_b",
     "term_a", "term_b", "sum_ptr", "out_ptr", "beside_ptr", "q_a", "q_b", "k_a", "k_b", "v_a", "v_b", "norm_q_a",
     "norm_q_b", "norm_k_a", "norm_k_b", "q_ptr", "k_ptr", "v_ptr"), "*bf16"
) | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "row_scale_ptr": "*fp32", "epsilon": "fp32"}  # fmt: skip
STREAMS = {"IS_TWO": True, "BLOCK": 4096}
INT8 = {"GROUP_M": 8, "HAS_BIAS": True}


def described(tile: triton_int8.Tile) -> dict[str, Any]:
    types = {**POINTERS, "a_desc": f"tensordesc<i8[{tile.m},{tile.k}]>", "w_desc": f"tensordesc<i8[{tile.n},{tile.k}]>"}
    constants = {"BM": tile.m, "BN": tile.n, "BK": tile.k, **INT8, "PROGRAMS": 132, "SPECIALIZED": tile.specialized}
    return {"kernel": triton_int8.int8_linear_descriptors_kernel, "types": types, "constants": constants,
            "warps": tile.warps, "stages": tile.stages}  # fmt: skip


CONV = {**INT8, "ROWS": 3, "COLUMNS": 3}


def convolved(tile: triton_conv.ConvTile, last: bool) -> dict[str, Any]:
    box = triton_conv.box_of(tile.m, 2, 64, 64)
    x_desc = f"tensordesc<i8[{','.join(map(str, (*box, tile.k)))}]>"
    types = {**POINTERS, "x_desc": x_desc, "w_desc": f"tensordesc<i8[{tile.n},{tile.k}]>"}
    sizes = {"BI": box[0], "BH": box[1], "BW": box[2], "BN": tile.n, "BK": tile.k, "IS_LAST": last}
    return {"kernel": triton_conv.int8_conv_descriptors_kernel, "types": types, "warps": tile.warps,
            "constants": {**CONV, **sizes, "PROGRAMS": 132, "SPECIALIZED": tile.specialized},
            "stages": tile.stages}  # fmt: skip


def case(kernel: Any, constants: dict[str, Any], warps: int, stages: int = 3, **types: str) -> dict[str, Any]:
    return {"kernel": kernel, "types": {**POINTERS, **types}, "constants": constants, "warps": warps, "stages": stages}


CASES: dict[str, dict[str, Any]] = {f"int8 {t.m}x{t.n} {t.warps} warps": described(t) for t, _ in triton_int8.TILES}
CASES |= {f"int8 conv {t.m}x{t.n} {t.warps} warps": convolved(t, True) for t, _ in triton_conv.TILES}
CASES["int8 conv planes 256x128 8 warps"] = convolved(triton_conv.TILES[0][0], False)
_tile = triton_int8.POINTER_TILE
_conv_tile = triton_conv.POINTER_TILE
CASES |= {
    f"int8 conv pointers {'last' if last else 'planes'}": case(
        triton_conv.int8_conv_pointers_kernel,
        {"BM": _conv_tile.m, "BN": _conv_tile.n, "BK": _conv_tile.k, **CONV, "IS_LAST": last}, _conv_tile.warps,
        _conv_tile.stages, x_ptr="*i8",
    )
    for last in (True, False)
}  # fmt: skip
CASES["pictures parts"] = case(triton_pictures.picture_parts_kernel, {"BLOCK": 4096, "PARTS": 256}, 8)
CASES |= {
    f"pictures {'last' if last else 'planes'}": case(
        triton_pictures.picture_codes_kernel,
        {"LARGEST": 127.0, "INVERSE": 1 / 127, "SMALLEST": 1e-12, "PARTS": 256, "IS_LAST": last, "BC": 64, "BP": 64}, 8,
        q_ptr="*i8",
    )
    for last in (True, False)
}  # fmt: skip
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
    **{
        f"streams {name}": case(
            triton_streams.affine_kernel,
            {"IS_GATE": name == "gated", "ROUNDS": True, "IS_TWO": True, "ROWS": 4, "BLOCK": 1024}, 4, **TOKENS,
        )
        for name in ("gated", "modulated")
    },
    "streams folded": case(
        triton_streams.norm_kernel,
        {**INTEGERS, **STREAMS, "HAS_SUM": True, "ROUNDS": False, "CODES": False}, 4, **TOKENS,
    ),
    "streams int8": case(
        triton_streams.norm_kernel,
        {**INTEGERS, **STREAMS, "HAS_SUM": True, "ROUNDS": True, "CODES": True}, 4, **{**TOKENS, "out_ptr": "*i8"},
    ),
    "streams fp8": case(
        triton_streams.norm_kernel,
        {**FLOATS, **STREAMS, "HAS_SUM": False, "ROUNDS": True, "CODES": True}, 4, **{**TOKENS, "out_ptr": "*fp8e4nv"},
    ),
    "activated int8": case(
        triton_activate.gelu_codes_kernel,
        {**INTEGERS, "IS_TANH": True, "HAS_BESIDE": True, "BLOCK0": 4096, "BLOCK": 16384}, 16,
        **{**TOKENS, "q_ptr": "*i8"},
    ),
    "heads": case(
        triton_rope.rope_kernel,
        {"HAS_NORM": True, "HAS_ROPE": True, "IS_TWO": True, "LANES": 32, "HEADS": 8}, 4, **TOKENS,
    ),
    "few rows int4": case(
        triton_weights.int4_gemv_kernel, {"BN": 64, "BYTES": 64, "ROWS": 16, "HAS_BIAS": True}, 4, 4, w_ptr="*u8",
    ),
}  # fmt: skip


SIZES = {"out_height", "out_width", "pixels", "length", "span"}  # of usual pictures, multiples of 16
UNFUSED = (  # launched without fused multiplies and adds
    triton_rows.quantize_rows_kernel, triton_streams.affine_kernel, triton_streams.norm_kernel,
    triton_activate.gelu_codes_kernel, triton_rope.rope_kernel, triton_pictures.picture_codes_kernel,
)  # fmt: skip


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> dict[str, Any]:
    """Compile one kernel and return what its PTX and its resource usage say."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [
        i
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in SIZES or (n.isupper() and n not in constants)
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in [*aligned, *_strides(names)]}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": kernel not in UNFUSED}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = binary.asm["ptx"]
    usage = _resources(binary.asm["cubin"])
    return {
        "int8 tensor cores": len(re.findall(r"wgmma\.mma_async\S*s32\.s8\.s8", ptx)),
        "tensor copies": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "specialized": "setmaxnreg" in ptx,
        "fused multiplies": len(re.findall(r"fma\.rn\.f32", ptx)),
        "wide loads": len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx)),
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
