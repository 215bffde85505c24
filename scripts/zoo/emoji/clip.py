"""Train the two CLIPs: A (reward; its text tower is the pipeline's text encoder) and B (judge; another image tower).

    python -m scripts.zoo.emoji.clip --recipe full --seconds 240 --data data/emoji --out work

writes ``work/clip_a`` and ``work/clip_b`` (open_clip folders), ``work/text_encoder`` and ``work/clip_a.json``,
``work/clip_b.json`` (metrics). ``--seconds`` is shared by both; the same command continues a run that was stopped.
The judge's image tower needs timm beside open_clip.

Contrastive training alone learns bags of coloured parts: "A left of B" and "B left of A" get equal features, and so do
a picture and its shuffled pieces; a blurred picture has the features of a sharp one; and a label's style is learned by
heart, so that a style in which it was never seen is not recognised. So each scene adds a false caption (objects,
colours, style, number or label changed; see captions.contradiction) to the texts, and some add their picture to the
images, damaged (damage.py). Each scene is also compared with its own false twins, across and within the towers, and its
style with the two others, named with any label. A and B differ in image tower, in captions, and in the scenes of their
training.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.training.checkpoint import save_weights
from diffaccel.training.loop import Deadline, TrainingPlan, TrainingRun
from diffaccel.training.steps import computing
from scripts.zoo.emoji import captions, clip_eval, clip_export, damage, heldout, recipe, tokenizers, views, world
from scripts.zoo.emoji.recipe import ClipRecipe, Recipe
from scripts.zoo.emoji.scenes import KINDS, Scenes, build

NAMES = ("clip_a", "clip_b")
_MAX_SCALE = math.log(100)
_PARTS = 5  # A is not trained on scenes whose index is 0 modulo 5, B on those with 1


def model_config(clip: ClipRecipe, shared: Recipe, entries: int) -> dict[str, Any]:
    """Return open_clip's ``model_cfg``."""
    return {
        "embed_dim": clip.embed_dim,
        "vision_cfg": dict(clip.vision),
        "text_cfg": {
            "context_length": shared.context,
            "vocab_size": entries,
            "hf_tokenizer_name": "tokenizer",
            "width": clip.text_width,
            "heads": clip.text_heads,
            "layers": clip.text_layers,
        },
    }


def make(config: dict[str, Any]) -> nn.Module:
    """Make a CLIP with random weights."""
    from open_clip.model import CLIP

    return CLIP(**config)


def tokenize(tokenizer, texts: Sequence[str], length: int) -> torch.Tensor:
    """Encode texts to ids (n, length) int32, padded with EOS as by open_clip's tokenizer."""
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return torch.from_numpy(encoded["input_ids"]).to(torch.int32)


