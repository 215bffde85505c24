"""Compare searches on a mixture of Gaussians, whose velocity is exact: reward and likelihood at equal NFE.

    python -m scripts.bench_search_gmm --budgets 50 100 200 500 1000 --prompts 64 --seeds 3 --json gmm.json

Data is a mixture of 32 Gaussians of standard deviation 0.25 in 16 dimensions, with means from N(0, I). A prompt is a
direction w; the reward is ``w x``, or ``sigmoid(3 w x - 3)``, which saturates. A high reward at a high negative
log-likelihood means samples that the data does not have. Everything is deterministic.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.files import write_json
from diffaccel.flow import LINEAR
from diffaccel.samplers import RBF, SMC, SVDD, BoN, CoDe, SoP
from diffaccel.samplers.rewards import Reward
from diffaccel.schedules import Schedule
from diffaccel.session import Eval, Pred, Session, Step, bcast

DIM, MODES, STD = 16, 32, 0.25
TAIL = 8  # deterministic steps after the search on the variance-preserving path
PATHS = ("vp", "linear", "native")
REWARDS = {"linear": lambda r: r, "saturating": lambda r: torch.sigmoid(3 * r - 3)}


@dataclass(frozen=True)
class Bed:
    """A distribution of data, and prompts that ask for directions in it.

    Attributes:
        means: of the modes, ``(MODES, DIM)``.
        directions: of the prompts, of length 1, ``(prompts, DIM)``.
    """

    means: Tensor
    directions: Tensor

    @classmethod
    def make(cls, prompts: int, seed: int = 0) -> Bed:
        """Draw the means and the directions."""
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(MODES, DIM, generator=generator)
        directions = torch.randn(prompts, DIM, generator=generator)
        return cls(means, directions / directions.norm(dim=1, keepdim=True))

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return ``E[eps - x0 | x]`` on the linear path, ``(R, DIM, 1, 1)``; ``sigma`` broadcasts against ``x``."""
        flat, sigma = x.flatten(1)[:, None], sigma.reshape(-1, 1, 1)
        alpha, variance = 1 - sigma, (1 - sigma) ** 2 * STD**2 + sigma**2
        offset = flat - alpha * self.means
        weight = (-(offset**2).sum(-1, keepdim=True) / (2 * variance)).softmax(1)  # posterior of the mode
        x0 = (weight * (self.means + alpha * STD**2 / variance * offset)).sum(1)
        eps = (weight * (sigma / variance * offset)).sum(1)
        return (eps - x0).reshape(x.shape)

    def nll(self, x: Tensor) -> Tensor:
        """Return ``-log p`` of samples, ``(R,)`` nats."""
        exponent = (x.flatten(1)[:, None] - self.means).pow(2).sum(-1) / (2 * STD**2)
        log_joint = -exponent - DIM / 2 * math.log(2 * math.pi * STD**2) - math.log(MODES)
        return -log_joint.logsumexp(1)

    def data(self, count: int) -> Tensor:
        """Draw samples of the data, ``(count, DIM, 1, 1)``."""
        generator = torch.Generator().manual_seed(1)
        modes = torch.randint(MODES, (count,), generator=generator)
        return (self.means[modes] + STD * torch.randn(count, DIM, generator=generator))[..., None, None]

    def reward(self, name: str) -> Reward:
        """Return the reward of that name, of clean latents; a prompt is the number of its direction."""

        def score(x0: Tensor, prompts: list[str]) -> Tensor:
            directions = self.directions[[int(prompt) for prompt in prompts]]
            return REWARDS[name]((x0.flatten(1) * directions).sum(1).double())

        return Reward(name=name, function=score, input="latents", batch_size=4096)


def open_session(prompts: int, seed: int, steps: int) -> Session:
    """Return the session of a call without a pipeline: a row per prompt with its own generator, even noise levels."""
    generators = [torch.Generator().manual_seed(seed * 100_003 + row) for row in range(prompts)]
    x = torch.stack([torch.randn(DIM, 1, 1, generator=generator) for generator in generators])
    sigmas = torch.linspace(1, 0, steps + 1)
    schedule = Schedule(LINEAR, sigmas, sigmas[:-1] * 1000, "velocity", False, 1000)
    conds: Any = [SimpleNamespace(arguments={"prompt": [str(row) for row in range(prompts)]})]
    session = Session(
        pipe=SimpleNamespace(config=SimpleNamespace()), family=SimpleNamespace(), scheduler=None, conds=conds,  # type: ignore[arg-type]
        latents=x, timesteps=schedule.timesteps, step_arguments={}, read_schedule=schedule, dtype=x.dtype, height=1,
        width=1, generator=generators, reopen=lambda **arguments: None,
    )  # fmt: skip
    session.__dict__["x"] = x  # set directly: there is no family that knows the layout of latents
    return session


