"""Time layers with weights and activations of 4 bits, a FLUX-size transformer of them, and steps of their training.

    python -m scripts.bench_qvgen --kind nvidia-h200 --out docs/results
    python -m scripts.bench_qvgen --tables tune linear --out docs/results   # measure tiles first

Ratios of geometric means over the shapes of FLUX and of Wan, in one run; activations are quantized in every row with
"+q", and weights of "w4a4" rest at 4 bits. Sums of every shape are checked against whole numbers first. ``train`` times
a step of quantization-aware training beside one of plain fine-tuning with the same teacher.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel import record
from diffaccel.distill import NetworkTeacher
from diffaccel.files import write_json
from diffaccel.kernels import winners
from diffaccel.kernels.dispatch import capability
from diffaccel.kernels.fp8_linear import fp8_linear
from diffaccel.kernels.low_bit_linear import low_bit_linear
from diffaccel.kernels.packed_codes import expand_codes, pack_codes
from diffaccel.kernels.quantize_rows import quantize_rows
from diffaccel.kernels.quantize_tokens import quantize_tokens
from diffaccel.kernels.triton_low_bit import LOW_BIT_TILES, launch_low_bit_linear
from diffaccel.quant import QVGen
from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.low_bit.linear import LowBitLinear
from diffaccel.quant.qvgen.data import CleanSamples
from diffaccel.quant.qvgen.run import QATRun
from diffaccel.quant.swap import quantize_networks
from diffaccel.training.steps import backward, computing
from scripts.bench_quant import DEVICE, Timer, flux_inputs, flux_network, normal

FLUX = ((4608, 3072, 3072), (4608, 3072, 9216), (4608, 3072, 12288), (4608, 12288, 3072), (4608, 15360, 3072))
WAN = ((32760, 1536, 1536), (32760, 1536, 8960), (32760, 8960, 1536))
TABLES = ("tune", "linear", "flux", "train")


def check_sums(m: int, k: int, n: int) -> None:
    """Raise unless sums of random and of extreme codes are exact on this device."""
    one, zero = torch.ones(n, 1, device=DEVICE), torch.zeros(n, 1, device=DEVICE)
    stats = torch.tensor([[1.0, 0.0, 0.0]], device=DEVICE).expand(m, 3).contiguous()
    for draw in (lambda *s: torch.randint(-8, 8, s, device=DEVICE), lambda *s: torch.full(s, -8, device=DEVICE),
                 lambda *s: torch.full(s, 7, device=DEVICE)):  # fmt: skip
        a, w = draw(m, k), draw(n, k)
        y = low_bit_linear(a.float().to(torch.float8_e4m3fn), stats, w.float().to(torch.float8_e4m3fn), one, zero, zero,
                           None, torch.float32)  # fmt: skip
        exact = torch._int_mm(a.to(torch.int8), w.to(torch.int8).t())
        if not torch.equal(y.double(), exact.double()):
            raise RuntimeError(f"sums of {m}x{k}x{n} are off by {float((y.double() - exact.double()).abs().max())}")


def linear_ways(m: int, k: int, n: int) -> dict[str, Callable[[], Tensor]]:
    x, linear = normal(m, k), nn.Linear(k, n, device=DEVICE, dtype=torch.bfloat16)
    wf, wfs = quantize_rows(linear.weight.detach(), "fp8")
    bias = linear.bias.detach()
    layer = LowBitLinear.of(linear, LowBit())
    dense = LowBitLinear.of(linear, LowBit(weight_bits=3, act_bits=3, dense=True))
    clip = layer.act_clip.detach()
    rows = (layer.weight_scale.detach(), layer.weight_zero.detach(), layer.weight_sum.detach())
    ready8, ready = layer.centred_codes("int8"), layer.centred_codes("fp8")
    packed = layer.weight.detach()

    def by_int8() -> Tensor:
        return low_bit_linear(*quantize_tokens(x, clip, 4, False, "int8"), ready8, *rows, bias)

    return {
        "bf16": lambda: F.linear(x, linear.weight, bias),
        "fp8 exact +q": lambda: fp8_linear(*quantize_rows(x, "fp8"), wf, wfs, bias, fast_accumulation=False),
        "fp8 fast +q": lambda: fp8_linear(*quantize_rows(x, "fp8"), wf, wfs, bias),
        "w4a4 +q": lambda: layer.product(x),
        "w4a4 +q, expanded before": lambda: low_bit_linear(
            *quantize_tokens(x, clip, 4, False, "fp8"), ready, *rows, bias
        ),
        "w4a4 by int8 +q, expanded before": by_int8,
        "w3a3 +q, 3 bits in 3": lambda: dense.product(x),
        "quantization of activations": lambda: quantize_tokens(x, clip, 4, False, "fp8")[0],
        "expansion of the weight": lambda: expand_codes(packed, 4, 8, k, "fp8"),
    }


def linear_table(timer: Timer) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for family, shapes in (("flux", FLUX), ("wan", WAN)):
        for m, k, n in shapes:
            check_sums(min(m, 512), k, n)
            ways = linear_ways(m, k, n)
            with torch.no_grad():
                rates = {name: 2e-12 * m * k * n / timer(way) for name, way in ways.items()}
            rows.append({"family": family, "m": m, "k": k, "n": n, "tflops": rates})
            print(f"| {m}x{k}x{n} | " + " | ".join(f"{name} {rate:.0f}" for name, rate in rates.items()), flush=True)
            del ways
            torch.cuda.empty_cache()
    ratios: dict[str, Any] = {}
    for family in ("flux", "wan", "all"):
        chosen = [row["tflops"] for row in rows if family in (row["family"], "all")]
        means = {name: math.exp(statistics.fmean(math.log(row[name]) for row in chosen)) for name in chosen[0]}
        ratios[family] = {base: means["w4a4 +q"] / means[base] for base in means}
        print(f"{family}: w4a4 +q over " + ", ".join(f"{base} {ratio:.3f}" for base, ratio in ratios[family].items()))
    return {"rows": rows, "w4a4_over": ratios}


def tune_table(timer: Timer) -> dict[str, Any]:
    """Measure every tile of the product on every shape and write the winners."""
    table: dict[str, Any] = {}
    for m, k, n in (*FLUX, *WAN, (4096, 3072, 12288), (512, 3072, 12288), (512, 3072, 3072), (512, 12288, 3072)):
        a, stats = quantize_tokens(normal(m, k), torch.full((1, 2), 0.95, device=DEVICE), 4, False, "fp8")
        codes = torch.randint(0, 16, (n, k), device=DEVICE, dtype=torch.uint8)
        w = expand_codes(pack_codes(codes, 4), 4, 8, k, "fp8")
        one = torch.ones(n, 1, device=DEVICE)
        times = {}
        for tile, _ in LOW_BIT_TILES:
            for stages in (tile.stages, 3):
                candidate = type(tile)(**{**asdict(tile), "stages": stages})
                times[candidate] = timer(
                    lambda tile=candidate, a=a, stats=stats, w=w, one=one: launch_low_bit_linear(
                        a, stats, w, (one, one, one), None, torch.bfloat16, tile, True
                    )
                )
        best = min(times, key=times.__getitem__)
        table[winners.key("low_bit_fp8", capability(DEVICE), m, n, k)] = asdict(best)
        print(f"| {m}x{k}x{n} | {best} | {2e-12 * m * k * n / times[best]:.0f} TFLOP/s |", flush=True)
    file = Path(winners.__file__).with_name("winners.json")
    known = json.loads(file.read_text())["winners"]
    write_json(file, {"winners": {**known, **table}})
    winners.forget()
    return {"winners": table}


def flux_table(timer: Timer, size: int, blocks: tuple[int, int]) -> dict[str, Any]:
    """Measure one forward of the transformer and its resident bytes: bf16, and 4 bits with each form of modulation."""
    ways = {"bf16": None, "w4a4, modulation 4 bits": QVGen(modulation="int4", originals="drop"),
            "w4a4, all linears": QVGen(layers="all", originals="drop")}  # fmt: skip
    inputs, rows = flux_inputs(size), {}
    for name, config in ways.items():
        gc.collect()
        torch.cuda.empty_cache()
        network = flux_network(blocks)
        if config is not None:
            quantize_networks([network], config)
        gc.collect()
        torch.cuda.empty_cache()
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())}
        with torch.no_grad():
            milliseconds = 1000 * timer(lambda network=network: network(**inputs))
        rows[name] = {"gigabytes": 1e-9 * sum(tensors.values()), "eager_ms": milliseconds}
        rows[name]["over_bf16"] = rows["bf16"]["eager_ms"] / milliseconds
        print(f"| {name} | {rows[name]['gigabytes']:.2f} GB | {milliseconds:.1f} ms | {rows[name]['over_bf16']:.2f} |")
        del network
    return {"size": size, "blocks": list(blocks), "rows": rows}


def wan_network() -> Any:
    """Return a network of the size of Wan2.1-1.3B with random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with DEVICE:
        net = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30, text_dim=4096)
    return net.to(torch.bfloat16).eval()


