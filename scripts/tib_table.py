"""The table of ``scripts.bench_tib_quality``: a whole network in 8 or 4 bits, and what becomes of its temporal block.

A row rounds the network outside of the temporal block to the nearest codes, or learns that rounding block after block,
and gives the temporal block round-to-nearest weights with one range for all timesteps ("nearest"), its own learned
rounding with ranges for each timestep ("tiar"), or codes of exact features ("cache").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import diffaccel
import diffaccel.eval
from diffaccel.cli.planned import calibration_prompts
from diffaccel.eval.sets import prompts
from diffaccel.files import write_json
from diffaccel.quant import TIB, W4A8, W8A8
from diffaccel.quant.reconstruction.blocks import reconstruct
from diffaccel.quant.reconstruction.calls import recording
from diffaccel.runs import loading
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.generate import generate_run
from diffaccel.runs.request import Request
from diffaccel.training.loop import Deadline

tell = partial(print, flush=True)


@dataclass(frozen=True)
class Way:
    """A row: how the network is rounded outside of the temporal block, and the form of that block's features."""

    name: str
    learned: bool
    features: str


WAYS = (
    Way("naive", False, "nearest"),  # round-to-nearest everywhere
    Way("learned", True, "nearest"),  # block reconstruction, without care for the temporal block
    Way("tiar", True, "tiar"),
    Way("cache", True, "cache"),
)


@dataclass(frozen=True)
class Setting:
    """What all rows share.

    Attributes:
        work: folder of models and pictures; what is finished there is kept.
        steps: of a picture.
        count: of the last prompts of ``prompts``, which are drawn.
        batch: pictures of a call.
        iterations: of the temporal block's rounding; ``block_iterations`` of each other block's.
        calibration: number of prompts of which the calls are recorded, ``calibration_batch`` in a call; every
            ``every``-th call of the network is kept.
    """

    model: str
    work: Path
    device: torch.device
    dtype: torch.dtype
    size: int
    steps: int
    prompts: str
    count: int
    batch: int
    iterations: int
    block_iterations: int
    calibration: int
    calibration_batch: int
    every: int = 5

    @property
    def request(self) -> Request:
        """The request that every row draws."""
        texts = tuple(prompts.read(self.prompts).texts[-self.count :])
        named = Request(
            model=self.model, prompts=texts, size=(self.size, self.size), steps=self.steps, batch=self.batch,
            device=str(self.device), seed=50_000,
        )  # fmt: skip
        return named.with_model_defaults()

    def plain(self) -> Any:
        """Return the pipeline in full precision."""
        pipe = diffaccel.load(self.model, torch_dtype=self.dtype).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def config_of(bits: int) -> Any:
    """Return the quantizer outside of the temporal block, whose weights the block's own method takes."""
    return W8A8(modulation="keep") if bits == 8 else W4A8(modulation="keep")


def learned_model(setting: Setting, bits: int) -> Path:
    """Return the folder of a model with learned rounding, which is made where it is missing."""
    folder = setting.work / "models" / f"learned-{bits}"
    if (folder / "reports.json").is_file():
        return folder
    pipe = setting.plain()
    arguments = call_arguments(pipe, setting.request)
    for name in ("num_inference_steps", "prompt", "generator", "output_type"):
        arguments.pop(name, None)
    texts = calibration_prompts(setting.model, None, setting.calibration)[: setting.calibration]
    with recording(pipe.transformer, setting.every) as calls, torch.no_grad():
        for start in range(0, len(texts), setting.calibration_batch):
            part = list(texts[start : start + setting.calibration_batch])
            own = dict(arguments)
            if isinstance(own.get("negative_prompt"), str):
                own["negative_prompt"] = [own["negative_prompt"]] * len(part)
            generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))]
            pipe(prompt=part, num_inference_steps=setting.steps, generator=generators, output_type="latent", **own)
    tell(f"W{bits}A8: {len(calls)} calls of the network are kept")
    _, reports = reconstruct(pipe.transformer, config_of(bits), calls, iterations=setting.block_iterations, tell=tell)
    pipe.save_pretrained(folder)
    write_json(folder / "reports.json", [vars(report) for report in reports])
    return folder


def opened(setting: Setting, way: Way, bits: int) -> Any:
    """Return the pipeline of a row."""
    if way.learned:
        pipe = diffaccel.load(learned_model(setting, bits), torch_dtype=setting.dtype).to(setting.device)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe = diffaccel.accelerate(setting.plain(), config_of(bits))
    return diffaccel.accelerate(pipe, TIB(bits=bits, features=way.features, iterations=setting.iterations))


def table(setting: Setting, bits: list[int], deadline: Deadline) -> dict[str, Any] | None:
    """Draw the rows that are left and compare every pair; None where time was over before."""
    folders = {"plain": setting.work / "pictures" / "plain"}
    generate_run(setting.request, folders["plain"], pipe=setting.plain(), digest="plain")
    for number in bits:
        for way in WAYS:
            name = f"{way.name}-w{number}a8"
            folders[name] = setting.work / "pictures" / name
            if _is_drawn(folders[name]):
                continue
            if deadline.left() < 60:
                return None
            generate_run(setting.request, folders[name], pipe=opened(setting, way, number), digest=name)
            tell(f"drawn: {name}, {deadline.left():.0f} s left")
    found: dict[str, Any] = {}
    for number in bits:
        names = [f"{way.name}-w{number}a8" for way in WAYS]
        for place, name in enumerate(["plain", *names[:-1]]):
            if f"{name}:{number}" in found:
                continue
            if deadline.left() < 20:
                return None
            others = names if name == "plain" else names[place:]
            comparison = diffaccel.eval.compare(
                folders[name],
                *[folders[other] for other in others],
                report=setting.work / "report" / f"{name}-{number}",
            )
            tell(f"\nagainst {name}\n{comparison.table()}")
            found[f"{name}:{number}"] = {"others": others, "table": str(comparison.table())}
    reports = {b: json.loads((setting.work / "models" / f"learned-{b}" / "reports.json").read_text()) for b in bits}
    return {"pairs": found, "blocks": reports, "seed": setting.request.seed, "count": setting.count}


def _is_drawn(folder: Path) -> bool:
    file = folder / "run.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("state") == "finished"


def setting_of(options: Any, work: Path) -> Setting:
    """Return the setting of a command line."""
    device = loading.pick_device(options.device)
    return Setting(
        model=options.model, work=work, device=device, dtype=loading.pick_dtype("auto", device), size=options.size,
        steps=options.steps, prompts=options.prompts, count=options.count, batch=options.batch,
        iterations=options.iterations, block_iterations=options.block_iterations, calibration=options.calibration,
        calibration_batch=options.calibration_batch,
    )  # fmt: skip
