"""Tables of ``scripts.bench_quant``: passes over streams against torch's own operations, and seconds of the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

import diffaccel
from diffaccel.kernels.activate_rows import gelu_codes
from diffaccel.kernels.fp8_linear import fp8_linear
from diffaccel.kernels.int8_linear import int8_linear
from diffaccel.kernels.quantize_rows import quantize_rows, quantize_rows_reference
from diffaccel.kernels.rope import agrees, joint_heads, joint_heads_reference
from diffaccel.kernels.streams import gated_sums, modulate, norm_modulate, norm_modulate_codes
from diffaccel.modules import Capture, FusedBlocks

DEVICE = torch.device("cuda")
TEXT, IMAGE, WIDTH, HIDDEN, HEAD = 512, 4096, 3072, 12288, 128  # FLUX.1-dev at 1024x1024
EPSILON = 1e-6
Way = Callable[[], Any]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def formula(streams: Any, gated: Any, codes: Any) -> Any:
    """Return norms, modulated and quantized, of streams by torch's operations."""
    results = []
    for (x, scale, shift), (y, gate) in zip(streams, gated or [(None, None)] * len(streams), strict=True):
        total = x if y is None else x + gate.unsqueeze(1) * y
        out = F.layer_norm(total, (WIDTH,), None, None, EPSILON) * (1 + scale[:, None]) + shift[:, None]
        results.append((total, quantize_rows_reference(out.flatten(0, 1), codes) if codes else out))
    return results


def activated(beside: Tensor | None, x: Tensor, codes: Any) -> Any:
    """Return the codes of a hidden layer by torch's operations."""
    y = F.gelu(x, approximate="tanh")
    y = y if beside is None else torch.cat([beside, y], dim=-1)
    return quantize_rows_reference(y.flatten(0, 1), codes)


def passes() -> dict[str, tuple[int, Way, Way]]:
    """Return, for each pass, the bytes that it must move, its kernel, and torch's operations."""
    vectors = normal(1, 12 * WIDTH).chunk(12, dim=1)
    streams = [(normal(1, t, WIDTH), vectors[6 * i], vectors[6 * i + 1]) for i, t in enumerate((TEXT, IMAGE))]
    gated = [(normal(1, t, WIDTH), vectors[6 * i + 2]) for i, t in enumerate((TEXT, IMAGE))]
    one = [(normal(1, TEXT + IMAGE, WIDTH), vectors[0], vectors[1])]
    triples = [(y, gate, x) for (y, gate), (x, _, _) in zip(gated, streams, strict=True)]
    projections = [tuple(normal(1, t, WIDTH) for _ in range(3)) for t in (TEXT, IMAGE)]
    joint: Any = [tuple(normal(1, TEXT + IMAGE, WIDTH) for _ in range(3))]
    norms = [(normal(HEAD), normal(HEAD)) for _ in range(2)]
    angle = torch.rand(TEXT + IMAGE, HEAD, device=DEVICE, dtype=torch.float32)
    rotary = (angle.cos(), angle.sin())
    beside, hidden, image = normal(1, TEXT + IMAGE, WIDTH), normal(1, TEXT + IMAGE, HIDDEN), normal(1, IMAGE, HIDDEN)
    n, h = (TEXT + IMAGE) * WIDTH, (TEXT + IMAGE) * HIDDEN
    rows: dict[str, tuple[int, Way, Way]] = {
        "modulate": (4 * n, lambda: modulate(one), lambda: modulate(one, "reference")),
        "gate, sum": (6 * n, lambda: gated_sums(triples), lambda: gated_sums(triples, "reference")),
        "norm, modulate": (4 * n, lambda: norm_modulate(one, EPSILON), lambda: formula(one, None, None)),
        "norm, modulate, folded": (
            4 * n, lambda: norm_modulate(one, EPSILON, folded=True), lambda: formula(one, None, None)),
        "gate, sum, norm, modulate": (
            8 * n, lambda: norm_modulate(streams, EPSILON, gated), lambda: formula(streams, gated, None)),
        "gate, sum, norm, modulate, folded": (
            8 * n, lambda: norm_modulate(streams, EPSILON, gated, True), lambda: formula(streams, gated, None)),
        "heads of two streams": (
            12 * n, lambda: joint_heads(projections, norms, rotary, HEAD, EPSILON),  # type: ignore[arg-type]
            lambda: joint_heads_reference(projections, norms, rotary, HEAD, EPSILON)),  # type: ignore[arg-type]
        "heads of one stream": (
            8 * n, lambda: joint_heads(joint, norms[:1], rotary, HEAD, EPSILON),
            lambda: joint_heads_reference(joint, norms[:1], rotary, HEAD, EPSILON)),
    }  # fmt: skip
    for codes in ("int8", "fp8"):
        kind: Any = codes
        rows |= {
            f"norm, modulate, {codes}": (
                3 * n, lambda kind=kind: norm_modulate_codes(one, EPSILON, kind),  # type: ignore[misc]
                lambda kind=kind: formula(one, None, kind)),
            f"gate, sum, norm, modulate, {codes}": (
                7 * n, lambda kind=kind: norm_modulate_codes(streams, EPSILON, kind, gated),  # type: ignore[misc]
                lambda kind=kind: formula(streams, gated, kind)),
            f"gelu, {codes}": (
                3 * IMAGE * HIDDEN, lambda kind=kind: gelu_codes(None, image, kind, "tanh"),  # type: ignore[misc]
                lambda kind=kind: activated(None, image, kind)),
            f"attention beside gelu, {codes}": (
                3 * (n + h), lambda kind=kind: gelu_codes(beside, hidden, kind, "tanh"),  # type: ignore[misc]
                lambda kind=kind: activated(beside, hidden, kind)),
        }  # fmt: skip
    return rows


