"""Tables of ``bench_quant`` of 3x3 convolutions: every tile of the int8 kernel, and int8 against cuDNN in bf16."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels import winners
from diffaccel.kernels.dispatch import capability
from diffaccel.kernels.int8_conv import int8_conv2d
from diffaccel.kernels.quantize_pictures import quantize_pictures
from diffaccel.kernels.quantize_rows import quantize_rows
from diffaccel.kernels.triton_conv import TILES, ConvSizes, ConvTile, fitting_depth, launch_int8_conv

DEVICE = torch.device("cuda")
BATCH = 2
# side of the input, CI, CO, stride: SDXL's at 1024x1024, with both guidance branches
CONVOLUTIONS = (
    (128, 320, 320, 1), (64, 640, 640, 1), (32, 1280, 1280, 1), (128, 960, 320, 1), (64, 1920, 640, 1),
    (32, 2560, 1280, 1), (128, 320, 320, 2),
)  # fmt: skip
MORE = ((128, 640, 320, 1), (64, 320, 640, 1), (64, 960, 640, 1), (64, 1280, 640, 1), (32, 640, 1280, 1),
        (32, 1920, 1280, 1), (64, 1280, 1280, 1), (128, 640, 640, 1))  # fmt: skip


def operands(side: int, ci: int, co: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pictures, weight and bias in bf16, channels last."""
    shapes = (BATCH, ci, side, side), (co, ci, 3, 3), (co,)
    x, w, bias = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes)
    place = torch.channels_last
    return x.contiguous(memory_format=place), (w * (9 * ci) ** -0.5).contiguous(memory_format=place), bias


def weight_codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of a weight, channels last, and its scales."""
    codes, scale = quantize_rows(w.permute(0, 2, 3, 1).flatten(1), "int8")
    return codes.reshape(len(w), 3, 3, w.shape[1]).permute(0, 3, 1, 2), scale


def conv_ways(side: int, ci: int, co: int, stride: int) -> dict[str, Callable[[], Tensor]]:
    """Return each way of computing a convolution; "planes" reads and writes contiguous pictures, as norms do."""
    x, w, bias = operands(side, ci, co)
    planes, (w8, w8s), (x8, x8s) = x.contiguous(), weight_codes(w), quantize_pictures(x)
    place = (stride, stride), (1, 1), torch.bfloat16
    return {
        "bf16": lambda: F.conv2d(x, w, bias, stride, 1),
        "bf16 planes": lambda: F.conv2d(planes, w, bias, stride, 1).contiguous(),
        "int8": lambda: int8_conv2d(x8, x8s, w8, w8s, bias, *place),
        "int8 planes": lambda: int8_conv2d(x8, x8s, w8, w8s, bias, *place, False),
        "int8 +q": lambda: int8_conv2d(*quantize_pictures(x), w8, w8s, bias, *place),
        "int8 planes +q": lambda: int8_conv2d(*quantize_pictures(planes), w8, w8s, bias, *place, False),
    }


def flops(side: int, ci: int, co: int, stride: int) -> int:
    return 2 * BATCH * (side // stride) ** 2 * 9 * ci * co


def conv_table(timer: Any) -> dict[str, Any]:
    """Measure every way on every convolution: TFLOP/s, difference from bf16, ratios; and the codes alone."""
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    for shape in (*CONVOLUTIONS, *MORE):
        ways = conv_ways(*shape)
        exact = ways["bf16"]().double()
        errors = {name: float((way().double() - exact).norm() / exact.norm()) for name, way in ways.items()}
        seconds = {name: timer(way) for name, way in ways.items()}
        rates = {name: 1e-12 * flops(*shape) / s for name, s in seconds.items()}
        x = operands(*shape[:3])[0]
        inputs = {"codes": x, "codes of planes": x.contiguous()}
        codes = {name: 1e6 * timer(lambda x=x: quantize_pictures(x)) for name, x in inputs.items()}
        rows.append({"shape": shape, "tflops": rates, "codes_us": codes, "difference_from_bf16": errors})
        side, ci, co, stride = shape
        cells = [f"{rate:.0f}" for rate in rates.values()] + [f"{us:.1f}" for us in codes.values()]
        ratios = rates["int8"] / rates["bf16"], rates["int8 +q"] / rates["bf16"]
        planes = rates["int8 planes +q"] / rates["bf16 planes"]
        cells += [f"{ratio:.2f}" for ratio in (*ratios, planes)] + [f"{errors['int8 +q']:.4f}"]
        print(f"| {ci}->{co} at {side}, step {stride} | " + " | ".join(cells) + " |", flush=True)
        del ways, exact, x, inputs
        torch.cuda.empty_cache()
    torch.backends.cudnn.benchmark = False
    means = {name: math.exp(statistics.fmean(math.log(row["tflops"][name]) for row in rows)) for name in rates}
    print("| geometric mean | " + " | ".join(f"{mean:.0f}" for mean in means.values()) + " |")
    return {"batch": BATCH, "rows": rows, "geometric_means": means}


HEADER = (
    "| TFLOP/s | bf16 | bf16 planes | int8 | int8 planes | int8 +q | int8 planes +q | codes, us | of planes, us "
    "| int8 / bf16 | +q | planes +q | error |"
)


def candidates(ci: int) -> list[ConvTile]:
    """Return the tiles that may win for a number of channels."""
    tiles = []
    for tile, _ in TILES:
        for depth in {fitting_depth(tile, ci), replace(tile, k=64, stages=tile.stages + 1)}:
            tiles += [replace(depth, programs=programs) for programs in ((1, 2) if tile.m * tile.n <= 16384 else (1,))]
    return tiles


def tune_conv_table(timer: Any) -> dict[str, Any]:
    """Measure every tile of the convolution on every shape of step 1 and return the winners."""
    table, rows = {}, []
    for side, ci, co, stride in (*CONVOLUTIONS, *MORE):
        if stride != 1:
            continue
        x, w, bias = operands(side, ci, co)
        (x8, x_scale), (w8, w_scale) = quantize_pictures(x), weight_codes(w)
        sizes = ConvSizes(BATCH, side, side, side, side, ci, co, 3, 3, (1, 1), (1, 1))
        y = x.new_empty((BATCH, side, side, co)).permute(0, 3, 1, 2)
        times = {}
        for tile in [*candidates(ci), ConvTile(128, 128, 64, 8, 4, descriptors=False)]:
            try:
                times[tile] = timer(
                    lambda tile=tile, x8=x8, x_scale=x_scale, w8=w8, rest=(w_scale, bias), y=y, sizes=sizes: (
                        launch_int8_conv(x8, x_scale, w8, rest, y, sizes, True, tile)
                    )
                )
            except Exception as error:
                print(f"{tile}: {type(error).__name__}: {str(error)[:200]}")
        best = min(times, key=times.__getitem__)
        table[winners.key("int8_conv2d", capability(DEVICE), *sizes.product)] = asdict(best)
        rates = {
            _name(tile): 1e-12 * flops(side, ci, co, 1) / s for tile, s in sorted(times.items(), key=lambda i: i[1])
        }
        rows.append({"shape": (side, ci, co), "tflops": rates})
        print(
            f"| {ci}->{co} at {side} | " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()), flush=True
        )
    return {"rows": rows, "winners": table}


def _name(tile: ConvTile) -> str:
    ways = f"{' ws' * tile.specialized}{' x2' * (tile.programs == 2)}{' pointers' * (not tile.descriptors)}"
    return f"{tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages}{ways}"
