"""How good a CLIP is as a reward or judge: on sets that training never showed, and on damaged pictures."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from diffaccel.eval.metrics.frechet import distance_of_features as frechet
from scripts.zoo.emoji import captions as words
from scripts.zoo.emoji.recipe import Recipe
from scripts.zoo.emoji.scenes import FILLED, Row, Scenes
from scripts.zoo.emoji.world import COLOURS, COUNTS, World

_BATCH = 256


class Scorer:
    """One CLIP on one device, in batches."""

    def __init__(self, model: nn.Module, tokenizer, shared: Recipe, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.size, self.context = shared.size, shared.context

    def images(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features before normalization (n, d)."""
        return torch.cat([self.model.encode_image(part.to(self.device)).float() for part in pictures.split(_BATCH)])

    def scenes(self, scenes: Scenes) -> torch.Tensor:
        everything = torch.arange(len(scenes), device=scenes.device).split(_BATCH)
        return torch.cat([self.images(scenes.images(part, self.size)) for part in everything])

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Normalized features (n, d)."""
        found = []
        for start in range(0, len(texts), _BATCH):
            encoded = self.tokenizer(
                list(texts[start : start + _BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self.context,
                return_tensors="pt",
            )
            found.append(self.model.encode_text(encoded["input_ids"].to(self.device)).float())
        return F.normalize(torch.cat(found), dim=-1)


def top(similarity: torch.Tensor, truth: torch.Tensor, k: int) -> float:
    """The share of rows whose true column is among the k highest."""
    return (similarity.topk(k, 1).indices == truth[:, None]).any(1).float().mean().item()


def evaluate(model: nn.Module, tokenizer, sets: Mapping[str, Scenes], shared: Recipe) -> dict[str, float]:
    """All measures by name; accuracies in [0, 1]."""
    scorer = Scorer(model, tokenizer, shared, next(model.parameters()).device)
    features = {name: F.normalize(scorer.scenes(scenes), dim=-1) for name, scenes in sets.items()}
    found = retrieval(scorer, sets, features)
    found |= {"colour_word": _words(scorer, sets["colour"], features["colour"], len(COLOURS), _recoloured)}
    found |= {"count_word": _words(scorer, sets["count"], features["count"], len(COUNTS), _recounted)}
    for name in ("pair", "colour_pair"):
        found[f"{name}_order"] = order(scorer, sets[name], features[name])
    found |= labels(scorer, sets["seen"].world)
    return {name: round(value, 4) for name, value in found.items()}


def retrieval(scorer: Scorer, sets: Mapping[str, Scenes], features: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Picture to caption among the captions of all held-out sets together."""
    held = [name for name in sets if name != "seen"]
    texts = scorer.texts([text for name in held for text in sets[name].plain])
    similarity = torch.cat([features[name] for name in held]) @ texts.T
    truth = torch.arange(len(texts), device=texts.device)
    found = {"retrieval_top1": top(similarity, truth, 1), "retrieval_top5": top(similarity, truth, 5)}
    start = 0
    for name in held:
        part = slice(start, start + len(sets[name]))
        found[f"retrieval_top1_{name}"] = top(similarity[part], truth[part], 1)
        start = part.stop
    return found | {"retrieval_size": float(len(texts))}


def _recoloured(facts: words.Facts, choice: int) -> words.Facts:
    return replace(facts, colours=(choice,))


def _recounted(facts: words.Facts, choice: int) -> words.Facts:
    return replace(facts, count=COUNTS[choice])


def _words(scorer: Scorer, scenes: Scenes, features: torch.Tensor, choices: int, change) -> float:
    """The share of pictures for which the true colour (or number) word scores highest."""
    hits = []
    for i in range(len(scenes)):
        facts = scenes.facts(i)
        texts = [words.caption(change(facts, c), random.Random(0), plain=True) for c in range(choices)]
        truth = facts.colours[0] if change is _recoloured else COUNTS.index(facts.count)
        hits.append(int((scorer.texts(texts) @ features[i]).argmax()) == truth)
    return sum(hits) / len(hits)


def order(scorer: Scorer, scenes: Scenes, features: torch.Tensor) -> float:
    """The share of pairs for which the true caption beats the one with the two things exchanged."""
    true, false = [], []
    for i in range(len(scenes)):
        facts = scenes.facts(i)
        swapped = replace(facts, labels=facts.labels[::-1], colours=facts.colours[::-1])
        # The same generator state gives both captions the same relation word, so only the names differ.
        true.append(words.caption(facts, random.Random(i), related=True, plain=True))
        false.append(words.caption(swapped, random.Random(i), related=True, plain=True))
    gap = (features * scorer.texts(true)).sum(1) - (features * scorer.texts(false)).sum(1)
    return (gap > 0).float().mean().item()


def labels(scorer: Scorer, world: World) -> dict[str, float]:
    """Zero-shot labels of all icons among all labels of their style, and Fréchet distances of damaged icons."""
    from scripts.zoo.emoji.clip import shuffle_patches

    rows = [Row("single", (i,), (-1,), FILLED) for i in range(len(world.icons))]
    icons = Scenes(world, rows, seed=0, device=scorer.device)
    raw = scorer.scenes(icons)
    features = F.normalize(raw, dim=-1)
    truth, style = world.icon_label.to(scorer.device), world.icon_style.to(scorer.device)
    hits: dict[str, list[torch.Tensor]] = {"top1": [], "top5": []}
    prompts = [scorer.texts([f"{label}, {name}" for label in world.labels]) for name in world.styles]
    for number, texts in enumerate(prompts):
        best = (features[style == number] @ texts.T).topk(5, 1).indices == truth[style == number, None]
        hits["top1"].append(best[:, 0].float())
        hits["top5"].append(best.any(1).float())
    # Icons are ordered by style and label, so the parts joined are in the icons' order.
    one, five = torch.cat(hits["top1"]), torch.cat(hits["top5"])
    seen = world.training.to(scorer.device)
    by_style = torch.stack([(features * texts[truth]).sum(1) for texts in prompts], 1)
    generator = torch.Generator(scorer.device).manual_seed(0)
    permutation = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(scorer.device)
    half, rest = permutation.chunk(2)
    damaged = torch.cat(
        [scorer.images(shuffle_patches(icons.images(part, scorer.size), generator)) for part in rest.split(32)]
    )
    grey = torch.cat(
        [
            scorer.images(icons.images(part, scorer.size).mean(1, keepdim=True).expand(-1, 3, -1, -1))
            for part in rest.split(_BATCH)
        ]
    )
    return {
        "label_top1_seen": one[seen].mean().item(),
        "label_top5_seen": five[seen].mean().item(),
        "label_top1_style": one[~seen].mean().item(),
        "label_top5_style": five[~seen].mean().item(),
        "style_word": (by_style.argmax(1) == style).float().mean().item(),
        "fd_identity": frechet(raw[half], raw[rest]),
        "fd_shuffled": frechet(raw[half], damaged),
        "fd_grey": frechet(raw[half], grey),
    }
