"""Quality of a CLIP as a reward or judge: on combinations that training withheld, and on damaged pictures."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from diffaccel.eval.metrics.frechet import distance_of_features as frechet
from scripts.zoo.emoji import captions as words
from scripts.zoo.emoji import damage
from scripts.zoo.emoji.recipe import Recipe
from scripts.zoo.emoji.scenes import FILLED, Row, Scenes
from scripts.zoo.emoji.world import COLOURS, COUNTS, World

_BATCH = 256
BLURS = (3, 5, 9, 17)  # widths in pixels of the box blurs that are measured, of pictures of 128


class Encoder:
    """Features of pictures, scenes and texts by one CLIP, computed in batches."""

    def __init__(self, model: nn.Module, tokenizer, shared: Recipe, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.size, self.context = shared.size, shared.context

    def images(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the features of pictures before normalisation, (n, d)."""
        return torch.cat([self.model.encode_image(part.to(self.device)).float() for part in pictures.split(_BATCH)])

    def scenes(self, scenes: Scenes) -> torch.Tensor:
        """Return the features of all scenes before normalisation, (n, d)."""
        batches = torch.arange(len(scenes), device=scenes.device).split(_BATCH)
        return torch.cat([self.images(scenes.images(index, self.size)) for index in batches])

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the normalised features of texts, (n, d)."""
        features = []
        for start in range(0, len(texts), _BATCH):
            encoded = self.tokenizer(
                list(texts[start : start + _BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self.context,
                return_tensors="pt",
            )
            features.append(self.model.encode_text(encoded["input_ids"].to(self.device)).float())
        return F.normalize(torch.cat(features), dim=-1)


def top(similarity: torch.Tensor, truth: torch.Tensor, k: int) -> float:
    """Return the share of rows whose true column is among the k highest."""
    return (similarity.topk(k, 1).indices == truth[:, None]).any(1).float().mean().item()


def evaluate(model: nn.Module, tokenizer, sets: Mapping[str, Scenes], shared: Recipe) -> dict[str, float]:
    """Return all metrics by name; accuracies in [0, 1]."""
    encoder = Encoder(model, tokenizer, shared, next(model.parameters()).device)
    features = {name: F.normalize(encoder.scenes(scenes), dim=-1) for name, scenes in sets.items()}
    metrics = retrieval(encoder, sets, features)
    metrics |= {"colour_word": _words(encoder, sets["colour"], features["colour"], len(COLOURS), _recoloured)}
    metrics |= {"count_word": _words(encoder, sets["count"], features["count"], len(COUNTS), _recounted)}
    for name in ("pair", "colour_pair"):
        metrics[f"{name}_order"] = order(encoder, sets[name], features[name])
    metrics |= labels(encoder, sets["seen"].world)
    return {name: round(value, 4) for name, value in metrics.items()}


def retrieval(encoder: Encoder, sets: Mapping[str, Scenes], features: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Retrieve each picture's caption among the captions of all held-out sets together."""
    held_out = [name for name in sets if name != "seen"]
    texts = encoder.texts([text for name in held_out for text in sets[name].plain])
    similarity = torch.cat([features[name] for name in held_out]) @ texts.T
    truth = torch.arange(len(texts), device=texts.device)
    accuracies = {"retrieval_top1": top(similarity, truth, 1), "retrieval_top5": top(similarity, truth, 5)}
    start = 0
    for name in held_out:
        rows = slice(start, start + len(sets[name]))
        accuracies[f"retrieval_top1_{name}"] = top(similarity[rows], truth[rows], 1)
        start = rows.stop
    return accuracies | {"retrieval_size": float(len(texts))}


def _recoloured(facts: words.Facts, choice: int) -> words.Facts:
    return replace(facts, colours=(choice,))


def _recounted(facts: words.Facts, choice: int) -> words.Facts:
    return replace(facts, count=COUNTS[choice])


def _words(encoder: Encoder, scenes: Scenes, features: torch.Tensor, choices: int, change) -> float:
    """Return the share of pictures for which the true colour (or number) word scores highest."""
    hits = []
    for i in range(len(scenes)):
        facts = scenes.facts(i)
        texts = [words.caption(change(facts, c), random.Random(0), plain=True) for c in range(choices)]
        truth = facts.colours[0] if change is _recoloured else COUNTS.index(facts.count)
        hits.append(int((encoder.texts(texts) @ features[i]).argmax()) == truth)
    return sum(hits) / len(hits)


