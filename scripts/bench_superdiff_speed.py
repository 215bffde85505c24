"""Time superposition of two prompts: one batched network call a step against one call for each prediction.

    python -m scripts.bench_superdiff_speed --model sd15 --kind nvidia-h200 --out docs/results
    python -m scripts.bench_superdiff_speed --model flux --steps 8 --turns 6 --kind nvidia-h200 --out docs/results

Random weights. A UNet of Stable Diffusion 1.5's size, 512x512, has guidance and predicts three rows a step; FLUX.1-dev,
1024x1024, predicts two, in one network call or in two. "separate calls" is a loop as published code has it: one network
call for each prediction, then the two-component formula; its fp32 row is the paper's form. Rows are eager or captured
(``Capture()``), the network's calls of separate loops too. What is compared takes turns. A whole call has work before
its loop that the separate loop has not; "loop alone" is from one network call to the next.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

import diffaccel
from diffaccel.eval.uncertainty.intervals import median_ratio
from diffaccel.families import network
from diffaccel.files import write_json
from diffaccel.modules import Capture
from diffaccel.record import describe_device, versions
from diffaccel.runs import profile
from diffaccel.samplers import SuperDiff
from scripts.big_models import SMALL, made_on
from scripts.timing import wait

# name: side of a picture, config of the network
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "sd15": (512, {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "flux": (1024, {"guidance_embeds": True}),
    "small": (64, {
        "sample_size": 8, "cross_attention_dim": 64, "attention_head_dim": 4, "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }),
    "small-flux": (64, {**SMALL, "guidance_embeds": True}),
}  # fmt: skip
ROW_BY_ROW = ", one row a call"
PROMPT, GUIDANCE = "first | the second one", 7.5
HEAD = (
    "| way | ms a step | times as fast as the first row | as separate calls of its mode | outside the network "
    "| loop alone, ms a step | as separate calls | outside the network |\n" + "|---" * 8 + "|"
)
Step = tuple[float, float, float]  # seconds a step: of the whole call, of its network calls, of the loop alone


class Bench:
    """A pipeline without encoders and decoder, whose prompts have random encodings.

    Attributes:
        parts: arguments of a network call for each prediction, as superposition's first step has them in one.
    """

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, batch: int, steps: int) -> None:
        size, config = MODELS[model]
        self.device, self.dtype, self.batch, self.steps = device, dtype, batch, steps
        torch.manual_seed(0)
        self.pipe = (_flux if "flux" in model else _sd)(config, device, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.encode_prompt = self._encode
        self.call = {"height": size, "width": size, "output_type": "latent", "num_inference_steps": steps}
        self.call["guidance_scale"] = 3.5 if "flux" in model else GUIDANCE
        diffaccel.accelerate(self.pipe, SuperDiff())
        self.parts = self._parts()

    def _encode(self, prompt: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        config = network(self.pipe).config
        is_flux = "joint_attention_dim" in config
        width, length = (config.joint_attention_dim, 512) if is_flux else (config.cross_attention_dim, 77)
        text = torch.randn(len(texts), length, width, generator=torch.Generator().manual_seed(len(texts[0])))
        text = text.to(self.device, self.dtype)
        if is_flux:
            pooled = text.new_zeros(len(texts), config.pooled_projection_dim)
            return text, pooled, text.new_zeros(length, 3)
        return text, torch.zeros_like(text)

    def _parts(self) -> list[dict[str, Any]]:
        calls: list[tuple[Any, Any]] = []
        handle = network(self.pipe).register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        self.ours()
        handle.remove()
        args, kwargs = calls[0]
        names = ("sample", "timestep", "encoder_hidden_states")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs, "return_dict": False}
        rows = len(self._sample(kwargs))
        count = rows // self.batch

        def cut(value: Any, i: int) -> Any:
            return value[i * self.batch : (i + 1) * self.batch].clone() if _has_rows(value, rows) else value

        return [{name: cut(value, i) for name, value in kwargs.items()} for i in range(count)]

    @staticmethod
    def _sample(kwargs: dict[str, Any]) -> Tensor:
        return kwargs["sample"] if "sample" in kwargs else kwargs["hidden_states"]

    def row_by_row(self) -> Bench:
        """Have every network call take one row; graphs or whatever else is on goes."""
        diffaccel.remove(self.pipe)
        diffaccel.accelerate(self.pipe, SuperDiff(max_batch=1))
        return self

    def ours(self) -> Step:
        """Return the seconds a step of a superposed call."""
        with profile.measure(self.pipe) as measured:
            self.pipe([PROMPT] * self.batch, generator=torch.Generator().manual_seed(0), **self.call)
        seconds = diffaccel.summary(self.pipe).last_run["seconds"]
        of_a_call = (sum(measured.steps[:-1]) + sum(measured.gaps)) / len(measured.gaps)
        loop = of_a_call * len(measured.steps) / self.steps
        return seconds / self.steps, sum(measured.steps) / self.steps, loop

    @torch.no_grad()
    def separate(self) -> Step:
        """Return the seconds a step of a loop with one network call for each prediction."""
        module = network(self.pipe)
        name = "sample" if "sample" in self.parts[0] else "hidden_states"
        x = torch.randn_like(self.parts[0][name], dtype=torch.float32)
        sigmas = torch.linspace(10, 0.1, self.steps + 1)
        wait(self.device)
        start = time.perf_counter()
        for sigma, ds in zip(sigmas.tolist(), sigmas.diff().tolist(), strict=False):
            fed = (x / (sigma**2 + 1) ** 0.5).to(self.dtype)
            preds = [module(**{**part, name: fed})[0].float() for part in self.parts]
            x = _mixed(x, preds, sigma, ds)
        wait(self.device)
        seconds = (time.perf_counter() - start) / self.steps
        return seconds, 0.0, seconds

    def captured(self) -> Bench:
        """Put the network into graphs, which stay recorded from one turn to the next."""
        diffaccel.accelerate(self.pipe, Capture())
        return self


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def _mixed(x: Tensor, preds: list[Tensor], sigma: float, ds: float) -> Tensor:
    """Return the state after the published step of two components; without a null prediction the second is the base."""
    a, b, null = (*preds, preds[1])[:3]
    noise = (2 * abs(ds) * sigma) ** 0.5 * torch.randn_like(x)
    apart, alone = a - b, 2 * ds * (null + GUIDANCE * (b - null)) + noise
    top = (abs(ds) * (b - a) * (a + b) - alone * apart).flatten(1).sum(1)
    kappa = top / (2 * ds * GUIDANCE * apart.square().flatten(1).sum(1))
    return x + alone + 2 * ds * GUIDANCE * kappa.view(-1, *[1] * (x.ndim - 1)) * apart


def _sd(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    with made_on(device, dtype):
        unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return StableDiffusionPipeline(None, None, None, unet, scheduler, None, None, requires_safety_checker=False)


def _flux(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    with made_on(device, dtype):
        transformer = FluxTransformer2DModel(**config).eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(scheduler, None, None, None, None, None, transformer)


def ways_of(model: str, device: torch.device, batch: int, steps: int) -> dict[str, Callable[[], Step]]:
    """Return what is timed: on FLUX in bfloat16 alone, captured where there is a GPU."""
    make = lambda dtype: Bench(model, device, dtype, batch, steps)  # noqa: E731
    half = make(torch.bfloat16)
    ways = {"separate calls, bfloat16": half.separate, "superdiff, bfloat16": half.ours}
    if "flux" in model:
        return ways | {f"superdiff, bfloat16{ROW_BY_ROW}": make(torch.bfloat16).row_by_row().ours}
    ways = {"separate calls, float32": make(torch.float32).separate, **ways}
    if device.type == "cuda":
        ways["separate calls, bfloat16, captured"] = make(torch.bfloat16).captured().separate
        ways["superdiff, bfloat16, captured"] = make(torch.bfloat16).captured().ours
    return ways


def main() -> None:
    """Time all ways in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="sd15")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--kind", default=None, help="name of the machine, for the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    ways = ways_of(args.model, torch.device(args.device), args.batch, args.steps)
    seconds: dict[str, list[Step]] = {name: [] for name in ways}
    for turn in range(args.turns + 2):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            taken = ways[name]()
            if turn > 1:  # the first turns warm up and record graphs
                seconds[name].append(taken)
    rows = table(seconds)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        device = describe_device(torch.device(args.device))
        write_json(args.out / f"bench_superdiff_speed_{args.model}_{args.kind or args.device}.json", {
            "options": values, "device": device, "versions": versions(), "rows": rows,
            "date": time.strftime("%Y-%m-%d"),
        })  # fmt: skip