def fused_table(timer: Any, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure every pass: its kernel, torch's operations, and these compiled; microseconds and GB/s that must move."""
    device = torch.device("cuda", torch.cuda.current_device())
    table: dict[str, Any] = {"heads_norm_in_kernel": agrees(device, torch.bfloat16, HEAD), "rows": []}
    x = normal((TEXT + IMAGE) * WIDTH)
    seconds = timer(x.clone)
    copy_rate = 4e-9 * x.numel() / seconds
    table["copy"] = {"us": 1e6 * seconds, "gb_per_s": copy_rate}
    print(f"copy: {1e6 * seconds:.1f} us, {copy_rate:.0f} GB/s; norm of heads in the kernel: "
          f"{table['heads_norm_in_kernel']}", flush=True)  # fmt: skip
    for name, (size, kernel, eager) in passes().items():
        torch.compiler.reset()
        ways = {"kernel": kernel, "eager": eager, "compiled": torch.compile(eager, dynamic=False)}
        row: dict[str, Any] = {"pass": name, "bytes": size}
        for way, work in ways.items():
            seconds = timer(work)
            row[way] = {"us": 1e6 * seconds, "gb_per_s": 1e-9 * size / seconds}
        row["of_copy"] = row["kernel"]["gb_per_s"] / copy_rate
        table["rows"].append(row)
        print(f"| {name} | " + " | ".join(f"{row[way]['us']:.1f}" for way in ways)
              + f" | {row['kernel']['gb_per_s']:.0f} | {row['of_copy']:.2f} |", flush=True)  # fmt: skip
        save(table)
    return table


def host_table(save: Callable[[dict[str, Any]], None], calls: int = 100) -> dict[str, Any]:
    """Measure what the host needs to launch an operation: microseconds of a call in a queue that never waits."""
    m, k, n = 64, 256, 256  # too small for the device to be the limit
    x, w, bias = normal(m, k), normal(n, k), normal(n)
    a8, s8 = quantize_rows(x, "int8")
    w8, ws8 = quantize_rows(w, "int8")
    af, sf = quantize_rows(x, "fp8")
    wf, wsf = quantize_rows(w, "fp8")
    stream, vector = normal(1, m, k), normal(1, k)
    one = [(stream, vector, vector)]
    ways: dict[str, Way] = {
        "bf16 linear": lambda: F.linear(x, w, bias),
        "quantize": lambda: quantize_rows(x, "int8"),
        "quantize, through the dispatcher": lambda: torch.ops.diffaccel.quantize_rows(x, "int8"),
        "int8 linear": lambda: int8_linear(a8, s8, w8, ws8, bias),
        "int8 linear, through the dispatcher": lambda: torch.ops.diffaccel.int8_linear(
            a8, s8, w8, ws8, bias, torch.bfloat16
        ),
        "int8 linear with quantization": lambda: int8_linear(*quantize_rows(x, "int8"), w8, ws8, bias),
        "fp8 linear": lambda: fp8_linear(af, sf, wf, wsf, bias),
        "fp8 linear with quantization": lambda: fp8_linear(*quantize_rows(x, "fp8"), wf, wsf, bias),
        "modulate": lambda: modulate(one),
        "norm, modulate, int8": lambda: norm_modulate_codes(one, EPSILON, "int8"),
    }
    rows = {}
    for name, way in ways.items():
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                way()
            times.append((time.perf_counter() - started) / calls)
        rows[name] = 1e6 * min(times[1:])
        print(f"| {name} | {rows[name]:.1f} us |", flush=True)
        save({"us": rows})
    return {"us": rows}


def accelerated(network: Any, method: Any) -> Any:
    """Return a pipeline of a network, under a method."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, network)
    return diffaccel.accelerate(pipe, method)


def flux_row(
    timer: Any, network: Any, inputs: dict[str, Any], stock: Tensor | None, compiles: bool
) -> tuple[dict[str, Any], Tensor]:
    """Measure a transformer eager, captured and with compiled blocks; return its output too."""
    row: dict[str, Any] = {}
    output = network(**inputs)[0]
    row["equal_to_stock"] = stock is None or torch.equal(output, stock)
    torch.cuda.reset_peak_memory_stats()
    row["eager_ms"] = 1000 * timer(lambda: network(**inputs), warm=1)
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - timer.flush.numel() * 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        network(**inputs)
    row["launches"] = sum(event.count for event in profile.key_averages())
    started = time.perf_counter()
    pipe = accelerated(network, Capture())
    replayed = [network(**inputs)[0] for _ in range(3)][-1]
    row["captured_equal"] = torch.equal(replayed, output)
    row["capture_seconds"] = time.perf_counter() - started
    row["captured_ms"] = 1000 * timer(lambda: network(**inputs), warm=1)
    diffaccel.remove(pipe)
    if compiles:
        started = time.perf_counter()
        network.compile_repeated_blocks(fullgraph=True)
        network(**inputs)
        torch.cuda.synchronize()
        row["compile_seconds"] = time.perf_counter() - started
        row["compiled_ms"] = 1000 * timer(lambda: network(**inputs), warm=1)
        for block in (*network.transformer_blocks, *network.single_transformer_blocks):
            block._compiled_call_impl = None
    return row, output


FUSED = {"": None, " fused": FusedBlocks(), " folded": FusedBlocks(rounding="folded")}


def print_flux_row(name: str, row: dict[str, Any]) -> None:
    compiled = f"{row['compiled_ms']:.1f} (set-up {row['compile_seconds']:.0f} s)" if "compiled_ms" in row else "-"
    print(
        f"| {name} | eager {row['eager_ms']:.1f} ms, {row['of_eager_bf16']:.3f} | captured {row['captured_ms']:.1f}, "
        f"{row['captured_of_eager_bf16']:.3f} (equal: {row['captured_equal']}) | compiled {compiled} | equal to stock: "
        f"{row['equal_to_stock']} | differs by {row['difference_from_bf16']:.4f} | launches {row['launches']}, "
        f"{row['launches_of_bf16']:.3f} | weights {row['weights_share']:.3f} | {row['quantize_seconds']:.1f} s |",
        flush=True,
    )
