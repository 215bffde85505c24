"""Time quantized linears and a quantized FLUX-size transformer against bf16 and the library's int8, in one run.

    python -m scripts.bench_quant --kind nvidia-h200 --out docs/results            # every table
    python -m scripts.bench_quant --tables tune linear --out docs/results          # measure tiles first, then linears

Random normal data, the second-level cache flushed before every call, medians over calls; ratios are of geometric means
over the shapes. ``tune`` measures every tile of the int8 kernel on every shape and writes ``kernels/winners.json`` (and
a copy beside the record), which the following tables then use.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

import diffaccel
from diffaccel import record
from diffaccel.files import write_json
from diffaccel.kernels import winners
from diffaccel.kernels.dispatch import capability
from diffaccel.kernels.fp8_linear import fp8_linear
from diffaccel.kernels.int4_weight import expand_int4
from diffaccel.kernels.int8_linear import int8_linear
from diffaccel.kernels.quantize_rows import quantize_rows, quantize_rows_reference
from diffaccel.kernels.triton_int8 import TILES, launch_int8_linear
from diffaccel.kernels.weight_linear import weight_linear
from diffaccel.quant import W4A8, W4A16, W8A8
from diffaccel.quant.formats import LayerFormat, quantize_weight
from diffaccel.quant.swap import quantize_networks
from scripts.conv_tables import HEADER, conv_table, tune_conv_table
from scripts.fused_tables import FUSED, accelerated, flux_row, fused_table, host_table, print_flux_row

# M, K, N: FLUX (three widths of its linears and both second ones), SDXL, Wan2.1-1.3B
SHAPES = (
    (4608, 3072, 3072), (4608, 3072, 9216), (4608, 3072, 12288), (4608, 12288, 3072), (4608, 15360, 3072),
    (2048, 1280, 10240), (8192, 640, 5120), (32760, 1536, 8960),
)  # fmt: skip
FEW = ((1, 3072, 18432), (1, 3072, 9216), (2, 3072, 18432), (16, 3072, 18432))
ROWS = ((4608, 3072), (4608, 12288), (4608, 15360), (32760, 1536), (32760, 8960))
TABLES = ("tune", "tune_conv", "linear", "few_rows", "rows", "conv", "fused", "host", "flux")
DEVICE = torch.device("cuda")


class Timer:
    """Time GPU work by events, after a write that flushes the cache and lets the host run ahead."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.flush = torch.empty(256 * 2**20, dtype=torch.int32, device=DEVICE)

    def __call__(self, work: Callable[[], Any], warm: int = 3) -> float:
        """Return the median seconds of a call."""
        for _ in range(warm):
            work()
        pairs = []
        for _ in range(self.repeats):
            self.flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1000


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * scale


def library_int8() -> Callable[..., torch.Tensor]:
    """Return ``_int_mm`` with a compiled dequantization, what users of torch have."""

    def product(a: Any, a_scale: Any, w: Any, w_scale: Any, bias: Any) -> torch.Tensor:
        return (torch._int_mm(a, w.t()).float() * (a_scale * w_scale.t()) + bias).to(torch.bfloat16)

    return torch.compile(product, dynamic=False)