def table(seconds: dict[str, list[Step]]) -> dict[str, dict[str, Any]]:
    """Print a row for each way, compared with the first and with separate calls of its own mode; return them."""
    print(HEAD)
    rows: dict[str, dict[str, Any]] = {}
    first = [whole for whole, *_ in next(iter(seconds.values()))]
    for name, taken in seconds.items():
        whole, networks, loop = (list(part) for part in zip(*taken, strict=True))
        ratio = median_ratio(first, whole)
        rows[name] = {"ms_a_step": 1000 * median(whole), "ratio": ratio.to_dict()}
        shown = [name, f"{1000 * median(whole):.2f}", _interval(ratio)]
        if "superdiff" in name:
            separate_calls = name.replace("superdiff", "separate calls").removesuffix(ROW_BY_ROW)
            separate = [step for step, *_ in seconds[separate_calls]]
            for key, steps in (("", whole), ("loop_", loop)):
                own = median_ratio(separate, steps)
                share = median(1 - network / step for network, step in zip(networks, steps, strict=True))
                rows[name] |= {f"{key}of_its_mode": own.to_dict(), f"{key}outside": share}
                if key:
                    rows[name]["loop_ms_a_step"] = 1000 * median(loop)
                    shown.append(f"{1000 * median(loop):.2f}")
                shown += [_interval(own), f"{100 * share:.1f} %"]
        print("| " + " | ".join([*shown, *[""] * (8 - len(shown))]) + " |", flush=True)
    return rows


def _interval(ratio: Any) -> str:
    if ratio.interval is None:
        return f"{ratio.value:.2f}"
    return f"{ratio.value:.2f} ({ratio.interval.low:.2f} to {ratio.interval.high:.2f})"


if __name__ == "__main__":
    main()