def train_table(repeats: int) -> dict[str, Any]:
    """Measure steps on latents of 16 x 5 x 60 x 104, that is 17 frames of 832x480."""
    shape = (16, 5, 60, 104)
    text = torch.zeros(1, 512, 4096, device=DEVICE, dtype=torch.bfloat16)

    def call(net: Any, x: Tensor, sigma: Tensor, _: Any) -> Tensor:
        time = 1000 * sigma.to(x.device)
        out = net(x.to(torch.bfloat16), time, text.expand(len(x), -1, -1), return_dict=False)[0]
        return out.float()  # type: ignore[no-any-return]

    teacher = NetworkTeacher(wan_network(), call, "velocity", shape)
    samples, found = CleanSamples(torch.randn(4, *shape), ("",) * 4), {}
    for name, config in (("plain", None), ("qvgen", QVGen.paper(batch=1)), ("lsq", QVGen.paper(batch=1, rank=0))):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            work = plain_step(teacher) if config is None else QATRun(
                teacher, samples, config, folder, device=DEVICE, dtype=torch.bfloat16).turn  # fmt: skip
            seconds = []
            for _ in range(3 + repeats):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                work()
                end.record()
                torch.cuda.synchronize()
                seconds.append(start.elapsed_time(end) / 1000)
        found[name] = {"seconds": statistics.median(seconds[3:]), "peak_gb": 1e-9 * torch.cuda.max_memory_allocated()}
        found[name]["over_plain"] = found[name]["seconds"] / found["plain"]["seconds"]
        print(f"| {name} | {found[name]['seconds']:.3f} s | {found[name]['over_plain']:.2f} | "
              f"{found[name]['peak_gb']:.1f} GB |", flush=True)  # fmt: skip
        del work
    return {"rows": found, "shape": list(shape)}


