"""Time searches: the engine's own share, scoring on another device, and several processes on one search.

    python -m scripts.bench_search_speed --model flux --out docs/results
    accelerate launch --num_processes 2 -m scripts.bench_search_speed --model flux --out docs/results

A FLUX.1-dev-size transformer (random weights, bf16, 1024x1024) or a small one for a CPU. Alone it measures the engine's
own share and overlapped scoring, with a reward that takes a third of a prediction, on the CPU and on a second GPU where
there is one. With several processes it measures one of them alone and all of them together on 8 chains. What is
compared takes turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import diffaccel
from diffaccel.eval.uncertainty.intervals import median_ratio
from diffaccel.files import write_json
from diffaccel.record import describe_device, versions
from diffaccel.runs import profile
from diffaccel.samplers import RBF, SVDD
from diffaccel.samplers.rewards import Reward
from scripts.bench_driver import pipeline

CHAINS, STEPS = 8, 4


def latents_mean(x0: Tensor, prompts: list[str]) -> Tensor:
    """Score samples by their mean: a reward that costs nothing."""
    return x0.float().flatten(1).mean(1)


def busy(seconds: float, device: torch.device) -> Callable[[Tensor, list[str]], Tensor]:
    """Return a reward that computes for about ``seconds`` per sample, on its own device."""
    side = 512 if device.type == "cpu" else 4096
    a = torch.randn(side, side, device=device)

    def spend(times: int) -> None:
        out = a
        for _ in range(times):
            out = torch.mm(a, out) * 1e-3
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    spend(3)
    start = time.perf_counter()
    spend(20)
    times = max(1, round(seconds / ((time.perf_counter() - start) / 20)))

    def score(x0: Tensor, prompts: list[str]) -> Tensor:
        spend(times * len(x0))
        return latents_mean(x0, prompts)

    return score


class Bench:
    """A pipeline without encoders and decoder: what is predicted and searched is all that takes time."""

    def __init__(self, model: str, device: torch.device) -> None:
        self.device = device
        self.pipe, self.call = pipeline(model, str(device), torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.call |= {"num_inference_steps": STEPS}

    def seconds(self, config: Any) -> tuple[float, float, int]:
        """Run one search and return its seconds, those of the network, and its NFE."""
        diffaccel.accelerate(self.pipe, config)
        try:
            with profile.measure(self.pipe) as measured:
                self.pipe(**self.call, generator=torch.Generator().manual_seed(0))
            nfe = diffaccel.summary(self.pipe).last_run["nfe"]  # type: ignore[index]
        finally:
            diffaccel.remove(self.pipe)
        return measured.seconds, measured.parts["network"], nfe


def overhead(bench: Bench, turns: int) -> dict[str, Any]:
    """Measure the engine's share: the time of a search beside the network's own."""
    config = RBF(reward=Reward("mean", latents_mean, input="latents"), budget=40, particles=2, initial=4, chunk=4,
                 max_batch=4)  # fmt: skip
    shares, per_nfe = [], []
    for turn in range(turns + 1):
        seconds, network, nfe = bench.seconds(config)
        if turn:
            shares.append(seconds / network - 1)
            per_nfe.append(seconds / nfe)
    return {"overhead": median(shares), "overheads": shares, "seconds_per_nfe": median(per_nfe)}


def overlapped(bench: Bench, step: float, where: torch.device, turns: int) -> dict[str, Any]:
    """Time one search scored between predictions, and scored on ``where`` while the next chains are predicted."""
    function = busy(step / 3, where)
    configs = {
        name: SVDD(reward=Reward("busy", function, input="latents", device=device), budget=64, particles=4, max_batch=4)
        for name, device in (("in between", None), ("elsewhere", where))
    }
    times: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(turns + 1):
        for name in list(configs) if turn % 2 else reversed(configs):
            seconds, _, _ = bench.seconds(configs[name])
            if turn:
                times[name].append(seconds)
    return {"where": str(where), "seconds": times, "ratio": ratio(times["in between"], times["elsewhere"])}


def scaled(bench: Bench, state: Any, turns: int) -> dict[str, Any]:
    """Time one process alone, the others waiting, and all of them together."""
    reward = Reward("mean", latents_mean, input="latents")
    times: dict[str, list[float]] = {"alone": [], "together": []}
    for turn in range(turns + 1):
        for name in list(times) if turn % 2 else reversed(times):
            config = SVDD(reward=reward, budget=8 * STEPS, particles=CHAINS, shared=name == "together")
            state.wait_for_everyone()
            if name == "together" or state.process_index == 0:
                seconds, _, _ = bench.seconds(config)
                if turn:
                    times[name].append(seconds)
            state.wait_for_everyone()
    if state.process_index:
        return {}
    return {"processes": state.num_processes, "seconds": times, "ratio": ratio(times["alone"], times["together"])}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float | None]:
    """Return the median of the ratios turn by turn, with its interval, which fewer than 6 turns do not have."""
    numbers = median_ratio(slow, fast).to_dict()
    return {key: numbers[key] for key in ("value", "low", "high")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("flux", "small"), default="flux")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--kind", default=None, help="name of the machine, for the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)  # every process has the same weights
    bench = Bench(args.model, state.device)
    values: dict[str, Any] = {
        "command": f"python -m scripts.bench_search_speed --model {args.model} --turns {args.turns}",
        "device": describe_device(state.device), "kind": args.kind, "date": time.strftime("%Y-%m-%d"),
        "versions": versions(), "processes": state.num_processes,
    }  # fmt: skip

    def keep(**results: Any) -> None:
        """Print results and write all results so far."""
        values.update(results)
        if state.process_index == 0:
            print(json.dumps(results, indent=1), flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                name = f"bench_search_speed_{args.model}_{args.kind or state.device.type}_{state.num_processes}.json"
                write_json(args.out / name, values)

    if state.num_processes > 1:
        keep(scaling=scaled(bench, state, args.turns))
        return
    keep(engine=overhead(bench, args.turns))
    overlaps: list[dict[str, Any]] = []
    for where in [torch.device("cpu")] + [torch.device("cuda", 1)] * (torch.cuda.device_count() > 1):
        overlaps.append(overlapped(bench, values["engine"]["seconds_per_nfe"], where, args.turns))
        keep(overlap=overlaps)


if __name__ == "__main__":
    main()