def linear_ways(m: int, k: int, n: int, library: Callable[..., torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """Return each way of computing one linear layer; names with "+q" quantize the activations too."""
    x, w, bias = normal(m, k), normal(n, k, scale=k**-0.5), normal(n)
    a8, a8s = quantize_rows(x, "int8")
    w8, w8s = quantize_rows(w, "int8")
    af, afs = quantize_rows(x, "fp8")
    wf, wfs = quantize_rows(w, "fp8")
    w4a16, w4a8 = quantize_weight(w, LayerFormat("w4a16", 128)), quantize_weight(w, LayerFormat("w4a8", 128))

    def four_bits() -> torch.Tensor:
        codes = expand_int4(w4a8["weight"], w4a8["weight_multiplier"])
        return int8_linear(*quantize_rows(x, "int8"), codes, w4a8["weight_scale"], bias)

    return {
        "bf16": lambda: F.linear(x, w, bias),
        "_int_mm + compiled": lambda: library(a8, a8s, w8, w8s, bias),
        "int8": lambda: int8_linear(a8, a8s, w8, w8s, bias),
        "int8 +q": lambda: int8_linear(*quantize_rows(x, "int8"), w8, w8s, bias),
        "fp8 fast": lambda: fp8_linear(af, afs, wf, wfs, bias),
        "fp8 exact": lambda: fp8_linear(af, afs, wf, wfs, bias, fast_accumulation=False),
        "fp8 fast +q": lambda: fp8_linear(*quantize_rows(x, "fp8"), wf, wfs, bias),
        "fp8 exact +q": lambda: fp8_linear(*quantize_rows(x, "fp8"), wf, wfs, bias, fast_accumulation=False),
        "w4a16": lambda: weight_linear(x, w4a16["weight"], w4a16["weight_scale"], bias),
        "w4a8 +q": four_bits,
    }


def linear_table(timer: Timer) -> dict[str, Any]:
    """Measure every way on every shape: TFLOP/s, relative error, and ratios of geometric means."""
    library = library_int8()
    rows: list[dict[str, Any]] = []
    for m, k, n in SHAPES:
        ways = linear_ways(m, k, n, library)
        exact = ways["bf16"]().double()
        errors = {name: float((way().double() - exact).norm() / exact.norm()) for name, way in ways.items()}
        rates = {name: 2e-12 * m * k * n / timer(way) for name, way in ways.items()}
        rows.append({"m": m, "k": k, "n": n, "tflops": rates, "difference_from_bf16": errors})
        print(f"| {m}x{k}x{n} | " + " | ".join(f"{rate:.0f}" for rate in rates.values()) + " |", flush=True)
        del ways, exact
        torch.cuda.empty_cache()
    means = {name: math.exp(statistics.fmean(math.log(row["tflops"][name]) for row in rows)) for name in rates}
    ratios = {base: {name: means[name] / means[base] for name in means} for base in means}
    print("| mean over bf16 | " + " | ".join(f"{ratios['bf16'][name]:.2f}" for name in means) + " |")
    print("| mean over _int_mm | " + " | ".join(f"{ratios['_int_mm + compiled'][name]:.2f}" for name in means) + " |")
    return {"rows": rows, "geometric_means": means, "ratios": ratios}


def few_rows_table(timer: Timer) -> dict[str, Any]:
    """Measure products of few rows: microseconds and GB/s of weight codes."""
    rows = []
    for m, k, n in FEW:
        x, w, bias = normal(m, k), normal(n, k, scale=k**-0.5), normal(n)
        w8, w4 = quantize_weight(w, LayerFormat("w8a16")), quantize_weight(w, LayerFormat("w4a16", 128))
        ways = {
            "bf16": (2.0, lambda x=x, w=w, bias=bias: F.linear(x, w, bias)),
            "int8": (1.0, lambda x=x, w8=w8, bias=bias: weight_linear(x, w8["weight"], w8["weight_scale"], bias)),
            "int4": (0.5, lambda x=x, w4=w4, bias=bias: weight_linear(x, w4["weight"], w4["weight_scale"], bias)),
        }
        row: dict[str, Any] = {"m": m, "k": k, "n": n}
        for name, (size, way) in ways.items():
            seconds = timer(way)
            row[name] = {"us": 1e6 * seconds, "gb_per_s": 1e-9 * n * k * size / seconds}
        rows.append(row)
        print(f"| {m}x{k}x{n} | " + " | ".join(f"{row[w]['us']:.1f} us, {row[w]['gb_per_s']:.0f} GB/s" for w in ways))
    return {"rows": rows}


def rows_table(timer: Timer) -> dict[str, Any]:
    """Measure the quantization of activations: microseconds, and GB/s of what must be read and written."""
    compiled = torch.compile(quantize_rows_reference, dynamic=False)
    rows = []
    for m, k in ROWS:
        x = normal(m, k)
        row: dict[str, Any] = {"m": m, "k": k}
        for codes in ("int8", "fp8"):
            ways = {"kernel": quantize_rows, "compiled": compiled, "eager": quantize_rows_reference}
            for name, way in ways.items():
                seconds = timer(lambda way=way, x=x, codes=codes: way(x, codes))
                row[f"{codes} {name}"] = {"us": 1e6 * seconds, "gb_per_s": 1e-9 * (3 * m * k + 4 * m) / seconds}
        x8 = x.contiguous()
        seconds = timer(lambda x8=x8: x8.clone())
        row["copy"] = {"us": 1e6 * seconds, "gb_per_s": 1e-9 * 4 * m * k / seconds}
        rows.append(row)
        print(f"| {m}x{k} | " + " | ".join(f"{n}: {v['us']:.0f} us" for n, v in row.items() if isinstance(v, dict)))
    return {"rows": rows}


def tune_table(timer: Timer) -> dict[str, Any]:
    """Measure every tile of the int8 kernel on every shape and write the winners."""
    table, rows = {}, []
    for m, k, n in (*SHAPES, (4096, 3072, 12288), (512, 3072, 12288), (512, 3072, 3072), (512, 12288, 3072),
                    (1536, 3072, 12288), (4608, 3072, 21504), (154, 2048, 1280)):  # fmt: skip
        a, a_scale = quantize_rows(normal(m, k), "int8")
        w, w_scale = quantize_rows(normal(n, k), "int8")
        times = {}
        for tile, _ in TILES:
            for specialized in {tile.specialized, False}:
                candidate = type(tile)(**{**asdict(tile), "specialized": specialized})
                try:
                    times[candidate] = timer(
                        lambda tile=candidate, a=a, a_scale=a_scale, w=w, w_scale=w_scale: launch_int8_linear(
                            a, a_scale, w, w_scale, None, torch.bfloat16, tile, True
                        )
                    )
                except Exception as error:
                    print(f"{candidate}: {type(error).__name__}: {str(error)[:200]}")
        best = min(times, key=times.__getitem__)
        table[winners.key("int8_linear", capability(DEVICE), m, n, k)] = asdict(best)
        rates = {f"{t.m}x{t.n}x{t.k} w{t.warps} s{t.stages}{' ws' if t.specialized else ''}": 2e-12 * m * k * n / s
                 for t, s in times.items()}  # fmt: skip
        rows.append({"m": m, "k": k, "n": n, "tflops": rates})
        print(
            f"| {m}x{k}x{n} | {best} | " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()), flush=True
        )
    keep_winners(table)
    return {"rows": rows, "winners": table}


def keep_winners(table: dict[str, Any]) -> None:
    """Write winners beside those that the package has."""
    file = Path(winners.__file__).with_name("winners.json")
    known = json.loads(file.read_text())["winners"]
    write_json(file, {"winners": {**known, **table}})
    winners.forget()


def flux_network(blocks: tuple[int, int]) -> Any:
    """Return a FLUX.1-dev transformer with random weights of the size that trained ones have."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True, num_layers=blocks[0], num_single_layers=blocks[1])
    network = network.to(torch.bfloat16).to_empty(device=DEVICE).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, p in network.named_parameters():
        if p.ndim > 1:
            p.normal_(std=0.02)
        else:
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return network


def flux_inputs(size: int) -> dict[str, Any]:
    tokens = (size // 16) ** 2
    side = torch.arange(size // 16, device=DEVICE, dtype=torch.float32)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(tokens, 3)
    return {
        "hidden_states": normal(1, tokens, 64), "encoder_hidden_states": normal(1, 512, 4096),
        "pooled_projections": normal(1, 768), "timestep": torch.full((1,), 0.5, device=DEVICE, dtype=torch.bfloat16),
        "guidance": torch.full((1,), 3.5, device=DEVICE, dtype=torch.bfloat16), "img_ids": ids,
        "txt_ids": torch.zeros(512, 3, device=DEVICE), "return_dict": False,
    }  # fmt: skip


FLUX_WAYS: dict[str, Callable[[Any], Any]] = {
    "bf16": lambda network: None,
    "int8": lambda network: quantize_networks([network], W8A8(originals="drop")),
    "fp8": lambda network: quantize_networks([network], W8A8(dtype="fp8", originals="drop")),
    "w4a16": lambda network: quantize_networks([network], W4A16(originals="drop")),
    "w4a8": lambda network: quantize_networks([network], W4A8(originals="drop")),
    "torchao-fp8": lambda network: torchao_fp8(network),
}


def torchao_fp8(network: Any) -> None:
    """Quantize by torchao: fp8 by rows, except linears of one input row, which its int8 sibling cannot take."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(network, config, lambda module, name: type(module) is torch.nn.Linear and "norm" not in name)


def flux_table(
    timer: Timer, size: int, blocks: tuple[int, int], ways: list[str], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure one forward of the transformer: bf16 and each quantizer, each as it is and with fused blocks."""
    inputs, exact = flux_inputs(size), None
    table: dict[str, Any] = {"size": size, "blocks": list(blocks), "rows": {}}
    rows = table["rows"]
    for name in ways:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        network = flux_network(blocks)
        started = time.perf_counter()
        try:
            FLUX_WAYS[name](network)
        except ImportError as error:
            print(f"| {name} | {error} |")
            continue
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        gc.collect()
        weights = torch.cuda.memory_allocated() - before
        stock: Tensor | None = None
        for suffix, method in FUSED.items():
            if suffix == " folded" and name != "bf16":
                continue  # quantized, the norm is in the pass anyway
            pipe = None if method is None else accelerated(network, method)
            with torch.no_grad():
                row, output = flux_row(timer, network, inputs, stock, method is None)
            if pipe is not None:
                diffaccel.remove(pipe)
            stock = output if stock is None else stock
            exact = output.double() if exact is None else exact
            row.update(weight_bytes=weights, quantize_seconds=seconds)
            row["difference_from_bf16"] = float((output.double() - exact).norm() / exact.norm())
            rows[name + suffix] = row
            base = rows["bf16"]
            row["weights_share"] = weights / base["weight_bytes"]
            row["of_eager_bf16"] = row["eager_ms"] / base["eager_ms"]
            row["captured_of_eager_bf16"] = row["captured_ms"] / base["eager_ms"]
            row["launches_of_bf16"] = row["launches"] / base["launches"]
            print_flux_row(name + suffix, row)
            save(table)
        del network
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--size", type=int, default=1024, help="pixels of the FLUX picture")
    parser.add_argument("--blocks", type=int, nargs=2, default=(19, 38), help="double and single blocks of FLUX")
    parser.add_argument(
        "--ways", nargs="+", choices=FLUX_WAYS, default=["bf16", "int8", "fp8"], help="of the table flux"
    )
    parser.add_argument("--kind", default=None, help="name of the machine, for the record's file name")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # more shapes than the default would compile for
    timer = Timer(args.repeats)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "tune": lambda: tune_table(timer),
        "tune_conv": lambda: tune_conv_table(timer),
        "linear": lambda: linear_table(timer),
        "few_rows": lambda: few_rows_table(timer),
        "rows": lambda: rows_table(timer),
        "conv": lambda: conv_table(timer),
        "fused": lambda: fused_table(timer, lambda table: save("fused", table)),
        "host": lambda: host_table(lambda table: save("host", table)),
        "flux": lambda: flux_table(
            Timer(min(args.repeats, 10)), args.size, tuple(args.blocks), args.ways, lambda table: save("flux", table)
        ),
    }
    command = ["python", "-m", "scripts.bench_quant", "--tables", *args.tables, "--repeats", str(args.repeats)]
    settings = {"tables": args.tables, "repeats": args.repeats, "size": args.size, "blocks": list(args.blocks)}
    report = record.Record(kind="bench_quant", settings=settings, command=command)
    report.device = record.describe_device(DEVICE)
    results: dict[str, Any] = {}

    def save(name: str, table: dict[str, Any]) -> None:
        """Write the record with what is measured so far."""
        results[name] = table
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            report.finish(**results).save(args.out / f"bench_quant_{args.kind or 'cuda'}.json")

    for name in args.tables:
        print(f"\n{name}, {report.device['name']}", flush=True)
        if name == "fused":
            print("| pass | kernel, us | torch, us | compiled, us | GB/s | of a copy |")
        if name == "linear":
            print("| MxKxN, TFLOP/s | bf16 | _int_mm + compiled | int8 | int8 +q | fp8 fast | fp8 exact | fp8 fast +q "
                  "| fp8 exact +q | w4a16 | w4a8 +q |")  # fmt: skip
        if name == "conv":
            print(HEADER)
        save(name, measures[name]())
        if name == "tune_conv":
            keep_winners(results[name]["winners"])
        if args.out and name.startswith("tune"):
            write_json(args.out / f"winners{name[4:]}.json", {"winners": results[name]["winners"]})


if __name__ == "__main__":
    main()