def plain_step(teacher: NetworkTeacher) -> Callable[[], None]:
    """Return a step of fine-tuning with the same teacher, loss and optimiser, without rounding."""
    student = copy.deepcopy(teacher.network).float().requires_grad_(True)
    adam = torch.optim.AdamW(student.parameters(), lr=3e-5, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        x = torch.randn(1, *teacher.shape, device=DEVICE)
        sigma = torch.rand(1)
        with computing(torch.device(DEVICE), torch.bfloat16):
            with torch.no_grad():
                followed = teacher.ask(teacher.network, x, sigma, 0)
            loss = (teacher.ask(student, x, sigma, 0) - followed).square().mean()
        backward(loss)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--size", type=int, default=1024, help="pixels of the FLUX picture")
    parser.add_argument("--blocks", type=int, nargs=2, default=(19, 38), help="double and single blocks of FLUX")
    parser.add_argument("--kind", default=None, help="name of the machine, for the record's file name")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    timer = Timer(args.repeats)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "tune": lambda: tune_table(timer),
        "linear": lambda: linear_table(timer),
        "flux": lambda: flux_table(timer, args.size, tuple(args.blocks)),
        "train": lambda: train_table(args.repeats),
    }
    command = ["python", "-m", "scripts.bench_qvgen", "--tables", *args.tables, "--repeats", str(args.repeats)]
    report = record.Record(kind="bench_qvgen", settings={"tables": args.tables, "size": args.size}, command=command)
    report.device = record.describe_device(DEVICE)
    results: dict[str, Any] = {}
    for name in args.tables:
        print(f"\n{name}, {report.device['name']}", flush=True)
        results[name] = measures[name]()
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            report.finish(**results).save(args.out / f"bench_qvgen_{args.kind or 'cuda'}.json")


if __name__ == "__main__":
    main()