class Data:
    """One CLIP's training data: pictures, captions, false captions, and which scenes are equal."""

    def __init__(self, scenes: Scenes, clip: ClipRecipe, shared: Recipe, tokenizer) -> None:
        device = scenes.device
        self.scenes, self.size = scenes, shared.size
        self.tokens = tokenize(tokenizer, scenes.captions[clip.caption], shared.context).to(device)
        self.false = tokenize(tokenizer, scenes.contradictions(clip.caption), shared.context).to(device)
        self.weights = scenes.sampler(shared.shares)
        self.weights[torch.arange(len(scenes), device=device) % _PARTS == clip.caption] = 0
        # Scenes of equal content, whatever its place and size, are no negatives of each other.
        contents: dict[tuple, int] = {}
        content = [contents.setdefault((row.icons, row.colours, row.stacked), len(contents)) for row in scenes.rows]
        self.content = torch.tensor(content, device=device)
        # Damage must make the caption false. The shuffled parts of a pair or a count may still fit it, so only singles
        # are shuffled; of pairs whose caption tells the order, the halves are exchanged.
        self.related = torch.tensor(scenes.related(clip.caption), device=device)
        self.stacked = torch.tensor([row.stacked for row in scenes.rows], device=device)
        single = torch.tensor([kind in ("single", "colour") for kind in KINDS], device=device)
        self.may_damage = single[scenes.kind] | self.related
        self.style = scenes.world.icon_style.to(device)[scenes.placed.icon[:, 0]]
        self.styled = self._styled_tokens(tokenizer, shared).to(device)

    def _styled_tokens(self, tokenizer, shared: Recipe) -> torch.Tensor:
        """Encode each label in each style and template, (labels x templates, styles, length).

        Also a label that was withheld in this style: its caption is read with pictures of other labels, so that what a
        style's name means does not depend on the label beside it.
        """
        labels = list(self.scenes.world.labels)
        labels += ["emoji"] * (len(labels) // 8)  # the style alone
        templates = [template for template, _ in captions.TEMPLATES if "{s}" in template]
        texts = [
            template.format(x=label, s=style)
            for label in labels
            for template in templates
            for style in self.scenes.world.styles
        ]
        tokens = tokenize(tokenizer, texts, shared.context)
        return tokens.view(len(labels) * len(templates), len(self.scenes.world.styles), -1)

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """Draw indices of scenes, those that may be damaged first."""
        index = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        return index[self.may_damage[index].int().argsort(descending=True, stable=True)]

    def damage(self, images: torch.Tensor, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Damage pictures of scenes ``index`` so that their captions are false."""
        exchanged = damage.exchange_halves(images, self.stacked[index])
        shuffled = damage.shuffle_patches(images, generator)
        return torch.where(self.related[index][:, None, None, None], exchanged, shuffled)


def crop(tokens: torch.Tensor) -> torch.Tensor:
    """Cut off the columns that are padding in every row; under causal attention they have no effect."""
    longest = int((tokens != tokens.amax()).sum(1).max()) + 1
    return tokens[:, : min(-(-longest // 8) * 8, tokens.shape[1])]


def loss_of(model: nn.Module, data: Data, clip: ClipRecipe, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the loss, contrastive with hard negatives plus that against each scene's own twins, and its metrics."""
    index = data.batch(clip.batch, generator)
    count, device = len(index), index.device

    def some(share: float) -> torch.Tensor:
        return torch.randperm(count, generator=generator, device=generator.device)[: round(share * count)].to(device)

    images = data.scenes.images(index, data.size)
    damaged = min(round(clip.damaged * count), int(data.may_damage[index].sum()))
    degraded, twins, styled = some(clip.degraded), some(clip.contradicted), some(clip.styled)
    bad = data.damage(images[:damaged], index[:damaged], generator)
    worse = damage.degrade(images[degraded], generator)
    cost = (clip.cost * (damage.severity(images[degraded], worse) - 0.1)).clamp(0, 0.4)
    labels = torch.randint(len(data.styled), (len(styled),), generator=generator, device=generator.device).to(device)
    texts = torch.cat([data.tokens[index], data.false[index[twins]], data.styled[labels].flatten(0, 1)])
    with computing(device, torch.bfloat16 if device.type == "cuda" else torch.float32):
        seen = views.augment(torch.cat([images, bad, worse]), clip, generator)
        image = model.encode_image(torch.cat([seen, views.close_up(images[styled], generator)]))
        text = clip_export.reference(model, crop(texts).long())[1] @ model.text_projection  # encode_text: full length
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    text, named = text.tensor_split([count + len(twins)])
    image, worse, close = image.tensor_split([count + damaged, count + damaged + len(degraded)])
    scale = model.logit_scale.exp()
    text_gap, image_gap, text_margin, image_margin = _gaps(image, text, twins, damaged, count, scale)
    contrast = _contrast(image, text, data.content[index], scale)
    graded = _graded(image[degraded], worse, text[degraded], cost)
    style_loss, style_right = _style(close, named, data.style[index[styled]], scale)
    hard = sum(F.softplus(-gap).mean() for gap in (text_gap, image_gap, text_margin, image_margin) if len(gap))
    return {
        "loss": contrast + clip.hard_weight * (hard + graded) + clip.style_weight * style_loss,
        "contrast": contrast.detach(),
        "false_text": (text_gap > 0).float().mean().detach(),
        "false_image": (image_gap > 0).float().mean().detach(),
        "style": style_right,
        "graded": graded.detach(),
        "order": _order(text_gap, data.related[index[twins]]),
    }


def _contrast(image: torch.Tensor, text: torch.Tensor, content: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the symmetric contrastive loss of features ``(n + false ones, d)``; equal content is no negative."""
    count = len(content)
    mask = (content[:, None] == content[None]) & ~torch.eye(count, dtype=torch.bool, device=content.device)
    target = torch.arange(count, device=content.device)

    def direction(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        logits = scale * queries @ keys.T
        return F.cross_entropy(logits.masked_fill(F.pad(mask, (0, len(keys) - count)), -math.inf), target)

    return 0.5 * (direction(image[:count], text) + direction(text[:count], image))


def _gaps(
    image: torch.Tensor, text: torch.Tensor, twins: torch.Tensor, damaged: int, count: int, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return how much closer true pairs are than a scene and its false caption or damaged picture.

    The first two compare across the towers. Order is a product of what both towers say about place, and at the start
    neither says anything: a saddle point. The last two, which ask each tower by itself to separate a true input from
    its false twin, lead away from it.
    """
    match = (image[:count] * text[:count]).sum(1)
    false_text, false_image = text[count:], image[count:]
    text_gap = scale * (match[twins] - (image[twins] * false_text).sum(1))
    image_gap = scale * (match[:damaged] - (false_image * text[:damaged]).sum(1))
    text_margin = scale * (match[twins] - (text[twins] * false_text).sum(1))
    image_margin = scale * (match[:damaged] - (image[:damaged] * false_image).sum(1))
    return text_gap, image_gap, text_margin, image_margin


def _graded(image: torch.Tensor, worse: torch.Tensor, text: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """Ask that worse pictures (n, d) lose ``cost`` (n,) of the cosine to the caption, no less and no more.

    As negatives like the others they would lose all of it, and the judge would look at nothing but sharpness.
    """
    if not len(cost):
        return cost.new_zeros(())
    points = 100 * ((image * text).sum(1).detach() - cost - (worse * text).sum(1))
    return 0.2 * F.smooth_l1_loss(points, torch.zeros_like(points))


def _style(
    image: torch.Tensor, named: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tell the styles (n,) of pictures (n, d) by texts (n x styles, d); return the loss and the share that is right.

    The texts name any label, so that a style is a fact of its own and not one of the label's.
    """
    if not len(image):
        return image.new_zeros(()), image.new_ones(())
    logits = scale * (named.unflatten(0, (len(image), -1)) @ image[:, :, None])[..., 0]
    return F.cross_entropy(logits, truth), (logits.argmax(1) == truth).float().mean().detach()


def _order(gap: torch.Tensor, related: torch.Tensor) -> torch.Tensor:
    """Return the share of captions with a relation that beat their false twin, which mostly differs in the order."""
    return ((gap > 0) & related).float().sum().detach() / related.sum().clamp_min(1)


def train_one(
    name: str,
    data: Data,
    clip: ClipRecipe,
    config: dict[str, Any],
    work: Path,
    *,
    deadline: Deadline,
    seed: int,
) -> TrainingRun:
    """Train one CLIP until its time or the job's is over, with checkpoints in ``work``."""
    device = data.scenes.device
    torch.manual_seed(seed + NAMES.index(name))
    model = make(config).to(device)
    if "timm_model_name" in clip.vision:
        model.visual.to(memory_format=torch.channels_last)
    plan = TrainingPlan(
        lr=clip.lr,
        seconds=clip.seconds,
        betas=(0.9, 0.98),
        weight_decay=clip.weight_decay,
        warmup=clip.warmup,
        flat=0.0,
        ema=clip.ema,
        log_seconds=min(10.0, clip.seconds / 10),
    )
    run = TrainingRun(
        work,
        name,
        {"model": model},
        plan,
        seed=seed + NAMES.index(name),
        deadline=deadline,
        device=device,
        tell=partial(print, flush=True),
    )
    for _ in run:
        metrics = loss_of(model, data, clip, run.generator)
        run.update(metrics.pop("loss"), samples=clip.batch, **metrics)
        with torch.no_grad():
            model.logit_scale.clamp_(max=_MAX_SCALE)
    return run


def train(
    scenes: Scenes,
    shared: Recipe,
    work: str | Path,
    *,
    deadline: Deadline | None = None,
    seed: int = 0,
    names: Sequence[str] = NAMES,
) -> bool:
    """Make tokenizers, both CLIPs and the text encoder in ``work``, and return whether all is finished.

    Finished parts are skipped, so the same call continues a job that ran out of time.
    """
    from transformers import CLIPTokenizer

    work, deadline = Path(work), deadline or Deadline(math.inf)
    if not (work / tokenizers.T5_FOLDER).is_dir():
        tokenizers.build([*scenes.captions[0], *scenes.captions[1]], work, size=shared.vocabulary)
    tokenizer = CLIPTokenizer.from_pretrained(work / tokenizers.CLIP_FOLDER)
    sets = None
    for name in names:
        if (work / name).is_dir():
            continue
        if deadline.over():
            return False
        clip = shared.clip_a if name == "clip_a" else shared.clip_b
        config = model_config(clip, shared, len(tokenizer))
        scenes.keep(shared.size)
        data = Data(scenes, clip, shared, tokenizer)
        run = train_one(name, data, clip, config, work, deadline=deadline, seed=seed)
        if not run.finished:
            return False
        sets = sets or heldout.build(scenes.world, seed, scenes.device)
        _finish(name, run, config, sets, shared, tokenizer, work)
    return True


def _finish(
    name: str,
    run: TrainingRun,
    config: dict[str, Any],
    sets: dict[str, Scenes],
    shared: Recipe,
    tokenizer,
    work: Path,
) -> None:
    """Measure and export a trained CLIP with its averaged weights; its folder is written last."""
    with run.ema, torch.no_grad():
        model = run.module["model"].eval()
        metrics = clip_eval.evaluate(model, tokenizer, sets, shared)
        metrics |= {"name": name, "steps": run.step, "samples": run.samples, "seconds": round(run.seconds, 1)}
        clip_export.write_json(work / f"{name}.json", metrics)
        print(name, json.dumps(metrics), flush=True)
        if name == "clip_a":
            clip_export.text_encoder(model, config, work / "text_encoder")
        clip_export.folder(model, config, work / tokenizers.CLIP_FOLDER, work / name, shared.size)


def reopen(name: str, work: Path) -> None:
    """Make a finished CLIP unfinished: ``train`` then continues it, with fresh moments, up to its recipe's seconds."""
    metrics = json.loads((work / f"{name}.json").read_text())
    weights = load_file(work / name / "open_clip_model.safetensors")
    progress = {"step": metrics["steps"], "samples": metrics["samples"], "seconds": metrics["seconds"]}
    save_weights({f"model.{key}": value for key, value in weights.items()}, work / f"{name}.safetensors", **progress)
    shutil.rmtree(work / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, choices=sorted(recipe.RECIPES))
    parser.add_argument("--seconds", type=float, help="training time for both together; default: the recipe's")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder with world.json.xz and icons.zip")
    parser.add_argument("--out", type=Path, required=True, help="work folder: checkpoints and results")
    parser.add_argument("--only", choices=NAMES, help="train one of the two (its share of --seconds stays a half)")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--minutes", type=float, default=math.inf, help="this call ends after so long, set-up included")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shared = recipe.get(options.recipe)
    if options.seconds is not None:
        half = options.seconds / 2
        shared = replace(
            shared, clip_a=replace(shared.clip_a, seconds=half), clip_b=replace(shared.clip_b, seconds=half)
        )
    deadline = Deadline(60 * options.minutes)
    names = (options.only,) if options.only else NAMES
    try:
        table = build(world.load(options.data), shared, options.seed, device)
        print(f"{len(table)} scenes", flush=True)
        finished = train(table, shared, options.out, deadline=deadline, seed=options.seed, names=names)
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error
    print("finished" if finished else "time is up; say the same again to continue", flush=True)


if __name__ == "__main__":
    main()