def run(config: Any, bed: Bed, seed: int, steps: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """Run a search for every prompt and return the samples, and the search's report of each."""
    session, reply = open_session(len(bed.directions), seed, steps), None
    sampling = config.sample(session)
    while True:
        try:
            event = sampling.send(reply)
        except StopIteration as end:
            return end.value, session.report["search"]["pictures"]
        if isinstance(event, Eval):
            sigma = bcast(event.sigma, event.x)
            reply = Pred(LINEAR, event.x, sigma, bed.velocity(event.x, sigma))
        else:
            reply = event.x if isinstance(event, Step) else None


def methods(budget: int, temperature: float) -> dict[str, Any]:
    """Return the searches by name; initial noises take the same share of every budget: 25 of 500 for two chains."""
    initial = max(1, min(25, budget // 20))
    configs: dict[str, Any] = {
        "bon": BoN(budget=budget),
        "sop": SoP(budget=budget, particles=1 if budget < 80 else 2),
    }
    for path in PATHS:
        common: dict[str, Any] = {"budget": budget, "path": path} | ({"tail_steps": TAIL} if path == "vp" else {})
        configs[f"smc {path}"] = SMC(temperature=temperature, **common)
        configs[f"code {path}"] = CoDe(particles=2, **common)
        configs[f"svdd {path}"] = SVDD(particles=2, **common)
        for chunk in (1, 8, 16):
            configs[f"rbf {path} m={chunk}"] = RBF(particles=2, initial=initial, beam=1, chunk=chunk, **common)
        configs[f"rbf {path}"] = RBF(**common)
        configs[f"rbf {path} begin=0.4"] = RBF(begin=0.4, initial=0, **common)
    return configs


def measure(config: Any, bed: Bed, name: str, seeds: int, steps: int) -> dict[str, float]:
    """Return means over prompts and seeds of one search."""
    rewards, nlls, nfe = [], [], []
    config = replace(config, reward=bed.reward(name))
    for seed in range(seeds):
        x, pictures = run(config, bed, seed, steps)
        rewards += [picture["reward"] for picture in pictures]
        nfe += [picture["nfe"] for picture in pictures]
        nlls += bed.nll(x).tolist()
    count = len(rewards)
    mean = math.fsum(rewards) / count
    spread = (math.fsum((r - mean) ** 2 for r in rewards) / count) ** 0.5
    return {
        "reward": mean, "reward_error": spread / count**0.5, "nll": math.fsum(nlls) / count, "nfe": sum(nfe) / count,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 100, 200, 500, 1000], help="NFE a picture")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="noise levels of a call, and of the search")
    parser.add_argument("--only", nargs="+", default=[], help="names of methods, such as 'bon' or 'svdd vp'")
    parser.add_argument("--temperature", type=float, default=0.3, help="of SMC's target")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    args = parser.parse_args()
    bed = Bed.make(args.prompts)
    print(f"negative log-likelihood of the data itself: {float(bed.nll(bed.data(4096)).mean()):.2f}")
    rows = []
    for name in args.rewards:
        for budget in args.budgets:
            print(f"\n{name} reward, {budget} NFE{'':<10}  reward    +-      NLL    NFE")
            for method, config in methods(budget, args.temperature).items():
                if args.only and method not in args.only:
                    continue
                try:
                    row = measure(config, bed, name, args.seeds, args.steps)
                except DiffAccelError as error:
                    print(f"  {method:<28} {error}")
                    continue
                rows.append({"reward_name": name, "budget": budget, "method": method, **row})
                print(
                    f"  {method:<28} {row['reward']:8.3f} {row['reward_error']:6.3f} {row['nll']:8.2f} "
                    f"{row['nfe']:6.0f}"
                )
    if args.json:
        options = {k: v for k, v in vars(args).items() if k != "json"}
        environment = {
            "command": "python -m scripts.bench_search_gmm", "device": record.describe_device(torch.device("cpu")),
            "date": time.strftime("%Y-%m-%d"), "versions": record.versions(),
        }  # fmt: skip
        write_json(args.json, {**environment, "bed": options, "rows": rows})


if __name__ == "__main__":
    main()
