"""Time the native driver against the stock loop: the same call, stock and wrapped in turn, in one run.

    python -m scripts.bench_driver --model flux --out docs/results

A FLUX.1-dev-size transformer (random weights, bf16, 1024x1024, 512 text tokens) or a small one for a CPU. The two calls
alternate, and the ratio is taken turn by turn; its interval is Student's, of the logarithms.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import diffaccel
from diffaccel.eval.uncertainty.intervals import median_ratio
from diffaccel.files import write_json
from diffaccel.record import describe_device
from diffaccel.samplers import Euler

SIZES = {
    # pixels, steps, transformer config
    "flux": (1024, 8, {"guidance_embeds": True}),
    "small": (256, 8, {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 6, "attention_head_dim": 64,
                       "joint_attention_dim": 256, "pooled_projection_dim": 64, "axes_dims_rope": (16, 24, 24)}),
}  # fmt: skip


def pipeline(model: str, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline without encoders and autoencoder, and the arguments of its call."""
    size, steps, config = SIZES[model]
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        transformer = FluxTransformer2DModel(**config).eval().requires_grad_(False)
        torch.set_default_dtype(before)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 512, transformer.config.joint_attention_dim, device=device, dtype=dtype)
    pooled = torch.randn(1, transformer.config.pooled_projection_dim, device=device, dtype=dtype)
    call = dict(prompt_embeds=text, pooled_prompt_embeds=pooled, height=size, width=size, num_inference_steps=steps,
                output_type="latent", guidance_scale=3.5)  # fmt: skip
    return pipe, call


def timed(pipe: Any, call: dict[str, Any], device: str) -> tuple[float, torch.Tensor]:
    """Return the seconds of one whole call, and its latents."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    latents = pipe(**call, generator=torch.Generator("cpu").manual_seed(0)).images
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, latents


def measure(model: str, device: str, turns: int) -> dict[str, Any]:
    """Alternate stock and wrapped calls, and compare their times."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe, call = pipeline(model, device, dtype)
    steps = call["num_inference_steps"]
    methods = {"stock": None, "fp32 state": Euler(), "stock state": Euler(state="stock")}
    times: dict[str, list[float]] = {name: [] for name in methods}
    latents = {}
    for turn in range(turns + 1):
        for name in list(methods) if turn % 2 else reversed(methods):
            if methods[name] is not None:
                diffaccel.accelerate(pipe, methods[name])
            seconds, latents[name] = timed(pipe, call, device)
            diffaccel.remove(pipe)
            if turn:  # the first turn warms up
                times[name].append(seconds / steps)
    return {
        "model": model,
        "steps": steps,
        "turns": turns,
        "ways": {name: compare(times[name], times["stock"], latents[name], latents["stock"]) for name in methods},
    }


def compare(seconds: list[float], stock: list[float], latents: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """Return the median time and the median of the ratios turn by turn, with its interval from 6 turns on."""
    ratio = median_ratio(seconds, stock)
    return {
        "ms_per_step": 1000 * float(torch.tensor(seconds, dtype=torch.float64).median()),
        "ratio": ratio.value,
        "ratio_interval": None if ratio.interval is None else [ratio.interval.low, ratio.interval.high],
        "same_latents": bool(torch.equal(latents, reference)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SIZES), default="flux")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--kind", default=None, help="name of the machine, for the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    result = measure(args.model, args.device, args.turns)
    import diffusers

    device = describe_device(torch.device(args.device))["name"]
    record = {
        "command": f"python -m scripts.bench_driver --model {args.model} --device {args.device} --turns {args.turns}",
        "device": device,
        "kind": args.kind,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **result,
    }
    print(f"| {args.model}, {device} | ratio to stock (95 % interval) | ms per step | latents |")
    print("|---|---|---|---|")
    for name, row in result["ways"].items():
        low, high = row["ratio_interval"] or (float("nan"), float("nan"))
        same = "equal" if row["same_latents"] else "differ"
        print(f"| {name} | {row['ratio']:.4f} ({low:.4f} to {high:.4f}) | {row['ms_per_step']:.3f} | {same} |")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"bench_driver_{args.model}_{args.kind or args.device}.json"
        write_json(path, record)


if __name__ == "__main__":
    main()
