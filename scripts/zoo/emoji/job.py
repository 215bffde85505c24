"""One call of a training machine: run the unfinished stages until the time is over.

    python -m scripts.zoo.emoji.job --recipe full --minutes 9 --data data/emoji --work /tmp/emoji --out OUT

The same command continues where it was killed or ran out of time, and skips finished stages. ``--resume`` starts an
empty work folder from packed models (those of ``diffaccel/zoo``), when the optimiser state is lost.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from diffaccel.training.loop import Deadline
from scripts.zoo import stages
from scripts.zoo.emoji import clip, data, export, flow, recipe_flow, scenes, score, vae, world
from scripts.zoo.emoji import recipe as data_recipe

STAGES = ("clip", "vae", "flow", "export", "score")
_EXPORT_SECONDS = 20  # reserved at the end of a job, so that the result is exported
_SCORE_SECONDS = 75


class Job:
    """One call: recipes, folders, deadline, and data that is loaded when a stage needs it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.recipe = recipe_flow.get(options.recipe)
        self.data_recipe = data_recipe.get(options.recipe)
        self.data, self.work, self.out = options.data, options.work, options.out or options.work
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.seed, self.count = options.seed, options.count
        reserved = _EXPORT_SECONDS + (_SCORE_SECONDS if "score" in options.stages else 0)
        self.train_until = Deadline(60 * options.minutes - reserved)
        self.last = options.last
        if options.resume and not (self.work / "flow.safetensors").exists():
            self.work.mkdir(parents=True, exist_ok=True)
            export.restore(options.resume, self.work)
            for name in options.reopen:
                clip.reopen(name, self.work)
            for name in options.renew:
                shutil.rmtree(self.work / name)
        self.work.mkdir(parents=True, exist_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)

    @cached_property
    def world(self) -> world.World:
        """The whole world."""
        return world.load(self.data)

    @cached_property
    def scenes(self) -> scenes.Scenes:
        """Scenes of the whole world, for the CLIPs and the autoencoder."""
        return scenes.build(self.world, self.data_recipe, self.seed, self.device)

    @cached_property
    def flow_world(self) -> world.World:
        """The part of the world that the flow model learns."""
        return data.restrict(self.world, self.recipe.labels) if self.recipe.labels else self.world

    @cached_property
    def flow_scenes(self) -> scenes.Scenes:
        """Scenes of :attr:`flow_world`."""
        if not self.recipe.labels:
            return self.scenes
        return scenes.build(self.flow_world, self.data_recipe, self.seed, self.device)

    @cached_property
    def images(self) -> vae.Images:
        """Pictures of :attr:`scenes` by index and size."""
        return data.pictures(self.scenes)

    def clip(self) -> None:
        """Train both tokenizers, CLIP-A and CLIP-B, and export A's text tower as the pipeline's text encoder."""
        clip.train(self.scenes, self.data_recipe, self.work, deadline=self.train_until, seed=self.seed)

    def vae(self) -> None:
        """Train the autoencoder, and measure it when it is finished."""
        if vae.load(self.work, "cpu") is None:
            trained = vae.train(
                self.images,
                len(self.scenes),
                self.work,
                self.recipe.vae,
                deadline=self.train_until,
                device=self.device,
                seed=self.seed,
            )
            if trained is not None:
                quality = vae.quality(trained, self.images, len(self.scenes), self.device)
                (self.work / "vae_quality.json").write_text(json.dumps(quality))
                print("vae PSNR, dB:", quality, flush=True)

    def flow(self) -> None:
        """Train the transformer and its T5, once everything that they need exists."""
        needed = ("vae", "text_encoder", "tokenizer", "tokenizer_2")
        if missing := [name for name in needed if not (self.work / name).is_dir()]:
            print(f"flow: waits for {', '.join(missing)}; run the job again", flush=True)
            return
        autoencoder = vae.load(self.work, self.device)
        images = self.images if self.flow_scenes is self.scenes else data.pictures(self.flow_scenes)
        table = flow.tabulate(images, self.flow_scenes.captions, autoencoder, self.work, self.device)
        weights = self.flow_scenes.sampler(self.recipe.flow.shares)
        recipe = self.recipe
        if self.last:
            # The learning-rate schedule must end with this call, however long the earlier ones took.
            elapsed = export.training_state(self.work / "flow.safetensors")["seconds"]
            plan = replace(recipe.flow.plan, seconds=elapsed + max(self.train_until.left(), 1.0), samples=math.inf)
            recipe = replace(recipe, flow=replace(recipe.flow, plan=plan))
        flow.train(table, weights, self.work, recipe, deadline=self.train_until, device=self.device, seed=self.seed)

    def export(self) -> None:
        """Write the packed models, as parts of one tar, and every loss curve: all that must leave the machine."""
        curves = [line for file in sorted(self.work.glob("*.jsonl")) for line in stages.labelled(file, model=file.stem)]
        (self.out / "curves.jsonl").write_text("\n".join(curves) + "\n")
        if not (self.work / "flow.safetensors").is_file():
            print("export: there is no flow model yet", flush=True)
            return
        report = self.work / "report.json"
        export.export(
            self.work, self.recipe, self.work / "zoo", json.loads(report.read_text()) if report.is_file() else None
        )
        for part in export.send(self.work / "zoo", self.out):
            print(f"export: {part} {part.stat().st_size / 1e6:.1f} MB", flush=True)

    def score(self) -> None:
        """Measure the exported models, and export them again with the numbers in their cards."""
        if not (self.work / "zoo" / export.PIPELINE).is_dir():
            return
        entries = [json.loads(line) for line in (self.work / "flow.jsonl").read_text().splitlines()]
        losses = [entry["loss128"] for entry in entries if entry.get("loss128") is not None]
        pipe, judge = export.reload(self.work / "zoo", self.work / "plain", self.device)
        report = score.score(
            pipe,
            judge,
            self.flow_world,
            self.recipe,
            self.work,
            judge_metrics=json.loads((self.work / "clip_b.json").read_text()),
            count=self.count,
            loss=sum(losses[-5:]) / len(losses[-5:]) if losses else None,
        )
        # The bf16 weights do not leave this machine, so the loss of int8 is measured here.
        original = export.assemble(self.work, self.recipe, torch.bfloat16).to(self.device, torch.float32)
        settings = {"size": self.recipe.default_size, "steps": self.recipe.default_steps}
        psnr = score.rounding(original, pipe, guidance=self.recipe.default_guidance, **settings)
        report["quality"]["int8 against bf16, PSNR in dB"] = round(psnr, 2)
        (self.work / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        for name in ("report.json", "grid.png"):
            if self.out != self.work:
                shutil.copyfile(self.work / name, self.out / name)
        self.export()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="full (a GPU) or cpu (two cores)")
    stages.add_options(parser, STAGES)
    parser.add_argument("--minutes", type=float, required=True, help="time that training may take in this call")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="world.json.xz and icons.zip")
    parser.add_argument("--last", action="store_true", help="end the flow model's training with this call")
    parser.add_argument("--resume", type=Path, help="packed models to start from if the work folder has no flow model")
    parser.add_argument(
        "--reopen",
        choices=clip.NAMES,
        nargs="*",
        default=(),
        help="with --resume: CLIPs that go on training, up to their recipe's seconds",
    )
    parser.add_argument(
        "--renew", choices=clip.NAMES, nargs="*", default=(), help="with --resume: CLIPs that are trained from nothing"
    )
    parser.add_argument("--count", type=int, default=128, help="pictures in each check of the score")
    stages.run(Job, parser.parse_args(), STAGES)


if __name__ == "__main__":
    main()