def order(encoder: Encoder, scenes: Scenes, features: torch.Tensor) -> float:
    """Return the share of pairs for which the true caption beats the one with the two things exchanged."""
    captions, swapped_captions = [], []
    for i in range(len(scenes)):
        facts = scenes.facts(i)
        swapped = replace(facts, labels=facts.labels[::-1], colours=facts.colours[::-1])
        # The same generator state gives both captions the same relation word, so only the names differ.
        captions.append(words.caption(facts, random.Random(i), related=True, plain=True))
        swapped_captions.append(words.caption(swapped, random.Random(i), related=True, plain=True))
    gap = (features * encoder.texts(captions)).sum(1) - (features * encoder.texts(swapped_captions)).sum(1)
    return (gap > 0).float().mean().item()


def labels(encoder: Encoder, world: World) -> dict[str, float]:
    """Classify all icons zero-shot, labels and styles, and measure Fréchet distances of damaged icons."""
    rows = [Row("single", (i,), (-1,), FILLED) for i in range(len(world.icons))]
    icons = Scenes(world, rows, seed=0, device=encoder.device)
    raw = encoder.scenes(icons)
    features = F.normalize(raw, dim=-1)
    truth, style = world.icon_label.to(encoder.device), world.icon_style.to(encoder.device)
    prompts = [encoder.texts([f"{label}, {name}" for label in world.labels]) for name in world.styles]
    hits = torch.cat(
        [
            (features[style == number] @ texts.T).topk(5, 1).indices == truth[style == number, None]
            for number, texts in enumerate(prompts)
        ]
    )  # (N, 5) in the icons' order, which is by style and label
    top1, top5 = hits[:, 0].float(), hits.any(1).float()
    seen = world.training.to(encoder.device)
    named = (torch.stack([(features * texts[truth]).sum(1) for texts in prompts], 1).argmax(1) == style).float()
    return {
        "label_top1_seen": top1[seen].mean().item(),
        "label_top5_seen": top5[seen].mean().item(),
        "label_top1_style": top1[~seen].mean().item(),
        "label_top5_style": top5[~seen].mean().item(),
        "style_word": named[seen].mean().item(),
        "style_word_unseen": named[~seen].mean().item(),
        **_damage_distances(encoder, icons, raw, torch.stack(prompts)[style, truth]),
    }


def _damage_distances(encoder: Encoder, icons: Scenes, raw: torch.Tensor, texts: torch.Tensor) -> dict[str, float]:
    """Measure damage of one half of the icons: Fréchet distances from the other half, and points lost to blur.

    ``raw`` (n, d) are the icons' features, ``texts`` (n, d) those of their captions; points are 100 cosines.
    """
    generator = torch.Generator(encoder.device).manual_seed(0)
    permutation = torch.randperm(len(icons), generator=torch.Generator().manual_seed(0)).to(encoder.device)
    half, rest = permutation.chunk(2)

    def features(change: Callable[[torch.Tensor], torch.Tensor], batch: int = _BATCH) -> torch.Tensor:
        parts = [encoder.images(change(icons.images(index, encoder.size))) for index in rest.split(batch)]
        return torch.cat(parts)

    blurred = {width: features(partial(damage.box_blur, width=width)) for width in BLURS}
    damaged = {
        "shuffled": features(lambda x: damage.shuffle_patches(x, generator), 32),
        "bands": features(lambda x: damage.shuffle_patches(x, generator, (4, 1))),
        "grey": features(lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1)),
        **{f"blur_{width}": seen for width, seen in blurred.items()},
    }
    distances = {f"fd_{name}": frechet(raw[half], seen) for name, seen in damaged.items()}
    points = (F.normalize(raw[rest], dim=-1) * texts[rest]).sum(1)
    lost = {
        f"points_lost_blur_{width}": 100 * (points - (F.normalize(seen, dim=-1) * texts[rest]).sum(1)).mean().item()
        for width, seen in blurred.items()
    }
    return {"fd_identity": frechet(raw[half], raw[rest]), **distances, **lost}
