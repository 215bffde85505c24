"""One call of a training machine for emoji-sd: train until the time is over, pack, and measure.

    python -m scripts.zoo.emoji_sd.job --recipe full --minutes 9 --data data/emoji --work WORK --out OUT [--last]

No network is used: autoencoder, text encoder and judge are those of the installed package, pictures come from
``data/emoji`` (9 MB). The same command goes on where it was killed or ran out of time. ``--resume ZOO`` starts an empty
work folder from the packed ``ZOO/emoji-sd`` (7 MB) of an earlier machine. ``--last`` ends the learning rate's schedule
with this call.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from diffaccel import zoo
from diffaccel.training.loop import Deadline
from scripts.zoo import stages
from scripts.zoo.emoji import data, scenes, world
from scripts.zoo.emoji import recipe as data_recipe
from scripts.zoo.emoji.export import training_state
from scripts.zoo.emoji_sd import accept, export, recipe, unet

STAGES = ("train", "export", "accept")
_EXPORT_SECONDS, _ACCEPT_SECONDS = 20, 60  # reserved at the end of a call


def base_pipeline() -> object:
    """Return the installed emoji-flux, whose autoencoder and text encoder are shared."""
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(zoo.path(export.BASE), dtype=torch.float32)


class Job:
    """One call: recipe, folders, deadline."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.recipe = options, recipe.get(options.recipe)
        self.work, self.out = options.work, options.out or options.work
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        reserved = _EXPORT_SECONDS + _ACCEPT_SECONDS * ("accept" in options.stages)
        self.deadline = Deadline(max(60 * options.minutes - reserved, 1.0))
        for folder in (self.work, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        if options.resume and not (self.work / f"{unet.NAME}.safetensors").exists():
            export.restore(options.resume, self.work)
        self.base = base_pipeline()

    def _network(self) -> object:
        torch.manual_seed(self.options.seed)
        return unet.build(self.recipe, self.base.vae, self.base.text_encoder.config.hidden_size)

    def train(self) -> None:
        """Train the UNet until the deadline; a finished one needs no scenes."""
        file = self.work / f"{unet.NAME}.safetensors"
        if file.is_file() and not self.options.last:
            state = training_state(file)
            if self.recipe.plan.progress(state["samples"], state["seconds"]) >= 1:
                print("train: is finished", flush=True)
                return
        whole = world.load(self.options.data)
        if self.recipe.label_count:
            whole = data.restrict(whole, tuple(whole.labels[: self.recipe.label_count]))
        drawn = scenes.build(
            whole, replace(data_recipe.FULL, scenes=self.recipe.scenes), self.options.seed, self.device
        )
        vae = self.base.vae.to(self.device)
        table = unet.tabulate(
            data.pictures(drawn), drawn.captions, vae, self.base.tokenizer, self.recipe.size, self.device
        )
        plan = self.recipe.plan
        if self.options.last:  # the schedule ends with this call, however long the earlier ones took
            elapsed = training_state(file)["seconds"]
            plan = replace(plan, seconds=elapsed + max(self.deadline.left(), 1.0), samples=math.inf)
        unet.train(
            table, drawn.sampler(self.recipe.shares), self.work, replace(self.recipe, plan=plan), self._network(),
            self.base.text_encoder, deadline=self.deadline, device=self.device, seed=self.options.seed,
        )  # fmt: skip
        self.base.vae.to("cpu")
        self.base.text_encoder.to("cpu")

    def export(self) -> None:
        """Pack the averaged weights, and write what must leave the machine: the parts and the loss curve."""
        if not (self.work / f"{unet.NAME}.safetensors").is_file():
            print("export: there is no UNet yet", flush=True)
            return
        pipe = export.assemble(self.base, unet.load(self._network(), self.work))
        report = self.work / "report.json"
        told = json.loads(report.read_text()) if report.is_file() else None
        packed = Path(zoo.__file__).parent / export.BASE
        export.export(pipe, self.recipe, self.work, self.work / "zoo", packed, told)
        self.base = base_pipeline()  # the export is in bfloat16
        for part in export.send(self.work / "zoo" / export.MODEL, self.out):
            print(f"export: {part} {part.stat().st_size / 1e6:.1f} MB", flush=True)
        curve = self.work / f"{unet.NAME}.jsonl"
        if curve.is_file():
            shutil.copyfile(curve, self.out / "curve.jsonl")

    def accept(self) -> None:
        """Measure the packed model, and export it again with the numbers in its card."""
        if (self.work / "zoo" / export.MODEL).is_dir():
            model, guidance = self.work / "zoo" / export.MODEL, self.recipe.guidance
            accept.measure(model, self.options.data, self.work, count=self.options.count, guidance=guidance)
            for name in ("report.json", "grid.png"):
                if self.out != self.work:
                    shutil.copyfile(self.work / name, self.out / name)
            self.export()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="full (a GPU) or tiny (to try the code)")
    stages.add_options(parser, STAGES)
    parser.add_argument("--minutes", type=float, required=True, help="time that this call may take")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="world.json.xz and icons.zip")
    parser.add_argument("--last", action="store_true", help="end the training with this call")
    parser.add_argument("--resume", type=Path, help="folder with packed emoji-sd and emoji-flux, to start from")
    parser.add_argument("--count", type=int, default=128, help="pictures in each check")
    stages.run(Job, parser.parse_args(), STAGES)


if __name__ == "__main__":
    main()
